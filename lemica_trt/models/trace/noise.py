"""How a pipeline's call takes initial latents: arguments by state, and what it makes of them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.models.trace.arguments import Arguments
from lemica_trt.models.trace.body import split_states
from lemica_trt.models.trace.replay import relative
from lemica_trt.models.trace.runs import record
from lemica_trt.models.trace.tape import Event, Op, Tape

BASE = 100
"""Whole numbers below it are exact in every precision of latents."""


class _Taken(NamedTuple):
    """How an argument becomes x_0: its elements in another order, times `factor`, plus `offset`.

    FLUX.2 packs the latents that it is given; LTX-2 normalises those of its sound.

    Attributes:
        name, shape: of the argument.
        order: where each element of x_0 is in it.
    """

    name: str
    shape: tuple[int, ...]
    order: Tensor
    factor: Tensor
    offset: Tensor

    def given(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What becomes x."""
        values = ((x.float().cpu() - self.offset) / self.factor).flatten()
        made = torch.empty_like(values)
        made[self.order] = values
        return made.reshape(self.shape).to(x.device, dtype)


class NoiseArguments:
    """Initial latents as arguments of a call.

    Args:
        tape: a recording.

    Raises:
        UnsupportedError: no arguments were found that set them.
    """

    def __init__(self, pipeline: Any, arguments: Arguments, tape: Tape) -> None:
        self._pipeline, self._arguments, self._like = pipeline, arguments, _first(tape)
        names = [name for name in arguments.names if name.endswith("latents")]
        names.sort(key=lambda name: name != "latents")  # `image_latents` of a modular Z-Image begin another kind of run
        drawn = [tape.values[item.outs[0]] for item in tape.items if isinstance(item, Op) and "randn" in str(item.func)]
        shapes = [
            dict.fromkeys((tuple(x.shape), *(tuple(noise.shape) for noise in drawn if noise.numel() == x.numel())))
            for x in self._like
        ]
        noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) for x in self._like]
        for order in itertools.permutations(names, len(self._like)):
            for its in itertools.product(*shapes):
                for find in (self._as_they_are, self._found):
                    with contextlib.suppress(InputError):  # a pipeline refuses latents of another state's shape
                        self._taken = find(dict(zip(order, its)))
                        got = self._start(self._of(noise))
                        if all(relative(one.float().cpu(), x) < ROUNDED for one, x in zip(got, noise)):
                            return
        raise UnsupportedError(f"{type(pipeline).__name__} cannot be built yet: no arguments set its initial latents")

    def _as_they_are(self, shapes: Mapping[str, tuple[int, ...]]) -> list[_Taken]:
        """Arguments that are x_0."""
        pairs = zip(shapes.items(), self._like)
        one, zero = torch.ones(()), torch.zeros(())
        return [_Taken(name, shape, torch.arange(x.numel()), one, zero) for (name, shape), x in pairs]

    def _found(self, shapes: Mapping[str, tuple[int, ...]]) -> list[_Taken]:
        """How arguments of these names and shapes become x_0."""

        def start(values: Callable[[int], Tensor]) -> list[Tensor]:
            given = {
                name: values(x.numel()).reshape(shape).to(x.device, x.dtype)
                for (name, shape), x in zip(shapes.items(), self._like)
            }
            return [x.float().cpu() for x in self._start(given)]

        zeros, ones = start(torch.zeros), start(torch.ones)
        orders = [torch.zeros(x.numel(), dtype=torch.long) for x in self._like]
        for power in range(math.ceil(math.log(max(x.numel() for x in self._like), BASE))):
            digits = start(lambda count, unit=BASE**power: torch.arange(count) // unit % BASE)  # type: ignore[misc]
            for order, digit, zero, one in zip(orders, digits, zeros, ones):
                order += ((digit - zero) / (one - zero)).flatten().round().nan_to_num(0.0).long() * BASE**power
        return [
            _Taken(name, shape, order.clamp(0, order.numel() - 1), one - zero, zero)
            for (name, shape), order, zero, one in zip(shapes.items(), orders, zeros, ones)
        ]

    def _start(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        """x_0 of a call with these arguments."""
        return _first(record(self._pipeline, self._arguments, last_step=len(self._like), others=dict(given))[0])

    def _of(self, states: Sequence[Tensor]) -> dict[str, Tensor]:
        pairs = zip(self._taken, states, self._like)
        return {taken.name: taken.given(state, like.dtype) for taken, state, like in pairs}

    def given(self, noise: Tensor) -> dict[str, Tensor]:
        """Arguments for initial latents, fp32, joined as `body.joined_states` does."""
        return self._of([state.float() for state in split_states(noise, self._like)])


ROUNDED = 2**-6
"""What x_0 may deviate by from what was asked for: two roundings of bf16."""


def _first(tape: Tape) -> list[Tensor]:
    """What the first step of each state's sampler was given."""
    events = [item for item in tape.items if isinstance(item, Event) and item.kind == "step"]
    found = {event.scheduler: tape.value(event.inputs["sample"]) for event in reversed(events)}
    return [found[scheduler] for scheduler in tape.schedulers]
