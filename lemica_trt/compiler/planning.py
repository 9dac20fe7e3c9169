"""What is known of a model → plans: schedules by every method allowed, ways to run them, the best by trial."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from lemica_trt.compiler.work import Findings, Work, short
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.ir.budget import Afforded
from lemica_trt.ir.calibration import ErrorGraph, Provenance, TrajectoryGrams
from lemica_trt.ir.graphs import GraphSet
from lemica_trt.ir.plan import StepPlan, check_plan, guidance_range
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.sampler import SAMPLER_TOLERANCE, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.trials import Selection, recipe, way
from lemica_trt.planning.candidates import FittedPlans, Planner, SolverTable, Ways, candidates
from lemica_trt.planning.minimax import least_sum, solve
from lemica_trt.planning.prediction_path import POWERS, solve_predicted
from lemica_trt.planning.schedules import given, published, uniform
from lemica_trt.planning.signed import AdjointProducts, signed_errors, solve_signed

if TYPE_CHECKING:
    from lemica_trt.calibrate.fit import Fitter
    from lemica_trt.models import Model


def require_graph_fits(graph: Provenance, model: Model, table: SamplerTable, *, where: str) -> None:
    """Raise InputError unless an error graph, or its Grams, were measured on this model, sampler and guidance."""
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
                f"{where}: expected a measurement of {name} {short(expected)}, got {short(got)}",
                fix="calibrate this model (leave --error-graph out)",
            )
    if not graph.is_of(table):
        raise InputError(
            f"{where}: expected a measurement of this {table.scheduler}, got one of the same settings whose "
            f"coefficients differ by more than {SAMPLER_TOLERANCE:g}",
            fix="calibrate with this release of diffusers (leave --error-graph out)",
        )


Chooser = Callable[[Sequence[StepPlan]], tuple[StepPlan, Selection]]
"""Plans of one budget, or of one time, → the best of them, and how all did."""


def make_plans(
    table: SamplerTable,
    *,
    profile: Profile,
    budgets: Sequence[int | Afforded],
    ways: Ways,
    findings: Findings,
    schedule: Sequence[int] | None = None,
    solver: SolverTable | None = None,
    fitted: FittedPlans | None = None,
    choose: Chooser | None = None,
    before: Mapping[int, Sequence[str]] | None = None,
    graphs: GraphSet | None = None,
) -> tuple[list[StepPlan], tuple[Selection, ...]]:
    """Plans `bB` for each budget, in the order given; or one for a given schedule.

    Args:
        table: the sampler.
        profile: gives the default guidance scale, and the model's name for published schedules.
        budgets: full steps, or what a time affords: then ways that run the skip graph have others than ways that fold.
        ways, schedule: see `Request`.
        findings: what the methods and predictors need of a calibration.
        solver: makes planned solvers; None: without them.
        fitted: makes the plans of fitted solvers; None: without them.
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
    if graph is not None and not graph.is_of(table):
        raise InputError(
            "expected an error graph of this sampler, got one that was measured with another", fix="calibrate first"
        )
    plans, selections = [], []
    if schedule is not None:
        chosen = given(schedule, table.num_steps)
        found: list[dict[int, dict[Planner, list[Schedule]]]] = [{chosen.budget: {"given": [chosen]}}]
        budgets = [chosen.budget]
    else:
        found = [
            {count: _schedules(table, profile, count, ways, findings) for count in _full_steps(budget)}
            for budget in budgets
        ]
    for budget, schedules in zip(budgets, found):
        several = [
            plan
            for count, of_count in schedules.items()
            for plan in candidates(
                ways,
                of_count,
                table,
                name=f"b{count}",
                guidance_scale=profile.sampling.guidance_scale,
                grams=findings.grams,
                solver=solver,
                fitted=fitted if isinstance(budget, int) or count == budget.folded else None,
                fine=findings.reference,
                error_graph_digest=None if graph is None else graph.digest,
            )
            if isinstance(budget, int) or budget.admits(plan)
        ]
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
    return [_limited(plan, findings) for plan in plans], tuple(selections)


def _limited(plan: StepPlan, findings: Findings) -> StepPlan:
    """A plan that says for which guidance it holds; where its calibration was carried over, that limits it, too."""
    ranges = [guidance_range(plan.guidance_scale)]
    if findings.graph is not None and findings.graph.method == "retargeted" and findings.sensitivity is not None:
        ranges.append(guidance_range(findings.sensitivity.guidance_scale))
    known = [found for found in ranges if found is not None]
    if plan.budget == plan.num_steps or not known:
        return plan
    low, high = max(low for low, _ in known), min(high for _, high in known)
    return msgspec.structs.replace(plan, guidance_range=(low, high))


def _full_steps(budget: int | Afforded) -> tuple[int, ...]:
    return (budget,) if isinstance(budget, int) else budget.budgets


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
        elif method == "predicted":
            if findings.grams is not None:
                found[method] = _predicted(table, graph, findings.grams, budget)
            elif ways.method == method:
                raise UsageError("method predicted needs the Grams of uncached runs", fix="calibrate first")
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


def _predicted(table: SamplerTable, graph: ErrorGraph, grams: TrajectoryGrams, budget: int) -> list[Schedule]:
    """Schedules for predicted outputs: as errors were measured, and for solvers that correct part of them."""
    every = [solve_predicted(table, graph, grams, [budget], power=power)[budget] for power in POWERS]
    return list({schedule.full_steps: schedule for schedule in every}.values())


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
    """The plan whose way did best at the nearest budget; of a schedule that was given, whose recipe did.

    Raises:
        UsageError: nothing was tried.
    """
    for budget in sorted(before, key=lambda budget: abs(budget - plans[0].budget)):
        for best in before[budget]:
            for plan in plans:
                if way(plan) == best or (plan.method == "given" and recipe(way(plan)) == recipe(best)):
                    return plan
    raise UsageError(
        f"{len(plans)} ways to run {plans[0].budget} full steps are allowed, and none was tried on this model",
        fix="name one, for example --reuse output --predict none, or let `lemica-trt build` try them",
    )


def fitter(
    model: Callable[[], Model],
    table: SamplerTable,
    prompts: Sequence[str],
    work: Work,
    reporter: Reporter,
    *,
    fine: SamplerTable | None = None,
) -> FittedPlans | None:
    """Fits solvers to the model, on the samples of the calibration; None where the sampler draws noise.

    Args:
        model: opens it; called when there is something to fit.
        fine: the sampler at M steps, where plans are held against that.
    """
    if table.stochastic:
        return None
    reference = fine or table

    @functools.cache
    def opened() -> Fitter:
        from lemica_trt.calibrate.fit import Fitter, fit_measurement

        settings = model().profile.calibration
        measurement = fit_measurement(model(), table, reference, prompts, settings.samples, settings.seed)
        return Fitter(
            model(),
            table,
            reference,
            prompts,
            samples=settings.samples,
            seed=settings.seed,
            journal=work.fits(measurement.digest),
            progress=reporter.advance,
        )

    def fit(schedules: Sequence[Schedule]) -> list[StepPlan]:
        fits, plans = opened(), []
        for schedule in schedules:
            wanted = fits.evaluations_for(schedule)
            reporter.stage(
                "fit",
                f"a solver for {schedule.budget} steps, on {fits.samples} samples, to {reference.num_steps} steps: "
                f"{wanted / table.num_steps / fits.samples:.1f} samplings a sample",
            )
            plans.append(fits(schedule))
        return plans

    return fit


def planned_solvers(table: SamplerTable) -> SolverTable:
    """Solvers set to the steps of a schedule; needs PyTorch and diffusers."""
    from lemica_trt.models.scheduler import solver_table

    return lambda schedule, solver: solver_table(table, schedule.full_steps, solver)
