"""How good a bundle's plans are on its own engines: measured when one is added, kept in its reports. No PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from lemica_trt.bundle.manifest import PLANS_REPORT
from lemica_trt.bundle.reading import Bundle
from lemica_trt.compiler.quantized import unquantized
from lemica_trt.compiler.requests import prompts_of
from lemica_trt.core.atomic_folder import held
from lemica_trt.core.errors import LemicaError, UsageError
from lemica_trt.core.progress import Reporter, Tally, count
from lemica_trt.core.values import write_value
from lemica_trt.evaluate.compared import measure_plans
from lemica_trt.evaluate.samples import held_out_samples
from lemica_trt.evaluate.step_timer import require_runnable
from lemica_trt.evaluate.timing import require_uncached
from lemica_trt.ir.budget import StepBudget, skipped_steps
from lemica_trt.ir.measured import MeasuredPlan, MeasuredPlans
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import PLAN, VerifyReport
from lemica_trt.planning.planner import planners
from lemica_trt.runtime.pipeline import Pipeline

FITTED_LEAD = 0.75
"""A fitted plan of this part of the full steps, or more, is better than one that was not fitted: in every table of
benchmarks/results those of 10 steps are as good as unfitted ones of 15. For where no plan can be run."""


def known_quality(folder: Path) -> MeasuredPlans:
    """What the reports of a bundle say of its plans, and of plans that it had; nothing where they cannot be read."""
    try:
        return msgspec.json.decode((folder / PLANS_REPORT).read_bytes(), type=MeasuredPlans)
    except (OSError, ValueError, RecursionError):
        return MeasuredPlans()


def store_quality(folder: Path, found: Sequence[MeasuredPlan]) -> None:
    """Add to the reports of a bundle; not while another bundle is put in its place."""
    with contextlib.suppress(UsageError), held(folder):
        write_value(known_quality(folder) + found, folder / PLANS_REPORT)


def quality_from_report(report: VerifyReport, plans: Sequence[StepPlan]) -> list[MeasuredPlan]:
    """What a verification found of each plan."""
    rows = {row.plan: row for row in report.quality if row.method == PLAN}
    times = {timing.plan: timing for timing in report.timing}
    found = []
    for plan in plans:
        row, timing = rows.get(plan.name), times.get(plan.name)
        if timing is not None:
            found.append(
                MeasuredPlan(
                    rows_digest=plan.rows_digest,
                    psnr=() if row is None else row.each_psnr,
                    seconds=timing.total,
                    speedup=timing.speedup,
                    machine=report.machine,
                    backend=report.backend,
                    reference_steps=None if row is None else row.reference_steps,
                )
            )
    return found


def measure_quality(bundle: Bundle, plans: Sequence[StepPlan], clips: int, reporter: Reporter) -> list[MeasuredPlan]:
    """Run plans, and the uncached one, on held-out clips; where that cannot be, say why.

    Plans of quantised engines are compared with the uncached run of those that they were made from.

    Args:
        plans: that fit the bundle's graphs.
        clips: how many; 0: none.

    Returns:
        One for each plan, and the uncached plan's; nothing where nothing was run.
    """
    if not clips or not plans:
        return []
    try:
        backend = require_runnable(bundle, fix="measure where they run")
        uncached = require_uncached(bundle)
        samples = held_out_samples(prompts_of(bundle.manifest.profile, None, split="held_out"), clips)
        exact = unquantized(bundle) if bundle.engine(backend).quantized else None
        references = uncached.budget * (1 if exact is None else 2)
        steps = clips * (references + sum(plan.budget for plan in plans))
        reporter.stage("quality", f"{count(clips, 'held-out clip')} on {backend}, {steps} full steps")
        with contextlib.ExitStack() as opened:
            pipe = opened.enter_context(Pipeline(bundle, backend=backend))
            other = None if exact is None else opened.enter_context(Pipeline(exact, backend=backend))
            return measure_plans(pipe, plans, uncached, samples, Tally(reporter, steps), backend=backend, exact=other)
    except LemicaError as error:
        reporter.stage("quality", f"not measured: {error.what}")
        return []


def rivals_of(plan: StepPlan, budget: int | StepBudget, others: Sequence[StepPlan]) -> list[StepPlan]:
    """Other plans that a time allows, and that are compared with the same steps; none where full steps are given."""
    if isinstance(budget, int):
        return []
    found = []
    for other in others:
        most = budget.skipping if skipped_steps(other) else budget.folded
        if most is not None and other.budget <= most and other.reference_steps == plan.reference_steps:
            found.append(other)
    return [other for other in found if other.rows != plan.rows]


def better_rival(plan: StepPlan, rivals: Sequence[StepPlan], measured: Mapping[str, MeasuredPlan]) -> StepPlan | None:
    """The plan to keep instead of a new one, if there is one that is at least as good.

    Args:
        measured: by digest of the rows; where the new plan is not in it, fitted plans are taken to be better than
            others, see `FITTED_LEAD`.
    """
    if (new := measured.get(plan.rows_digest)) is not None and new.mean is not None:
        scores = {rival.rows_digest: measured[rival.rows_digest].mean for rival in rivals}
        best = max(rivals, key=lambda rival: scores[rival.rows_digest] or 0.0, default=None)
        return best if best is not None and (scores[best.rows_digest] or 0.0) >= new.mean else None
    if is_fitted(plan):
        return None
    near = [rival for rival in rivals if is_fitted(rival) and rival.budget >= FITTED_LEAD * plan.budget]
    return max(near, key=lambda rival: rival.budget, default=None)


def is_fitted(plan: StepPlan) -> bool:
    """Whether its method fits solvers to the model."""
    return plan.method in planners() and "fit" in planners()[plan.method].needs
