"""Budgets in the unit that the user has, and how many full steps B they come to.

    full steps   a plain number, as it is
    `Speedup`    against the uncached plan: a time, t(N) / factor
    `Latency`    a time
    `MinPsnr`    the least B whose plan reaches it, found by bisection (`least_reaching`), or stored (`Front`)

The time of a plan is a sum over its steps as they were measured, t = B·full + S·skipped + rest (`StepTimes`): S counts
the steps that run the skip graph, none where skipped steps are folded away. So a time affords ways that fold and ways
that do not different numbers of full steps (`Afforded`), and the best of all plans within the time is looked for.

Pure values and functions: nothing of how times or qualities are measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from lemica_trt.errors import InfeasibleError
from lemica_trt.plan import StepPlan
from lemica_trt.quality import PSNR_CAP
from lemica_trt.schedule import least_budget
from lemica_trt.values import Value, require, require_finite

FRONT_POINTS = 12
"""Budgets of a Pareto front, unless others are named."""

NORMAL_95 = 1.96
"""Half the 95 % interval of a mean, in standard errors."""


class Speedup(Value, frozen=True):
    """Time of the uncached plan / time of the plan, the denoising loop of one request: at least this."""

    factor: float

    def __post_init__(self) -> None:
        require_finite((self.factor,), "speed-up")
        require(self.factor >= 1, f"a speed-up must be at least 1, got {self.factor:g}")

    def __str__(self) -> str:
        return f"speed-up {self.factor:g}×"


class Latency(Value, frozen=True):
    """Seconds of the denoising loop of one request, at most; what text encoder and VAE take is not in it."""

    seconds: float

    def __post_init__(self) -> None:
        require_finite((self.seconds,), "latency")
        require(self.seconds > 0, f"a latency must be more than 0, got {self.seconds:g}")

    def __str__(self) -> str:
        return f"latency {said_seconds(self.seconds)}"


class MinPsnr(Value, frozen=True):
    """PSNR against the uncached run, dB, at least: the mean over clips that calibration has not seen."""

    decibels: float

    def __post_init__(self) -> None:
        require_finite((self.decibels,), "PSNR")
        require(
            0 < self.decibels < PSNR_CAP,
            f"a PSNR must be more than 0 and less than {PSNR_CAP:g}, got {self.decibels:g}",
        )

    def __str__(self) -> str:
        return f"PSNR {self.decibels:g} dB"


Budget = int | Speedup | Latency | MinPsnr
"""What a plan may cost, or must be good for; a number is full steps."""


def said(budget: Budget) -> str:
    """A budget in words."""
    return f"{budget} full steps" if isinstance(budget, int) else str(budget)


def said_seconds(seconds: float) -> str:
    """Seconds with three digits: a budget and what meets it must be told apart."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def speedup_from_text(text: str) -> Speedup:
    """`3`, `2.5x`.

    Raises:
        ValueError: it is something else.
    """
    return Speedup(factor=_number(text, r"[x×]?", "a speed-up, for example 3"))


def latency_from_text(text: str) -> Latency:
    """`2.5s`, `800ms`, `1.5min`; the unit must be there.

    Raises:
        ValueError: it is something else.
    """
    expected = "a time with its unit, for example 2.5s or 800ms"
    for unit, factor in (("ms", 1e-3), ("s", 1.0), ("min", 60.0)):
        if re.fullmatch(rf"[^a-z]*{unit}", text.strip()):
            return Latency(seconds=factor * _number(text, unit, expected))
    raise ValueError(f"expected {expected}, got {text!r}")


def min_psnr_from_text(text: str) -> MinPsnr:
    """`35`, `35dB`.

    Raises:
        ValueError: it is something else.
    """
    return MinPsnr(decibels=_number(text, r"(?:dB)?", "a PSNR in dB, for example 35"))


def _number(text: str, unit: str, expected: str) -> float:
    match = re.fullmatch(rf"(\d+\.?\d*|\.\d+)\s*{unit}", text.strip())
    if match is None:
        raise ValueError(f"expected {expected}, got {text!r}")
    return float(match[1])


# ---------------------------------------------------------------- time


class StepTimes(Value, frozen=True):
    """What steps take on one machine's engines, one request, seconds of wall-clock time.

    Attributes:
        full: a step that runs the full graph.
        skipped: a step that runs the skip graph; None where there is none.
        rest: what a run takes beyond its steps.
    """

    full: float
    skipped: float | None
    rest: float

    def __post_init__(self) -> None:
        require_finite((self.full, self.skipped or 0.0, self.rest), "full, skipped, rest")
        require(self.full > 0 and self.rest >= 0, f"full must be more than 0 and rest at least 0, got {self}")
        require(
            self.skipped is None or 0 <= self.skipped <= self.full,
            f"a skipped step must take 0 … {self.full} s, got {self.skipped}",
        )

    def total(self, full_steps: int, skipped_steps: int = 0) -> float:
        """Seconds of a run.

        Raises:
            ValueError: there are skipped steps, and nobody knows what one takes.
        """
        require(skipped_steps == 0 or self.skipped is not None, "there is no skip graph: its steps have no time")
        return full_steps * self.full + skipped_steps * (self.skipped or 0.0) + self.rest

    def of(self, plan: StepPlan) -> float:
        """Seconds of a plan."""
        return self.total(plan.budget, skipped_steps(plan))

    def speedup(self, plan: StepPlan) -> float:
        """Time of all steps in full / time of a plan."""
        return self.total(plan.num_steps) / self.of(plan)


def skipped_steps(plan: StepPlan) -> int:
    """Steps that run the skip graph."""
    return sum(row.graph == "skip" for row in plan.rows)


class Afforded(Value, frozen=True):
    """The full steps that a plan may have; None: there is no plan of that kind.

    Attributes:
        folded: of plans that run no skip graph.
        skipping: of plans that run it in every step that is not full.
    """

    folded: int | None
    skipping: int | None

    @property
    def budgets(self) -> tuple[int, ...]:
        """Both, the larger first."""
        return tuple(sorted({b for b in (self.folded, self.skipping) if b is not None}, reverse=True))

    def admits(self, plan: StepPlan) -> bool:
        """Whether a plan spends just that."""
        return plan.budget == (self.skipping if skipped_steps(plan) else self.folded)


def afforded(
    budget: Speedup | Latency,
    times: StepTimes,
    num_steps: int,
    max_skip: int | None,
    *,
    folds: bool = True,
    skips: bool = True,
) -> Afforded:
    """The most full steps that a time allows; t never falls with B.

    Args:
        budget: the time.
        times: of the steps.
        num_steps: N.
        max_skip: K; None: no limit.
        folds, skips: which kinds of plans are wanted.

    Raises:
        InfeasibleError: the least number of full steps takes longer.
    """
    uncached = times.total(num_steps)
    seconds = budget.seconds if isinstance(budget, Latency) else uncached / budget.factor
    if seconds >= uncached:
        return Afforded(folded=num_steps, skipping=num_steps)
    skips = skips and times.skipped is not None
    least = least_budget(num_steps, max_skip)

    def most(skipping: bool) -> int:
        """0: not even one."""
        fits = (b for b in range(num_steps, 0, -1) if times.total(b, (num_steps - b) * skipping) <= seconds)
        return next(fits, 0)

    found = {kind: most(kind) for kind, wanted in ((False, folds), (True, skips)) if wanted}
    if not found:
        raise InfeasibleError(
            f"{budget}: only plans that run the skip graph are asked for, and there is none",
            fix="rebuild the bundle with --reuse residual, or leave --reuse and --method out",
        )
    if max(found.values()) < least:
        needed = min(times.total(least, (num_steps - least) * kind) for kind in found)
        limit = "" if max_skip is None else f" where at most {max_skip} in a row are skipped"
        nearest = said_seconds(_up(needed)) if isinstance(budget, Latency) else f"{_down(uncached / needed):g}×"
        raise InfeasibleError(
            f"{budget}: {said_seconds(seconds)} here, in which {max(found.values())} full steps of "
            f"{said_seconds(times.full)} fit; at least {least} are needed{limit}",
            fix=f"the nearest that is feasible is {nearest}" + ("" if max_skip is None else "; or raise --max-skip"),
        )
    folded, skipping = (b if b >= least else None for b in (found.get(False, 0), found.get(True, 0)))
    return Afforded(folded=folded, skipping=skipping)


def _up(seconds: float) -> float:
    """Seconds that are still feasible, with the three digits that are shown."""
    digit = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    return math.ceil(seconds / digit) * digit


def _down(factor: float) -> float:
    """A factor that is still feasible, with two digits behind the point."""
    return math.floor(factor * 100) / 100


# ---------------------------------------------------------------- quality


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


class Point(Value, frozen=True):
    """One budget's plan, and how good it is.

    Attributes:
        plan: the best of the ways that were tried.
        way: see `candidates.way`.
        psnr: dB of each validation clip against the uncached run. The way was chosen on the same samples, by the
            signal-to-noise ratio of their latents; `verify` measures others.
    """

    plan: StepPlan
    way: str
    psnr: tuple[float, ...]

    def __post_init__(self) -> None:
        require(len(self.psnr) > 0, "psnr must not be empty")
        require_finite(self.psnr, "psnr")

    @property
    def budget(self) -> int:
        return self.plan.budget

    @property
    def mean(self) -> float:
        """dB, mean over clips."""
        return float(np.mean(self.psnr))

    @property
    def low(self) -> float | None:
        """dB, the low end of the 95 % interval of the mean, as if it were normal; None for a single clip."""
        n = len(self.psnr)
        return None if n == 1 else self.mean - NORMAL_95 * float(np.std(self.psnr, ddof=1)) / math.sqrt(n)

    @property
    def p5(self) -> float:
        """dB, 5th percentile over clips."""
        return float(np.percentile(self.psnr, 5))


class Front(Value, frozen=True):
    """Quality by budget, of those that were tried.

    Attributes:
        points: by rising budget, one each.
    """

    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        budgets = [point.budget for point in self.points]
        require(budgets == sorted(set(budgets)) != [], f"budgets must rise, got {budgets}")

    def least(self, budget: MinPsnr) -> Point:
        """The point of fewest full steps that reaches a PSNR.

        Raises:
            InfeasibleError: none does.
        """
        for point in self.points:
            if point.mean >= budget.decibels:
                return point
        best = max(self.points, key=lambda point: point.mean)
        raise InfeasibleError(
            f"{budget}: the best plan that was tried has {best.mean:.1f} dB with {best.budget} full steps",
            fix=f"ask for {math.floor(best.mean * 10) / 10:g} dB, or build with --min-psnr {budget.decibels:g}",
        )


class FrontRow(Value, frozen=True):
    """A point as it is shown.

    Attributes:
        plan, way, budget: of the point.
        psnr, psnr_low, psnr_p5: dB; see `Point`.
        seconds, speedup: predicted from step times; None where those are not known.
        dominated: another point takes no longer and is no worse, and not equal in both.
    """

    plan: str
    way: str
    budget: int
    psnr: float
    psnr_low: float | None
    psnr_p5: float
    seconds: float | None
    speedup: float | None
    dominated: bool


def front_rows(front: Front, times: StepTimes | None) -> tuple[FrontRow, ...]:
    """A front with the time of each plan; without step times a plan costs its full steps."""
    points = front.points
    if times is not None and times.skipped is None and any(skipped_steps(point.plan) for point in points):
        times = None
    cost = [float(point.budget) if times is None else times.of(point.plan) for point in points]
    return tuple(
        FrontRow(
            plan=point.plan.name,
            way=point.way,
            budget=point.budget,
            psnr=point.mean,
            psnr_low=point.low,
            psnr_p5=point.p5,
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


def front_budgets(num_steps: int, max_skip: int | None, *, most: int = FRONT_POINTS) -> tuple[int, ...]:
    """From the least feasible budget to half of all steps; where those are more than `most`, at about equal ratios: so
    are their speed-ups."""
    least = least_budget(num_steps, max_skip)
    largest = max(least, num_steps // 2)
    if largest - least < most:
        return tuple(range(least, largest + 1))
    return tuple(sorted({round(budget) for budget in np.geomspace(least, largest, most).tolist()}))
