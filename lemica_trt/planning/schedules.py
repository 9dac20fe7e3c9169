"""Schedules that need no error graph: equal distances, a list from the user, a published one."""

from __future__ import annotations

from collections.abc import Sequence

from lemica_trt.core.errors import InfeasibleError, InputError, UsageError
from lemica_trt.core.values import Value, read_value
from lemica_trt.ir.resources import calibration_path
from lemica_trt.ir.schedule import Schedule


def uniform(num_steps: int, budget: int) -> Schedule:
    """Full steps at round(i·N/B), i = 0 … B − 1, halves up: the baseline of equal distances.

    Raises:
        InfeasibleError: the budget lies outside 1 … N.
    """
    if not 1 <= budget <= num_steps:
        raise InfeasibleError(
            f"budget: expected 1 … {num_steps} full steps, got {budget}", fix=f"ask for 1 … {num_steps}"
        )
    steps = tuple((2 * i * num_steps + budget) // (2 * budget) for i in range(budget))
    return Schedule(num_steps=num_steps, full_steps=steps)


def through(schedule: Schedule, steps: Sequence[int]) -> Schedule:
    """The schedule with the nearest of its full steps moved onto each of some steps.

    Args:
        steps: rising, above 0.

    Raises:
        InfeasibleError: it has too few full steps.
    """
    if schedule.budget <= len(steps):
        raise InfeasibleError(
            f"budget: expected at least {1 + len(steps)} full steps, the first of each kind of steps, got "
            f"{schedule.budget}",
            fix=f"ask for {1 + len(steps)} … {schedule.num_steps}",
        )
    free = set(schedule.full_steps[1:]) - set(steps)
    found = {0, *schedule.full_steps} & {0, *steps}
    for step in steps:
        if step not in found:
            nearest = min(free, key=lambda its: (abs(its - step), its))
            free.remove(nearest)
            found.add(step)
    return Schedule(num_steps=schedule.num_steps, full_steps=tuple(sorted(found | free)))


def given(steps: Sequence[int], num_steps: int) -> Schedule:
    """The user's own list (`--schedule 0,1,2,5`).

    Raises:
        UsageError: empty, not beginning with 0, not rising, or out of 0 … N − 1; the message names the index.
    """
    fix = f"give rising steps of 0 … {num_steps - 1}, the first 0"
    if len(steps) == 0 or steps[0] != 0:
        raise UsageError(f"schedule[0]: expected step 0, got {steps[0] if steps else 'nothing'}", fix=fix)
    for index, step in enumerate(steps):
        if not 0 <= step < num_steps:
            raise UsageError(f"schedule[{index}]: expected a step of 0 … {num_steps - 1}, got {step}", fix=fix)
        if index > 0 and step <= steps[index - 1]:
            raise UsageError(
                f"schedule[{index}]: expected a step after {steps[index - 1]}, the one before it, got {step}", fix=fix
            )
    return Schedule(num_steps=num_steps, full_steps=tuple(steps))


class PublishedSchedule(Value, frozen=True):
    """One list as its authors published it, right or wrong: `full_steps` is not checked here."""

    model: str
    num_steps: int
    budget: int
    full_steps: tuple[int, ...]


class PublishedSchedules(Value, frozen=True):
    """`calibration/published_schedules.json`: what others published, and where."""

    source: str
    note: str
    schedules: tuple[PublishedSchedule, ...]


def published(model: str, budget: int) -> Schedule:
    """A schedule that the authors of LeMiCa published for a model.

    Raises:
        InputError: there is none for this model and budget, or the published list is no schedule (Z-Image's lists
            hold step 9 of a run of the steps 0 … 8).
    """
    path = calibration_path("published_schedules.json")
    schedules = read_value(PublishedSchedules, path).schedules
    of_model = {entry.budget: entry for entry in schedules if entry.model == model}
    if not of_model:
        models = ", ".join(sorted({entry.model for entry in schedules}))
        raise InputError(
            f"published schedule: expected a model that has one, got {model!r}", fix=f"use one of {models}"
        )
    if budget not in of_model:
        raise InputError(
            f"published schedule of {model}: expected a budget that was published, got {budget}",
            fix=f"use {' or '.join(map(str, sorted(of_model)))}",
        )
    entry = of_model[budget]
    try:
        return given(entry.full_steps, entry.num_steps)
    except UsageError as error:
        raise InputError(
            f"published schedule of {model} with {budget} full steps: the list as published is unusable: {error.what}",
            fix="calibrate, or give the steps yourself",
        ) from None
