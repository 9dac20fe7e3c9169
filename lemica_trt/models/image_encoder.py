"""What a traced pipeline makes of its picture before the loop, as a module: pixels and noise → conditions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import UNSET
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.pictures import Pixels, drawn_picture, planes, read_picture, resized
from lemica_trt.ir.graphs import DRAW, ImageSpec, TensorSpec
from lemica_trt.ir.prompts import Prompt
from lemica_trt.models.trace.ends import TapeSlice
from lemica_trt.models.trace.pictures import Seen, picture_entries
from lemica_trt.models.trace.runs import record
from lemica_trt.models.trace.tape import Op, Ref, Tape, refs
from lemica_trt.models.trace.tracing import Traced

FEWEST = 16
"""Numbers of a draw that the runtime can make as PyTorch does."""


class ImageEncoder(nn.Module):
    """The image encoder graph: VAE encoder, CLIP's vision model, and what the pipeline computes around them.

    Args:
        encode: of the recording.
        spec: what it is given.
        outputs: names of its conditions, in order.
        drawn: dtype of the noise in the recording.

    Attributes:
        spec, outputs: as given.
    """

    def __init__(self, encode: TapeSlice, spec: ImageSpec, outputs: tuple[str, ...], drawn: torch.dtype) -> None:
        super().__init__()
        self._encode, self.spec, self.outputs, self._drawn = encode, spec, outputs, drawn

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pictures fp32 [1, 3, height, width], and `draw` → conditions [1, …]; masks as int64."""
        given = {name: x.to(self._drawn) if name == DRAW else x for name, x in inputs.items()}
        found = {name: value[:1] for name, value in self._encode(given).items()}
        return {name: value.long() if value.dtype == torch.bool else value for name, value in found.items()}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Of the graph, for one request."""
        specs = [TensorSpec(name=its.name, dtype="fp32", shape=(1, 3, its.height, its.width)) for its in self._pictures]
        draw = self.spec.draw
        return (*specs, *([] if draw is UNSET else [TensorSpec(name=DRAW, dtype="fp32", shape=draw)]))

    @property
    def _pictures(self) -> Any:
        return self.spec.pictures

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """The noise that it takes, fp32, as diffusers draws it; None: it takes none."""
        return None if self.spec.draw is UNSET else torch.randn(self.spec.draw, generator=generator)

    @torch.no_grad()
    def conditions(self, picture: Pixels, draw: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        """Conditions [1, …] of a picture, prepared as the runtime does.

        Args:
            draw: as `draw` gives it.
        """
        inputs = {
            its.name: torch.from_numpy(
                planes(resized(picture, its.height, its.width, fit=its.fit, by=its.by), its.scale, its.offset)
            )
            for its in self._pictures
        }
        if draw is not None:
            inputs[DRAW] = draw
        found: dict[str, Tensor] = self({name: value.to(device) for name, value in inputs.items()})
        return found


def picture_of(prompt: Prompt, height: int, width: int) -> Pixels:
    """The picture that belongs to a prompt; where it has none, one that is drawn of its text."""
    if prompt.image is None:
        return drawn_picture(prompt.text, height, width)
    return read_picture(prompt.image, digest=prompt.digest)


def image_encoder(traced: Traced, pipeline: Any, births: Mapping[str, Ref]) -> ImageEncoder:
    """The image encoder of a trace.

    Args:
        births: name of a condition → the tensor that it is in the base run.

    Raises:
        UnsupportedError: a condition does not follow resized pixels, or the noise of the posterior is not what is drawn
            first, in one piece.
    """
    base, arguments = traced.runs.base, traced.arguments
    seen = []
    for size in arguments.other_sizes:
        tape, _ = record(pipeline, arguments, last_step=0, image=5, size=size)
        seen.append(Seen(tape, np.array(arguments.picture(5, size))))
    try:
        entries = picture_entries(base.tape, base.programs[0].span[0], seen)
        named = {"image" if k == 0 else f"image_{k + 1}": entry for k, entry in enumerate(entries)}
        draws = _draws(base.tape)
        inputs = {name: entry.ref for name, entry in named.items()}
        inputs |= {DRAW if k == 0 else f"{DRAW}_{k}": ref for k, ref in enumerate(draws)}
        end = 1 + max(at for at, item in enumerate(base.tape.items) if {*births.values()} & {*refs(item.outs)})
        slice_ = TapeSlice(base.tape, (entries[0].at, end), inputs, births, pipeline.components)
        drawn = [name for name in slice_.read if name.startswith(DRAW)]
        shape = tuple(base.tape.values[draws[0]].shape) if drawn else ()
        if drawn not in ([], [DRAW]) or (drawn and np.prod(shape) < FEWEST):
            raise UnsupportedError("what it makes of its image follows several draws of noise, or the initial noise")
    except UnsupportedError as error:
        raise UnsupportedError(f"{type(pipeline).__name__} cannot be built yet: {error.what}") from None
    spec = ImageSpec(
        pictures=tuple(
            msgspec.structs.replace(entry.spec, name=name) for name, entry in named.items() if name in slice_.read
        ),
        draw=shape if drawn else UNSET,
    )
    dtype = base.tape.values[draws[0]].dtype if drawn else torch.float32
    return ImageEncoder(slice_, spec, tuple(births), dtype)


def _draws(tape: Tape) -> list[Ref]:
    """What was drawn of the request's generator, in order."""
    return [
        item.outs[0]
        for item in tape.items
        if isinstance(item, Op)
        and any(isinstance(leaf, torch.Generator) for leaf in pytree.tree_leaves((item.args, item.kwargs)))
        and tape.values[item.outs[0]].is_floating_point()
    ]


class _Given(TorchFunctionMode):
    """The first noise that is drawn of a generator is a given one, in the dtype that is asked for."""

    def __init__(self, draw: Tensor) -> None:
        super().__init__()
        self._draw: Tensor | None = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        drawn = getattr(func, "__name__", "") == "randn" and (kwargs or {}).get("generator") is not None
        if drawn and self._draw is not None:
            output, self._draw = self._draw.to(output), None
        return output


@contextlib.contextmanager
def given_draw(draw: Tensor | None) -> Iterator[None]:
    """While it lasts, a pipeline draws this noise first; None: its own.

    A pipeline in half precision draws other numbers than the fp32 ones of a request, to which they are rounded here.
    """
    with contextlib.nullcontext() if draw is None else _Given(draw):
        yield
