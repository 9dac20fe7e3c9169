"""What is known of a model → plans: those of every method that is asked for, the best by trial."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lemica_trt.compiler.work import Findings, Work, short
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.ir.budget import Afforded
from lemica_trt.ir.calibration import Provenance
from lemica_trt.ir.graphs import GraphSet
from lemica_trt.ir.plan import StepPlan, check_plan
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.sampler import SAMPLER_TOLERANCE, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.trials import TrialTable
from lemica_trt.planning.planner import (
    Chooser,
    Fit,
    Planner,
    Problem,
    SolverTable,
    candidates,
    choose_planners,
    plan_given,
    select,
)
from lemica_trt.planning.step_plan import uncached_plan

if TYPE_CHECKING:
    from lemica_trt.calibrate.fit import Fitter
    from lemica_trt.calibrate.workers import Workers
    from lemica_trt.evaluate.trials import Trials
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


def make_plans(
    table: SamplerTable,
    *,
    profile: Profile,
    budgets: Sequence[int | Afforded],
    methods: Sequence[str],
    findings: Findings,
    schedule: Sequence[int] | None = None,
    solver: SolverTable | None = None,
    fit: Fit | None = None,
    choose: Chooser | None = None,
    before: Mapping[int, Sequence[str]] | None = None,
    graphs: GraphSet | None = None,
) -> tuple[list[StepPlan], tuple[TrialTable, ...]]:
    """Plans `bB` for each budget, in the order given; or one for a given schedule.

    Args:
        table: the sampler.
        profile: gives the default guidance scale, and the model's name for published schedules.
        budgets: full steps, or what a time allows.
        methods, schedule: see `Request`.
        findings: what is known of a calibration.
        solver, fit: see `Problem`.
        choose: tries several plans; None: the one that did best before.
        before: budget → methods, the best first.
        graphs: what the plans must run on; None: graphs are made for them.

    Returns:
        The plans, and how all did that were tried now.

    Raises:
        UsageError: what is asked for needs a calibration, or a trial, and there is none.
        InputError: the calibration or a published schedule is of another sampler.
    """
    problem = Problem(
        table=table,
        guidance_scale=profile.sampling.guidance_scale,
        calibration=findings.calibration,
        reference=findings.reference,
        model=profile.name,
        fit=fit,
        solver=solver,
    )
    if schedule is not None:
        return [plan_given(problem, schedule)], ()
    planners = choose_planners(methods, problem)
    plans, tables = [], []
    for budget in budgets:
        if choose is None and len(planners) > 1:
            plans.append(_best_before(planners, problem, budget, before or {}, graphs))
            continue
        several = candidates(planners, problem, budget)
        if len(several) == 1 or choose is None:
            plans.append(several[0])
            continue
        plan, trials = choose(several)
        plans.append(plan)
        tables.append(trials)
    return plans, tuple(tables)


def _best_before(
    planners: Sequence[Planner],
    problem: Problem,
    budget: int | Afforded,
    before: Mapping[int, Sequence[str]],
    graphs: GraphSet | None,
) -> StepPlan:
    """The plan of the method that did best at the nearest budget, of those that can make one here.

    Raises:
        UsageError: nothing was tried.
    """
    count = budget if isinstance(budget, int) else budget.budgets[0]
    known = {planner.name: planner for planner in planners}
    for tried in sorted(before, key=lambda tried: abs(tried - count)):
        for planner in (known[method] for method in before[tried] if method in known):
            with contextlib.suppress(UsageError):
                (plan,) = candidates([planner], problem, budget)
                if graphs is None or _runs_on(plan, graphs):
                    return plan
    raise UsageError(
        f"{len(planners)} methods are allowed for {count} full steps, and none that is possible here was tried",
        fix="name one, for example --method linear, or let `lemica-trt build` try them",
    )


def _runs_on(plan: StepPlan, graphs: GraphSet) -> bool:
    try:
        check_plan(plan, graphs)
    except InputError:
        return False
    return True


class Judge:
    """Tries plans on the model: on prompts behind those of the calibration, and other seeds. A `Chooser`.

    Uncached runs are kept for all plans that it is asked about.

    Args:
        model: opens it; called when there is something to run.
        table: its sampler.
        prompts: of the calibration.
        work: where finished runs are kept.
        fine: the sampler at M steps, where plans are held against that.
        workers: run the plans; None: this process.
    """

    def __init__(
        self,
        model: Callable[[], Model],
        table: SamplerTable,
        prompts: Sequence[str],
        work: Work,
        reporter: Reporter,
        *,
        fine: SamplerTable | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._open, self._table, self._prompts = model, table, prompts
        self._work, self._reporter, self._reference = work, reporter, fine or table
        self._workers = workers

    def __call__(self, plans: Sequence[StepPlan]) -> tuple[StepPlan, TrialTable]:
        """The best plan, see `planner.select`."""
        run, _, samples = self._trials
        budgets = "/".join(str(budget) for budget in sorted({plan.budget for plan in plans}))
        self._reporter.stage(
            "select",
            f"{len(plans)} plans of {budgets} full steps, the best of them on {samples} samples, against "
            f"{self._reference.num_steps} steps",
        )
        plan, table = select(plans, samples, run)
        self._reporter.note(f"{table.best.label}: {table.best.mean:.1f} dB")
        return plan, table

    def psnr(self, plan: StepPlan) -> tuple[float, ...]:
        """dB of the frames of each validation sample against the reference."""
        run, journal, samples = self._trials
        return run.psnr(plan, range(samples), journal=journal)

    @functools.cached_property
    def _trials(self) -> tuple[Trials, Path, int]:
        """What runs plans, the journal of frames, and the number of samples."""
        from lemica_trt.evaluate.trials import Trials, trials_digest

        model = self._open()
        settings, table, prompts = model.profile.calibration, self._table, self._prompts
        skip = settings.samples % len(prompts)
        fresh = [*prompts[skip:], *prompts[:skip]]
        seed = settings.seed + settings.samples
        reference = uncached_plan(self._reference, guidance_scale=model.profile.sampling.guidance_scale)
        digest = trials_digest(model, reference, table, fresh, seed=seed)
        run = Trials(
            model,
            reference,
            table,
            fresh,
            seed=seed,
            journal=self._work.trials(digest),
            progress=self._reporter.advance,
            workers=self._workers,
        )
        return run, self._work.frames(digest), settings.validation_samples


def fitter(
    model: Callable[[], Model],
    table: SamplerTable,
    prompts: Sequence[str],
    work: Work,
    reporter: Reporter,
    *,
    fine: SamplerTable | None = None,
) -> Fit | None:
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

    def fit(schedule: Schedule) -> StepPlan:
        fits = opened()
        wanted = fits.evaluations_for(schedule)
        reporter.stage(
            "fit",
            f"a solver for {schedule.budget} steps, on {fits.samples} samples, to {reference.num_steps} steps: "
            f"{wanted / table.num_steps / fits.samples:.1f} samplings a sample",
        )
        return fits(schedule)

    return fit


def planned_solvers(table: SamplerTable) -> SolverTable:
    """Solvers set to the steps of a schedule; needs PyTorch and diffusers."""
    from lemica_trt.models.scheduler import solver_table

    return lambda schedule, solver: solver_table(table, schedule.full_steps, solver)
