"""Ways of making a clip, side by side: all steps, a plan, and what else its number of full steps can be spent on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lemica_trt.ir.budget import format_seconds
from lemica_trt.ir.kept import UNCACHED, Kept
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


class Strip(NamedTuple):
    """The full steps of a plan, as pictures draw them.

    Attributes:
        name: at the left.
        full_steps: of the sampler's steps.
        quality: written at the right; None: not measured.
        reuses: whether the plan has the costs that the error graph measures: then its segments are outlined there, if
            it is the first that does.
        is_default: drawn dark, and named in bold.
    """

    name: str
    full_steps: tuple[int, ...]
    quality: Quality | None
    reuses: bool
    is_default: bool


def strips_of(
    report: VerifyReport | None, kept: Kept | None, plans: Sequence[StepPlan], default: StepPlan
) -> list[Strip]:
    """The plans that leave steps out, the default one first, and behind it the baselines of the same sampler.

    Args:
        report: has their quality, and `kept` the schedules of baselines; None: there is none.
        plans: of a bundle.
        default: one of them.
    """
    found, quality = list[Strip](), () if report is None else report.quality
    for plan in sorted(plans, key=lambda plan: (plan.name != default.name, plan.budget)):
        if plan.budget == plan.num_steps:
            continue
        by_method = {row.method: row for row in quality if row.plan == plan.name}
        reuses = any(row.cached for row in plan.rows)
        found.append(Strip(plan.name, plan.full_steps, by_method.get(PLAN), reuses, plan.name == default.name))
        if plan.name == default.name and kept is not None:
            for run in kept.clips.clips[0].runs:
                if run.method not in (PLAN, UNCACHED) and run.num_steps == plan.num_steps:
                    name = BASELINES.get(run.method, run.method)
                    found.append(Strip(name, run.full_steps, by_method.get(run.method), True, False))
    return found
