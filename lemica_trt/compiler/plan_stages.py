"""Model, sampler, prompts → calibration → plans."""

from __future__ import annotations

from pathlib import Path

from lemica_trt.bundle.manifest import (
    ERROR_GRAPH_FILE,
    FRONT_FILE,
    GRAMS_FILE,
    SELECTION_FILE,
    SENSITIVITY_FILE,
    plan_path,
)
from lemica_trt.compiler import artifacts
from lemica_trt.compiler.artifacts import ModelFacts, PlanIndex
from lemica_trt.compiler.context import Context
from lemica_trt.compiler.stage import Writes
from lemica_trt.core.progress import Reporter
from lemica_trt.core.values import write_value
from lemica_trt.ir.calibration import Calibration, ErrorGraph
from lemica_trt.ir.profile import CalibrationSettings
from lemica_trt.ir.trials import TrialTables
from lemica_trt.planning.planner import choose_planners, plan_given
from lemica_trt.planning.search import (
    BudgetSearch,
    PlanSet,
    beside,
    candidates_on,
    paths_begin,
    plan_budgets,
    resolve_budgets,
)
from lemica_trt.planning.step_plan import UNCACHED


def run_calibrate(context: Context, folder: Path) -> Writes:
    """Model, sampler, prompts → error graph, Gram matrices and sensitivities; or those that were given."""
    found = context.inputs.given.calibration
    if found is not None:
        _require_fitting(context, found.graph)
    else:
        found = calibrated(context)
    files = {ERROR_GRAPH_FILE: found.graph, GRAMS_FILE: found.grams, SENSITIVITY_FILE: found.sensitivity}
    for path, value in files.items():
        if value is not None:
            write_value(value, folder / path)
    return {"calibration": [path for path, value in files.items() if value is not None]}


def calibrated(
    context: Context, settings: CalibrationSettings | None = None, reporter: Reporter | None = None
) -> Calibration:
    """The model's calibration.

    Args:
        settings: None: the profile's.
        reporter: None: the context's.
    """
    from lemica_trt.calibrate.calibration import calibrate

    inputs = context.inputs
    return calibrate(
        context.step_model,
        settings or inputs.profile.calibration,
        context.table,
        inputs.prompts,
        journals=context.work.journals,
        trajectories=context.trajectories,
        reporter=reporter or context.reporter,
        workers=context.work_on,
        sensitivity=inputs.given.sensitivity,
    )


def _require_fitting(context: Context, graph: ErrorGraph) -> None:
    """Raise InputError unless an error graph that was given is of this model."""
    from lemica_trt.calibrate.calibration import require_calibration_of

    facts = context.read(ModelFacts, artifacts.MODEL_FILE)
    context.reporter.stage("calibrate", f"--error-graph: {graph.samples} samples, method {graph.method}")
    require_calibration_of(
        graph,
        context.table,
        context.inputs.profile,
        revision=facts.revision,
        latent_shape=facts.latent_shape,
        where="--error-graph",
    )


def run_plan(context: Context, folder: Path) -> Writes:
    """Calibration, prompts, budgets → plans: of several methods the best by trial."""
    made = make_plans(context)
    for plan in made.plans:
        steps = " ".join(map(str, plan.full_steps))
        context.reporter.stage("plan", f"{plan.name}: {plan.method}; full steps {steps}")
        if plan.name != UNCACHED:  # that is there
            write_value(plan, folder / plan_path(plan.name))
    index = PlanIndex(plans=tuple(plan.name for plan in made.plans), budgets=made.names)
    write_value(index, folder / artifacts.PLANS_FILE)
    own = [plan_path(name) for name in index.plans if name != UNCACHED]
    writes: Writes = {"plans": [artifacts.PLANS_FILE, *own], "trials": [], "front": []}
    if made.tables:
        write_value(TrialTables(tables=made.tables), folder / SELECTION_FILE)
        writes["trials"] = [SELECTION_FILE]
    if made.front is not None:
        write_value(made.front, folder / FRONT_FILE)
        writes["front"] = [FRONT_FILE]
    return writes


def make_plans(context: Context) -> PlanSet:
    """Plans of the request's budgets, or of its schedule."""
    from lemica_trt.calibrate.calibration import fit_by_model
    from lemica_trt.evaluate.evaluator import PlanEvaluator
    from lemica_trt.evaluate.samples import validation_samples

    inputs, table, reference = context.inputs, context.table, context.reference
    request, settings, journals = inputs.request, inputs.profile.calibration, context.work.journals
    fit = fit_by_model(
        lambda: context.step_model, settings, table, inputs.prompts, reference=reference, journals=journals,
        trajectories=context.trajectories, reporter=context.reporter, target=context.target,
    )  # fmt: skip
    problem = context.problem(context.calibration, fit=fit)
    if request.schedule is not None:
        plan = plan_given(problem, request.schedule)
        return PlanSet([plan], (plan.name,))
    max_skip = None if problem.calibration is None else problem.graph.max_skip
    switches = paths_begin(request.planners, table)
    budgets = resolve_budgets(request.budgets, request.planners, context.times, table.num_steps, max_skip, switches)
    samples = validation_samples(inputs.prompts, settings)
    evaluator = PlanEvaluator(
        lambda: context.step_model,
        table,
        samples,
        reference=reference,
        folder=journals,
        trajectories=context.trajectories,
        reporter=context.reporter,
        workers=context.work_on,
        target=context.target,
    )
    planners = choose_planners(request.methods, problem)
    if samples.count == 0:  # nothing to choose by
        planners = planners[:1]
    found = beside(candidates_on(context.layout, problem, planners), context.known)
    search = BudgetSearch(found, evaluator, context.reporter, try_all=request.tries_all(table.num_steps))
    return plan_budgets(
        budgets,
        search,
        context.reporter,
        pareto=request.pareto,
        num_steps=table.num_steps,
        max_skip=max_skip,
        switches=switches,
    )
