"""The ordered list of stages, and the only place that joins them.

    model → sampler → calibrate → plan (select) → export → engine → bundle → verify

Each stage leaves its result in the work folder, named by what it was made from, and is not run again while that is
the same:

    WORK/
      profile.json                 what is being built, flags applied
      sampler.json                 SamplerTable
      journal-<digest>.jsonl       what calibration has measured so far
      error_graph.json             ErrorGraph
      grams.json                   TrajectoryGrams        (calibration by secant or adjoint)
      products.json                AdjointProducts        (calibration by adjoint)
      trials-<digest>.jsonl        how plans did in trials so far
      selection.json               which ways were tried for each budget, and which won
      plans/<index>-<name>.json    StepPlans, in the order asked for
      export/export.json           what the graphs were made from, and the GraphSet
      export/onnx/…, tokenizer/…   the graphs
      engines/<backend>-<key>/…    engines, by what they were built from (TensorRT)

The command line's stage commands call the functions one by one; `build` calls all. Torch is imported by the stages
that need it, inside the functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from lemica_trt import __version__
from lemica_trt.builders import EngineEntry, Option, options_by_backend
from lemica_trt.builders import build as build_engine
from lemica_trt.builders import check as check_engine
from lemica_trt.builders import estimate as estimate_engine
from lemica_trt.bundle import (
    ERROR_GRAPH_FILE,
    GRAMS_FILE,
    MANIFEST,
    REPORTS,
    SAMPLER_FILE,
    SELECTION_FILE,
    Bundle,
    add_plan,
    check_plan,
    plan_path,
    require_replaceable,
    write_bundle,
)
from lemica_trt.candidates import (
    Planner,
    Selection,
    Selections,
    SolverTable,
    Ways,
    candidates,
    predictors,
    select,
    trial_runs,
    way,
)
from lemica_trt.errors import InputError, MissingDependencyError, UnsupportedError, UsageError
from lemica_trt.grams import TrajectoryGrams
from lemica_trt.graph import ErrorGraph
from lemica_trt.plan import StepPlan, layout_from_plans, plan_from_schedule
from lemica_trt.progress import Quiet, Reporter, size
from lemica_trt.resources import calibration_path
from lemica_trt.sampler import SamplerTable
from lemica_trt.schedule import Schedule, given, least_sum, published, require_feasible, solve, uniform
from lemica_trt.signed import AdjointProducts, signed_errors, solve_signed
from lemica_trt.spec import GraphSet, Profile, Role, Shape, StepLayout, TextSpec
from lemica_trt.values import V, Value, json_bytes, read_value, write_bytes, write_value

if TYPE_CHECKING:
    from lemica_trt.calibrate import Cost
    from lemica_trt.models import Model
    from lemica_trt.verify import VerifyReport

UNCACHED = "uncached"
"""Name of the plan that runs every step in full; every bundle has it: it is what the others are measured against."""

TOKENIZER_FILE = "tokenizer/tokenizer.json"

VERSIONS_OF = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")
"""Libraries that decide what is measured and exported."""


class Exported(Value, frozen=True):
    """`export/export.json`: the graphs, and everything that they were made from.

    Attributes:
        key: see `export_key`.
        source, shape: of the profile.
        revision: of the model.
        graphs: what was exported.
        text: how a prompt becomes ids.
        versions: of the libraries that exported.
    """

    key: str
    source: str
    revision: str
    shape: Shape
    versions: dict[str, str]
    graphs: GraphSet
    text: TextSpec


class Work:
    """The work folder of one build; at most one process uses it at a time.

    Attributes:
        root: the folder; made when first used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def profile(self) -> Path:
        return self.root / "profile.json"

    @property
    def sampler(self) -> Path:
        return self.root / "sampler.json"

    @property
    def error_graph(self) -> Path:
        return self.root / "error_graph.json"

    @property
    def grams(self) -> Path:
        return self.root / "grams.json"

    @property
    def products(self) -> Path:
        return self.root / "products.json"

    @property
    def selection(self) -> Path:
        return self.root / "selection.json"

    @property
    def plans(self) -> Path:
        return self.root / "plans"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def export_record(self) -> Path:
        return self.export / "export.json"

    def journal(self, digest: str) -> Path:
        """Where calibration keeps what it has measured for one kind of measurement."""
        return self.root / f"journal-{digest[:16]}.jsonl"

    def trials(self, digest: str) -> Path:
        """Where trials of plans keep their scores."""
        return self.root / f"trials-{digest[:16]}.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder.

        Raises:
            UsageError: another process holds it.
        """
        import fcntl

        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"{self.root}: expected a free work folder, another lemica-trt is using it",
                    fix="wait for it, or choose another --output",
                ) from None
            yield


def work_folder(output: Path) -> Path:
    """The work folder that belongs to a bundle: beside it."""
    return output.parent / f"{output.name}.work"


# ---------------------------------------------------------------- stages


def open_model(profile: Profile, reporter: Reporter, *, device: str | None = None) -> Model:
    """Load the model of a profile.

    Args:
        device: torch device; None: a GPU where there is one.

    Raises:
        MissingDependencyError: the build extra is not installed, or there is no such device.
        InputError, UnsupportedError: as `models.load_model`.
    """
    reporter.stage("model", f"{profile.name} from {profile.source}, {profile.dtype}")
    try:
        from lemica_trt.models import load_model, usable_device
    except ImportError as error:
        raise MissingDependencyError(
            f"building needs PyTorch and diffusers, got: {error}", fix="pip install 'lemica-trt[build]'"
        ) from None
    model = load_model(profile, device=usable_device(device))
    parameters = sum(p.numel() for p in model.pipeline.transformer.parameters())
    shape = "×".join(str(n) for n in model.latent_shape)
    reporter.note(f"DiT with {parameters / 1e6:.1f} M parameters, latents {shape}, revision {model.revision[:12]}")
    return model


def lower_sampler(model: Model, reporter: Reporter) -> SamplerTable:
    """The model's sampler as a table."""
    from lemica_trt.lower import sampler_table

    table = sampler_table(model.scheduler(), dynamic_guidance=model.profile.sampling.dynamic_guidance)
    kind = "stochastic" if table.stochastic else "deterministic"
    reporter.stage(
        "sampler",
        f"{table.scheduler}, {table.num_steps} steps, {kind}; reads {table.latent_history} latents and "
        f"{table.output_history} outputs back",
    )
    return table


def calibration_prompts(profile: Profile, file: Path | None, *, split: str = "calibration") -> tuple[str, ...]:
    """The prompts of a profile, or of a file.

    Raises:
        InputError: no such file, or no prompt in it.
    """
    from lemica_trt.calibrate import read_prompts

    return tuple(read_prompts(file or calibration_path(profile.calibration.prompts) / f"{split}.txt"))


class Findings(NamedTuple):
    """What is known of a model under a sampler, to make plans from.

    Attributes:
        graph: what caching each segment costs.
        grams: for fitted predictors.
        products: for the signed planner.
        selections: how the ways did that were tried.
    """

    graph: ErrorGraph | None = None
    grams: TrajectoryGrams | None = None
    products: AdjointProducts | None = None
    selections: tuple[Selection, ...] = ()


def calibrate(model: Model, table: SamplerTable, prompts: Sequence[str], work: Work, reporter: Reporter) -> Findings:
    """Measure or estimate the error graph, going on from what the work folder already has."""
    from lemica_trt.calibrate import calibrate_cheaply, cheap_measurement, measure, measurement_digest

    settings = model.profile.calibration
    wanted = calibration_cost(model, table)
    reporter.stage(
        "calibrate",
        f"{settings.method}: {settings.samples} samples, up to {settings.max_skip} steps skipped: "
        f"{wanted.samplings:.0f} samplings' work, {wanted.samplings / settings.samples:.1f} a sample",
    )
    for stale in (work.grams, work.products):
        stale.unlink(missing_ok=True)
    common: dict[str, Any] = {"seed": settings.seed, "max_skip": settings.max_skip}
    if settings.method == "exact":
        journal = work.journal(measurement_digest(model, table, prompts, **common))
        graph = measure(
            model, table, prompts, samples=settings.samples, journal=journal, progress=reporter.advance, **common
        )
        write_value(graph, work.error_graph)
        return Findings(graph=graph)
    common["method"] = settings.method
    journal = work.journal(cheap_measurement(model, table, prompts, **common).digest)
    found = calibrate_cheaply(
        model, table, prompts, samples=settings.samples, journal=journal, progress=reporter.advance, **common
    )
    counted = found.cost
    reporter.note(
        f"{counted.full} full steps, {counted.backward} backward passes, {counted.skip} skipped steps were run: "
        f"{counted.samplings / settings.samples:.1f} samplings a sample"
    )
    write_value(found.grams, work.grams)
    if found.products is not None:
        write_value(found.products, work.products)
    write_value(found.graph, work.error_graph)
    return Findings(graph=found.graph, grams=found.grams, products=found.products)


def calibration_cost(model: Model, table: SamplerTable) -> Cost:
    """What the profile's calibration costs from its beginning."""
    from lemica_trt.calibrate import cheap_cost, checkpoints, cost

    settings = model.profile.calibration
    if settings.method == "exact":
        return cost(table.num_steps, settings.max_skip, settings.samples)
    return cheap_cost(
        table.num_steps,
        settings.max_skip,
        settings.samples,
        method=settings.method,
        checkpointed=checkpoints(model),
    )


def require_graph_fits(graph: ErrorGraph, model: Model, table: SamplerTable, *, where: str) -> None:
    """Raise InputError unless an error graph was measured on this model, sampler and guidance."""
    for name, expected, got in (
        ("model revision", model.revision, graph.revision),
        ("sampler", table.digest, graph.sampler_digest),
        ("guidance scale", model.profile.sampling.guidance_scale, graph.guidance_scale),
        ("negative prompt", model.profile.sampling.negative_prompt, graph.negative_prompt),
        ("text length", model.profile.text_length, graph.text_length),
        ("latent shape", tuple(model.latent_shape), graph.latent_shape),
    ):
        if expected != got:
            raise InputError(
                f"{where}: expected an error graph of {name} {_short(expected)}, got {_short(got)}",
                fix="calibrate this model (leave --error-graph out)",
            )


Chooser = Callable[[Sequence[StepPlan]], tuple[StepPlan, Selection]]
"""Plans of one budget → the best of them, and how all did."""


def make_plans(
    table: SamplerTable,
    *,
    profile: Profile,
    budgets: Sequence[int],
    ways: Ways,
    findings: Findings,
    schedule: Sequence[int] | None = None,
    solver: SolverTable | None = None,
    choose: Chooser | None = None,
    before: Mapping[int, Sequence[str]] | None = None,
    graphs: GraphSet | None = None,
) -> tuple[list[StepPlan], tuple[Selection, ...]]:
    """Plans `bB` for each budget, in the order given; or one for a given schedule.

    Args:
        table: the sampler.
        profile: gives the default guidance scale, and the model's name for published schedules.
        budgets, ways, schedule: see `Request`.
        findings: what the methods and predictors need of a calibration.
        solver: makes planned solvers; None: without them.
        choose: tries several ways; None: the one that did best before.
        before: budget → ways, the best first; see `candidates.way`.
        graphs: what the plans must run on; None: graphs are made for them.

    Returns:
        The plans, and how all ways did that were tried now.

    Raises:
        UsageError: what is asked for needs a calibration, or a trial, and there is none.
        InputError: the error graph or a published schedule is of another sampler.
        InfeasibleError, InputError: as `schedule` and `predict`.
    """
    graph = findings.graph
    if graph is not None and graph.sampler_digest != table.digest:
        raise InputError(
            "expected an error graph of this sampler, got one that was measured with another", fix="calibrate first"
        )
    plans, selections = [], []
    if schedule is not None:
        chosen = given(schedule, table.num_steps)
        found: list[dict[Planner, list[Schedule]]] = [{"given": [chosen]}]
        budgets = [chosen.budget]
    else:
        found = [_schedules(table, profile, budget, ways, findings) for budget in budgets]
    for budget, schedules in zip(budgets, found):
        several = candidates(
            ways,
            schedules,
            table,
            name=f"b{budget}",
            guidance_scale=profile.sampling.guidance_scale,
            grams=findings.grams,
            solver=solver,
            error_graph_digest=None if graph is None else graph.digest,
        )
        if graphs is not None and len(several) > 1:
            several = [plan for plan in several if _runs_on(plan, graphs)] or several[:1]
        if len(several) == 1:
            plans += several
        elif choose is not None:
            plan, selection = choose(several)
            plans.append(plan)
            selections.append(selection)
        else:
            plans.append(_best_before(several, before or {}))
    return plans, tuple(selections)


def _schedules(
    table: SamplerTable, profile: Profile, budget: int, ways: Ways, findings: Findings
) -> dict[Planner, list[Schedule]]:
    """Schedules of a budget by every method that is allowed and can be used here."""
    graph, products = findings.graph, findings.products
    found: dict[Planner, list[Schedule]] = {}
    for method in ways.methods:
        if method == "uniform":
            found[method] = [uniform(table.num_steps, budget)]
        elif method == "published":
            found[method] = [published(profile.name, budget)]
        elif graph is None:
            raise UsageError(f"method {method} needs an error graph", fix="calibrate first, or use --method uniform")
        elif method == "lemica":
            found[method] = [solve(graph, [budget])[budget]]
        elif method == "least-sum":
            found[method] = [least_sum(graph, budget)]
        elif products is not None:
            found[method] = _signed(table, graph, products, budget)
        elif ways.method == "signed":
            raise UsageError("method signed needs adjoint products", fix="calibrate with --calibration adjoint")
    for schedule in (schedule for schedules in found.values() for schedule in schedules):
        if schedule.num_steps != table.num_steps:
            raise InputError(
                f"expected a schedule for {table.num_steps} steps, got one for {schedule.num_steps}",
                fix=f"--denoising-steps {schedule.num_steps}",
            )
    return found


def _signed(table: SamplerTable, graph: ErrorGraph, products: AdjointProducts, budget: int) -> list[Schedule]:
    """Signed schedules for outputs that are extrapolated in the step index, and in log-SNR where it is known."""
    seeds = [solve(graph, [budget])[budget], least_sum(graph, budget)]
    times = [None] if table.levels is None else [None, table.levels.log_snr[: table.num_steps]]
    return [
        solve_signed(signed_errors(table, products.array, max_skip=graph.max_skip, times=time), budget, seeds=seeds)
        for time in times
    ]


def _runs_on(plan: StepPlan, graphs: GraphSet) -> bool:
    try:
        check_plan(plan, graphs)
    except InputError:
        return False
    return True


def _best_before(plans: Sequence[StepPlan], before: Mapping[int, Sequence[str]]) -> StepPlan:
    """The plan whose way did best at the nearest budget.

    Raises:
        UsageError: nothing was tried.
    """
    for budget in sorted(before, key=lambda budget: abs(budget - plans[0].budget)):
        for best in before[budget]:
            for plan in plans:
                if way(plan) == best:
                    return plan
    raise UsageError(
        f"{len(plans)} ways to run {plans[0].budget} full steps are allowed, and none was tried on this model",
        fix="name one, for example --method lemica, or let `lemica-trt build` try them",
    )


def chooser(model: Model, table: SamplerTable, prompts: Sequence[str], work: Work, reporter: Reporter) -> Chooser:
    """Tries plans on the model: on prompts behind those of the calibration, and other seeds."""
    from lemica_trt.calibrate import Trials, trials_digest

    settings = model.profile.calibration
    skip = settings.samples % len(prompts)
    fresh = [*prompts[skip:], *prompts[:skip]]
    seed = settings.seed + settings.samples

    def choose(plans: Sequence[StepPlan]) -> tuple[StepPlan, Selection]:
        reporter.stage(
            "select",
            f"{len(plans)} ways to run {plans[0].budget} full steps, the best of them on "
            f"{settings.validation_samples} samples",
        )
        run = Trials(
            model,
            uncached_plan(table, guidance_scale=model.profile.sampling.guidance_scale),
            table,
            fresh,
            seed=seed,
            journal=work.trials(trials_digest(model, table, fresh, seed=seed)),
            progress=reporter.advance,
        )
        plan, selection = select(plans, settings.validation_samples, run)
        best = selection.tried[0]
        reporter.note(f"{best.way}: {best.mean:.1f} dB")
        return plan, selection

    return choose


def planned_solvers(table: SamplerTable) -> SolverTable:
    """Solvers set to the steps of a schedule; needs PyTorch and diffusers."""
    from lemica_trt.lower import solver_table

    return lambda schedule, solver: solver_table(table, schedule.full_steps, solver)


def uncached_plan(table: SamplerTable, *, guidance_scale: float, name: str = UNCACHED) -> StepPlan:
    """The plan that runs every step in full."""
    every = Schedule(num_steps=table.num_steps, full_steps=tuple(range(table.num_steps)))
    return plan_from_schedule(every, table, name=name, guidance_scale=guidance_scale, method="none")


def export(model: Model, layout: StepLayout, work: Work, reporter: Reporter) -> Exported:
    """Export all graphs, unless the work folder has them from the same input."""
    profile = model.profile
    key = export_key(profile, model.revision, layout)
    exported = _exported(work)
    if exported is not None and exported.key == key:
        reporter.stage("export", "unchanged")
        exported = msgspec.structs.replace(exported, source=profile.source, shape=profile.shape)
        write_value(exported, work.export_record)
        return exported
    from lemica_trt.export import export_graphs

    reporter.stage("export", f"ONNX opset {profile.opset}, {profile.dtype}")
    staged = work.root / "export.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    graphs = export_graphs(model, layout, staged)
    tokenizer = staged / TOKENIZER_FILE
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_bytes(model.tokenizer_json())
    exported = Exported(
        key=key,
        source=profile.source,
        revision=model.revision,
        shape=profile.shape,
        versions=library_versions(),
        graphs=graphs,
        text=model.text_spec(TOKENIZER_FILE),
    )
    write_value(exported, staged / work.export_record.name)
    # Only a folder that is whole has a record: a kill before the rename leaves `export.tmp`, or an `export` without.
    work.export_record.unlink(missing_ok=True)
    shutil.rmtree(work.export, ignore_errors=True)
    staged.rename(work.export)
    for graph in graphs.graphs:
        total = sum((work.export / name).stat().st_size for name in {graph.file, *graph.data_files})
        reporter.note(f"{graph.role}: {size(total)}")
    return exported


def export_key(profile: Profile, revision: str, layout: StepLayout) -> str:
    """Digest of everything that changes the graphs: model, shapes, precision, layout, libraries, and our own code."""
    package = Path(__file__).parent
    sources = sorted(path for room in ("models", "export") for path in (package / room).glob("*.py"))
    made_from = {
        "revision": revision,
        "family": profile.family,
        "dtype": profile.dtype,
        "text_length": profile.text_length,
        "opset": profile.opset,
        "shape": msgspec.structs.replace(profile.shape, fps=1),
        "layout": layout,
        "versions": library_versions(),
        "sources": [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources],
    }
    return hashlib.sha256(json_bytes(made_from)).hexdigest()


def _exported(work: Work) -> Exported | None:
    """What the work folder's export folder holds; None where it holds nothing whole."""
    try:
        exported = read_value(Exported, work.export_record)
    except InputError:
        return None
    names = [TOKENIZER_FILE, *(name for graph in exported.graphs.graphs for name in (graph.file, *graph.data_files))]
    return exported if all((work.export / name).is_file() for name in names) else None


def engines(
    exported: Exported, work: Work, backends: Sequence[str], options: dict[str, Option], reporter: Reporter
) -> list[EngineEntry]:
    """Build engines of the exported graphs with each backend; those that the work folder has are taken from there."""
    chosen = options_by_backend(backends, options)
    entries = []
    for backend in chosen:
        reporter.stage("engine", backend)
        entries.append(build_engine(backend, exported.graphs, work.export, work.root, chosen[backend], reporter))
    return entries


def assemble(
    profile: Profile,
    table: SamplerTable,
    findings: Findings,
    plans: Sequence[StepPlan],
    exported: Exported,
    entries: Sequence[EngineEntry],
    work: Work,
    output: Path,
    reporter: Reporter,
) -> Bundle:
    """Write the bundle."""
    reporter.stage("bundle", str(output))
    files: dict[str, Path | bytes] = {TOKENIZER_FILE: work.export / TOKENIZER_FILE, SAMPLER_FILE: json_bytes(table)}
    if findings.graph is not None:
        files[ERROR_GRAPH_FILE] = json_bytes(findings.graph)
    if findings.grams is not None:
        files[GRAMS_FILE] = json_bytes(findings.grams)
    if findings.selections:
        files[SELECTION_FILE] = json_bytes(Selections(selections=findings.selections))
    for spec in exported.graphs.graphs:
        files.update({name: work.export / name for name in (spec.file, *spec.data_files)})
    for entry in entries:  # ONNX Runtime's engines are the ONNX files; other builders write their own
        files.update({name: work.root / name for name in entry.files.values() if name not in files})
    before = _manifest_and_reports(output)
    bundle = write_bundle(
        output,
        profile=profile,
        graphs=exported.graphs,
        plans=plans,
        default_plan=plans[0].name,
        text=exported.text,
        engines=entries,
        files=files,
        revision=exported.revision,
        versions=exported.versions,
    )
    manifest, reports = _manifest_and_reports(output)
    if before[0] == manifest and not reports:  # the same bundle: what was verified of it still holds
        for name, content in before[1].items():
            write_bytes(content, output / REPORTS / name)
    reporter.note(size(sum(entry.size for entry in bundle.manifest.files.values())))
    return bundle


def _manifest_and_reports(output: Path) -> tuple[bytes | None, dict[str, bytes]]:
    """What lies at `output`: the manifest, and the reports by name."""
    if not (output / MANIFEST).is_file():
        return None, {}
    files = (output / REPORTS).glob("*") if (output / REPORTS).is_dir() else ()
    return (output / MANIFEST).read_bytes(), {path.name: path.read_bytes() for path in files if path.is_file()}


def library_versions() -> dict[str, str]:
    """Versions of lemica-trt and of the libraries that decide what is measured and exported; absent ones left out."""
    versions = {"lemica-trt": __version__}
    for name in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


class Request(Value, frozen=True):
    """What `build` is asked for beyond the profile.

    Attributes:
        budgets: full steps of each plan; the first plan is the default.
        ways: how the full steps may be chosen, and what skipped steps may do; several ways are tried.
        schedule: full steps as given; then the budgets are not used and nothing is calibrated.
        error_graph: path of an error graph to use instead of calibrating.
        prompts: path of calibration prompts instead of the profile's.
        device: torch device that calibrates and verifies; None: a GPU where there is one.
        backends: engines to build, in order of preference.
        options: builder options; each backend takes those that it has.
        verify_samples: held-out clips of the verification; 0: none at all.
    """

    budgets: tuple[int, ...] = (15,)
    ways: Ways = Ways()
    schedule: tuple[int, ...] | None = None
    error_graph: str | None = None
    prompts: str | None = None
    device: str | None = None
    backends: tuple[str, ...] = ("onnxruntime",)
    options: dict[str, Option] = {}
    verify_samples: int = 8

    @property
    def calibrates(self) -> bool:
        """Whether an error graph has to be measured."""
        return self.needs_graph and self.error_graph is None

    @property
    def needs_graph(self) -> bool:
        """Whether a method searches an error graph."""
        return self.schedule is None and not set(self.ways.methods) <= {"uniform", "published"}


def check_request(profile: Profile, output: Path, request: Request) -> None:
    """Refuse before any work what could only fail behind it.

    Raises:
        UsageError: unknown backend or option; `output` is something else than a bundle.
        UnsupportedError, MissingDependencyError: as `builders.check`.
        InputError: a prompt file or error graph cannot be read.
    """
    require_replaceable(output)
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
    """

    bundle: Bundle
    report: VerifyReport | None
    unverified: dict[str, str]


def build(profile: Profile, output: Path, request: Request, reporter: Reporter) -> Result:
    """All stages. What an earlier run finished from the same input is not done again.

    Engines of a backend that this machine cannot run are built all the same and not verified: `Result.unverified`.

    Args:
        profile: what to build, flags applied.
        output: the bundle's folder; the work folder lies beside it, see `work_folder`.
        request: see there.

    Raises:
        LemicaError: whatever a stage raises; finished stages stay in the work folder.
    """
    check_request(profile, output, request)
    work = Work(work_folder(output))
    with work.locked():
        model, table = _begin(profile, work, request.device, reporter)
        prompts = calibration_prompts(profile, Path(request.prompts) if request.prompts else None)
        findings = Findings()
        if request.error_graph is not None:
            graph = read_value(ErrorGraph, request.error_graph)
            require_graph_fits(graph, model, table, where=request.error_graph)
            reporter.stage("calibrate", f"{request.error_graph}: {graph.samples} samples, method {graph.method}")
            findings = Findings(graph=graph)
        elif request.calibrates:
            require_feasible(table.num_steps, profile.calibration.max_skip, request.budgets)
            findings = calibrate(model, table, prompts, work, reporter)
        plans, selections = make_plans(
            table,
            profile=profile,
            budgets=request.budgets,
            ways=request.ways,
            findings=findings,
            schedule=request.schedule,
            solver=planned_solvers(table),
            choose=chooser(model, table, prompts, work, reporter),
        )
        findings = findings._replace(selections=selections)
        _write_plans(plans, selections, work, reporter)
        plans = _plans_of(work)
        layout = layout_from_plans(plans, latent_shape=model.latent_shape, guided=model.guided)
        exported = export(model, layout, work, reporter)
        entries = engines(exported, work, request.backends, request.options, reporter)
        bundle = assemble(profile, table, findings, plans, exported, entries, work, output, reporter)
        if request.verify_samples == 0:
            return Result(bundle, None, dict.fromkeys(_backends(bundle), "not asked for"))
        backend, unverified = verifiable(bundle)
        if backend is None:
            return Result(bundle, None, unverified)
        report = verify_bundle(bundle, model, request.verify_samples, reporter, backend=backend)
        return Result(bundle, report, unverified)


def _begin(profile: Profile, work: Work, device: str | None, reporter: Reporter) -> tuple[Model, SamplerTable]:
    """Load the model and lower its sampler; what the work folder has of another profile is taken away, journals not."""
    if not work.profile.is_file() or work.profile.read_bytes() != json_bytes(profile):
        for path in (work.error_graph, work.grams, work.products, work.selection):
            path.unlink(missing_ok=True)
        shutil.rmtree(work.plans, ignore_errors=True)
        write_value(profile, work.profile)
    model = open_model(profile, reporter, device=device)
    table = lower_sampler(model, reporter)
    write_value(table, work.sampler)
    return model, table


def _backends(bundle: Bundle) -> list[str]:
    return [entry.key.backend for entry in bundle.manifest.engines]


def verifiable(bundle: Bundle) -> tuple[str | None, dict[str, str]]:
    """The first backend, in order of preference, whose engines can run here; and why the others are not verified.

    One is enough: engines are of the same graphs, and on a GPU machine nobody waits for the same plans on a CPU.
    `verify --backend` asks for another.
    """
    smallest: tuple[Role, ...] = ("combine",)  # its engine speaks for all of them
    chosen, reasons = None, {}
    for entry in bundle.manifest.engines:
        name = entry.key.backend
        if chosen is not None:
            reasons[name] = f"{chosen} was; ask for it with --backend {name}"
            continue
        try:
            bundle.pipeline(backend=name, roles=smallest)
            chosen = name
        except (MissingDependencyError, UnsupportedError) as error:
            reasons[name] = error.what
    return chosen, reasons


def verify_bundle(
    bundle: Bundle, model: Model, samples: int, reporter: Reporter, *, backend: str | None = None
) -> VerifyReport:
    """Verify, store the report and its pictures in the bundle, and fail if something is not as it must be.

    Args:
        backend: which engines; None: the preferred ones.

    Raises:
        MissingDependencyError, UnsupportedError: these engines cannot run here.
        VerificationError: after the report was stored.
    """
    from lemica_trt.report.folder import write_reports
    from lemica_trt.verify import held_out, require_verified, stored_report, verify

    requests = held_out(calibration_prompts(model.profile, None, split="held_out"), samples)
    report = stored_report(bundle)
    if report is not None and report.is_of(bundle, samples, backend) and not report.failures():
        reporter.stage("verify", "unchanged")
        return report
    report, clips = verify(bundle, model, requests, reporter=reporter, backend=backend)
    write_reports(bundle, report, clips)
    require_verified(report)
    return report


def replan(
    bundle: Bundle,
    *,
    budgets: Sequence[int],
    ways: Ways,
    schedule: Sequence[int] | None,
    default: str | None,
    reporter: Reporter,
) -> Bundle:
    """Add plans to a bundle from what it carries of its calibration; no PyTorch, nothing is tried.

    Raises:
        UsageError, InfeasibleError, InputError: as `make_plans` and `bundle.add_plan`.
    """

    def carried(kind: type[V], file: str) -> V | None:
        return read_value(kind, bundle.file(file)) if file in bundle.manifest.files else None

    table = read_value(SamplerTable, bundle.file(SAMPLER_FILE))
    selected = carried(Selections, SELECTION_FILE)
    before = {plan.budget: [way(plan)] for plan in map(bundle.plan, bundle.plans) if plan.budget < plan.num_steps}
    for selection in selected.selections if selected is not None else ():
        before[selection.budget] = [tried.way for tried in selection.tried]
    plans, _ = make_plans(
        table,
        profile=bundle.manifest.profile,
        budgets=budgets,
        ways=ways,
        findings=Findings(
            graph=carried(ErrorGraph, ERROR_GRAPH_FILE),
            grams=carried(TrajectoryGrams, GRAMS_FILE),
        ),
        schedule=schedule,
        solver=planned_solvers(table) if ways.solver is not None else None,
        before=before,
        graphs=bundle.manifest.graphs,
    )
    for plan in plans:
        reporter.stage("plan", f"{plan.name}: full steps {' '.join(map(str, plan.full_steps))}")
    return add_plan(bundle, *plans, default=default)


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


def _short(value: object) -> str:
    """Digests by their first 12 digits, everything else as it is."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


# ---------------------------------------------------------------- stages alone, on the files of the one before


def calibrate_stage(
    profile: Profile, work: Work, prompts: Path | None, device: str | None, reporter: Reporter
) -> ErrorGraph:
    """Profile → `profile.json`, `sampler.json`, `error_graph.json` in the work folder."""
    texts = calibration_prompts(profile, prompts)
    with work.locked():
        model, table = _begin(profile, work, device, reporter)
        graph = calibrate(model, table, texts, work, reporter).graph
        assert graph is not None
        return graph


def plan_stage(
    target: Path,
    *,
    budgets: Sequence[int],
    ways: Ways,
    schedule: Sequence[int] | None,
    default: str | None,
    reporter: Reporter,
) -> list[StepPlan]:
    """Plans of a bundle (added to it) or of a work folder (written to `plans/`; several ways are tried there, which
    takes the model).

    Raises:
        UsageError: `default` for a work folder: only a bundle has one.
        InputError: the folder is neither.
    """
    work = Work(target)
    if not work.profile.is_file():
        bundle = replan(
            Bundle.open(target), budgets=budgets, ways=ways, schedule=schedule, default=default, reporter=reporter
        )
        return [bundle.plan(name) for name in bundle.plans]
    if default is not None:
        raise UsageError("--default is for bundles", fix="in a work folder the first budget's plan becomes the default")
    with work.locked():
        profile, table = read_value(Profile, work.profile), read_value(SamplerTable, work.sampler)

        def choose(plans: Sequence[StepPlan]) -> tuple[StepPlan, Selection]:
            model = open_model(profile, reporter)
            return chooser(model, table, calibration_prompts(profile, None), work, reporter)(plans)

        plans, selections = make_plans(
            table,
            profile=profile,
            budgets=budgets,
            ways=ways,
            findings=_findings_of(work),
            schedule=schedule,
            solver=planned_solvers(table) if ways.solvers else None,
            choose=choose,
        )
        _write_plans(plans, selections, work, reporter)
        return plans


def _findings_of(work: Work) -> Findings:
    """What the work folder has of a calibration."""

    def found(kind: type[V], path: Path) -> V | None:
        return read_value(kind, path) if path.is_file() else None

    selections = found(Selections, work.selection)
    return Findings(
        graph=found(ErrorGraph, work.error_graph),
        grams=found(TrajectoryGrams, work.grams),
        products=found(AdjointProducts, work.products),
        selections=selections.selections if selections is not None else (),
    )


def export_stage(work: Work, reporter: Reporter) -> Exported:
    """The plans of a work folder → graphs in it."""
    with work.locked():
        plans = _plans_of(work)
        model = open_model(read_value(Profile, work.profile), reporter)
        layout = layout_from_plans(plans, latent_shape=model.latent_shape, guided=model.guided)
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
        plans = _plans_of(work)
        exported = _exported(work)
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
        entries = engines(exported, work, backends, options, reporter)
        return assemble(profile, table, _findings_of(work), plans, exported, entries, work, output, reporter)


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
    chosen = options_by_backend(backends, options)
    with work.locked():
        entries = []
        for backend in chosen:
            reporter.stage("engine", backend)
            entries.append(build_engine(backend, manifest.graphs, bundle.path, work.root, chosen[backend], reporter))
        graphs = {name for graph in manifest.graphs.graphs for name in (graph.file, *graph.data_files)}
        engines = {name for entry in manifest.engines for name in entry.files.values()} - graphs
        plans = {plan_path(name) for name in manifest.plans}
        files: dict[str, Path | bytes] = {
            name: bundle.path / name for name in manifest.files if name not in engines | plans
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
            text=manifest.text,
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
            f"expected the weights that the bundle was built from ({_short(bundle.manifest.revision)}), "
            f"got {_short(model.revision)} in {model.profile.source}",
            fix="name the right folder with --weights, or rebuild the bundle",
        )
    return verify_bundle(bundle, model, samples, reporter, backend=backend)


def _write_plans(plans: Sequence[StepPlan], selections: tuple[Selection, ...], work: Work, reporter: Reporter) -> None:
    """Plans, and how they were selected → the work folder, in place of those that are there."""
    shutil.rmtree(work.plans, ignore_errors=True)
    work.selection.unlink(missing_ok=True)
    if selections:
        write_value(Selections(selections=selections), work.selection)
    for index, plan in enumerate(plans):
        reporter.stage("plan", f"{plan.name}: {way(plan)}; full steps {' '.join(map(str, plan.full_steps))}")
        write_value(plan, work.plans / f"{index}-{plan.name}.json")


def _plans_of(work: Work) -> list[StepPlan]:
    """The plans in a work folder, in the order in which they were asked for, and the uncached one.

    Raises:
        InputError: there are none, or they are of another sampler.
    """
    profile, table = read_value(Profile, work.profile), read_value(SamplerTable, work.sampler)
    files = sorted(work.plans.glob("*.json"), key=lambda path: int(path.name.split("-", 1)[0]))
    plans = [read_value(StepPlan, path) for path in files]
    if not plans or any(plan.sampler_digest != table.digest for plan in plans):
        raise InputError(
            f"{work.plans}: expected plans for {work.sampler.name}, got {'others' if plans else 'none'}",
            fix=f"lemica-trt plan {work.root} --budget 15",
        )
    return [*plans, uncached_plan(table, guidance_scale=profile.sampling.guidance_scale)]


# ---------------------------------------------------------------- what a build would do


class Stage(Value, frozen=True):
    """One stage of a build that has not run yet; estimates, None where there is none.

    Attributes:
        name: of the stage.
        what: what it would do.
        seconds: wall-clock time on this machine.
        disk, memory: bytes; memory is the peak of the process.
    """

    name: str
    what: str
    seconds: float | None = None
    disk: int | None = None
    memory: int | None = None


def dry_run(profile: Profile, output: Path, request: Request) -> list[Stage]:
    """What `build` would do. Loads the model, so that a hub id is downloaded, but computes next to nothing."""
    from lemica_trt.estimate import estimate

    check_request(profile, output, request)
    model = open_model(profile, Quiet(), device="cpu")
    table = lower_sampler(model, Quiet())
    if request.calibrates:
        require_feasible(table.num_steps, profile.calibration.max_skip, request.budgets)
    expected = estimate(model)
    settings = profile.calibration
    stages = []
    if request.calibrates:
        calls = calibration_cost(model, table)
        stages.append(
            Stage(
                name="calibrate",
                what=f"{settings.method}, {settings.samples} samples: {calls.full} full steps, "
                f"{calls.backward} backward passes, {calls.skip} skipped steps, {calls.samplings:.0f} samplings' work, "
                "at most; finished units are not done again",
                seconds=(calls.full + calls.backward) * expected.full_step + calls.skip * expected.skipped_step,
                disk=calls.units * 200,
                memory=expected.run_memory,
            )
        )
    plans = "given schedule" if request.schedule is not None else f"budgets {request.budgets}"
    ways = len(request.ways.methods) * (len(predictors(request.ways, table, None)) + len(request.ways.solvers))
    if ways > 1:
        runs = trial_runs(ways, settings.validation_samples)
        budgets = request.budgets if request.schedule is None else (len(request.schedule),)
        full = settings.validation_samples * table.num_steps + runs * sum(budgets)
        stages.append(
            Stage(
                name="select",
                what=f"about {ways} ways to run each budget, tried in about {full} full steps",
                seconds=full * expected.full_step,
                disk=runs * 150,
                memory=expected.run_memory,
            )
        )
    stages.append(Stage(name="plan", what=f"{', '.join(request.ways.methods)}; {plans}", seconds=0.1, disk=20_000))
    stages.append(
        Stage(
            name="export",
            what=f"full, skip, combine, text encoder, VAE decoder to ONNX, opset {profile.opset}, {profile.dtype}",
            disk=expected.weights,
            memory=expected.export_memory,
        )
    )
    for backend in dict.fromkeys(request.backends):
        building = estimate_engine(backend, expected.weights)
        stages.append(Stage(name="engine", what=backend, seconds=building.seconds, memory=building.memory))
    stages.append(Stage(name="bundle", what=str(output), disk=expected.weights))
    if request.verify_samples:
        budgets = request.budgets if request.schedule is None else (len(request.schedule),)
        full = request.verify_samples * (table.num_steps + 3 * sum(budgets)) + 8 * (table.num_steps + sum(budgets))
        stages.append(
            Stage(
                name="verify",
                what=f"{request.verify_samples} held-out clips, about {full} full steps",
                seconds=full * expected.full_step,
                memory=2 * expected.run_memory,
            )
        )
    return stages
