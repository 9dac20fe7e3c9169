"""What a build is asked for, all its stages in order, and what they would cost."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lemica_trt.backends.builders import check as check_engine
from lemica_trt.backends.builders import estimate as estimate_engine
from lemica_trt.backends.builders import options_by_backend
from lemica_trt.bundle.manifest import GRAMS_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import move_bundle, require_replaceable
from lemica_trt.compiler.budgets import (
    DEFAULT_BUDGETS,
    Clock,
    Scout,
    afforded_by,
    answers,
    paces_of,
    plan_budgets,
    probe,
    require_searchable,
    scouting_cost,
    timed,
)
from lemica_trt.compiler.planning import fitter, make_plans, planned_solvers, require_graph_fits
from lemica_trt.compiler.stages import (
    assemble,
    begin,
    calibrate,
    calibration_cost,
    calibration_prompts,
    engines,
    export,
    hired,
    lower_sampler,
    open_model,
    reference_sampler,
    retargeted,
    verifiable,
    verify_bundle,
)
from lemica_trt.compiler.work import Findings, Work, candidate_folder, plans_in, plans_to_run, work_folder, write_plans
from lemica_trt.core.errors import InfeasibleError
from lemica_trt.core.progress import Quiet, Reporter
from lemica_trt.core.values import Value, read_value
from lemica_trt.ir.budget import Budget, FrontRow, MinPsnr, StepTimes, said
from lemica_trt.ir.calibration import ErrorGraph, TrajectoryGrams
from lemica_trt.ir.engine import Option
from lemica_trt.ir.plan import layout_from_plans
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.report import Answer, Stage
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.planning.budget import afforded, front_budgets, front_rows
from lemica_trt.planning.minimax import least_budget, require_feasible
from lemica_trt.planning.planner import AUTO, UNFITTED, Planner, planners_named, trial_runs

if TYPE_CHECKING:
    from lemica_trt.ir.report import VerifyReport
    from lemica_trt.models import Model


class Request(Value, frozen=True):
    """What `build` is asked for beyond the profile.

    Attributes:
        budgets: of each plan, full steps or in another unit; the first plan is the default.
        pareto: whether the quality of budgets all along is measured too.
        methods: names of planners, or `auto`; the plans of several are tried.
        schedule: full steps as given; then the budgets are not used and nothing is calibrated.
        error_graph: path of an error graph to use instead of calibrating; Grams beside it (`grams.json`, as work
            folders and bundles have them) are used too.
        calibration_from: path of a work folder or bundle of the same model whose calibration is carried over.
        prompts: path of calibration prompts instead of the profile's.
        device: torch device that calibrates and verifies; None: a GPU where there is one.
        ray: address of the Ray cluster that calibrates and tries plans; None: this process.
        backends: engines to build, in order of preference.
        options: builder options; each backend takes those that it has.
        verify_samples: held-out clips of the verification; 0: none at all.
        reference_steps: M: the run that plans are held against is the sampler with M steps; None: its own N.
    """

    budgets: tuple[Budget, ...] = DEFAULT_BUDGETS
    pareto: bool = False
    methods: tuple[str, ...] = ("auto",)
    schedule: tuple[int, ...] | None = None
    error_graph: str | None = None
    calibration_from: str | None = None
    prompts: str | None = None
    device: str | None = None
    ray: str | None = None
    backends: tuple[str, ...] = ("onnxruntime",)
    options: dict[str, Option] = {}
    verify_samples: int = 8
    reference_steps: int | None = None

    @property
    def calibrates(self) -> bool:
        """Whether an error graph has to be measured."""
        return self.needs_graph and self.error_graph is None

    @property
    def source(self) -> Path | None:
        """`calibration_from`."""
        return None if self.calibration_from is None else Path(self.calibration_from)

    @property
    def needs_graph(self) -> bool:
        """Whether a method searches an error graph."""
        return self.schedule is None and any("error-graph" in planner.needs for planner in planners_named(self.methods))


def check_request(profile: Profile, output: Path, request: Request) -> None:
    """Refuse before any work what could only fail behind it.

    Raises:
        UsageError: unknown backend or option; `output` is something else than a bundle; budgets to be searched of a
            method that has only its own.
        UnsupportedError, MissingDependencyError: as `builders.check`.
        InputError: a prompt file or error graph cannot be read.
    """
    require_replaceable(output)
    require_searchable(request.budgets, request.pareto, request.methods)
    for backend, options in options_by_backend(request.backends, request.options).items():
        check_engine(backend, profile.dtype, options)
    calibration_prompts(profile, Path(request.prompts) if request.prompts else None)
    if request.error_graph is not None:
        read_value(ErrorGraph, request.error_graph)
    if request.verify_samples:
        calibration_prompts(profile, None, split="held_out")


class Result(NamedTuple):
    """What `build` made.

    Attributes:
        bundle: on disk.
        report: of the engines that were verified; None where none were.
        unverified: backends whose engines were built and not verified, and why.
        answers: what came of budgets that are no numbers of full steps.
        front: quality and predicted time of the budgets that were looked at.
    """

    bundle: Bundle
    report: VerifyReport | None
    unverified: dict[str, str]
    answers: tuple[Answer, ...]
    front: tuple[FrontRow, ...]


def build(profile: Profile, output: Path, request: Request, reporter: Reporter) -> Result:
    """All stages. What an earlier run finished from the same input is not done again.

    Engines of a backend that this machine cannot run are built all the same and not verified: `Result.unverified`.
    The bundle takes the place of an older one behind its verification; one that fails stays in `candidate_folder`.

    Args:
        profile: what to build, flags applied.
        output: the bundle's folder; the work folder lies beside it, see `work_folder`.
        request: see there.

    Raises:
        LemicaError: whatever a stage raises; finished stages stay in the work folder.
    """
    check_request(profile, output, request)
    profile, sensitivity = retargeted(profile, request.source)
    work = Work(work_folder(output))
    with work.locked():
        model, table = begin(profile, work, request.device, reporter)
        prompts = calibration_prompts(profile, Path(request.prompts) if request.prompts else None)
        fine = reference_sampler(model, table, request.reference_steps)
        graph, grams = None, None
        if request.error_graph is not None:
            graph = read_value(ErrorGraph, request.error_graph)
            require_graph_fits(graph, model, table, where=request.error_graph)
            grams = _grams_beside(request.error_graph, model, table)
        max_skip = None
        if request.needs_graph:
            max_skip = profile.calibration.max_skip if graph is None else graph.max_skip
        times = None
        if any(map(timed, request.budgets)):
            times = probe(model, table, work, request.methods, request.backends, request.options, reporter)
        budgets = afforded_by(request.budgets, times, request.methods, table.num_steps, max_skip)
        findings = Findings(graph=graph, grams=grams)
        with hired(model, request.ray, reporter) as workers:
            if graph is not None:
                reporter.stage("calibrate", f"{request.error_graph}: {graph.samples} samples, method {graph.method}")
            elif request.calibrates:
                counts = [budget for budget in budgets if isinstance(budget, int)]
                require_feasible(table.num_steps, profile.calibration.max_skip, counts)
                findings = calibrate(model, table, prompts, work, reporter, workers, sensitivity)
            findings = findings._replace(reference=fine)
            make = functools.partial(
                make_plans,
                table,
                profile=profile,
                methods=request.methods,
                findings=findings,
                schedule=request.schedule,
                solver=planned_solvers(table),
                fit=fitter(lambda: model, table, prompts, work, reporter, fine=fine),
            )
            from lemica_trt.evaluate.evaluator import PlanEvaluator, validation_samples

            evaluator = PlanEvaluator(
                lambda: model,
                table,
                validation_samples(prompts, profile.calibration),
                reference=fine,
                folder=work.root,
                reporter=reporter,
                workers=workers,
            )
            planned = plan_budgets(
                budgets,
                Scout(make, evaluator),
                reporter,
                pareto=request.pareto,
                num_steps=table.num_steps,
                max_skip=max_skip,
            )
        findings = findings._replace(selections=planned.selections, front=planned.front)
        write_plans(planned.plans, findings, work, reporter)
        layout = layout_from_plans(
            plans_to_run(work), latent_shape=model.latent_shape, guided=model.guided, conditions=model.conditions
        )
        exported = export(model, layout, work, reporter)
        entries = engines(exported.graphs, work.export, work, request.backends, request.options, reporter)
        plans, candidate = plans_in(work), candidate_folder(output)
        bundle = assemble(profile, table, findings, plans, exported, entries, work, candidate, reporter, before=output)
        report, unverified = None, dict.fromkeys(_backends(bundle), "not asked for")
        if request.verify_samples:
            backend, unverified = verifiable(bundle)
            if backend is not None:
                report = verify_bundle(bundle, model, request.verify_samples, reporter, backend=backend, anew=False)
        if report is not None:
            steps, paces = report.steps, paces_of(report)
        else:
            steps, paces = times, {} if times is None else Clock(bundle, reporter).paces(planned.plans, times)
        front = () if planned.front is None else front_rows(planned.front, steps)
        if front:
            from lemica_trt.report.folder import write_front

            write_front(bundle, front)
        found = answers(request.budgets, planned, times or steps, paces)
        return Result(move_bundle(bundle, output), report, unverified, found, front)


def _grams_beside(error_graph: str, model: Model, table: SamplerTable) -> TrajectoryGrams | None:
    """The Grams of the calibration that an error graph is of, where they lie beside it.

    Raises:
        InputError: they are of something else.
    """
    path = Path(error_graph).with_name(Path(GRAMS_FILE).name)
    if not path.is_file():
        return None
    grams = read_value(TrajectoryGrams, path)
    require_graph_fits(grams, model, table, where=str(path))
    return grams


def _backends(bundle: Bundle) -> list[str]:
    return [entry.key.backend for entry in bundle.manifest.engines]


def dry_run(profile: Profile, output: Path, request: Request) -> list[Stage]:
    """What `build` would do. Loads the model, so that a hub id is downloaded, but computes next to nothing."""
    from lemica_trt.evaluate.estimate import estimate

    check_request(profile, output, request)
    profile, _ = retargeted(profile, request.source)
    model = open_model(profile, Quiet(), device="cpu")
    table = lower_sampler(model, Quiet())
    counts = [budget for budget in request.budgets if isinstance(budget, int)]
    if request.calibrates:
        require_feasible(table.num_steps, profile.calibration.max_skip, counts)
    expected = estimate(model)
    settings = profile.calibration
    max_skip = settings.max_skip if request.needs_graph else None
    if request.schedule is not None:
        budgets = [len(request.schedule)]
    else:
        steps = StepTimes(full=expected.full_step, skipped=expected.skipped_step, rest=0.0)
        budgets = [_about(budget, steps, table.num_steps, max_skip) for budget in request.budgets]
    stages = []
    if any(map(timed, request.budgets)):
        stages.append(
            Stage(
                name="time",
                what="graphs exported and engines built to time their steps; full steps below are by PyTorch's",
                disk=2 * expected.weights,
                memory=expected.export_memory,
            )
        )
    if request.calibrates:
        calls = calibration_cost(model, table)
        stages.append(
            Stage(
                name="calibrate",
                what=f"{settings.method}, {settings.samples} samples: {calls.full} full steps, "
                f"{calls.skip} skipped steps, {calls.samplings:.0f} samplings' work, "
                "at most; finished units are not done again",
                seconds=calls.full * expected.full_step + calls.skip * expected.skipped_step,
                disk=calls.units * 200,
                memory=expected.run_memory,
            )
        )
    plans = "given schedule" if request.schedule is not None else ", ".join(map(said, request.budgets))
    reference = request.reference_steps or table.num_steps
    fitted = 0  # solvers for each budget
    tried = _tried(request, table)
    fitted = sum("fit" in planner.needs for planner in tried)
    if fitted:
        full = settings.samples * (reference + fitted * sum(budgets))
        stages.append(
            Stage(
                name="fit",
                what=f"solvers for each budget: {fitted}, to {reference} steps on {settings.samples} samples: "
                f"{full} full steps, {full / table.num_steps / settings.samples:.1f} samplings a sample",
                seconds=full * expected.full_step,
                disk=1_000 * fitted * sum(budgets),
                memory=expected.run_memory,
            )
        )
    if len(tried) > 1:
        runs = trial_runs(len(tried), settings.validation_samples)
        full = settings.validation_samples * reference + runs * sum(budgets)
        stages.append(
            Stage(
                name="select",
                what=f"{len(tried)} plans of each budget, tried in about {full} full steps",
                seconds=full * expected.full_step,
                disk=runs * 150,
                memory=expected.run_memory,
            )
        )
    if request.pareto or any(isinstance(budget, MinPsnr) for budget in request.budgets):
        looked_at = front_budgets(table.num_steps, max_skip)
        full = scouting_cost(looked_at, table.num_steps, len(tried), settings.validation_samples)
        full += fitted * settings.samples * sum(looked_at)
        stages.append(
            Stage(
                name="quality",
                what=f"{len(looked_at)} budgets of {looked_at[0]} … {looked_at[-1]} looked at in {full} full steps",
                seconds=full * expected.full_step,
                memory=expected.run_memory,
            )
        )
    stages.append(Stage(name="plan", what=f"{', '.join(request.methods)}; {plans}", seconds=0.1, disk=20_000))
    stages.append(
        Stage(
            name="export",
            what=f"step graphs, text encoder, VAE decoder to ONNX, opset {profile.opset}, {profile.dtype}",
            disk=expected.weights,
            memory=expected.export_memory,
        )
    )
    for backend in dict.fromkeys(request.backends):
        building = estimate_engine(backend, expected.weights)
        stages.append(Stage(name="engine", what=backend, seconds=building.seconds, memory=building.memory))
    stages.append(Stage(name="bundle", what=str(output), disk=expected.weights))
    if request.verify_samples:
        full = request.verify_samples * (reference + 3 * sum(budgets)) + 8 * (table.num_steps + sum(budgets))
        stages.append(
            Stage(
                name="verify",
                what=f"{request.verify_samples} held-out clips, about {full} full steps",
                seconds=full * expected.full_step,
                memory=2 * expected.run_memory,
            )
        )
    return stages


def _tried(request: Request, table: SamplerTable) -> list[Planner]:
    """The planners whose plans are tried."""
    if request.schedule is not None:
        return []
    auto = UNFITTED if table.stochastic else AUTO
    return planners_named([name for method in request.methods for name in (auto if method == "auto" else (method,))])


def _about(budget: Budget, times: StepTimes, num_steps: int, max_skip: int | None) -> int:
    """The full steps that a budget comes to, as far as an estimate can tell."""
    if isinstance(budget, int):
        return budget
    if isinstance(budget, MinPsnr):
        return num_steps // 2
    with contextlib.suppress(InfeasibleError):  # by the engines it may be feasible
        return afforded(budget, times, num_steps, max_skip).budgets[0]
    return least_budget(num_steps, max_skip)
