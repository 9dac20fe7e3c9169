"""The same stages on a finished bundle: other plans, other engines, verification again."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lemica_trt.bundle.contents import calibration_in, read_from, read_if_listed
from lemica_trt.bundle.manifest import (
    FRONT_FILE,
    MANIFEST_SIGNATURE,
    REFERENCE_FILE,
    REPORTS,
    SAMPLER_FILE,
    SELECTION_FILE,
    plan_path,
)
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.reports import stored_report
from lemica_trt.bundle.workspace import Workspace, work_folder
from lemica_trt.bundle.writing import add_plan, require_replaceable, write_bundle
from lemica_trt.compiler.bundle_stages import verify_bundle
from lemica_trt.compiler.context import open_model, solver_tables
from lemica_trt.compiler.graph_stages import build_engines
from lemica_trt.compiler.plan_quality import better_rival, known_quality, measure_quality, rivals_of, store_quality
from lemica_trt.compiler.quantized import (
    precisions,
    quantized_engines,
    require_quantized_engines,
    without_quantization,
)
from lemica_trt.compiler.requests import BuildRequest, PlanResult, prompts_of
from lemica_trt.core.atomic_folder import held
from lemica_trt.core.errors import InputError, MissingDependencyError, UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.evaluate.step_timer import StepTimer, require_runnable
from lemica_trt.ir.budget import Front, MinPsnr
from lemica_trt.ir.measured import MeasuredPlan
from lemica_trt.ir.plan import UNCACHED, StepPlan
from lemica_trt.ir.profile import Lora, Profile
from lemica_trt.ir.resources import absolute_source
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.trials import TrialTables
from lemica_trt.planning.budget import front_rows
from lemica_trt.planning.planner import Fit, Problem, plan_given, planners
from lemica_trt.planning.search import PlanSet, best_known, budget_outcomes, resolve_budgets

if TYPE_CHECKING:
    from lemica_trt.ir.report import VerifyReport


def verify(
    bundle: Bundle,
    weights: str | None,
    samples: int,
    device: str | None,
    backend: str | None,
    reporter: Reporter,
    *,
    prompts: Path | None = None,
    loras: tuple[Lora, ...] = (),
) -> VerifyReport:
    """Verify a bundle against the model that it was built from, on the backend named or the first that runs here.

    Args:
        prompts: file of held-out prompts; None: the profile's.
        loras: the LoRA weights that were fused; empty: as the bundle names them.

    Raises:
        MissingDependencyError: none of its engines can run here.
        InputError: these are other weights; or no prompts can be read, which is found before the model is loaded.
    """
    backend = backend or require_runnable(bundle, fix="verify the bundle where they run")
    profile = profile_of_bundle(bundle, weights, loras)
    held_out = prompts_of(profile, None if prompts is None else str(prompts), split="held_out")
    model = open_model(profile, reporter, device=device)
    if model.revision != bundle.manifest.revision:
        raise InputError(
            f"expected the weights that the bundle was built from ({str(bundle.manifest.revision)[:12]}), "
            f"got {model.revision[:12]} in {model.profile.source}",
            fix="name the right folder with --weights and LoRA weights with --lora, or rebuild the bundle",
        )
    return verify_bundle(bundle, model, held_out, samples, reporter, backend=backend)


def profile_of_bundle(bundle: Bundle, weights: str | None, loras: tuple[Lora, ...] = ()) -> Profile:
    """The profile that a bundle was built as, pointing at weights that are here.

    Raises:
        UsageError: the bundle was built from a local folder, or from LoRA weights in a file, and that is not named.
    """
    profile = bundle.manifest.profile
    if loras:
        profile = msgspec.structs.replace(profile, loras=loras)
    elif local := [lora for lora in profile.loras or () if lora.on_hub is None]:
        raise UsageError(
            f"the bundle was built with LoRA weights of a local file {local[0].source!r}, which it does not carry",
            fix="name all that were fused, in their order: "
            + " ".join(f"--lora {lora.source}:{lora.scale:g}" for lora in profile.loras or ()),
        )
    if weights is not None:
        return msgspec.structs.replace(profile, source=absolute_source(weights))
    if ":" in profile.source or "/" in profile.source:  # package:NAME or a hub id; of folders only the name is kept
        return profile
    raise UsageError(
        f"the bundle was built from a local folder {profile.source!r}, which it does not carry",
        fix="name it: --weights DIR",
    )


# ---------------------------------------------------------------- plans


def plan_bundle(bundle: Bundle, request: BuildRequest, reporter: Reporter, *, default: str | None = None) -> PlanResult:
    """Add plans to a bundle from what it carries of its calibration; no PyTorch.

    Steps are timed only where a budget is in a unit of time, or a front is shown, and the reports have no times of
    this machine. A PSNR is looked up among the plans that were tried when the bundle was built. New plans run on a few
    held-out clips where the bundle's engines run here; of plans that a time allows the best one is taken, and where
    that is one that the bundle has, none is added.

    Args:
        request: budgets, methods, schedule, reference steps, whether the front is shown, and on how many clips
            (`verify_samples`) new plans run.
        default: name of the new default plan; None: as before.

    Raises:
        UsageError: a reference or a fitted solver that the bundle does not have; a PSNR, and no front.
        UsageError, InfeasibleError, InputError: as the planners, and `bundle.writing.add_plan`.
        MissingDependencyError: a time is needed, and no engine runs here.
    """
    request.check(None)
    timer, front = StepTimer(bundle, reporter), _front_of(bundle, request)
    times = timer.steps if request.is_timed else None
    made, rivals = _plans_for(bundle, request, times, front)
    made, measured = _chosen(bundle, made, rivals, request.verify_samples, reporter)
    added = [plan for plan in made.plans if plan.name not in bundle.plans or bundle.plan(plan.name) != plan]
    for plan in made.plans:
        what = "; the bundle has it"
        if plan in added:
            what = f", in place of that by {bundle.plan(plan.name).method}" if plan.name in bundle.plans else ""
        reporter.stage("plan", f"{plan.name}: {plan.method}; full steps {' '.join(map(str, plan.full_steps))}{what}")
    speeds = timer.speeds(made.plans, times) if times is not None else {}
    if times is None and front is not None:
        with contextlib.suppress(MissingDependencyError):  # a front is worth showing where no engine runs
            times = timer.steps
    if added or default is not None:
        note_signatures(bundle, reporter)
        bundle = add_plan(bundle, *added, default=default)
        store_quality(bundle.path, measured)
    rows = front_rows(front, times) if front is not None and request.pareto else ()
    if rows:
        from lemica_trt.report.pictures import write_front

        # matplotlib comes with what builds; and where another process writes the bundle, there is no picture
        with contextlib.suppress(MissingDependencyError, UsageError), held(bundle.path):
            write_front(
                rows, bundle.path / REPORTS, num_steps=bundle.manifest.profile.sampling.steps,
                report=stored_report(bundle), plan=bundle.plan(),
            )  # fmt: skip
    return PlanResult(
        plans=tuple(bundle.plan(name) for name in bundle.plans),
        outcomes=budget_outcomes(request.budgets, made, times, speeds),
        front=rows,
        measured=known_quality(bundle.path) + measured,
        added=tuple(plan.name for plan in added),
    )


def note_signatures(bundle: Bundle, reporter: Reporter) -> None:
    """Say that the signatures of a bundle go, if it has any: they are of its manifest, which is about to change."""
    if (bundle.path / MANIFEST_SIGNATURE).exists():
        reporter.note("the bundle changes, its signatures go → lemica-trt sign BUNDLE --key KEY.pem")


def _plans_for(
    bundle: Bundle, request: BuildRequest, times: Any, front: Front | None
) -> tuple[PlanSet, list[list[StepPlan]]]:
    """A plan for each budget; and beside each the bundle's own plans that would do as well."""
    table = read_from(bundle, SamplerTable, SAMPLER_FILE)
    reference = reference_of(bundle, table, request.reference_steps)
    cached = [plan for plan in map(bundle.plan, bundle.plans) if plan.budget < plan.num_steps]
    problem = Problem(
        table=table,
        guidance_scale=bundle.manifest.profile.sampling.guidance_scale,
        calibration=calibration_in(bundle),
        reference=reference,
        model=bundle.manifest.profile.name,
        fit=_fit_of(cached, reference),
        fit_range=bundle.manifest.profile.sampling.guidance_range,
        solver=solver_tables(table) if any(method.startswith("stock:") for method in request.methods) else None,
    )
    if request.schedule is not None:
        plan = plan_given(problem, request.schedule)
        return PlanSet([plan], (plan.name,), front=front), [[]]
    if not request.budgets:
        return PlanSet([], (), front=front), []
    max_skip = problem.graph.max_skip if problem.calibration is not None and request.needs_calibration else None
    found = best_known(request.methods, problem, bundle.manifest.graphs.layout, _before(bundle, cached))
    chosen, rivals = list[StepPlan](), list[list[StepPlan]]()
    for budget in resolve_budgets(request.budgets, request.planners, times, table.num_steps, max_skip):
        if isinstance(budget, MinPsnr):
            assert front is not None
            chosen.append(front.least(budget).plan)
            rivals.append([])
        else:
            chosen.append(found(budget))
            searched = "auto" in request.methods and not isinstance(budget, int)
            rivals.append(rivals_of(chosen[-1], budget, cached) if searched else [])
    return PlanSet(chosen, tuple(plan.name for plan in chosen), front=front), rivals


def _chosen(
    bundle: Bundle, made: PlanSet, rivals: list[list[StepPlan]], clips: int, reporter: Reporter
) -> tuple[PlanSet, list[MeasuredPlan]]:
    """The plans to have: those that were made, or better ones that the bundle has; and what was measured."""
    own = [bundle.plan(name) for name in bundle.plans]
    plans = [next((old for old in own if old.name == UNCACHED == plan.name), plan) for plan in made.plans]
    new = [plan for plan in plans if plan.name != UNCACHED and plan not in own]
    run = {plan.rows_digest: plan for plan in (*new, *(r for several in rivals for r in several if new))}
    comparable = [plan for plan in run.values() if plan.reference_steps is None]  # with what the bundle's engines run
    measured = measure_quality(bundle, comparable, clips, reporter)
    by_digest = {found.rows_digest: found for found in measured}
    chosen = []
    for plan, several in zip(plans, rivals):
        kept = better_rival(plan, several, by_digest) if plan in new else None
        chosen.append(kept or plan)
        if kept is not None:
            reporter.stage("plan", f"{kept.name} is as fast and better than {plan.budget} full steps by {plan.method}")
    names = tuple(plan.name for plan in chosen)
    return PlanSet(list({plan.name: plan for plan in chosen}.values()), names, front=made.front), measured


def _before(bundle: Bundle, cached: Sequence[StepPlan]) -> Mapping[int, Sequence[str]]:
    """Budget → methods, the best first, as the build has found."""
    before = {plan.budget: [plan.method] for plan in cached}
    known = read_if_listed(bundle, TrialTables, SELECTION_FILE)
    for table in known.tables if known is not None else ():
        before[table.budget] = [trial.label for trial in table.trials]
    return before


def _fit_of(cached: Sequence[StepPlan], reference: SamplerTable | None) -> Fit:
    """Gives the fitted solvers that a bundle has."""
    by_fit = {name for name, planner in planners().items() if "fit" in planner.needs}
    steps = None if reference is None else reference.num_steps
    known = {plan.full_steps: plan for plan in cached if plan.method in by_fit and plan.reference_steps == steps}

    def fit(schedule: Schedule) -> StepPlan:
        if schedule.full_steps not in known:
            raise UsageError(
                f"a solver for {schedule.budget} full steps is fitted to the model, and the bundle has none for them",
                fix=f"lemica-trt build … --budget {schedule.budget}",
            )
        return known[schedule.full_steps]

    return fit


def _front_of(bundle: Bundle, request: BuildRequest) -> Front | None:
    """The front that a bundle was built with, where it is asked for."""
    if not request.pareto and not any(isinstance(budget, MinPsnr) for budget in request.budgets):
        return None
    found = read_if_listed(bundle, Front, FRONT_FILE)
    if found is None:
        raise UsageError(
            "the bundle has no stored qualities: nothing here knows how good a plan would be",
            fix="build it with --pareto or --min-psnr, which runs plans on the model",
        )
    return found


def reference_of(bundle: Bundle, table: SamplerTable, steps: int | None) -> SamplerTable | None:
    """The sampler at M steps out of a bundle; None: plans are compared with N steps.

    Raises:
        UsageError: the bundle has it for another M.
    """
    found = read_if_listed(bundle, SamplerTable, REFERENCE_FILE)
    if steps == table.num_steps:
        return None
    if steps is not None and (found is None or found.num_steps != steps):
        known = [table.num_steps] if found is None else [table.num_steps, found.num_steps]
        raise UsageError(
            f"--reference-steps: expected {' or '.join(map(str, known))}, which the bundle knows, got {steps}",
            fix=f"lemica-trt build … --reference-steps {steps}",
        )
    return found


# ---------------------------------------------------------------- engines


def rebuild_engines(bundle: Bundle, output: Path, changes: dict[str, Any], reporter: Reporter) -> Bundle:
    """The same bundle with other engines: its graphs and plans as they are, engines built here; no PyTorch.

    Args:
        changes: backends and options.

    Raises:
        UsageError: `output` is the bundle itself, or something else than a bundle.
        IntegrityError: a file of the bundle is altered or missing.
        LemicaError: as `backends.build.build` and, where linear layers are quantised, `quantized.quantized_engines`.
    """
    require_replaceable(output)
    if output.resolve() == bundle.path.resolve():
        raise UsageError(f"--output: expected another folder than the bundle, got {output}", fix="choose another")
    manifest = bundle.manifest
    request = BuildRequest(**changes)
    request.check(manifest.profile.dtype, finished=True)
    bundle.check()
    observed_on = require_quantized_engines(bundle, request) if request.quantizes else None
    work = Workspace(work_folder(output))
    with work.locked():
        plain = msgspec.structs.replace(request, options=without_quantization(request.options))
        entries = build_engines(plain, manifest.graphs, bundle.path, work.root, reporter)
        if observed_on is not None:
            entries = quantized_engines(
                bundle, entries, request, work.root,
                backend=observed_on, trajectories=work.trajectories, reporter=reporter,
            )  # fmt: skip
        before, after = precisions(manifest.engines), precisions(entries)
        graphs = {name for graph in manifest.graphs.graphs for name in (graph.file, *graph.data_files)}
        replaced = {name for entry in manifest.engines for name in entry.paths} - graphs
        replaced |= {plan_path(name) for name in manifest.plans}
        replaced |= set() if before == after else {FRONT_FILE, SELECTION_FILE}  # qualities on the other engines
        files: dict[str, Path | bytes] = {
            **{name: work.root / name for entry in entries for name in entry.paths},
            **{name: bundle.path / name for name in manifest.files if name not in replaced},
        }
        if before != after:
            reporter.note(
                f"the plans were made for {before} engines, these are {after} "
                f"→ lemica-trt plan {output} --calibrate-on engine"
            )
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
