"""Ways of making a clip, side by side: all steps, a plan, and what else its number of full steps can be spent on."""

from __future__ import annotations

from typing import NamedTuple

from lemica_trt.ir.budget import format_seconds
from lemica_trt.ir.kept import UNCACHED
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import PLAN, Quality, VerifyReport

BASELINES = {"lemica": "LeMiCa", "uniform": "uniform", "fewer-steps": "fewer steps"}
"""Method of a baseline → what tables call it."""

REUSE_RESIDUALS = ("lemica", "uniform")
"""Baselines that run the skip graph in every step that is not full."""


class Way(NamedTuple):
    """One way.

    Attributes:
        method: as in `KeptRun`.
        name: for people.
        budget, num_steps: full steps, and of how many.
        seconds: of the denoising loop of one request; None: not known.
        speedup: against all steps in full.
        predicted: the times are put together from those of single steps; otherwise the loop was timed.
        quality: over the held-out clips; None: others are compared with it.
    """

    method: str
    name: str
    budget: int
    num_steps: int
    seconds: float | None
    speedup: float | None
    predicted: bool
    quality: Quality | None

    @property
    def cost(self) -> str:
        """Seconds and speed-up."""
        if self.seconds is None or self.speedup is None:
            return ""
        about = "≈ " if self.predicted else ""
        return f"{about}{format_seconds(self.seconds)} · {about}{self.speedup:.1f}×"


def ways_of(report: VerifyReport, plan: StepPlan) -> list[Way]:
    """The uncached run, a plan, and the baselines that verification ran beside it.

    Baselines run in PyTorch, so that their time on the engines is predicted.
    """
    timing = {timing.plan: timing for timing in report.timing}
    whole = next((timing for timing in report.timing if timing.budget == plan.num_steps), None)
    steps, total, finer = plan.num_steps, None if whole is None else whole.total, plan.reference_steps
    found = [Way(UNCACHED, f"all {steps} steps", steps, steps, total, None if total is None else 1.0, False, None)]
    if finer is not None:
        times = None if report.steps is None else report.steps.total(steps) / report.steps.total(finer)
        seconds = None if times is None or total is None else total / times
        found = [Way(UNCACHED, f"same sampler, {finer} steps", finer, finer, seconds, times, True, None)]
    for quality in (row for row in report.quality if row.plan == plan.name):
        if quality.method == PLAN:
            own = timing.get(plan.name)
            seconds, speedup = (None, None) if own is None else (own.total, own.speedup)
            found.append(Way(PLAN, f"plan {plan.name}", plan.budget, steps, seconds, speedup, False, quality))
            continue
        speedup = _predicted(report, quality, steps)
        seconds = None if speedup is None or total is None else total / speedup
        few = quality.method not in REUSE_RESIDUALS
        name = BASELINES.get(quality.method, quality.method)
        found.append(
            Way(
                quality.method,
                f"same sampler, {quality.budget} steps" if few else name,
                quality.budget,
                quality.budget if few else steps,
                seconds,
                speedup,
                True,
                quality,
            )
        )
    return found


def _predicted(report: VerifyReport, quality: Quality, num_steps: int) -> float | None:
    """Time of all steps / time of a baseline, from step times."""
    times = report.steps
    skipped = num_steps - quality.budget if quality.method in REUSE_RESIDUALS else 0
    if times is None or (skipped and times.skipped is None):
        return None
    return times.total(num_steps) / times.total(quality.budget, skipped)
