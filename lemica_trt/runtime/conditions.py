"""What the text encoders give → what the DiT is given: the conditions of a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lemica_trt.backends.base import Array
from lemica_trt.core.errors import InputError
from lemica_trt.ir.graphs import NEGATIVE, StepLayout


@dataclass(frozen=True)
class EncodedText:
    """What the text encoders make of one text.

    Attributes:
        arrays: by condition, without batch; as long as the encoder pads texts to.
        tokens: of each condition that has a text axis, at how many of its positions the text is. The template around it
            is not counted.
    """

    arrays: Mapping[str, Array]
    tokens: Mapping[str, int]


def conditions_from_texts(
    layout: StepLayout,
    prompts: Sequence[EncodedText],
    negatives: Sequence[EncodedText] = (),
    pictures: Sequence[Mapping[str, Array]] = (),
) -> dict[str, Array]:
    """What the DiT is given for some requests: the layout's conditions.

    Args:
        prompts: b of them.
        negatives: as many under guidance, else none.
        pictures: as many where the bundle needs an image, by condition.

    Returns:
        By name, [R, …] or [b, …]. A text axis is as long as the text that it follows: one that both branches share as
        long as the prompt.

    Raises:
        InputError: no text encoder gives a condition; a text has no tokens; or texts of one batch have other lengths.
    """
    result = {}
    for spec in layout.conditions:
        if pictures and spec.name in pictures[0]:
            result[spec.name] = np.stack([picture[spec.name] for picture in pictures])
            continue
        name, texts, followed = spec.name, [*negatives, *prompts], prompts
        if spec.text_axes and name not in texts[0].arrays:
            name, texts, followed = name.removeprefix(NEGATIVE), list(negatives), negatives
        elif spec.text_axes and spec.shape[0] == "batch":
            texts = list(prompts)
        if any(name not in text.arrays for text in texts):
            raise InputError(f"no text encoder of the bundle gives the condition {spec.name}", fix="rebuild it")
        length = _length(name, followed) if spec.text_axes else None
        result[spec.name] = np.stack([text.arrays[name][:length] for text in texts])
    return result


def condition_shapes(layout: StepLayout, conditions: Mapping[str, Array], batch: int) -> tuple[tuple[int, ...], ...]:
    """The shape of each of the layout's conditions, in order, at a batch size; of text axes as they are given.

    Raises:
        InputError: others are given, or a text is longer than the graphs take, or of several lengths.
    """
    names = [spec.name for spec in layout.conditions]
    if set(conditions) != set(names):
        raise InputError(f"conditions must be {', '.join(sorted(names))}, got {', '.join(sorted(conditions))}")
    lengths: dict[str, int] = {}
    shapes = []
    for spec in layout.conditions:
        expected = list(spec.at(batch))
        for axis, dim in enumerate(spec.shape):
            if dim in spec.text_axes and conditions[spec.name].ndim == len(expected):
                size = conditions[spec.name].shape[axis]
                if not 1 <= size <= expected[axis] or lengths.setdefault(str(dim), size) != size:
                    raise InputError(
                        f"{spec.name} must have one length of 1 … {expected[axis]} tokens, as others have that "
                        f"follow the same text, got {size}"
                    )
                expected[axis] = size
        shapes.append(tuple(expected))
    return tuple(shapes)


def _length(name: str, texts: Sequence[EncodedText]) -> int:
    """Tokens of a condition that texts have, all the same."""
    length, *others = {text.tokens[name] for text in texts}
    if others:
        raise InputError(f"prompts of a batch must have one length, got {sorted((length, *others))} tokens")
    if length < 1:
        raise InputError("prompts must be of at least 1 token, got one of none")
    return length
