"""What changes each slot: one run is compared with runs of another prompt, negative prompt, image, seed or guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.trace import SlotRole
from lemica_trt.models.trace.arguments import BASE_IMAGE, BASE_SEED
from lemica_trt.models.trace.program import Program, effects
from lemica_trt.models.trace.tape import Event, Ref, Tape, refs

STEP, PROMPT, NEGATIVE, IMAGE, SEED = "step", "prompt", "negative_prompt", "image", "seed"

REQUEST = (PROMPT, NEGATIVE, IMAGE, SEED)
"""What a request brings, beside its guidance scales."""


@dataclass(frozen=True)
class Run:
    """A recorded call of the pipeline.

    Attributes:
        tape, programs: of it.
        scales: guidance parameter → value.
        seed, image: as in `arguments.Arguments.at`.
    """

    tape: Tape
    programs: list[Program]
    scales: Mapping[str, float]
    seed: int = BASE_SEED
    image: int = BASE_IMAGE


@dataclass(frozen=True)
class Found:
    """What a slot is. `of`: what changes it, in a fixed order."""

    role: SlotRole
    of: tuple[str, ...]


def kinds_of(base: Run, others: Mapping[str, Run]) -> list[tuple[int, ...]]:
    """Steps by the structure of their programs.

    Raises:
        UnsupportedError: it differs between runs.
    """
    kinds: dict[str, list[int]] = {}
    for program in base.programs:
        kinds.setdefault(program.digest, []).append(program.index)
    for what, run in others.items():
        for mine, other in zip(base.programs, run.programs):
            if mine.digest != other.digest:
                raise UnsupportedError(
                    f"step {mine.index} runs other operators with another {what}: {_difference(mine, other)}"
                )
    return [tuple(steps) for steps in kinds.values()]


def _difference(one: Program, other: Program) -> str:
    for mine, its in zip(one.nodes, other.nodes):
        if (mine.kind, str(mine.what)) != (its.kind, str(its.what)):
            return f"{its.what} in place of {mine.what}"
    return f"{len(other.nodes)} in place of {len(one.nodes)}, or on other operands"


def find_slots(base: Run, others: Mapping[str, Run], steps: Sequence[int]) -> list[Found]:
    """What each slot of one kind of step is.

    Args:
        base: one run.
        others: what is different in it (one of `REQUEST`, or a guidance parameter) → another run.
        steps: of the kind.

    Raises:
        UnsupportedError: a slot is a state that the loop carries, or depends on what cannot be told apart.
    """
    programs, found = [base.programs[i] for i in steps], []
    suspects = []
    for k, first in enumerate(programs[0].values):
        changed = {what for what, run in others.items() if _differs(base, run, steps, k)}
        if any(not same(first, program.values[k]) for program in programs[1:]):
            if changed & set(REQUEST):
                suspects.append(k)
                changed = {what for what, run in others.items() if _differs(base, run, steps[:1], k)}
            else:
                changed.add(STEP)
        role = _role(programs[0], k, changed) if k not in suspects else "condition"
        found.append(Found(role, tuple(what for what in (STEP, *others) if what in changed)))
    for k in suspects:
        if _dead(base, others, steps, k):
            found[k] = Found("constant", ())
    suspects = [k for k in suspects if found[k].role != "constant"]
    if suspects:
        _freeze(base, programs, suspects)
    return found


def _differs(base: Run, other: Run, steps: Sequence[int], slot: int) -> bool:
    return any(not same(base.programs[i].values[slot], other.programs[i].values[slot]) for i in steps)


def _role(program: Program, slot: int, changed: set[str]) -> SlotRole:
    request, scales = changed & set(REQUEST), changed - {STEP, *REQUEST}
    if len(scales) > 1 or (request and scales):
        raise UnsupportedError(f"{_named(program, slot)} follows {' and '.join(sorted(request | scales))} at once")
    if request:
        return "condition"
    return "guidance" if scales else "column" if changed else "constant"


def _dead(base: Run, others: Mapping[str, Run], steps: Sequence[int], slot: int) -> bool:
    """Whether a slot's value is overwritten before it is read: on the base run's latents, the values of any run do the
    same with the base run's first value."""
    value = base.programs[steps[0]].values[slot]
    for i in steps:
        program = base.programs[i]
        for run in (base, *others.values()):
            own = run.programs[i].values
            held = [value if k == slot else its for k, its in enumerate(own)]
            if not _same_effects(base.tape, program, own, held):
                return False
    return True


def _named(program: Program, slot: int) -> str:
    component, argument = program.destination(slot)
    where = f"{component}.{argument}" if component else "the sampler's input"
    return f"what {program.operator(slot)} reads for {where}"


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal; tensors in shape and dtype too."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _freeze(base: Run, programs: list[Program], suspects: list[int]) -> None:
    """Slots that change with step and request: harmless where holding them at their first value changes nothing."""
    for program in programs[1:]:
        frozen = [programs[0].values[k] if k in suspects else value for k, value in enumerate(program.values)]
        if not _same_effects(base.tape, program, program.values, frozen):
            slot = suspects[0]
            raise UnsupportedError(
                f"{_named(programs[0], slot)} changes with the step and the request: a state that the loop carries, "
                f"or noise that it draws{_source(base.tape, program.births[slot])}"
            )


def _same_effects(tape: Tape, program: Program, values: Sequence[Any], others: Sequence[Any]) -> bool:
    one, other = (list(effects(tape, program, its)) for its in (values, others))
    return len(one) == len(other) and all(map(same, one, other))


def _source(tape: Tape, born: Ref | None) -> str:
    """What made a tensor, or what it is a view of."""
    for item in tape.items:
        if born is not None and any(tape.storage(ref) == tape.storage(born) for ref in refs(item.outs)):
            return f" (made by {item.name if isinstance(item, Event) else item.func})"
    return ""
