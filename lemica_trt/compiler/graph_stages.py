"""Model → sampler, layout, graphs, engines, times: everything that needs no calibration."""

from __future__ import annotations

from pathlib import Path

from msgspec import UNSET

from lemica_trt.backends.build import build as build_engine
from lemica_trt.backends.build import prune
from lemica_trt.backends.options import options_by_backend
from lemica_trt.bundle.manifest import (
    REFERENCE_FILE,
    SAMPLER_FILE,
    plan_path,
)
from lemica_trt.compiler import artifacts
from lemica_trt.compiler.artifacts import Engines, Exported, ModelFacts
from lemica_trt.compiler.context import Context, library_versions
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.compiler.stage import Writes
from lemica_trt.core.errors import UsageError
from lemica_trt.core.progress import Reporter, size
from lemica_trt.core.values import write_value
from lemica_trt.evaluate.step_timer import StepTimer, times_text
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.graphs import GraphSet, StepLayout
from lemica_trt.planning.layout import layout_for_methods
from lemica_trt.planning.minimax import require_feasible
from lemica_trt.planning.planner import candidates, plan_given
from lemica_trt.planning.search import paths_begin
from lemica_trt.planning.step_plan import UNCACHED, uncached_plan


def run_lower(context: Context, folder: Path) -> Writes:
    """Model → the sampler as a table; at M steps, too, where plans are compared with those."""
    from lemica_trt.planning.fold import nearest_steps

    model, steps = context.model, context.inputs.request.reference_steps
    sampling = model.profile.sampling
    if sampling.guidance_range is not None and not model.guided:
        raise UsageError(
            "--guidance-range: the model has one branch, whose guidance no request changes", fix="leave it out"
        )
    table = model.table()
    kind = "stochastic" if table.stochastic else "deterministic"
    context.reporter.stage(
        "lower",
        f"{table.scheduler}, {table.num_steps} steps, {kind}; reads {table.latent_history} latents and "
        f"{table.output_history} outputs back"
        + "".join(f"; steps {at} … run {model.experts[table.kinds[at]]}" for at in table.switches),
    )
    facts = ModelFacts(
        revision=model.revision,
        latent_shape=tuple(model.latent_shape),
        guided=model.guided,
        branches=model.branches,
        conditions=model.conditions,
        loras=tuple(str(lora.sha256) for lora in model.profile.loras or ()) or UNSET,
        experts=model.experts if len(model.experts) > 1 else UNSET,
    )
    write_value(facts, folder / artifacts.MODEL_FILE)
    write_value(table, folder / SAMPLER_FILE)
    write_value(uncached_plan(table, guidance_scale=sampling.guidance_scale), folder / plan_path(UNCACHED))
    writes = {
        "model": [artifacts.MODEL_FILE],
        "sampler": [SAMPLER_FILE],
        "uncached": [plan_path(UNCACHED)],
        "reference": list[str](),
    }
    if steps is not None and steps != table.num_steps:
        finer = model.table(steps)
        nearest_steps(table, finer)
        write_value(finer, folder / REFERENCE_FILE)
        writes["reference"] = [REFERENCE_FILE]
    return writes


def require_plannable(context: Context) -> None:
    """Refuse before hours of work what no plan can be made for: budgets, a schedule, a method that needs no
    calibration.

    Raises:
        InfeasibleError, InputError, UsageError, UnsupportedError: as the planners.
    """
    if not context.takes_part("plan"):
        return
    request, problem = context.inputs.request, context.problem(None)
    if request.schedule is not None:
        plan_given(problem, request.schedule)
        return
    given, num_steps = context.inputs.given.calibration, problem.table.num_steps
    max_skip = context.inputs.profile.calibration.max_skip if given is None else given.graph.max_skip
    budgets = [budget for budget in request.budgets if isinstance(budget, int)]
    switches = paths_begin(request.planners, problem.table)
    require_feasible(num_steps, max_skip if request.needs_calibration else num_steps, budgets, switches)
    asked = [planner for planner in request.planners if planner.needs <= problem.has]
    for budget in budgets if asked and "auto" not in request.methods else ():
        candidates(asked, problem, budget)


def run_layout(context: Context, folder: Path) -> Writes:
    """Sampler, methods → the interface that all step graphs share."""
    facts = context.read(ModelFacts, artifacts.MODEL_FILE)
    layout = layout_for_methods(
        context.problem(None),
        context.inputs.request.planners,
        latent_shape=facts.latent_shape,
        guided=facts.guided,
        branches=facts.branches,
        conditions=facts.conditions,
        experts=facts.experts or (),
    )
    context.reporter.stage(
        "layout",
        f"plans read at most {layout.latent_history} latents and {layout.output_history} outputs back"
        + (", the branches of the guidance apart" if layout.guidance_history else "")
        + (f", and caches {', '.join(slot.name for slot in layout.caches)}" if layout.caches else ""),
    )
    write_value(layout, folder / artifacts.LAYOUT_FILE)
    return {"layout": [artifacts.LAYOUT_FILE]}


def run_export(context: Context, folder: Path) -> Writes:
    """Model, layout → ONNX graphs and the tokenizer."""
    from lemica_trt.export import export_graphs

    profile, model = context.inputs.profile, context.model
    context.reporter.stage("export", f"ONNX opset {profile.opset}, {profile.dtype}")
    graphs = export_graphs(model, context.read(StepLayout, artifacts.LAYOUT_FILE), folder)
    files = [artifacts.EXPORT_FILE]
    for name, content in model.tokenizer_files().items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
        files.append(name)
    found = Exported(graphs=graphs, encoders=model.encoder_specs(), versions=library_versions())
    write_value(found, folder / artifacts.EXPORT_FILE)
    for graph in graphs.graphs:
        names = [graph.file, *graph.data_files]
        context.reporter.note(f"{graph.role}: {size(sum((folder / name).stat().st_size for name in names))}")
        files += names
    return {"graphs": files}


def run_engine(context: Context, folder: Path) -> Writes:
    """Graphs → engines of every backend asked for; finished ones of an interrupted run are taken as they are."""
    graphs, root = context.read(Exported, artifacts.EXPORT_FILE).graphs, context.work.root
    entries = build_engines(context.inputs.request, graphs, root, root, context.reporter)
    write_value(Engines(entries=tuple(entries)), folder / artifacts.ENGINES_FILE)
    built = {name for entry in entries for name in entry.files.values()} - {graph.file for graph in graphs.graphs}
    return {"engines": [artifacts.ENGINES_FILE, *sorted(built)]}


def build_engines(
    request: BuildRequest, graphs: GraphSet, root: Path, out: Path, reporter: Reporter
) -> list[EngineEntry]:
    """Engines of a request's backends; finished ones in `out` are taken as they are, it keeps no others.

    Args:
        root: folder of the graphs.
        out: folder of the engines.
    """
    entries = []
    for backend, options in options_by_backend(request.backends, request.options).items():
        reporter.stage("engine", backend)
        entries.append(build_engine(backend, graphs, root, out, options, reporter))
    prune(entries, out)
    return entries


def run_time(context: Context, folder: Path) -> Writes:
    """Engines → what a step takes on this machine."""
    measured = StepTimer(context.engines, context.reporter).measured
    context.reporter.stage("time", times_text(measured.steps, measured.backend))
    write_value(measured, folder / artifacts.TIMES_FILE)
    return {"times": [artifacts.TIMES_FILE]}
