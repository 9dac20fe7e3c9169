"""A planner makes a step plan of B full steps; `select` finds the best of several plans by running them.

    problem     what a plan is made for, and what is known: sampler, calibration, how to fit and to set a solver
    planner     problem, budget → step plan; one file each in `planners/`, found by listing
    candidates  the plans of several planners for one budget
    select      which of them does best on the model

Which planner is best depends on the model, and the errors that a schedule was made from do not tell: `auto` runs
the plans of a few planners whole, on prompts that nothing was fitted to, by successive halving.

Knows plans and numbers only; `evaluate` runs plans.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from lemica_trt.core.errors import InfeasibleError, InputError, UnsupportedError, UsageError, install_command
from lemica_trt.ir.budget import StepBudget
from lemica_trt.ir.calibration import Calibration, ErrorGraph, TrajectoryGrams
from lemica_trt.ir.plan import PlanRow, StepPlan, guidance_range
from lemica_trt.ir.profile import FEW_STEPS
from lemica_trt.ir.sampler import SAMPLER_TOLERANCE, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.trials import Trial, TrialScore, TrialTable
from lemica_trt.planning.schedules import given
from lemica_trt.planning.step_plan import plan_from_schedule, uncached_plan

StockSolver = Literal["first-order", "dpmsolver++", "unipc"]

SolverTable = Callable[[Schedule, StockSolver], SamplerTable]
"""A standard solver set to the full steps of a schedule: `models.scheduler.solver_table`."""

Fit = Callable[[Schedule], StepPlan]
"""The plan of a solver fitted for a schedule: `calibrate.fit.Fitter`."""

Need = Literal["error-graph", "grams", "fit", "levels", "solver"]

MISSING: dict[Need, tuple[str, str]] = {
    "error-graph": ("an error graph", "calibrate first"),
    "grams": ("the Gram matrices of uncached runs", "calibrate first; an error graph alone has none"),
    "fit": (
        "a solver fitted to the model, which takes the model and a sampler that draws no noise",
        "fit it where the model is (lemica-trt build), with a deterministic sampler (--scheduler)",
    ),
    "levels": ("a sampler whose noise levels are known", "use another --scheduler or --method"),
    "solver": (
        "standard solvers, which take PyTorch, diffusers and a sampler whose noise levels are known",
        f"{install_command('build')}, or use another --method",
    ),
}
"""Need → what is missing where a problem does not have it, and how to get it."""

AUTO = ("fitted", "stock:dpmsolver++", "stock:unipc")
"""What `auto` tries: what won wherever it could be fitted, and the best stock solvers, which it must not be below."""

PAPER = "lemica"
"""The planner that every gain is measured against."""

UNFITTED = ("linear", "lemica", "stock:dpmsolver++", "stock:unipc")
"""What `auto` tries where no solver can be fitted."""

GROUPS = ("auto", "all")
"""What may stand for several methods: a few, or every one that goes by measurements or a standard solver and is not
there to be compared with only."""


def auto_methods(num_steps: int, *, fits: bool = True) -> tuple[str, ...]:
    """What `auto` tries for a sampler, if everything is possible.

    Of few steps LeMiCa's plan is tried, too: between steps that far apart outputs are not smooth, and a fitted solver
    is not always ahead.

    Args:
        fits: whether a solver can be fitted.
    """
    if not fits:
        return UNFITTED
    return AUTO if num_steps > FEW_STEPS else (AUTO[0], PAPER, *AUTO[1:])


@dataclass(frozen=True)
class Problem:
    """What plans are made for, and what is known to make them from; built once for all planners and budgets.

    Attributes:
        table: the sampler, N steps.
        guidance_scale: default of a request; what the calibration ran at.
        calibration: of this sampler; None: not calibrated.
        reference: the same sampler at M > N steps, where plans are to end where that ends; None: where the N steps end.
        model: profile name, which published schedules are listed under.
        fit: fits a solver to the model; None: there is no model to fit to.
        fit_range: lowest and highest guidance scale of what `fit` fits to; None: `guidance_scale` alone.
        solver: sets a standard solver; None: there is no diffusers to take it from.

    Raises:
        InputError: the calibration was measured on another sampler.
    """

    table: SamplerTable
    guidance_scale: float
    calibration: Calibration | None = None
    reference: SamplerTable | None = None
    model: str = ""
    fit: Fit | None = None
    fit_range: tuple[float, float] | None = None
    solver: SolverTable | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None and not self.calibration.is_of(self.table):
            got = self.calibration.graph
            same = got.sampler_digest == self.table.digest
            raise InputError(
                f"expected a calibration of {self.table.scheduler} with {self.table.num_steps} steps, got one of "
                + (
                    f"the same settings whose coefficients differ by more than {SAMPLER_TOLERANCE:g}"
                    if same
                    else f"{got.scheduler} with {got.num_steps} steps, or of other settings"
                ),
                fix="calibrate with this sampler",
            )

    @property
    def has(self) -> frozenset[Need]:
        """The needs of planners that are met."""
        calibration = self.calibration
        met: dict[Need, bool] = {
            "error-graph": calibration is not None,
            "grams": calibration is not None and calibration.grams is not None,
            "fit": self.fit is not None and not self.table.stochastic,
            "levels": self.table.levels is not None,
            "solver": self.solver is not None and self.table.levels is not None,
        }
        return frozenset(need for need, is_met in met.items() if is_met)

    @property
    def graph(self) -> ErrorGraph:
        """Of the calibration; for planners that need it."""
        assert self.calibration is not None
        return self.calibration.graph

    @property
    def grams(self) -> TrajectoryGrams:
        """Of the calibration; for planners that need them."""
        assert self.calibration is not None and self.calibration.grams is not None
        return self.calibration.grams

    def guidance_range(self, *, fitted: bool = False) -> tuple[float, float] | None:
        """Guidance scales that plans made from the calibration hold for; None: any.

        A calibration that was carried over from another guidance scale holds where both do.

        Args:
            fitted: whether the plan's weights come from `fit`.
        """
        if fitted and self.fit_range is not None:
            return self.fit_range
        scales = [self.guidance_scale]
        if self.calibration is not None and self.calibration.graph.method == "retargeted":
            source = self.calibration.sensitivity
            scales += [] if source is None else [source.guidance_scale]
        found = (guidance_range(scale, fitted=fitted) for scale in scales)
        ranges = [each for each in found if each is not None]
        return (max(low for low, _ in ranges), min(high for _, high in ranges)) if ranges else None


@dataclass(frozen=True)
class Planner:
    """One method. Called with a problem and B, it gives a plan of exactly B full steps, `method` being its name.

    B = N gives the uncached plan, whoever is asked.

    Attributes:
        name: what `--method` takes and tables print.
        summary: one line.
        needs: what a problem must have for it.
        folds: whether nothing runs in a skipped step, so that a plan takes B steps of engine time; else each skipped
            step costs a little.
        make: the method itself: problem, B < N → rows; what the plan says of where it comes from is filled in here.
        latent_history: how many latents a row reads back, where that may be more than the sampler does.
        compared: whether it is there to be compared with, and runs only where it is named: `all` leaves it out.

    Raises:
        UsageError: the problem lacks what it needs; says what.
        InfeasibleError: it has no plan of B full steps.
    """

    name: str
    summary: str
    needs: frozenset[Need]
    folds: bool
    make: Callable[[Problem, int], StepPlan]
    latent_history: int = 1
    compared: bool = False

    def __call__(self, problem: Problem, budget: int) -> StepPlan:
        self.require_needs(problem)
        if budget == problem.table.num_steps:
            return uncached_plan(problem.table, guidance_scale=problem.guidance_scale)
        return _with_origin(self.make(problem, budget), problem, self.name, self.needs)

    def require_needs(self, problem: Problem) -> None:
        """Raise UsageError unless the problem has what the planner needs."""
        for need in sorted(self.needs - problem.has):
            what, fix = MISSING[need]
            raise UsageError(f"method {self.name} needs {what}", fix=fix)


def plan_given(problem: Problem, steps: Sequence[int]) -> StepPlan:
    """The user's own full steps, with LeMiCa's reuse of the last residual in between.

    Args:
        steps: rising, of 0 … N − 1, the first 0.

    Raises:
        UsageError: they are something else.
    """
    schedule = given(steps, problem.table.num_steps)
    if schedule.budget == schedule.num_steps:
        return uncached_plan(problem.table, guidance_scale=problem.guidance_scale)
    plan = plan_from_schedule(
        schedule, problem.table, name="given", guidance_scale=problem.guidance_scale, method="given"
    )
    return _with_origin(plan, problem, "given", frozenset())


def _with_origin(plan: StepPlan, problem: Problem, method: str, needs: frozenset[Need]) -> StepPlan:
    """The plan with its name, and with what it was made from and for."""
    return msgspec.structs.replace(
        plan,
        name=f"b{plan.budget}",
        method=method,
        guidance_scale=problem.guidance_scale,
        guidance_range=problem.guidance_range(fitted="fit" in needs),
        error_graph_digest=problem.graph.digest if "error-graph" in needs else None,
        reference_steps=None if problem.reference is None else problem.reference.num_steps,
    )


# ---------------------------------------------------------------- which planners


@functools.cache
def planners() -> dict[str, Planner]:
    """Name → planner: the `PLANNERS` of every module in `planning/planners/`, by name."""
    folder = importlib.import_module("lemica_trt.planning.planners")
    modules = [
        importlib.import_module(f"{folder.__name__}.{found.name}") for found in pkgutil.iter_modules(folder.__path__)
    ]
    found: list[Planner] = [planner for module in modules for planner in module.PLANNERS]
    return {planner.name: planner for planner in sorted(found, key=lambda planner: planner.name)}


def planners_named(methods: Sequence[str]) -> list[Planner]:
    """All planners that the methods may come to, whatever the problem has: what there must be before a build begins.

    Raises:
        UsageError: no such planner.
    """
    known = planners()
    groups = {"auto": (*AUTO, *UNFITTED), "all": tuple(_measuring())}
    names = [name for method in methods for name in groups.get(method, (method,))]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *GROUPS], n=2)
            raise UsageError(
                f"method: expected {' or '.join(GROUPS)} or one of {', '.join(known)}, got {name!r}",
                fix=f"did you mean {' or '.join(near)}?" if near else "lemica-trt methods says what each does",
            )
    return [known[name] for name in dict.fromkeys(names)]


def choose_planners(methods: Sequence[str], problem: Problem) -> list[Planner]:
    """The planners named, in that order, each once; of a group those that are possible.

    Args:
        methods: names, `auto` (see `auto_methods`), or `all`.

    Raises:
        UsageError: no such planner, or a named one needs what the problem does not have; a group has none.
    """
    chosen: list[Planner] = []
    for method in methods:
        if method in GROUPS:
            chosen += _possible(problem, every=method == "all")
            continue
        (planner,) = planners_named([method])
        planner.require_needs(problem)
        chosen.append(planner)
    if not chosen:
        raise UsageError("no method is possible: there is no calibration and no standard solver", fix="calibrate first")
    return list(dict.fromkeys(chosen))


def _possible(problem: Problem, *, every: bool) -> list[Planner]:
    known = planners()
    names = auto_methods(problem.table.num_steps, fits=known["fitted"].needs <= problem.has)
    if every:
        names = tuple(dict.fromkeys((*names, *_measuring())))
    return [known[name] for name in names if known[name].needs <= problem.has and _lowers(known[name], problem)]


def _measuring() -> list[str]:
    """Names of planners that go by something that was measured, or by a solver, and are meant to win."""
    return [name for name, planner in planners().items() if planner.needs and not planner.compared]


def _lowers(planner: Planner, problem: Problem) -> bool:
    """Whether a standard solver can be set to this sampler's steps; true of all other planners."""
    if "solver" in planner.needs:
        try:
            planner(problem, max(problem.table.num_steps // 2, 1))
        except UnsupportedError:
            return False
    return True


def full_steps_for(planner: Planner, budget: int | StepBudget) -> int | None:
    """B of a planner's plan; None: the time does not allow its kind."""
    if isinstance(budget, int):
        return budget
    return budget.folded if planner.folds else budget.skipping


def candidates(planners: Sequence[Planner], problem: Problem, budget: int | StepBudget) -> list[StepPlan]:
    """Their plans for one budget; of equal plans the first.

    Args:
        budget: B; or what a time allows, which is more full steps for planners that fold than for the others. Planners
            of a kind that the time does not allow at all are left out.

    Returns:
        At least one; planners that have no plan of so many full steps are left out where others have one.

    Raises:
        UsageError: no planner, or only ones that are left out.
        UsageError, InfeasibleError, InputError, UnsupportedError: as the planners.
    """
    found: dict[tuple[PlanRow, ...], StepPlan] = {}
    infeasible: InfeasibleError | None = None
    for planner in planners:
        count = full_steps_for(planner, budget)
        if count is not None:
            try:
                plan = planner(problem, count)
            except InfeasibleError as error:  # too few for each kind of steps to have one, where others fold
                infeasible = error
                continue
            found.setdefault(plan.rows, plan)
    if not found and infeasible is not None:
        raise infeasible
    if not found:
        raise UsageError("none of the methods has a plan in this time", fix="name other methods, or none: --method")
    return list(found.values())


# ---------------------------------------------------------------- which plan

Run = Callable[[Sequence[StepPlan], range], Sequence[Sequence[float]]]
"""Plans, samples → dB of each plan on each sample."""

FIRST_ROUND = 2
"""Samples of the first round. All plans run on the same samples, so that few tell the worse half: of eleven selections
that began with 4 samples, each would have had the same winner."""


LEAD, ENOUGH = 6.0, 8
"""Of fewer samples than `ENOUGH` chance decides which plan comes out best: the first plan, whose method is known to be
good, is kept unless another one leads by more than `LEAD`/√samples dB, about what two plans differ by from sample to
sample over the root of their number."""


def select(
    plans: Sequence[StepPlan], samples: int, run: Run, *, of: TrialScore | UnsetType = UNSET
) -> tuple[StepPlan, TrialTable]:
    """The plan that does best, by successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943).

    The first round tries every plan on `FIRST_ROUND` samples; each further round keeps the better half, at least 2,
    and doubles the samples. The first plan stays to the end, and LeMiCa's if it is there, so that every gain is seen
    against it.

    Args:
        plans: of one budget or one time, at least one; of equals the first wins, and see `LEAD`.
        samples: of the last round.
        run: tries plans.
        of: what it scores, see `TrialTable`.
    """
    scores: list[list[float]] = [[] for _ in plans]

    def mean(index: int) -> float:
        return float(np.mean(scores[index]))

    alive = list(range(len(plans)))
    for new, count in rounds(len(plans), samples):
        if scores[0]:
            kept = sorted(alive, key=mean, reverse=True)[:count]
            alive = [index for index in alive if index in (0, *kept) or plans[index].method == PAPER]
        for index, found in zip(alive, run([plans[index] for index in alive], new)):
            scores[index] += found
    lead = chance_lead(samples)
    order = sorted(range(len(plans)), key=lambda index: (-len(scores[index]), -mean(index) + lead * (index > 0)))
    trials = [
        Trial(label=plans[index].method, full_steps=plans[index].full_steps, snr=tuple(scores[index]))
        for index in order
    ]
    return plans[order[0]], TrialTable(budget=plans[order[0]].budget, samples=samples, trials=tuple(trials), of=of)


def chance_lead(samples: int) -> float:
    """dB that the mean of one plan may be above that of another by chance, see `LEAD`."""
    return LEAD / math.sqrt(samples) if samples < ENOUGH else 0.0


def rounds(plans: int, samples: int) -> list[tuple[range, int]]:
    """The rounds of `select`: which samples are new, and how many plans run on them."""
    found, done, until = [], 0, min(FIRST_ROUND, samples)
    while done < samples:
        found.append((range(done, until), plans))
        done, until, plans = until, min(2 * until, samples), min(max(2, -(-plans // 2)), plans)
    return found


def trial_runs(plans: int, samples: int) -> int:
    """Runs of plans that `select` makes, apart from those of the first and LeMiCa's where they are the worse half."""
    return sum(len(new) * alive for new, alive in rounds(plans, samples))
