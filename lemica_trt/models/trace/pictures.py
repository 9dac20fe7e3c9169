"""How a pipeline makes tensors of the pictures that it is given: found by comparing them with resized pixels.

A recording begins with tensors; what Pillow and numpy did before is not in it. So a tensor that may be a picture is
compared with the picture itself, resized in every way that a runtime without PyTorch can, in two recordings with
pictures of other sizes and aspect ratios. What is left then must be a straight line in the pixels, one a channel. Where
there are a first and a last picture, a tensor may be both, one behind the other (Wan's for CLIP).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple, get_args

import msgspec
import numpy as np
import torch

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.pictures import Pixels, planes, resized
from lemica_trt.ir.graphs import Filter, Fit, PictureSpec, Source
from lemica_trt.models.trace.tape import Event, Op, Ref, Tape, refs

EXACT = 2e-6
"""Largest deviation of a picture's values, relative to the largest of them: fp32 rounds each of a few operations."""


DIGITS = 8
"""Of scales and offsets: more than fp32 has, less than in which processors differ."""


class Seen(NamedTuple):
    """A recording up to the loop, and the pictures that it was given."""

    tape: Tape
    pictures: Mapping[Source, Pixels]


class Entry(NamedTuple):
    """A tensor [n, 3, height, width] that is n of the pictures.

    Attributes:
        at: the recording's item that made it, or the first one that reads it.
        ref: of the base recording.
        specs: how each row is made.
    """

    at: int
    ref: Ref
    specs: tuple[PictureSpec, ...]


def picture_entries(base: Tape, end: int, others: Sequence[Seen]) -> list[Entry]:
    """The tensors of a recording that are its pictures, of each size the last: what comes behind is computed by a
    graph.

    Args:
        base: the recording.
        end: of its items before the loop.
        others: the same call with pictures of other sizes.

    Raises:
        UnsupportedError: what the pipeline does depends on the size of a picture, or one is found in no tensor.
    """
    names = list(others[0].pictures)
    for k, item in enumerate(base.items[:end]):
        if any(k >= len(each.tape.items) or _kind(each.tape.items[k]) != _kind(item) for each in others):
            raise UnsupportedError("it does other things with a picture of another size")
    found: dict[tuple[object, ...], Entry] = {}
    follows = False
    for at, leaf, ref in _candidates(base, end, len(names)):
        mine = [(_leaf(each.tape, at, leaf), each.pictures) for each in others]
        values = base.values[ref]
        if any(its.shape != values.shape for its, _ in mine):
            follows = True
            continue
        if torch.equal(mine[0][0], mine[1][0]):
            continue
        specs = [_of_row(k, [(its.cpu().numpy(), pictures) for its, pictures in mine]) for k in range(len(values))]
        known = tuple(spec for spec in specs if spec is not None)
        if len(known) == len(specs):
            found[tuple((its.source, its.height, its.width, its.fit, its.by) for its in known)] = Entry(at, ref, known)
    missing = [name for name in names if all(name != its.source for entry in found.values() for its in entry.specs)]
    if missing and follows:
        raise UnsupportedError("its shapes follow the size of its picture")
    if missing:
        raise UnsupportedError(
            f"no tensor that it makes of its {missing[0].replace('_', ' ')} is resized pixels, each channel scaled"
        )
    return sorted(found.values(), key=lambda entry: entry.at)


def _kind(item: Op | Event) -> tuple[str, str]:
    return ("op", str(item.func)) if isinstance(item, Op) else (item.kind, item.name)


def _tensors(item: Op | Event) -> list[Ref]:
    """What an item reads and gives, in order."""
    return [*refs((item.args, item.kwargs) if isinstance(item, Op) else item.inputs), *refs(item.outs)]


def _leaf(tape: Tape, at: int, leaf: int) -> torch.Tensor:
    return tape.values[_tensors(tape.items[at])[leaf]]


def _candidates(tape: Tape, end: int, most: int) -> Iterator[tuple[int, int, Ref]]:
    """Tensors fp32 [1 … most, 3, height, width], with where they first are: item, and number among its tensors."""
    seen = set()
    for at, item in enumerate(tape.items[:end]):
        for leaf, ref in enumerate(_tensors(item)):
            value = tape.values[ref]
            pictured = value.dim() == 4 and 1 <= value.shape[0] <= most and value.shape[1] == 3
            if ref not in seen and value.dtype == torch.float32 and pictured:
                seen.add(ref)
                yield at, leaf, ref


def _of_row(k: int, seen: Sequence[tuple[np.ndarray, Mapping[Source, Pixels]]]) -> PictureSpec | None:
    """How row k of a tensor [n, 3, height, width] is made of one of the pictures; None: in no way that is known."""
    for name in seen[0][1]:
        spec = _explained([(values[k : k + 1], pictures[name]) for values, pictures in seen])
        if spec is not None:
            return spec if name == "image" else msgspec.structs.replace(spec, of=name)
    return None


def _explained(pairs: Sequence[tuple[np.ndarray, Pixels]]) -> PictureSpec | None:
    """How tensors [1, 3, height, width] are made of pictures; None: in no way that is known."""
    height, width = pairs[0][0].shape[2:]
    for fit, by in product(get_args(Fit), get_args(Filter)):
        pixels = [resized(picture, height, width, fit=fit, by=by) for _, picture in pairs]
        lines = [
            np.polyfit(
                np.concatenate([its[..., c].ravel() for its in pixels]).astype(np.float64),
                np.concatenate([values[0, c].ravel() for values, _ in pairs]).astype(np.float64),
                1,
            )
            for c in range(3)
        ]
        red, green, blue = ((float(f"{line[0]:.{DIGITS}g}"), round(float(line[1]), DIGITS)) for line in lines)
        scale, offset = (red[0], green[0], blue[0]), (red[1], green[1], blue[1])
        size = max(float(np.abs(values).max()) for values, _ in pairs)
        made = [planes(its, scale, offset) for its in pixels]
        if all(np.abs(one - values).max() <= EXACT * size for one, (values, _) in zip(made, pairs)):
            return PictureSpec(name="image", height=height, width=width, fit=fit, by=by, scale=scale, offset=offset)
    return None
