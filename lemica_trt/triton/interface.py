"""The models of a repository, and the tensors that go in and out of them; one request is one sample.

    prompt ─ pipeline ──────────────────────────────────────────────────── frames, MP4 or PNG
    image      │ text_encoder        denoiser_stream            vae_decoder
               │ prompt → embeds     embeds → step…, latents    latents → frames
               │ (cache)             (batches, metrics)
               │ image_encoder
               │ image → embeds

Pure: from a bundle's manifest to names, dtypes and dimensions; `repository` writes them, `check` compares with them,
the models read requests and call each other by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from msgspec import UNSET

from lemica_trt.backends.base import Array
from lemica_trt.bundle.manifest import Manifest
from lemica_trt.core.errors import InputError
from lemica_trt.ir.graphs import IMAGE_ENCODER, NEGATIVE, Role, Source, StepLayout, TensorSpec
from lemica_trt.ir.profile import Shape
from lemica_trt.runtime.conditions import EncodedText, condition_shapes

OLDEST_SERVER = (2, 51)
"""Oldest tritonserver release: the one that the models were tested on."""

OLDEST_SERVER_NAME = "2.51 (container 24.10)"
"""The same for people."""

MODELS: dict[str, str] = {
    "text_encoder": "text_encoder.py",
    "image_encoder": "image_encoder.py",
    "denoiser": "denoiser.py",
    "denoiser_stream": "denoiser.py",
    "vae_decoder": "vae_decoder.py",
    "pipeline": "pipeline.py",
    "pipeline_stream": "pipeline.py",
}
"""Model → its file in `lemica_trt/triton/model/`."""

MODEL_SUMMARIES: dict[str, str] = {
    "text_encoder": "Prompt → conditions: what all text encoders make of it.",
    "image_encoder": "Image → conditions: what the image encoder makes of it; of a last one, too, where there is one.",
    "denoiser": "Conditions → latents: the whole denoising loop, in process.",
    "denoiser_stream": "Like denoiser, with an answer after each full step.",
    "vae_decoder": "Latents → frames.",
    "pipeline": "Prompt → frames, or an MP4 or PNG file.",
    "pipeline_stream": "Like pipeline, with an answer after each full step.",
}
"""What each model does, in a line."""

STREAMS = ("denoiser_stream", "pipeline_stream")
"""Models that answer more than once (decoupled)."""

FILE_FORMATS = {"image": "png", "video": "mp4"}
"""Output of the pipelines that is a file → its format, which a request asks for by `output`."""

_TRITON_DTYPES = {
    "fp32": "FP32", "fp16": "FP16", "bf16": "FP32", "int64": "INT64", "int32": "INT32", "uint8": "UINT8",
}  # fmt: skip
"""bf16 has no numpy dtype: it travels as FP32, as the runtime hands it out."""

_NUMPY_DTYPES: dict[str, Any] = {
    "FP32": np.float32, "FP16": np.float16, "INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8,
    "STRING": np.object_,
}  # fmt: skip

IMAGES: tuple[Source, ...] = get_args(Source)
"""Inputs of the pipelines and of `image_encoder`, where requests must have them: the content of a PNG, JPEG or WebP
file, as it is or in base64."""

_TOKENS = "_tokens"
"""Ends the name of a text encoder's output that says how long the text is."""


@dataclass(frozen=True)
class Port:
    """An input or output: Triton's dtype without `TYPE_`, dimensions without batch; -1: as long as a text."""

    name: str
    dtype: str
    dims: tuple[int, ...]

    @property
    def numpy(self) -> Any:
        """The dtype of its arrays."""
        return _NUMPY_DTYPES[self.dtype]

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of one sample, with its batch dimension, may have this shape."""
        wanted = (1, *self.dims)
        return len(shape) == len(wanted) and all(dim in (size, -1) for dim, size in zip(wanted, shape))


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a model."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def interfaces(manifest: Manifest) -> dict[str, Interface]:
    """The models that a bundle can serve: all, `image_encoder` where it needs an image; `denoiser` and
    `denoiser_stream` alone where it has no VAE decoder, or no encoder that gives each condition.
    """
    graphs = manifest.graphs
    encoders = [graphs.graph(role) for role in graphs_of("text_encoder", manifest)]
    encoded = {tensor.name: tensor for graph in encoders for tensor in graph.outputs}
    pictured = [graphs.graph(IMAGE_ENCODER).outputs] if graphs.image is not UNSET else []
    from_image = {tensor.name: tensor for outputs in pictured for tensor in outputs}
    latents = Port("latents", "FP32", graphs.layout.latent_shape)
    progress = (Port("step", "INT32", (1,)), Port("num_steps", "INT32", (1,)))
    taken = tuple(_condition_ports(graphs.layout, encoded | from_image))
    found = {
        "denoiser": Interface(taken, (latents,)),
        "denoiser_stream": Interface(taken, (*progress, latents, Port("ended", "STRING", (1,)))),
    }
    given = {port.name.removeprefix(NEGATIVE) for port in taken} <= set(encoded | from_image)
    if given and "vae_decoder" in {graph.role for graph in graphs.graphs}:
        decoded = next(tensor for tensor in graphs.graph("vae_decoder").outputs if tensor.name == "frames")
        frames, prompt = _port(decoded), Port("prompt", "STRING", (1,))
        images = tuple(Port(name, "STRING", (1,)) for name in graphs.sources)
        asked = (prompt, *images)
        made = (frames, Port(file_output(manifest.profile.shape), "STRING", (1,)))
        lengths = (Port(name + _TOKENS, "INT32", (1,)) for name in encoded if name in _free(graphs.layout))
        found["text_encoder"] = Interface((prompt,), (*map(_port, encoded.values()), *lengths))
        found["vae_decoder"] = Interface((latents,), (frames,))
        found["pipeline"] = Interface(asked, made)
        found["pipeline_stream"] = Interface(asked, (*progress, *made))
        if pictured:
            found["image_encoder"] = Interface(images, tuple(map(_port, from_image.values())))
    return {name: found[name] for name in MODELS if name in found}


def graphs_of(model: str, manifest: Manifest) -> tuple[Role, ...]:
    """The graphs that a model runs."""
    if model in ("vae_decoder", IMAGE_ENCODER):
        return (model,)
    if model.startswith("denoiser"):
        return manifest.graphs.layout.step_graphs
    roles = {graph.role for graph in manifest.graphs.graphs}
    return tuple(spec.graph for spec in manifest.encoders if spec.graph in roles)


def file_output(shape: Shape) -> str:
    """Which of `FILE_FORMATS` the pipelines answer: `image` where a clip is one frame."""
    return "image" if shape.is_image else "video"


def tensors_from_text(text: EncodedText) -> dict[str, Array]:
    """What `text_encoder` answers: arrays as long as the encoder pads texts to, and how long the text is."""
    found: dict[str, Array] = {name: array[None] for name, array in text.arrays.items()}
    return found | {name + _TOKENS: np.array([[count]], np.int32) for name, count in text.tokens.items()}


def text_from_tensors(layout: StepLayout, tensors: Mapping[str, Array]) -> EncodedText:
    """The inverse of `tensors_from_text`."""
    lengths = {name: tensors[name + _TOKENS] for name in _free(layout) if name + _TOKENS in tensors}
    arrays = {name: array[0] for name, array in tensors.items() if name.removesuffix(_TOKENS) not in lengths}
    arrays.update({name: tensors[name][0] for name in lengths})
    return EncodedText(arrays, {name: int(length[0, 0]) for name, length in lengths.items()})


def inputs_from_conditions(conditions: Mapping[str, Array]) -> dict[str, Array]:
    """The layout's conditions of one request, as the denoisers take them: each branch's row by itself, [1, …]."""
    found = {}
    for name, rows in conditions.items():
        found[name] = rows[-1:]
        if len(rows) == 2:
            found[NEGATIVE + name] = rows[:1]
    return found


def conditions_from_inputs(layout: StepLayout, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse of `inputs_from_conditions`; inputs without batch.

    Raises:
        InputError: a text is longer than the graphs take, or of two lengths; or the rows of two branches are.
    """
    conditions = {}
    for spec in layout.conditions:
        names = (NEGATIVE + spec.name, spec.name) if spec.at(1)[0] == 2 else (spec.name,)
        rows = [inputs[name] for name in names]
        if rows[0].shape != rows[-1].shape:
            raise InputError(f"{names[0]} must be as long as {names[-1]}, {len(rows[-1])} tokens; got {len(rows[0])}")
        conditions[spec.name] = np.stack(rows)
    condition_shapes(layout, conditions, 1)
    return conditions


def _condition_ports(layout: StepLayout, encoded: Mapping[str, TensorSpec]) -> Iterator[Port]:
    """Of each condition the prompt's row, and the negative prompt's; of the dtype that its encoder gives."""
    for spec in layout.conditions:
        dtype = encoded.get(spec.name.removeprefix(NEGATIVE), spec).dtype
        dims = tuple(-1 if dim in spec.text_axes else int(dim) for dim in spec.shape[1:])
        port = Port(spec.name, _TRITON_DTYPES[dtype], dims)
        yield port
        if spec.at(1)[0] == 2:
            yield replace(port, name=NEGATIVE + port.name)


def _port(tensor: TensorSpec) -> Port:
    return Port(tensor.name, _TRITON_DTYPES[tensor.dtype], tuple(int(size) for size in tensor.shape[1:]))


def _free(layout: StepLayout) -> set[str]:
    """Conditions whose shape follows the text."""
    return {spec.name for spec in layout.conditions if spec.text_axes}
