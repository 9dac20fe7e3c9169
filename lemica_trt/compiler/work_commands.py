"""The loop over the stages, up to one of them, on a work folder."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE, FRONT_FILE, REPORTS, plan_path
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import Workspace, candidate_folder, work_folder
from lemica_trt.bundle.writing import move_bundle, require_replaceable
from lemica_trt.compiler import artifacts
from lemica_trt.compiler.bundle_stages import report_of, written_bundle
from lemica_trt.compiler.context import Context
from lemica_trt.compiler.draft_stage import left_behind
from lemica_trt.compiler.estimates import DryContext, Forecast, require_counts
from lemica_trt.compiler.preflight import require_possible
from lemica_trt.compiler.requests import (
    BuildRequest,
    BuildResult,
    Inputs,
    PlanResult,
    inputs_from_request,
    profile_with_samples,
    prompts_of,
    stored_inputs,
)
from lemica_trt.compiler.stage import estimate_stages, needed_stages, run_stages
from lemica_trt.compiler.stages import STAGES
from lemica_trt.core.errors import LemicaError, UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.evaluate.step_timer import StepTimer, speeds_from_report
from lemica_trt.ir.budget import Front
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.graphs import GraphSet
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.report import StageEstimate
from lemica_trt.planning.budget import front_rows
from lemica_trt.planning.search import PlanSet, budget_outcomes

DRAFT = ("draft", "early")
"""The stages that a build runs although nothing needs what they make."""

ENGINE_STAGES = ("engine", "time", "bundle")
"""What runs where PyTorch need not be."""


def build(profile: Profile, output: Path, request: BuildRequest, reporter: Reporter) -> BuildResult:
    """All stages. What an earlier run finished from the same inputs is not done again.

    Engines of a backend that this machine cannot run are built all the same and not verified: `BuildResult.unverified`.
    The bundle takes the place of an older one after its verification; one that fails stays in `candidate_folder`.

    Args:
        profile: what to build, flags applied.
        output: the bundle's folder; the work folder lies beside it, see `work_folder`.
        request: see there.

    Raises:
        LemicaError: whatever a stage raises; finished stages stay in the work folder.
    """
    require_replaceable(output)
    request.check(profile.dtype, validation_samples=profile.calibration.validation_samples)
    return _built(inputs_from_request(profile, request), output, reporter)


def extend(output: Path, samples: str, changes: dict[str, Any], reporter: Reporter) -> BuildResult:
    """A bundle's build again, from the work folder beside it, with more calibration samples; those that are there are
    not measured again, and the bundle stays until the new one is verified.

    Args:
        samples: see `with_samples`.
        changes: fields of the request.

    Raises:
        UsageError: there is no work folder; or as `with_samples`.
        LemicaError: as `build`.
    """
    work = Workspace(work_folder(output))
    if not work.is_there:
        raise UsageError(
            f"--samples: expected the work folder of the build, {work.root.name} beside {output}: what was calibrated "
            "lies there",
            fix="bring it back, or build again with --samples",
        )
    require_replaceable(output)
    note_gone(output, (), reporter)
    inputs = with_samples(changed_inputs(stored_inputs(work), changes), samples)
    inputs.request.check(inputs.profile.dtype, validation_samples=inputs.profile.calibration.validation_samples)
    return _built(inputs, output, reporter)


def note_gone(output: Path, further: Collection[str], reporter: Reporter) -> None:
    """Say which further shapes of a bundle the one in its place will lack.

    Args:
        further: names of those that it will have.
    """
    with contextlib.suppress(LemicaError):
        if gone := [name for name in Bundle.open(output, trusted=()).shapes[1:] if name not in further]:
            again = " ".join(f"--shape {name}" for name in gone)
            reporter.note(f"the new bundle will lack {', '.join(gone)} → lemica-trt shape {output} {again}")


def _built(inputs: Inputs, output: Path, reporter: Reporter) -> BuildResult:
    require_possible(inputs)
    last = "verify" if inputs.request.verify_samples else "bundle"
    with stages_run(Workspace(work_folder(output)), inputs, reporter, *DRAFT, last, output=output) as context:
        return _result(context)


def dry_run(profile: Profile, output: Path, request: BuildRequest) -> list[StageEstimate]:
    """What `build` would do; nothing is downloaded, and next to nothing computed.

    Where the model is not on this machine there are samplings and no times.
    """
    require_replaceable(output)
    request.check(profile.dtype, validation_samples=profile.calibration.validation_samples)
    with DryContext(Workspace(work_folder(output)), inputs_from_request(profile, request), output=output) as context:
        last = "verify" if request.verify_samples else "bundle"
        stages = context.select(needed_stages(STAGES, context, *DRAFT, last))
        require_counts(context.forecast)
        if context.is_understood:
            for stage in stages:
                stage.ensures(context)
        return estimate_stages(stages, context, context.forecast)


def calibrate(profile: Profile, work: Path, request: BuildRequest, reporter: Reporter) -> ErrorGraph:
    """Profile, prompts → error graph, in a work folder."""
    request.check(profile.dtype if request.calibrate_on == "engine" else None)
    inputs = inputs_from_request(profile, request)
    require_possible(inputs, plans=False)
    with stages_run(Workspace(work), inputs, reporter, "calibrate") as context:
        return context.read(ErrorGraph, ERROR_GRAPH_FILE)


def export(work: Path, changes: dict[str, Any], reporter: Reporter) -> GraphSet:
    """A work folder → graphs in it, for plans of its methods.

    Args:
        changes: fields of the request.
    """
    inputs = changed_inputs(stored_inputs(Workspace(work)), changes)
    with stages_run(Workspace(work), inputs, reporter, "export") as context:
        return context.read(artifacts.Exported, artifacts.EXPORT_FILE).graphs


def engine(work: Path, output: Path, changes: dict[str, Any], reporter: Reporter) -> Bundle:
    """Graphs and plans of a work folder → a bundle; no PyTorch.

    Args:
        changes: fields of the request.

    Raises:
        InputError: an earlier stage has not run, or has run for another profile.
    """
    require_replaceable(output)
    inputs = changed_inputs(stored_inputs(Workspace(work)), changes)
    inputs.request.check(inputs.profile.dtype)
    with stages_run(Workspace(work), inputs, reporter, "bundle", output=output, only=ENGINE_STAGES) as context:
        return publish(context)


def plan(work: Path, changes: dict[str, Any], reporter: Reporter, *, samples: str | None = None) -> PlanResult:
    """A work folder → plans in it; several methods are tried and solvers fitted, which takes the model.

    Args:
        changes: fields of the request.
        samples: of the calibration, see `with_samples`; None: as many as there are.
    """
    inputs = changed_inputs(stored_inputs(Workspace(work)), changes)
    if samples is not None:
        inputs = with_samples(inputs, samples)
    settings, request = inputs.profile.calibration, inputs.request
    builds = request.is_timed or request.calibrate_on == "engine"
    request.check(inputs.profile.dtype if builds else None, validation_samples=settings.validation_samples)
    with stages_run(Workspace(work), inputs, reporter, "plan") as context:
        made, times = plans_of(context), context.times
        return PlanResult(
            plans=tuple(made.plans),
            outcomes=budget_outcomes(request.budgets, made, times, {}),
            front=() if made.front is None else front_rows(made.front, times),
        )


def with_samples(inputs: Inputs, samples: str) -> Inputs:
    """Inputs with more calibration samples.

    Args:
        samples: how many in all, or how many more: `+4`.

    Raises:
        UsageError: it is neither, or the calibration was given.
    """
    if inputs.given.calibration is not None:
        raise UsageError(
            "--samples: the calibration was given (--error-graph), there is none to go on with", fix="leave it out"
        )
    return msgspec.structs.replace(inputs, profile=profile_with_samples(inputs.profile, samples))


def changed_inputs(inputs: Inputs, changes: dict[str, Any]) -> Inputs:
    """Inputs of a work folder with other fields of the request; prompts are read where others are named."""
    request = msgspec.structs.replace(inputs.request, **changes)
    prompts = inputs.prompts if request.prompts is None else prompts_of(inputs.profile, request.prompts)
    return msgspec.structs.replace(inputs, request=request, prompts=prompts)


@contextlib.contextmanager
def stages_run(
    work: Workspace,
    inputs: Inputs,
    reporter: Reporter,
    *last: str,
    output: Path | None = None,
    only: tuple[str, ...] | None = None,
) -> Iterator[Context]:
    """Run the stages up to some of them, and hold the work folder while what they made is looked at.

    Args:
        last: names of the stages.
        output: folder of the bundle.
        only: see `run_stages`.
    """
    with work.locked(), Context(work, inputs, reporter, output=output) as context:
        inputs.store(work)
        stages = context.select(needed_stages(STAGES, context, *last))
        may_run = [stage for stage in stages if only is None or stage.name in only]
        todo = estimate_stages(may_run, context, Forecast.of_inputs(inputs, output))
        steps = sum(found.full_steps for found in todo)
        if steps:
            samplings = steps / inputs.profile.sampling.steps
            reporter.stage("work", f"about {steps:.0f} full steps of the DiT, {samplings:.1f} samplings' work")
        reporter.expect([(found.name, found.full_steps) for found in todo])
        try:
            run_stages(stages, context, only=only)
        except KeyboardInterrupt:
            reporter.close()
            if set(DRAFT) & set(last) and (line := left_behind(context)) is not None:
                reporter.stage(DRAFT[0], line)
            raise
        yield context


def plans_of(context: Context) -> PlanSet:
    """The plans that were made for the request."""
    index = context.read(artifacts.PlanIndex, artifacts.PLANS_FILE)
    return PlanSet(
        plans=[context.read(StepPlan, plan_path(name)) for name in index.plans],
        names=index.budgets,
        front=context.read_if_there(Front, FRONT_FILE),
    )


def publish(context: Context) -> Bundle:
    """Move the bundle that was written to its place."""
    bundle = written_bundle(context)
    assert bundle is not None and context.output is not None
    if bundle.path == candidate_folder(context.output):
        return move_bundle(bundle, context.output)
    return bundle


def _result(context: Context) -> BuildResult:
    made, request, bundle = plans_of(context), context.inputs.request, written_bundle(context)
    assert bundle is not None
    verified = context.read_if_there(artifacts.Verified, artifacts.VERIFIED_FILE)
    unverified = dict.fromkeys((entry.key.backend for entry in bundle.manifest.engines), "not asked for")
    report = None
    times = steps = context.times
    if verified is not None:
        report, unverified = report_of(context), verified.unverified
    if report is not None:
        steps, speeds = report.steps, speeds_from_report(report)
    else:
        speeds = {} if times is None else StepTimer(bundle, context.reporter).speeds(made.plans, times)
    front = () if made.front is None else front_rows(made.front, steps)
    if front:
        from lemica_trt.report.pictures import write_front

        count = bundle.manifest.profile.sampling.steps
        write_front(front, bundle.path / REPORTS, num_steps=count, report=report, plan=bundle.plan())
    outcomes = budget_outcomes(request.budgets, made, times or steps, speeds)
    return BuildResult(publish(context), report, unverified, outcomes, front)
