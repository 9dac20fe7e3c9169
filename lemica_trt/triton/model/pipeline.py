"""Prompt → frames, or an MP4 or PNG file: calls text_encoder, image_encoder where the bundle needs an image,
denoiser_stream and vae_decoder. Serves `pipeline` and `pipeline_stream`, which also answers with progress after each
full step.

Written by `lemica-trt triton`; needs tritonserver 2.51 or newer, and in its python interpreter lemica-trt (without
PyTorch), and PyAV for MP4. All parameters are explained in config.pbtxt.
"""

import base64
import importlib.util
import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from lemica_trt.core.errors import InputError, LemicaError
from lemica_trt.runtime import validation
from lemica_trt.runtime.conditions import conditions_from_texts
from lemica_trt.runtime.video import encoded
from lemica_trt.triton.interface import (
    FILE_FORMATS,
    IMAGES,
    file_output,
    inputs_from_conditions,
    interfaces,
    text_from_tensors,
)
from lemica_trt.triton.server import cancel, errors, load, requests

FORWARDED = ("plan", "steps", "quality", "seed", "guidance_scale")


class TritonPythonModel:
    def initialize(self, args):
        """Check everything; the other models hold the engines."""
        try:
            bundle, parameters = load.open_bundle(pb_utils, args)
        except LemicaError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None
        self.streams = "stream" in parameters
        self.interfaces, self.layout = interfaces(bundle.manifest), bundle.manifest.graphs.layout
        self.negative_prompt = bundle.manifest.profile.sampling.negative_prompt
        self.fps = bundle.manifest.profile.shape.fps
        self.file = file_output(bundle.manifest.profile.shape)
        self.format = FILE_FORMATS[self.file]
        made_here = self.format != "mp4" or importlib.util.find_spec("av")
        self.outputs = ("frames", self.format, f"{self.format}-base64") if made_here else ("frames",)

    def execute(self, arrived):
        for request in arrived:
            sender = request.get_response_sender()
            try:
                self.answer(request, sender)
            except Exception as error:  # whatever it was, the request gets an answer
                errors.send_error(pb_utils, sender, error)

    def answer(self, request, sender):
        start = time.monotonic()
        parameters = requests.read_parameters(request, (*FORWARDED, "negative_prompt", "output", "timeout"))
        limit = validation.timeout_from(parameters) or request.timeout()
        output = parameters.get("output", "frames")
        if output not in self.outputs:
            raise InputError(f"output must be one of {', '.join(self.outputs)}; got {output!r}")
        requests.require_requested(request, "frames" if output == "frames" else self.file, output)
        ports = self.interfaces["pipeline"].inputs
        given = {port.name: requests.tensor_from(pb_utils, request, port) for port in ports}
        seed, pictures = validation.seed_from(parameters), []
        images = {name: given[name] for name in IMAGES if name in given}
        if images:
            pictures = [self.encode_image(images, seed)]
        prompts, negatives = [self.encode(validation.text_from("prompt", given["prompt"][0]))], []
        if self.layout.guided:
            negative = parameters.get("negative_prompt", self.negative_prompt)
            negatives = [self.encode(validation.text_from("negative_prompt", negative), negative=True)]
        elif "negative_prompt" in parameters:
            raise InputError("this bundle was built without guidance: it takes no negative_prompt")
        inputs = inputs_from_conditions(conditions_from_texts(self.layout, prompts, negatives, pictures))
        forwarded = {name: parameters[name] for name in FORWARDED if name in parameters}
        deadline = start + limit / 1e6 if limit else None
        latents = self.denoise(request, sender, inputs, forwarded, deadline)
        frames = next(self.call("vae_decoder", {"latents": latents}, ["frames"]))["frames"]
        result = pb_utils.Tensor("frames", frames) if output == "frames" else self.encoded(frames[0], output)
        tensors = [*self.progress, result] if self.streams else [result]
        sender.send(
            pb_utils.InferenceResponse(output_tensors=tensors), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        )

    def encode(self, prompt, *, negative=False):
        """What the text encoders make of a prompt, or of a negative one."""
        inputs = {"prompt": np.array([[prompt.encode()]], np.object_)}
        outputs = [port.name for port in self.interfaces["text_encoder"].outputs]
        found = next(self.call("text_encoder", inputs, outputs, parameters={"negative": negative}))
        return text_from_tensors(self.layout, found)

    def encode_image(self, images, seed):
        """Conditions without batch, by name: what the image encoder makes of the images of a request."""
        outputs = [port.name for port in self.interfaces["image_encoder"].outputs]
        inputs = {name: image[None] for name, image in images.items()}
        found = next(self.call("image_encoder", inputs, outputs, parameters={"seed": seed}))
        return {name: array[0] for name, array in found.items()}

    def denoise(self, request, sender, inputs, parameters, deadline):
        """Latents [1, *latent_shape]; passes progress on, and cancellation and the time that is left."""
        left = max(1, int((deadline - time.monotonic()) * 1e6)) if deadline else 0
        outputs = ["step", "num_steps", "latents", "ended"]
        with cancel.cancel_token() as caller:
            settings = {"settings": json.dumps(parameters), "caller": caller.name}
            calls = self.call("denoiser_stream", inputs, outputs, stream=True, parameters=settings, timeout=left)
            for found in cancel.answers_while_wanted(calls, lambda: cancel.require_wanted(request, caller)):
                if "ended" in found:
                    raise errors.RequestEnded(*json.loads(found["ended"][0, 0]))
                self.progress = [pb_utils.Tensor(name, found[name]) for name in ("step", "num_steps")]
                if "latents" in found:
                    return found["latents"]
                if self.streams:
                    sender.send(pb_utils.InferenceResponse(output_tensors=self.progress))
        raise LemicaError("denoiser_stream ended without a result")

    def call(self, model, inputs, outputs, *, stream=False, **options):
        """The responses of another model of this server, each as arrays by name."""
        tensors = [pb_utils.Tensor(name, array) for name, array in inputs.items()]
        request = pb_utils.InferenceRequest(model_name=model, inputs=tensors, requested_output_names=outputs, **options)
        for response in request.exec(decoupled=True) if stream else [request.exec()]:
            if response.has_error():
                raise errors.forward_error(pb_utils, response.error())
            found = {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
            if found:  # the stream's empty last response carries nothing
                yield found

    def encoded(self, frames, output):
        """The file as bytes, or those in base64 for JSON."""
        data = encoded(frames, f".{self.format}", fps=self.fps)
        data = base64.b64encode(data) if output.endswith("-base64") else data
        return pb_utils.Tensor(self.file, np.array([[data]], np.object_))
