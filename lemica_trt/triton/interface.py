"""The models of a repository, and the tensors that go in and out of them; one request is one sample.

    prompt ─ pipeline ──────────────────────────────────────────────────── frames or MP4
               │ text_encoder        denoiser_stream            vae_decoder
               │ prompt → embeds     embeds → step…, latents    latents → frames
               │ (cache)             (batches, metrics)

Pure: from a bundle's manifest to names, dtypes and dimensions; `repository` writes them, `check` compares with them,
`server` reads requests by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import UNSET

from lemica_trt.bundle.manifest import Manifest
from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.graphs import GraphSet

OLDEST_SERVER = (2, 51)
"""Oldest tritonserver release: the one that the models were tested on."""

OLDEST_SERVER_NAME = "2.51 (container 24.10)"
"""The same for people."""

MODELS: dict[str, str] = {
    "text_encoder": "text_encoder.py",
    "denoiser": "denoiser.py",
    "denoiser_stream": "denoiser.py",
    "vae_decoder": "vae_decoder.py",
    "pipeline": "pipeline.py",
    "pipeline_stream": "pipeline.py",
}
"""Model → its file in `lemica_trt/triton/model/`."""

MODEL_SUMMARIES: dict[str, str] = {
    "text_encoder": "Prompt → embeddings.",
    "denoiser": "Prompt embeddings → latents: the whole denoising loop, in process.",
    "denoiser_stream": "Like denoiser, with an answer after each full step.",
    "vae_decoder": "Latents → frames.",
    "pipeline": "Prompt → frames, or an MP4 file.",
    "pipeline_stream": "Like pipeline, with an answer after each full step.",
}
"""What each model does, in a line."""

STREAMS = ("denoiser_stream", "pipeline_stream")
"""Models that answer more than once (decoupled)."""

_TRITON_DTYPES = {"fp32": "FP32", "fp16": "FP16", "bf16": "FP32", "uint8": "UINT8"}
"""bf16 has no numpy dtype: it travels as FP32, as the runtime hands it out."""


@dataclass(frozen=True)
class Port:
    """An input or output: Triton's dtype without `TYPE_`, dimensions without batch."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a model."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def embeds_of(graphs: GraphSet) -> Port:
    """The prompt's condition: as the text encoder gives it; as the DiT takes it where there is none.

    Raises:
        UnsupportedError: the DiT takes several conditions, or one whose shape follows the prompt.
    """
    if len(graphs.layout.conditions) != 1:
        names = ", ".join(condition.name for condition in graphs.layout.conditions)
        raise UnsupportedError(f"expected one condition to serve, the bundle's DiT takes {names or 'none'}")
    (tensor,) = graphs.layout.conditions
    if tensor.text_axes:
        raise UnsupportedError(f"expected prompts that are padded, the shape of {tensor.name} follows their length")
    encoded = (output for graph in graphs.graphs if graph.role == "text_encoder" for output in graph.outputs)
    tensor = next((output for output in encoded if output.name == tensor.name), tensor)
    return Port(tensor.name, _TRITON_DTYPES[tensor.dtype], tuple(int(size) for size in tensor.shape[1:]))


def interfaces(manifest: Manifest) -> dict[str, Interface]:
    """The models that a bundle can serve: all six, or `denoiser` and `denoiser_stream` without text encoder or VAE."""
    graphs = manifest.graphs
    if graphs.image is not UNSET:
        raise UnsupportedError(
            "the bundle needs an image beside the prompt, which cannot be served yet",
            fix="lemica-trt run, or in Python",
        )
    embeds = embeds_of(graphs)
    latents = Port("latents", "FP32", graphs.layout.latent_shape)
    taken = (embeds, Port(f"negative_{embeds.name}", embeds.dtype, embeds.dims)) if graphs.layout.guided else (embeds,)
    progress = (Port("step", "INT32", (1,)), Port("num_steps", "INT32", (1,)))
    found = {
        "denoiser": Interface(taken, (latents,)),
        "denoiser_stream": Interface(taken, (*progress, latents, Port("ended", "STRING", (1,)))),
    }
    if {"text_encoder", "vae_decoder"} <= {graph.role for graph in graphs.graphs}:
        decoded = next(tensor for tensor in graphs.graph("vae_decoder").outputs if tensor.name == "frames")
        frames = Port("frames", _TRITON_DTYPES[decoded.dtype], tuple(int(size) for size in decoded.shape[1:]))
        prompt, video = Port("prompt", "STRING", (1,)), Port("video", "STRING", (1,))
        found["text_encoder"] = Interface((prompt,), (embeds,))
        found["vae_decoder"] = Interface((latents,), (frames,))
        found["pipeline"] = Interface((prompt,), (frames, video))
        found["pipeline_stream"] = Interface((prompt,), (*progress, frames, video))
    return {name: found[name] for name in MODELS if name in found}
