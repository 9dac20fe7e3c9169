"""Prompt → embeddings: tokenizer and text encoder. Embeddings of prompts that have been seen are kept; not in Triton's
response cache, which answers without a look at the parameters.

Written by `lemica-trt triton`; needs tritonserver 2.51 or newer, and in its python interpreter lemica-trt (without
PyTorch) with the engine library of the bundle. All parameters are explained in config.pbtxt.
"""

import functools

import numpy as np
import triton_python_backend_utils as pb_utils

from lemica_trt.core.errors import LemicaError
from lemica_trt.runtime import validation
from lemica_trt.triton.server import errors, load, requests

CACHE_BYTES = 64 << 20
"""Embeddings that are kept, those that were asked for last."""


class TritonPythonModel:
    def initialize(self, args):
        """Check everything, load the engine, encode a prompt."""
        try:
            self.pipeline, _ = load.load_pipeline(pb_utils, args, ("text_encoder",))
            arrays = self.pipeline.encode("").values()
            if not all(np.isfinite(array).all() for array in arrays):
                raise LemicaError("the text encoder's numbers are not finite")
            self.keep(CACHE_BYTES // sum(array.nbytes for array in arrays))
            self.name = args["model_name"]
            self.negative = ("", self.pipeline.bundle.manifest.profile.sampling.negative_prompt)
        except LemicaError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None

    def keep(self, count):
        """Keep the embeddings of so many prompts."""
        self.encoded = functools.lru_cache(max(1, count))(self.encode)

    def encode(self, text):
        """The conditions by name; what there is to warn of is logged."""
        for line in self.pipeline.warnings(text, negative=text in self.negative):
            pb_utils.Logger.log_warn(f"{self.name}: {line}")
        return self.pipeline.encode(text)

    def execute(self, arrived):
        """Encode one by one, so that an answer does not depend on what came with it."""
        return [self.answer(request) for request in arrived]

    def answer(self, request):
        try:
            requests.read_parameters(request, ())
            prompt = requests.tensor_from(pb_utils, request, "prompt", (1,), np.object_)[0]
            conditions = self.encoded(validation.text_from("prompt", prompt))
        except Exception as error:  # whatever it was, the request gets an answer
            return pb_utils.InferenceResponse(error=errors.triton_error(pb_utils, error))
        tensors = [pb_utils.Tensor(name, array[None]) for name, array in conditions.items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)
