"""The stages alone, on the files of the one before, and what is done with a finished bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lemica_trt.builders import Option, options_by_backend
from lemica_trt.builders import build as build_engine
from lemica_trt.bundle import (
    ERROR_GRAPH_FILE,
    GRAMS_FILE,
    SAMPLER_FILE,
    SELECTION_FILE,
    SENSITIVITY_FILE,
    Bundle,
    add_plan,
    plan_path,
    require_replaceable,
    write_bundle,
)
from lemica_trt.candidates import Selection, Selections, Ways, way
from lemica_trt.errors import InputError, MissingDependencyError, UsageError
from lemica_trt.grams import TrajectoryGrams
from lemica_trt.graph import ErrorGraph
from lemica_trt.pipeline.planning import chooser, make_plans, planned_solvers
from lemica_trt.pipeline.stages import (
    assemble,
    begin,
    calibrate,
    calibration_prompts,
    engines,
    export,
    hired,
    open_model,
    retargeted,
    verifiable,
    verify_bundle,
)
from lemica_trt.pipeline.work import (
    Exported,
    Findings,
    Work,
    exported_in,
    findings_in,
    plans_in,
    short,
    work_folder,
    write_plans,
)
from lemica_trt.plan import StepPlan, layout_from_plans
from lemica_trt.progress import Reporter
from lemica_trt.sampler import SamplerTable
from lemica_trt.sensitivity import Sensitivity
from lemica_trt.spec import Profile
from lemica_trt.values import V, read_value

if TYPE_CHECKING:
    from lemica_trt.verify import VerifyReport


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
            sensitivity=carried(Sensitivity, SENSITIVITY_FILE),
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
            with hired(model, None, reporter) as workers:
                return chooser(model, table, calibration_prompts(profile, None), work, reporter, workers)(plans)

        plans, selections = make_plans(
            table,
            profile=profile,
            budgets=budgets,
            ways=ways,
            findings=findings_in(work),
            schedule=schedule,
            solver=planned_solvers(table) if ways.solvers else None,
            choose=choose,
        )
        write_plans(plans, selections, work, reporter)
        return plans


def export_stage(work: Work, reporter: Reporter) -> Exported:
    """The plans of a work folder → graphs in it."""
    with work.locked():
        plans = plans_in(work)
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
        entries = engines(exported, work, backends, options, reporter)
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
            f"expected the weights that the bundle was built from ({short(bundle.manifest.revision)}), "
            f"got {short(model.revision)} in {model.profile.source}",
            fix="name the right folder with --weights, or rebuild the bundle",
        )
    return verify_bundle(bundle, model, samples, reporter, backend=backend)
