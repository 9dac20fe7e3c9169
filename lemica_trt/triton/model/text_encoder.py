"""Prompt → conditions: tokenizers and text encoders; with the parameter `negative`, those of negative prompts. What is
made of prompts that have been seen is kept; not in Triton's response cache, which answers without a look at the
parameters.

Written by `lemica-trt triton`; needs tritonserver 2.51 or newer, and in its python interpreter lemica-trt (without
PyTorch) with the engine library of the bundle. All parameters are explained in config.pbtxt.
"""

import functools

import numpy as np
import triton_python_backend_utils as pb_utils

from lemica_trt.core.errors import InputError, LemicaError
from lemica_trt.runtime import validation
from lemica_trt.triton.interface import interfaces, tensors_from_text
from lemica_trt.triton.server import errors, load, requests

CACHE_BYTES = 64 << 20
"""Conditions that are kept, those that were asked for last."""


class TritonPythonModel:
    def initialize(self, args):
        """Check everything, load the engines, encode a prompt."""
        try:
            self.pipeline, _ = load.load_pipeline(pb_utils, args)
            (self.input,) = interfaces(self.pipeline.bundle.manifest)["text_encoder"].inputs
            for negative in (False, True):
                arrays = self.pipeline.encode_text("", negative=negative).arrays.values()
                if not all(np.isfinite(array).all() for array in arrays):
                    raise LemicaError("the text encoder's numbers are not finite")
            self.keep(CACHE_BYTES // sum(array.nbytes for array in arrays))
            self.name = args["model_name"]
        except LemicaError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None

    def keep(self, count):
        """Keep the conditions of so many prompts."""
        self.encoded = functools.lru_cache(max(1, count))(self.encode)

    def encode(self, text, negative):
        """The answer's tensors; what there is to warn of is logged."""
        for line in self.pipeline.warnings(text, negative=negative):
            pb_utils.Logger.log_warn(f"{self.name}: {line}")
        return tensors_from_text(self.pipeline.encode_text(text, negative=negative))

    def execute(self, arrived):
        """Encode one by one, so that an answer does not depend on what came with it."""
        return [self.answer(request) for request in arrived]

    def answer(self, request):
        try:
            negative = requests.read_parameters(request, ("negative",)).get("negative", False)
            if not isinstance(negative, bool):
                raise InputError(f"negative must be true or false; got {negative!r}")
            prompt = requests.tensor_from(pb_utils, request, self.input)[0]
            found = self.encoded(validation.text_from("prompt", prompt), negative)
        except Exception as error:  # whatever it was, the request gets an answer
            return pb_utils.InferenceResponse(error=errors.triton_error(pb_utils, error))
        tensors = [pb_utils.Tensor(name, array) for name, array in found.items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)
