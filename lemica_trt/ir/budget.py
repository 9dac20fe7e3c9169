"""Budgets in the unit that the user has, times of steps, and quality by budget."""

from __future__ import annotations

import math
import re

import numpy as np

from lemica_trt.core.errors import InfeasibleError
from lemica_trt.core.metrics import PSNR_CAP, margin_95
from lemica_trt.core.values import Value, require, require_finite
from lemica_trt.ir.plan import StepPlan


class Speedup(Value, frozen=True, tag="speedup"):
    """Time of the uncached plan / time of the plan, the denoising loop of one request: at least this."""

    factor: float

    def __post_init__(self) -> None:
        require_finite((self.factor,), "speed-up")
        require(self.factor >= 1, f"a speed-up must be at least 1, got {self.factor:g}")

    def __str__(self) -> str:
        return f"speed-up {self.factor:g}×"


class Latency(Value, frozen=True, tag="latency"):
    """Seconds of the denoising loop of one request, at most; what text encoder and VAE take is not in it."""

    seconds: float

    def __post_init__(self) -> None:
        require_finite((self.seconds,), "latency")
        require(self.seconds > 0, f"a latency must be more than 0, got {self.seconds:g}")

    def __str__(self) -> str:
        return f"latency {format_seconds(self.seconds)}"


class MinPsnr(Value, frozen=True, tag="min-psnr"):
    """PSNR against the uncached run, dB, at least: the mean over the validation samples."""

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


def format_budget(budget: Budget) -> str:
    """A budget in words."""
    return f"{budget} full steps" if isinstance(budget, int) else str(budget)


def format_seconds(seconds: float) -> str:
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


class StepTimes(Value, frozen=True):
    """What steps take on one machine's engines, one request, seconds of wall-clock time.

    Attributes:
        full: a step that runs the full graph; of several kinds of steps the mean over the sampler's.
        skipped: a step that runs the skip graph, likewise; None where there is none.
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
    return sum(row.cached for row in plan.rows)


class StepBudget(Value, frozen=True):
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


class Point(Value, frozen=True):
    """One budget's plan, and how good it is.

    Attributes:
        plan: the best of those that were tried.
        psnr: dB of each validation clip against the uncached run. The plan was chosen on the same samples, by the
            signal-to-noise ratio of their latents; `verify` measures others.
    """

    plan: StepPlan
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
        """dB, the low end of the 95 % interval of the mean (Student's t); None for a single clip."""
        margin = margin_95(self.psnr)
        return None if margin is None else self.mean - margin

    @property
    def p5(self) -> float:
        """dB, 5th percentile over clips."""
        return float(np.percentile(self.psnr, 5))

    @property
    def worst(self) -> float:
        """dB of the worst clip."""
        return min(self.psnr)


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
        plan, method, budget: of the point's plan.
        psnr, psnr_low, psnr_p5, psnr_worst: dB; see `Point`.
        seconds, speedup: predicted from step times; None where those are not known.
        dominated: another point takes no longer and is no worse, and not equal in both.
    """

    plan: str
    method: str
    budget: int
    psnr: float
    psnr_low: float | None
    psnr_p5: float
    psnr_worst: float
    seconds: float | None
    speedup: float | None
    dominated: bool
