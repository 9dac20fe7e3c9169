"""Ids that a pipeline pads itself: in front of what its tokenizer gave, up to a multiple of some number (CogView 4).

Such padding is attended, so that the text encoder must be given as much of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lemica_trt.models.trace.tape import Event, Ref, Tape, refs


def fed_ids(tape: Tape, event: Event) -> Ref:
    """The ids of a tokenizer's call as a network is given them: with padding in front, or as they are."""
    own: Ref = event.outs["input_ids"]
    ids, at = tape.value(own), next(k for k, item in enumerate(tape.items) if item is event)
    for item in tape.items[at + 1 :]:
        if isinstance(item, Event) and item.kind == "call":
            for ref in refs(item.inputs):
                if _ends_with(tape.values[ref], ids):
                    return ref
    return own


def multiples(tapes: dict[str, Tape], component: str) -> list[int | None]:
    """The numbers of ids that a tokenizer's may be padded to a multiple of in front, largest first; [None]: they are
    not.

    Args:
        tapes: recordings of prompts of several lengths.
    """
    lengths = []
    for tape in tapes.values():
        for event in tape.items:
            if isinstance(event, Event) and event.kind == "tokenize" and event.name == component:
                fed = fed_ids(tape, event)
                lengths += [] if fed == event.outs["input_ids"] else [tape.value(fed).shape[1]]
    shortest = min(lengths, default=0)
    return [size for size in range(shortest, 1, -1) if not any(length % size for length in lengths)] or [None]


def _ends_with(value: Tensor, ids: Tensor) -> bool:
    """Whether a tensor is ids behind at least one that is padding."""
    front = value.shape[-1] - ids.shape[-1] if value.dim() == 2 else 0
    if front < 1 or value.dtype != ids.dtype or value.shape[0] != ids.shape[0]:
        return False
    return torch.equal(value[:, front:].cpu(), ids.cpu()) and bool((value[:, :front] == value[0, 0]).all())
