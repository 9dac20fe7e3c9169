"""Budgets in the unit that the user has, and how many full steps B they come to.

    full steps   a plain number, as it is
    `Speedup`    against the uncached plan: a time, t(N) / factor
    `Latency`    a time
    `MinPsnr`    the least B whose plan reaches it, found by bisection (`least_reaching`), or stored (`Front`)

The time of a plan is a sum over its steps as they were measured, t = B·full + S·skipped + rest (`StepTimes`): S counts
the steps that run the skip graph, none where skipped steps are folded away. So a time allows plans that fold and plans
that do not different numbers of full steps (`StepBudget`); the best of all plans within the time is looked for.

Pure values and functions: nothing of how times or qualities are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lemica_trt.core.errors import InfeasibleError
from lemica_trt.ir.budget import Front, FrontRow, Latency, Speedup, StepBudget, StepTimes, format_seconds, skipped_steps
from lemica_trt.planning.minimax import least_budget

FRONT_POINTS = 12
"""Budgets of a Pareto front, unless others are named."""


def max_full_steps(
    budget: Speedup | Latency,
    times: StepTimes,
    num_steps: int,
    max_skip: int | None,
    *,
    folds: bool = True,
    skips: bool = True,
    switches: Sequence[int] = (),
) -> StepBudget:
    """The most full steps that a time allows; t never falls with B.

    Args:
        budget: the time.
        times: of the steps.
        num_steps: N.
        max_skip: K; None: no limit.
        folds, skips: which kinds of plans are wanted.
        switches: as in `least_budget`.

    Raises:
        InfeasibleError: the least number of full steps takes longer.
    """
    uncached = times.total(num_steps)
    seconds = budget.seconds if isinstance(budget, Latency) else uncached / budget.factor
    if seconds >= uncached:
        return StepBudget(folded=num_steps, skipping=num_steps)
    skips = skips and times.skipped is not None
    least = least_budget(num_steps, max_skip, switches)

    def most(skipping: bool) -> int:
        """0: not even one."""
        fits = (b for b in range(num_steps, 0, -1) if times.total(b, (num_steps - b) * skipping) <= seconds)
        return next(fits, 0)

    found = {kind: most(kind) for kind, wanted in ((False, folds), (True, skips)) if wanted}
    if not found:
        raise InfeasibleError(
            f"{budget}: only plans that run the skip graph are asked for, and there is none",
            fix="rebuild the bundle with --method lemica, or name a method that folds",
        )
    if max(found.values()) < least:
        needed = min(times.total(least, (num_steps - least) * kind) for kind in found)
        limit = "" if max_skip is None else f" where at most {max_skip} in a row are skipped"
        nearest = format_seconds(_up(needed)) if isinstance(budget, Latency) else f"{_down(uncached / needed):g}×"
        raise InfeasibleError(
            f"{budget}: {format_seconds(seconds)} here, in which {max(found.values())} full steps of "
            f"{format_seconds(times.full)} fit; at least {least} are needed{limit}",
            fix=f"the nearest that is feasible is {nearest}" + ("" if max_skip is None else "; or raise --max-skip"),
        )
    folded, skipping = (b if b >= least else None for b in (found.get(False, 0), found.get(True, 0)))
    return StepBudget(folded=folded, skipping=skipping)


def _up(seconds: float) -> float:
    """Seconds that are still feasible, with the three digits that are shown."""
    digit = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    return math.ceil(seconds / digit) * digit


def _down(factor: float) -> float:
    """A factor that is still feasible, with two digits behind the point."""
    return math.floor(factor * 100) / 100


def least_reaching(budgets: Sequence[int], reaches: Callable[[int], bool]) -> int:
    """The least budget that reaches something, by bisection: about log₂ of them are asked.

    Args:
        budgets: rising; the last one is taken to reach it and is never asked.
        reaches: where it is false for a budget and true for a smaller one, some budget is found that reaches and
            whose predecessor does not.
    """
    low, high = 0, len(budgets) - 1
    while low < high:
        middle = (low + high) // 2
        if reaches(budgets[middle]):
            high = middle
        else:
            low = middle + 1
    return budgets[high]


def front_rows(front: Front, times: StepTimes | None) -> tuple[FrontRow, ...]:
    """A front with the time of each plan; without step times a plan costs its full steps."""
    points = front.points
    if times is not None and times.skipped is None and any(skipped_steps(point.plan) for point in points):
        times = None
    cost = [float(point.budget) if times is None else times.of(point.plan) for point in points]
    return tuple(
        FrontRow(
            plan=point.plan.name,
            method=point.plan.method,
            budget=point.budget,
            psnr=point.mean,
            psnr_low=point.low,
            psnr_p5=point.p5,
            psnr_worst=point.worst,
            seconds=None if times is None else times.of(point.plan),
            speedup=None if times is None else times.speedup(point.plan),
            dominated=beaten,
        )
        for point, beaten in zip(points, dominated(cost, [point.mean for point in points]))
    )


def dominated(costs: Sequence[float], qualities: Sequence[float]) -> list[bool]:
    """Which points are not on the Pareto front: another costs no more and is no worse, and not equal in both.

    In one sweep from the cheapest on, of equal costs the best first.
    """
    beaten = [False] * len(costs)
    best, best_cost = -math.inf, math.inf
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i])):
        if qualities[index] > best:
            best, best_cost = qualities[index], costs[index]
        else:
            beaten[index] = qualities[index] < best or costs[index] > best_cost
    return beaten


def front_budgets(
    num_steps: int, max_skip: int | None, switches: Sequence[int] = (), *, most: int = FRONT_POINTS
) -> tuple[int, ...]:
    """From the least feasible budget to half of all steps; where those are more than `most`, at about equal ratios: so
    are their speed-ups.

    Args:
        switches: as in `least_budget`.
    """
    least = least_budget(num_steps, max_skip, switches)
    largest = max(least, num_steps // 2)
    if largest - least < most:
        return tuple(range(least, largest + 1))
    return tuple(sorted({round(budget) for budget in np.geomspace(least, largest, most).tolist()}))
