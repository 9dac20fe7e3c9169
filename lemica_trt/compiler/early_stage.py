"""The draft of the bundle gets a fitted plan as soon as a few samples are calibrated.

The plan is planned on the error graph of those samples, fitted to the first, and run on the engines for the clip that
the draft was verified on. Where its frames are nearer to the uncached run than those of the plan in the draft, it takes
that one's place. What was calibrated is kept for the calibration: all this costs twice the plan's full steps.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from lemica_trt.bundle.manifest import plan_path
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.reports import store_report, stored_report
from lemica_trt.bundle.writing import move_bundle
from lemica_trt.compiler import artifacts
from lemica_trt.compiler.artifacts import Draft
from lemica_trt.compiler.context import Context
from lemica_trt.compiler.draft_stage import first_of_draft, write_draft
from lemica_trt.compiler.estimates import Forecast, early_steps
from lemica_trt.compiler.plan_stages import calibrated
from lemica_trt.compiler.stage import Writes
from lemica_trt.core.progress import Reporter, Within, count
from lemica_trt.core.values import write_value
from lemica_trt.evaluate.step_timer import runnable_backend
from lemica_trt.ir.budget import MinPsnr
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import VerifyReport
from lemica_trt.planning.layout import misfit
from lemica_trt.planning.planner import full_steps_for, planners
from lemica_trt.planning.search import resolve_budgets
from lemica_trt.planning.step_plan import UNCACHED

METHOD = "fitted"
"""What plans it."""


def run_early(context: Context, folder: Path) -> Writes:
    """A few samples → a draft with a fitted plan at the output; nothing where no draft lies there, or it is as good."""
    draft, output, found = context.read(Draft, artifacts.DRAFT_FILE), context.output, Draft()
    assert output is not None
    samples = context.inputs.early_samples
    lies_there = draft.run is not None and Bundle.open(output, trusted=()).digest == draft.manifest
    if lies_there and not context.table.stochastic:
        _ = context.model  # opened first: that is told of as a stage of its own
        context.reporter.stage("early", f"a fitted plan for the draft, from {count(samples, 'sample')}")
        reporter = Within(context.reporter, early_steps(Forecast.of_inputs(context.inputs, None)))
        plan = _plan(context, samples, reporter)
        if misfit(plan, context.layout) is None:
            found = _better(context, plan, output, reporter)
    write_value(found, folder / artifacts.EARLY_FILE)
    return {"early": [artifacts.EARLY_FILE]}


def _plan(context: Context, samples: int, reporter: Reporter) -> StepPlan:
    """Planned on some samples, and fitted to the first."""
    from lemica_trt.calibrate.calibration import fit_by_model

    inputs, table, planner = context.inputs, context.table, planners()[METHOD]
    settings = msgspec.structs.replace(inputs.profile.calibration, samples=samples, validation_samples=0)
    calibration = calibrated(context, settings, reporter)
    fit = fit_by_model(
        lambda: context.step_model, msgspec.structs.replace(settings, samples=1), table, inputs.prompts,
        reference=None, journals=context.work.journals, trajectories=context.trajectories, reporter=reporter,
    )  # fmt: skip
    (budget,) = resolve_budgets(
        inputs.request.budgets[:1], [planner], context.times, table.num_steps, settings.max_skip
    )
    assert not isinstance(budget, MinPsnr)
    steps = full_steps_for(planner, budget)
    assert steps is not None
    return planner(context.problem(calibration, fit=fit), steps)


def _better(context: Context, plan: StepPlan, output: Path, reporter: Reporter) -> Draft:
    """The draft with a plan, where it is better with it."""
    from lemica_trt.evaluate.samples import held_out_samples
    from lemica_trt.evaluate.verify import require_verified, verify

    before = stored_report(Bundle.open(output, trusted=()))
    bundle = write_draft(context, [plan, context.read(StepPlan, plan_path(UNCACHED))])
    backend, _ = runnable_backend(bundle)
    report = verify(
        bundle,
        context.model,
        held_out_samples(context.inputs.held_out, 1),
        reporter=reporter,
        backend=backend,
        first=first_of_draft(context),
        draft=True,
        steps=None if before is None else before.steps,
    ).report
    old, new = _decibels(before), _decibels(report)
    if new <= old:
        shutil.rmtree(bundle.path)
        context.reporter.note(f"the draft keeps its plan: {old:.1f} dB on one clip, the fitted one has {new:.1f}")
        return Draft()
    store_report(report, bundle)
    require_verified(report, bundle.path)
    context.reporter.note(f"{output}: {plan.name} by {plan.method}, {new:.1f} dB on one clip, {old:.1f} before")
    return Draft(manifest=move_bundle(bundle, output).digest)


def _decibels(report: VerifyReport | None) -> float:
    """PSNR of the plan of a draft on its clip; 0 where the draft has none."""
    return report.quality[0].psnr if report is not None and report.quality else 0.0
