"""Prompt → embeddings: tokenizer and text encoder. Its answers are kept in Triton's response cache.

Written by `lemica-trt triton`; needs tritonserver 2.51 or newer, and in its python interpreter lemica-trt (without
PyTorch) with the engine library of the bundle. All parameters are explained in config.pbtxt.
"""

import numpy as np
import triton_python_backend_utils as pb_utils

from lemica_trt.core.errors import LemicaError
from lemica_trt.runtime import validation
from lemica_trt.triton.server import errors, load, requests


class TritonPythonModel:
    def initialize(self, args):
        """Check everything, load the engine, encode a prompt."""
        try:
            self.pipeline, _ = load.load_pipeline(pb_utils, args, ("text_encoder",))
            if not all(np.isfinite(array).all() for array in self.pipeline.encode("").values()):
                raise LemicaError("the text encoder's numbers are not finite")
            self.name = args["model_name"]
            self.negative = ("", self.pipeline.bundle.manifest.profile.sampling.negative_prompt)
        except LemicaError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None

    def execute(self, arrived):
        """Encode one by one, so that an answer does not depend on what came with it."""
        return [self.answer(request) for request in arrived]

    def answer(self, request):
        try:
            requests.read_parameters(request, ())
            prompt = requests.tensor_from(pb_utils, request, "prompt", (1,), np.object_)[0]
            text = validation.text_from("prompt", prompt)
            conditions = self.pipeline.encode(text)
            for line in self.pipeline.warnings(text, negative=text in self.negative):
                pb_utils.Logger.log_warn(f"{self.name}: {line}")
        except Exception as error:  # whatever it was, the request gets an answer
            return pb_utils.InferenceResponse(error=errors.triton_error(pb_utils, error))
        tensors = [pb_utils.Tensor(name, array[None]) for name, array in conditions.items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)
