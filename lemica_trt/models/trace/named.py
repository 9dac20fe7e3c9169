"""Slots of all kinds of steps, by name, with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lemica_trt.ir.trace import (
    TraceSlot,
)
from lemica_trt.models.trace.slots import Found, Run


class Slots:
    """Slots by name; those of several kinds of steps that are the same have one.

    Attributes:
        slots: by name, in order.
        of_kind: names of each kind's slots.
    """

    def __init__(
        self, base: Run, ends: Mapping[str, Run], kinds: Sequence[Sequence[int]], found: Sequence[Sequence[Found]]
    ) -> None:
        self.slots: dict[str, TraceSlot] = {}
        self.of_kind: list[list[str]] = []
        self._numbers: dict[tuple[int, int], str] = {}
        by_birth: dict[Any, str] = {}
        for k, (steps, its) in enumerate(zip(kinds, found)):
            names = []
            first = base.programs[steps[0]]
            for number, slot in enumerate(its):
                if slot.role == "constant" and first.births[number] is None:
                    continue
                birth = first.births[number]
                known = by_birth.get((birth, slot)) if slot.role in ("constant", "condition") else None
                name = known or self._add(base, ends, steps, number, slot)
                by_birth[birth, slot] = self._numbers[k, number] = name
                names.append(name)
            self.of_kind.append(names)

    def name(self, kind: int, number: int) -> str | None:
        """The name of a slot; None: it is a constant number."""
        return self._numbers.get((kind, number))

    def _add(self, base: Run, ends: Mapping[str, Run], steps: Sequence[int], number: int, slot: Found) -> str:
        program = base.programs[steps[0]]
        component, argument = program.destination(number)
        value = program.values[number]
        name = stem = "guidance" if slot.role == "guidance" and not component else argument.split(".")[0]
        for k in range(2, 1000):
            if name not in self.slots:
                break
            name = f"{stem}_{k}"
        column, factor = _column(base, ends, steps, number, slot)
        self.slots[name] = TraceSlot(
            name=name,
            role=slot.role,
            of=slot.of,
            component=component,
            argument=argument,
            operator=program.operator(number) if program.operator(number) != component else "",
            dtype=dtype_name(value),
            shape=tuple(value.shape) if isinstance(value, Tensor) else (),
            column=column,
            factor=factor,
        )
        return name


def _column(
    base: Run, ends: Mapping[str, Run], steps: Sequence[int], number: int, slot: Found
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Offset and factor of each step, where all elements of the slot are equal."""
    if slot.role not in ("column", "guidance"):
        return (), ()
    starts = [_uniform(base.programs[i].values[number]) for i in steps]
    if any(start is None for start in starts):
        return (), ()
    values = [start for start in starts if start is not None]
    if slot.role == "column":
        return tuple(values), ()
    name = slot.of[-1]
    run = ends[name]
    factors = []
    for i, start in zip(steps, values):
        end = _uniform(run.programs[i].values[number])
        factors.append(((start if end is None else end) - start) / (run.scales[name] - base.scales[name]))
    return tuple(v - f * base.scales[name] for v, f in zip(values, factors)), tuple(factors)


def _uniform(value: Any) -> float | None:
    if isinstance(value, Tensor):
        first = value.double().flatten()[0] if value.numel() else None
        return None if first is None or not bool((value.double() == first).all()) else float(first)
    return float(value)


def dtype_name(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
