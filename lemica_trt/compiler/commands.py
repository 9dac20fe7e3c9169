"""The stages alone, on the files of the one before, and what is done with a finished bundle."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lemica_trt.bundle.manifest import (
    ERROR_GRAPH_FILE,
    GRAMS_FILE,
    REFERENCE_FILE,
    SAMPLER_FILE,
    SELECTION_FILE,
    SENSITIVITY_FILE,
    plan_path,
)
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import add_plan, require_replaceable, write_bundle
from lemica_trt.compiler.budgets import (
    DEFAULT_BUDGETS,
    Clock,
    Planned,
    Scout,
    afforded_by,
    answers,
    carried_front,
    plan_budgets,
    require_searchable,
    timed,
)
from lemica_trt.compiler.planning import fitter, make_plans, planned_solvers
from lemica_trt.compiler.stages import (
    assemble,
    begin,
    calibrate,
    calibration_prompts,
    engines,
    export,
    hired,
    open_model,
    reference_sampler,
    retargeted,
    verifiable,
    verify_bundle,
)
from lemica_trt.compiler.work import (
    Exported,
    Findings,
    Work,
    exported_in,
    findings_in,
    plans_in,
    plans_to_run,
    short,
    work_folder,
    write_plans,
)
from lemica_trt.core.errors import InputError, MissingDependencyError, UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.core.values import V, Value, read_value
from lemica_trt.ir.budget import Budget, FrontRow, MinPsnr
from lemica_trt.ir.calibration import ErrorGraph, Sensitivity, TrajectoryGrams
from lemica_trt.ir.engine import Option
from lemica_trt.ir.plan import StepPlan, layout_from_plans
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.report import Answer
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.trials import TrialTables
from lemica_trt.planning.budget import front_rows
from lemica_trt.planning.planner import planners, planners_named

if TYPE_CHECKING:
    from lemica_trt.ir.report import VerifyReport


class Replanned(Value, frozen=True):
    """What `plan` made.

    Attributes:
        plans: all that the bundle has now; of a work folder, those made.
        answers: what came of budgets that are no numbers of full steps.
        front: quality and predicted time by budget, if it was asked for.
    """

    plans: tuple[StepPlan, ...]
    answers: tuple[Answer, ...] = ()
    front: tuple[FrontRow, ...] = ()


def replan(
    bundle: Bundle,
    *,
    budgets: Sequence[Budget],
    methods: Sequence[str],
    schedule: Sequence[int] | None,
    default: str | None,
    reporter: Reporter,
    pareto: bool = False,
    reference_steps: int | None = None,
) -> tuple[Bundle, Replanned]:
    """Add plans to a bundle from what it carries of its calibration; no PyTorch, no plan is tried.

    Steps are timed only where a budget is in a unit of time, or a front is shown, and the reports have no times of
    this machine. A PSNR is looked up among the plans that were tried when the bundle was built.

    Args:
        reference_steps: M, the bundle's own or N; None: the bundle's own. See `Request`.

    Raises:
        UsageError: another M; a fitted solver that the bundle does not have.
        UsageError, InfeasibleError, InputError: as `make_plans`, `budget.afforded`, `carried_front`, `bundle.add_plan`.
        MissingDependencyError: a time is needed, and no engine runs here.
    """

    def carried(kind: type[V], file: str) -> V | None:
        return read_value(kind, bundle.file(file)) if file in bundle.manifest.files else None

    require_searchable(budgets, False, methods)
    table = read_value(SamplerTable, bundle.file(SAMPLER_FILE))
    graph = carried(ErrorGraph, ERROR_GRAPH_FILE)
    fine = _carried_reference(carried(SamplerTable, REFERENCE_FILE), table, reference_steps)
    selected = carried(TrialTables, SELECTION_FILE)
    cached = [plan for plan in map(bundle.plan, bundle.plans) if plan.budget < plan.num_steps]
    before = {plan.budget: [plan.method] for plan in cached}
    against = None if fine is None else fine.num_steps
    by_fit = {name for name, planner in planners().items() if "fit" in planner.needs}
    solvers = {plan.full_steps: plan for plan in cached if plan.method in by_fit and plan.reference_steps == against}

    def fit(schedule: Schedule) -> StepPlan:
        if schedule.full_steps not in solvers:
            raise UsageError(
                f"a solver for {schedule.budget} full steps is fitted to the model, and the bundle has none for them",
                fix=f"lemica-trt build … --budget {schedule.budget}",
            )
        return solvers[schedule.full_steps]

    for trials in selected.tables if selected is not None else ():
        before[trials.budget] = [trial.label for trial in trials.trials]
    looked_up = pareto or any(isinstance(budget, MinPsnr) for budget in budgets)
    front = carried_front(bundle) if looked_up else None
    searches = schedule is None and any("error-graph" in planner.needs for planner in planners_named(methods))
    clock = Clock(bundle, reporter)
    times = clock.steps if any(map(timed, budgets)) else None
    max_skip = graph.max_skip if graph is not None and searches else None
    chosen: list[StepPlan] = []
    for budget in afforded_by(budgets, times, methods, table.num_steps, max_skip):
        if isinstance(budget, MinPsnr):
            assert front is not None
            chosen.append(front.least(budget).plan)
            continue
        made, _ = make_plans(
            table,
            profile=bundle.manifest.profile,
            budgets=[budget],
            methods=methods,
            findings=Findings(
                graph=graph,
                grams=carried(TrajectoryGrams, GRAMS_FILE),
                reference=fine,
                sensitivity=carried(Sensitivity, SENSITIVITY_FILE),
            ),
            schedule=schedule,
            solver=planned_solvers(table) if any(method.startswith("stock:") for method in methods) else None,
            fit=fit,
            before=before,
            graphs=bundle.manifest.graphs,
        )
        chosen += made
    for plan in chosen:
        reporter.stage("plan", f"{plan.name}: full steps {' '.join(map(str, plan.full_steps))}")
    paces = clock.paces(chosen, times) if times is not None else {}
    if times is None and looked_up:
        with contextlib.suppress(MissingDependencyError):  # a front is worth showing where no engine runs
            times = clock.steps
    if chosen or default is not None:
        bundle = add_plan(bundle, *{plan.name: plan for plan in chosen}.values(), default=default)
    planned = Planned(chosen, tuple(plan.name for plan in chosen), (), front)
    return bundle, Replanned(
        plans=tuple(bundle.plan(name) for name in bundle.plans),
        answers=answers(budgets, planned, times, paces),
        front=front_rows(front, times) if front is not None and pareto else (),
    )


def _carried_reference(fine: SamplerTable | None, table: SamplerTable, steps: int | None) -> SamplerTable | None:
    """The sampler at M steps out of a bundle; None: plans are held against N.

    Raises:
        UsageError: the bundle has it for another M.
    """
    if steps == table.num_steps:
        return None
    if steps is not None and (fine is None or fine.num_steps != steps):
        known = [table.num_steps] if fine is None else [table.num_steps, fine.num_steps]
        raise UsageError(
            f"--reference-steps: expected {' or '.join(map(str, known))}, which the bundle knows, got {steps}",
            fix=f"lemica-trt build … --reference-steps {steps}",
        )
    return fine


def profile_of_bundle(bundle: Bundle, weights: str | None) -> Profile:
    """The profile that a bundle was built as, pointing at weights that are here.

    Raises:
        UsageError: the bundle was built from a local folder, and that is not named.
    """
    profile = bundle.manifest.profile
    if weights is not None:
        return msgspec.structs.replace(profile, source=absolute_source(weights))
    if ":" in profile.source or "/" in profile.source:  # package:NAME or a hub id; of folders only the name is kept
        return profile
    raise UsageError(
        f"the bundle was built from a local folder {profile.source!r}, which it does not carry",
        fix="name it: --weights DIR",
    )


def absolute_source(source: str) -> str:
    """A source that means the same from every working directory: folders become absolute."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def calibrate_stage(
    profile: Profile,
    work: Work,
    prompts: Path | None,
    device: str | None,
    ray: str | None,
    calibration_from: Path | None,
    reporter: Reporter,
) -> ErrorGraph:
    """Profile → `profile.json`, `sampler.json`, `error_graph.json` in the work folder.

    Args:
        calibration_from: work folder or bundle whose calibration is used; the profile is adapted to it.
    """
    profile, sensitivity = retargeted(profile, calibration_from)
    texts = calibration_prompts(profile, prompts)
    with work.locked():
        model, table = begin(profile, work, device, reporter)
        with hired(model, ray, reporter) as workers:
            graph = calibrate(model, table, texts, work, reporter, workers, sensitivity).graph
        assert graph is not None
        return graph


def plan_stage(
    target: Path,
    *,
    budgets: Sequence[Budget] | None,
    methods: Sequence[str],
    schedule: Sequence[int] | None,
    default: str | None,
    reporter: Reporter,
    pareto: bool = False,
    reference_steps: int | None = None,
) -> Replanned:
    """Plans of a bundle (added to it) or of a work folder (written to `plans/`; several plans are tried and solvers
    fitted there, which takes the model).

    Args:
        budgets: None: none where only a bundle's front or another default is asked for, else `DEFAULT_BUDGETS`.
        methods, schedule, pareto: see `Request`.
        default: the bundle's new default plan.
        reference_steps: see `Request`; of a bundle as in `replan`.

    Raises:
        UsageError: `default` for a work folder: only a bundle has one; a time for a work folder: it has no engines.
        InputError: the folder is neither.
    """
    work = Work(target)
    if not work.profile.is_file():
        if budgets is None:
            alone = default is not None and schedule is None and reference_steps is None and methods == ("auto",)
            budgets = () if pareto or alone else DEFAULT_BUDGETS
        bundle, made = replan(
            Bundle.open(target),
            budgets=budgets,
            methods=methods,
            schedule=schedule,
            default=default,
            reporter=reporter,
            pareto=pareto,
            reference_steps=reference_steps,
        )
        if made.front:
            from lemica_trt.report.folder import write_front

            with contextlib.suppress(MissingDependencyError):  # matplotlib comes with what builds
                write_front(bundle, made.front)
        return made
    if default is not None:
        raise UsageError("--default is for bundles", fix="in a work folder the first budget's plan becomes the default")
    budgets = DEFAULT_BUDGETS if budgets is None else budgets
    if any(map(timed, budgets)):
        raise UsageError(
            "a time needs engines, and a work folder has none that are finished",
            fix="give it to `lemica-trt build`, or to `lemica-trt plan` with the bundle",
        )
    require_searchable(budgets, pareto, methods)
    from lemica_trt.evaluate.evaluator import PlanEvaluator, validation_samples

    with work.locked():
        profile, table = read_value(Profile, work.profile), read_value(SamplerTable, work.sampler)
        prompts = calibration_prompts(profile, None)
        model = functools.cache(lambda: open_model(profile, reporter))
        fine = None if reference_steps is None else reference_sampler(model(), table, reference_steps)
        findings = findings_in(work)._replace(reference=fine)
        evaluator = PlanEvaluator(
            model,
            table,
            validation_samples(prompts, profile.calibration),
            reference=fine,
            folder=work.root,
            reporter=reporter,
        )
        make = functools.partial(
            make_plans,
            table,
            profile=profile,
            methods=methods,
            findings=findings,
            schedule=schedule,
            solver=planned_solvers(table),
            fit=fitter(model, table, prompts, work, reporter, fine=fine),
        )
        planned = plan_budgets(
            afforded_by(budgets, None, methods, table.num_steps, None),
            Scout(make, evaluator),
            reporter,
            pareto=pareto,
            num_steps=table.num_steps,
            max_skip=None if findings.graph is None else findings.graph.max_skip,
        )
        findings = findings._replace(selections=planned.selections, front=planned.front)
        write_plans(planned.plans, findings, work, reporter)
        return Replanned(
            plans=tuple(planned.plans),
            answers=answers(budgets, planned, None, {}),
            front=() if planned.front is None else front_rows(planned.front, None),
        )


def export_stage(work: Work, reporter: Reporter) -> Exported:
    """The plans of a work folder → graphs in it."""
    with work.locked():
        plans = plans_to_run(work)
        model = open_model(read_value(Profile, work.profile), reporter)
        layout = layout_from_plans(
            plans, latent_shape=model.latent_shape, guided=model.guided, conditions=model.conditions
        )
        return export(model, layout, work, reporter)


def engine_stage(
    target: Path, output: Path, backends: Sequence[str], options: dict[str, Option], reporter: Reporter
) -> Bundle:
    """The graphs and plans of a work folder, or of a bundle that was built for another machine → a bundle; no PyTorch.

    Raises:
        InputError: an earlier stage has not run, or has run for another profile; or the folder is neither.
        UsageError: `output` is the bundle itself.
    """
    require_replaceable(output)
    work = Work(target)
    if not work.profile.is_file():
        return reengine(Bundle.open(target), output, backends, options, reporter)
    with work.locked():
        profile, table = read_value(Profile, work.profile), read_value(SamplerTable, work.sampler)
        plans = plans_in(work)
        exported = exported_in(work)
        # The key needs the libraries that exported, which need not be here: compare what the graphs show instead.
        if exported is None or (exported.graphs.dtype, exported.shape, exported.source) != (
            profile.dtype,
            profile.shape,
            profile.source,
        ):
            found = "none" if exported is None else "others"
            raise InputError(
                f"{work.export}: expected the graphs of {work.profile.name}, got {found}",
                fix=f"lemica-trt export {work.root}",
            )
        entries = engines(exported.graphs, work.export, work, backends, options, reporter)
        return assemble(profile, table, findings_in(work), plans, exported, entries, work, output, reporter)


def reengine(
    bundle: Bundle, output: Path, backends: Sequence[str], options: dict[str, Option], reporter: Reporter
) -> Bundle:
    """The same bundle with other engines: its graphs and plans as they are, engines built here.

    Raises:
        UsageError: `output` is the bundle itself.
        IntegrityError: a file of the bundle is altered or missing.
    """
    if output.resolve() == bundle.path.resolve():
        raise UsageError(f"--output: expected another folder than the bundle, got {output}", fix="choose another")
    bundle.check()
    manifest = bundle.manifest
    work = Work(work_folder(output))
    with work.locked():
        entries = engines(manifest.graphs, bundle.path, work, backends, options, reporter)
        graphs = {name for graph in manifest.graphs.graphs for name in (graph.file, *graph.data_files)}
        old = {name for entry in manifest.engines for name in entry.files.values()} - graphs
        plans = {plan_path(name) for name in manifest.plans}
        files: dict[str, Path | bytes] = {
            name: bundle.path / name for name in manifest.files if name not in old | plans
        }
        for entry in entries:
            files.update({name: work.root / name for name in entry.files.values() if name not in files})
        reporter.stage("bundle", str(output))
        return write_bundle(
            output,
            profile=manifest.profile,
            graphs=manifest.graphs,
            plans=[bundle.plan(name) for name in manifest.plans],
            default_plan=manifest.default_plan,
            encoders=manifest.encoders,
            engines=entries,
            files=files,
            revision=manifest.revision,
            versions=manifest.versions,
        )


def verify_stage(
    bundle: Bundle, weights: str | None, samples: int, device: str | None, backend: str | None, reporter: Reporter
) -> VerifyReport:
    """Verify a bundle against the model that it was built from, on the backend named or the first that runs here.

    Raises:
        MissingDependencyError: none of its engines can run here.
    """
    if backend is None:
        backend, reasons = verifiable(bundle)
        if backend is None:
            raise MissingDependencyError(
                f"expected engines that run on this machine, got {'; '.join(f'{k}: {v}' for k, v in reasons.items())}",
                fix="verify the bundle where they run",
            )
    model = open_model(profile_of_bundle(bundle, weights), reporter, device=device)
    if model.revision != bundle.manifest.revision:
        raise InputError(
            f"expected the weights that the bundle was built from ({short(bundle.manifest.revision)}), "
            f"got {short(model.revision)} in {model.profile.source}",
            fix="name the right folder with --weights, or rebuild the bundle",
        )
    return verify_bundle(bundle, model, samples, reporter, backend=backend)
