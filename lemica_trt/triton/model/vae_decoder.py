"""Latents → frames.

Written by `lemica-trt triton`; needs tritonserver 2.51 or newer, and in its python interpreter lemica-trt (without
PyTorch) with the engine library of the bundle. All parameters are explained in config.pbtxt.
"""

import numpy as np
import triton_python_backend_utils as pb_utils

from lemica_trt.core.errors import LemicaError
from lemica_trt.triton.interface import interfaces
from lemica_trt.triton.server import errors, load, requests


class TritonPythonModel:
    def initialize(self, args):
        """Check everything, load the engine, decode zeros."""
        try:
            self.pipeline, _ = load.load_pipeline(pb_utils, args)
            (self.input,) = interfaces(self.pipeline.bundle.manifest)["vae_decoder"].inputs
            self.pipeline.decode(np.zeros(self.input.dims, np.float32))
        except LemicaError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None

    def execute(self, arrived):
        """Decode one by one: the decoder is where memory peaks, and an answer does not depend on what came with it."""
        for request in arrived:
            sender = request.get_response_sender()
            try:
                requests.read_parameters(request, ())
                latents = requests.tensor_from(pb_utils, request, self.input)
                frames = pb_utils.Tensor("frames", self.pipeline.decode(latents)[None])
            except Exception as error:  # whatever it was, the request gets an answer
                errors.send_error(pb_utils, sender, error)
                continue
            response = pb_utils.InferenceResponse(output_tensors=[frames])
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
