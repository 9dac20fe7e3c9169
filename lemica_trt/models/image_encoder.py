"""What a traced pipeline makes of its pictures before the loop, as a module: pixels and noise → conditions."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from lemica_trt.ir.graphs import DRAW, ImageSpec, PictureSpec, Source, TensorSpec
from lemica_trt.ir.prompts import Prompt
from lemica_trt.models.trace.ends import TapeSlice
from lemica_trt.models.trace.pictures import Entry, Seen, picture_entries
from lemica_trt.models.trace.runs import record
from lemica_trt.models.trace.slots import IMAGE
from lemica_trt.models.trace.tape import Op, Ref, Tape, refs
from lemica_trt.models.trace.tracing import Traced

FEWEST = 16
"""Numbers of a draw that the runtime can make as PyTorch does."""


class ImageEncoder(nn.Module):
    """The image encoder graph: VAE encoder, CLIP's vision model, and what the pipeline computes around them.

    Args:
        encode: of the recording; its inputs are tensors of the recording.
        spec: what it is given.
        rows: input of `encode` → which of its inputs are that, one behind the other.
        outputs: names of its conditions, in order.
        whole: of those that have a row for each picture; of others the first row is taken.
        drawn: dtype of the noise in the recording.

    Attributes:
        spec, outputs: as given.
    """

    def __init__(
        self,
        encode: TapeSlice,
        spec: ImageSpec,
        rows: Mapping[str, Sequence[str]],
        outputs: tuple[str, ...],
        whole: Collection[str],
        drawn: torch.dtype,
    ) -> None:
        super().__init__()
        self._encode, self.spec, self._rows, self.outputs = encode, spec, rows, outputs
        self._whole, self._drawn = whole, drawn

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pictures fp32 [1, 3, height, width], and `draw` → conditions [1, …]; masks as int64."""
        given = {name: torch.cat([inputs[row] for row in rows]) for name, rows in self._rows.items()}
        given |= {name: x.to(self._drawn) for name, x in inputs.items() if name == DRAW}
        found = {name: value[None] if name in self._whole else value[:1] for name, value in self._encode(given).items()}
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
    def conditions(
        self, pictures: Mapping[Source, Pixels], draw: Tensor | None, device: torch.device
    ) -> dict[str, Tensor]:
        """Conditions [1, …] of the pictures of a request, prepared as the runtime does.

        Args:
            pictures: at least `spec.sources`.
            draw: as `draw` gives it.
        """
        inputs = {
            its.name: torch.from_numpy(
                planes(
                    resized(pictures[its.source], its.height, its.width, fit=its.fit, by=its.by), its.scale, its.offset
                )
            )
            for its in self._pictures
        }
        if draw is not None:
            inputs[DRAW] = draw
        found: dict[str, Tensor] = self({name: value.to(device) for name, value in inputs.items()})
        return found


def pictures_of(prompt: Prompt, sources: Sequence[Source], height: int, width: int) -> dict[Source, Pixels]:
    """The pictures that belong to a prompt; for those that it has not, ones that are drawn of its text.

    Raises:
        InputError: one cannot be read.
    """
    found: dict[Source, Pixels] = {}
    for name in sources:
        if name in prompt.pictures:
            path, digest = prompt.pictures[name]
            found[name] = read_picture(path, digest=digest)
        else:
            found[name] = drawn_picture(prompt.text, height, width, name=name)
    return found


def image_encoder(
    traced: Traced, pipeline: Any, births: Mapping[str, Ref], whole: Collection[str] = ()
) -> ImageEncoder:
    """The image encoder of a trace.

    Args:
        births: name of a condition → the tensor that it is in the base run.
        whole: as in `ImageEncoder`.

    Raises:
        UnsupportedError: a condition does not follow resized pixels, or the noise of the posterior is not what is drawn
            first, in one piece.
    """
    base, arguments = traced.runs.base, traced.arguments
    seen = []
    for size in arguments.other_sizes:
        tape, _ = record(pipeline, arguments, last_step=0, image=5, size=size)
        seen.append(Seen(tape, {name: np.array(picture) for name, picture in arguments.pictures(5, size).items()}))
    try:
        entries = picture_entries(base.tape, base.programs[0].span[0], seen)
        named = _named(entries)
        draws = _draws(base.tape)
        inputs = {specs[0].name: entry.ref for entry, specs in zip(entries, named)}
        inputs |= {DRAW if k == 0 else f"{DRAW}_{k}": ref for k, ref in enumerate(draws)}
        end = 1 + max(at for at, item in enumerate(base.tape.items) if {*births.values()} & {*refs(item.outs)})
        slice_ = TapeSlice(base.tape, (entries[0].at, end), inputs, births, pipeline.components)
        drawn = [name for name in slice_.read if name.startswith(DRAW)]
        shape = tuple(base.tape.values[draws[0]].shape) if drawn else ()
        if drawn not in ([], [DRAW]) or (drawn and np.prod(shape) < FEWEST):
            raise UnsupportedError("what it makes of its image follows several draws of noise, or the initial noise")
    except UnsupportedError as error:
        slots = dict.fromkeys(
            f"{slot.component}.{slot.argument}" for slot in traced.trace.role("condition") if IMAGE in slot.of
        )
        raise UnsupportedError(
            f"{type(pipeline).__name__} cannot be built yet: {error.what} ({', '.join(slots)})"
        ) from None
    read = [specs for specs in named if specs[0].name in slice_.read]
    spec = ImageSpec(pictures=tuple(its for specs in read for its in specs), draw=shape if drawn else UNSET)
    rows = {specs[0].name: [its.name for its in specs] for specs in read}
    dtype = base.tape.values[draws[0]].dtype if drawn else torch.float32
    return ImageEncoder(slice_, spec, rows, tuple(births), whole, dtype)


def _named(entries: Sequence[Entry]) -> list[list[PictureSpec]]:
    """The rows of each entry, called after the picture that they are, and counted from its second on."""
    counts, found = Counter[str](), []
    for entry in entries:
        specs = []
        for spec in entry.specs:
            counts[spec.source] += 1
            name = spec.source if counts[spec.source] == 1 else f"{spec.source}_{counts[spec.source]}"
            specs.append(msgspec.structs.replace(spec, name=name))
        found.append(specs)
    return found


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
