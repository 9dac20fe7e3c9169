"""How a pipeline's call takes initial latents: arguments by state, and what it makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.models.trace.arguments import Arguments
from lemica_trt.models.trace.body import split_states
from lemica_trt.models.trace.replay import relative
from lemica_trt.models.trace.runs import record
from lemica_trt.models.trace.tape import Event, Tape


class _Taken(NamedTuple):
    """x_0 = factor·given + offset, element by element (LTX-2 normalises the latents of its sound)."""

    name: str
    factor: Tensor
    offset: Tensor


class NoiseArguments:
    """Initial latents as arguments of a call.

    Args:
        tape: a recording.

    Raises:
        UnsupportedError: no arguments were found that set them.
    """

    def __init__(self, pipeline: Any, arguments: Arguments, tape: Tape) -> None:
        self._like = x = _first(tape)
        if len(x) == 1:
            self._taken = [_Taken("latents", torch.ones(()), torch.zeros(()))]
            return
        names = [name for name in arguments.names if name.endswith("latents")]
        noise = [torch.randn(each.shape, generator=torch.Generator().manual_seed(5)) for each in x]
        for order in itertools.permutations(names, len(x)):
            try:
                self._taken = self._found(pipeline, arguments, order)
                got = _first(record(pipeline, arguments, last_step=len(x), others=self._arguments(noise))[0])
            except InputError:  # a pipeline refuses latents of another state's shape
                continue
            if all(relative(one.float(), other) < 1e-5 for one, other in zip(got, noise)):
                return
        raise UnsupportedError(f"{type(pipeline).__name__} cannot be built yet: no arguments set its initial latents")

    def _found(self, pipeline: Any, arguments: Arguments, order: Sequence[str]) -> list[_Taken]:
        ends = []
        for value in (0.0, 1.0):
            others = {name: torch.full_like(x, value) for name, x in zip(order, self._like)}
            ends.append(_first(record(pipeline, arguments, last_step=len(self._like), others=others)[0]))
        return [_Taken(name, one - zero, zero) for name, zero, one in zip(order, *ends)]

    def _arguments(self, states: Sequence[Tensor]) -> dict[str, Tensor]:
        """What gives these x_0."""
        return {
            taken.name: ((state - taken.offset.to(state.device)) / taken.factor.to(state.device)).to(like.dtype)
            for taken, state, like in zip(self._taken, states, self._like)
        }

    def given(self, noise: Tensor) -> dict[str, Tensor]:
        """Arguments for initial latents, fp32, joined as `body.joined_states` does."""
        return self._arguments([state.float() for state in split_states(noise, self._like)])


def _first(tape: Tape) -> list[Tensor]:
    """What the first step of each state's sampler was given."""
    events = [item for item in tape.items if isinstance(item, Event) and item.kind == "step"]
    found = {event.scheduler: tape.value(event.inputs["sample"]) for event in reversed(events)}
    return [found[scheduler] for scheduler in tape.schedulers]
