"""Images → conditions: Pillow and the image encoder. Images from elsewhere are parsed here, in a process of its own.

Written by `lemica-trt triton`; needs tritonserver 2.51 or newer, and in its python interpreter lemica-trt (without
PyTorch) with the engine library of the bundle, and Pillow. All parameters are explained in config.pbtxt.
"""

import numpy as np
import triton_python_backend_utils as pb_utils

from lemica_trt.core.errors import LemicaError
from lemica_trt.core.pictures import drawn_picture, picture_sent
from lemica_trt.runtime import validation
from lemica_trt.triton.interface import interfaces
from lemica_trt.triton.server import errors, load, requests


class TritonPythonModel:
    def initialize(self, args):
        """Check everything, load the engine, encode a picture."""
        try:
            self.pipeline, _ = load.load_pipeline(pb_utils, args)
            self.inputs = interfaces(self.pipeline.bundle.manifest)["image_encoder"].inputs
            drawn = {port.name: drawn_picture("", 64, 64, name=port.name) for port in self.inputs}
            arrays = self.pipeline.encode_image(**drawn).values()
            if not all(np.isfinite(array).all() for array in arrays):
                raise LemicaError("the image encoder's numbers are not finite")
        except LemicaError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None

    def execute(self, arrived):
        """Encode one by one: a picture takes memory, and an answer does not depend on what came with it."""
        return [self.answer(request) for request in arrived]

    def answer(self, request):
        try:
            seed = validation.seed_from(requests.read_parameters(request, ("seed",)))
            sent = {port.name: requests.tensor_from(pb_utils, request, port)[0] for port in self.inputs}
            images = {name: picture_sent(value, name=name) for name, value in sent.items()}
            found = self.pipeline.encode_image(**images, seed=seed)
        except Exception as error:  # whatever it was, the request gets an answer
            return pb_utils.InferenceResponse(error=errors.triton_error(pb_utils, error))
        tensors = [pb_utils.Tensor(name, array[None]) for name, array in found.items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)
