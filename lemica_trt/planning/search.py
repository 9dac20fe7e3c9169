"""Budgets in any unit → plans: which planners are asked, what is tried, and how well budgets are met."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from lemica_trt.core.errors import InfeasibleError, InputError, UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.ir.budget import Budget, Front, Latency, MinPsnr, Point, Speedup, StepBudget, StepTimes, format_budget
from lemica_trt.ir.graphs import StepLayout
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import BudgetOutcome, Speed
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.trials import TrialTable
from lemica_trt.planning.budget import front_budgets, front_rows, least_reaching, max_full_steps
from lemica_trt.planning.layout import misfit
from lemica_trt.planning.minimax import least_budget
from lemica_trt.planning.planner import (
    UNFITTED,
    Planner,
    Problem,
    candidates,
    choose_planners,
    full_steps_for,
    planners,
)

NEAR_FACTOR = 2.0
"""Budgets within this factor of one that tried every method are near it."""


class Candidates(Protocol):
    """The plans that there are for a budget."""

    def __call__(self, budget: int | StepBudget, method: str | None = None) -> list[StepPlan]:
        """At least one; where a method is named, its plan alone if it has one for this budget."""
        ...


class Evaluator(Protocol):
    """What chooses plans and looks at their frames: `evaluate.evaluator.PlanEvaluator`."""

    def __call__(self, plans: Sequence[StepPlan]) -> tuple[StepPlan, TrialTable]:
        """The best of several plans, and how all did."""
        ...

    def psnr(self, plan: StepPlan) -> tuple[float, ...]:
        """dB of the frames of each validation sample against the uncached run."""
        ...


class PlanSet(NamedTuple):
    """The plans of one command.

    Attributes:
        plans: of different names, in the order asked for; the first is the default.
        names: the plan of each budget.
        tables: how plans did, one for each budget that tried several.
        front: the quality of every plan whose frames were looked at; None: of none.
    """

    plans: list[StepPlan]
    names: tuple[str, ...]
    tables: tuple[TrialTable, ...] = ()
    front: Front | None = None


def resolve_budgets(
    budgets: Sequence[Budget],
    planners: Sequence[Planner],
    times: StepTimes | None,
    num_steps: int,
    max_skip: int | None,
    switches: Sequence[int] = (),
) -> list[int | StepBudget | MinPsnr]:
    """Budgets, those in units of time as full steps.

    Args:
        times: of the steps; needed where a budget is in a unit of time.
        switches: as in `least_budget`.

    Raises:
        InfeasibleError: as `planning.budget.max_full_steps`.
    """
    found: list[int | StepBudget | MinPsnr] = []
    kinds = {planner.folds for planner in planners}
    for budget in budgets:
        if isinstance(budget, (Speedup, Latency)):
            assert times is not None
            wanted = {"folds": True in kinds, "skips": False in kinds}
            found.append(max_full_steps(budget, times, num_steps, max_skip, **wanted, switches=switches))
        else:
            found.append(budget)
    return found


def paths_begin(planners: Sequence[Planner], table: SamplerTable) -> tuple[int, ...]:
    """The switches that `least_budget` takes: none where a planner folds, which goes on across them."""
    return () if any(planner.folds for planner in planners) else table.switches


def candidates_on(layout: StepLayout, problem: Problem, planners: Sequence[Planner]) -> Candidates:
    """Plans of some planners that fit the graphs of a layout.

    Raises (when called):
        InputError: none does.
    """

    def found(budget: int | StepBudget, method: str | None = None) -> list[StepPlan]:
        named = [p for p in planners if p.name == method and full_steps_for(p, budget) is not None]
        try:
            several = candidates(named or planners, problem, budget)
        except InfeasibleError:  # the named one has no plan of so many full steps, others may
            if not named:
                raise
            several = candidates(planners, problem, budget)
        fitting = [plan for plan in several if misfit(plan, layout) is None]
        if not fitting:
            raise InputError(
                f"plan {several[0].name} ({several[0].method}): {misfit(several[0], layout)}",
                fix="rebuild the bundle with this --method",
            )
        return fitting

    return found


def beside(found: Candidates, known: Sequence[StepPlan]) -> Candidates:
    """The same, and behind them the plans of their budget that there are already."""

    def both(budget: int | StepBudget, method: str | None = None) -> list[StepPlan]:
        several = found(budget, method)
        counts, rows = {plan.budget for plan in several}, [plan.rows for plan in several]
        return [*several, *(plan for plan in known if plan.budget in counts and plan.rows not in rows)]

    return both


class BudgetSearch:
    """Plans of any number of budgets, and the quality of each on validation clips.

    A budget tries every method if none within `NEAR_FACTOR` did; else it takes the method that was best there.

    Args:
        candidates: the plans of a budget.
        evaluator: chooses among them, and measures the quality of the one.
        try_all: whether every budget that a plan is asked for tries every method, near ones too.

    Attributes:
        tables: budget → how plans did.
    """

    def __init__(
        self, candidates: Candidates, evaluator: Evaluator, reporter: Reporter, *, try_all: bool = False
    ) -> None:
        self._candidates, self._evaluator, self._reporter = candidates, evaluator, reporter
        self._try_all = try_all
        self._plans: dict[int, StepPlan] = {}
        self._points: dict[int, Point] = {}
        self.tables: dict[int, TrialTable] = {}

    @property
    def front(self) -> Front | None:
        """All points so far."""
        return Front(points=tuple(self._points[b] for b in sorted(self._points))) if self._points else None

    def plan(self, budget: int | StepBudget) -> StepPlan:
        """The plan of a budget."""
        return self._best(budget, self._try_all)

    def point(self, budget: int) -> Point:
        """A plan of a budget, and the PSNR of its frames."""
        if budget not in self._points:
            plan = self._plans.get(budget) or self._best(budget, False)
            self._reporter.stage("quality", f"{plan.name}: {plan.method}")
            point = Point(plan=plan, psnr=self._evaluator.psnr(plan))
            self._points[budget] = point
            self._reporter.note(f"{point.mean:.1f} dB")
        return self._points[budget]

    def _best(self, budget: int | StepBudget, try_all: bool) -> StepPlan:
        count = budget if isinstance(budget, int) else budget.budgets[0]
        near = [] if try_all else [tried for tried in self.tables if is_near(tried, count)]
        method = None
        if near:
            method = self.tables[min(near, key=lambda tried: abs(tried - count))].best.label
        plans = self._candidates(budget, method)
        plan = plans[0]
        if len(plans) > 1:
            plan, self.tables[plan.budget] = self._evaluator(plans)
        self._plans[plan.budget] = plan
        return plan


def is_near(tried: int, budget: int) -> bool:
    """Whether two budgets may share what is known of methods."""
    return max(tried, budget) <= NEAR_FACTOR * min(tried, budget)


def plan_budgets(
    budgets: Sequence[int | StepBudget | MinPsnr],
    search: BudgetSearch,
    reporter: Reporter,
    *,
    pareto: bool,
    num_steps: int,
    max_skip: int | None,
    switches: Sequence[int] = (),
) -> PlanSet:
    """A plan for each budget, and the front if it is asked for: its budgets, and those of the plans.

    Args:
        num_steps, max_skip, switches: as in `least_budget`.

    Raises:
        InfeasibleError: as the planners; no number of full steps has the PSNR that is asked for.
    """
    chosen: list[StepPlan] = []
    for budget in budgets:
        if isinstance(budget, MinPsnr):
            feasible = range(least_budget(num_steps, max_skip, switches), num_steps + 1)
            reporter.stage("search", f"the fewest of {feasible[0]} … {num_steps} full steps that have {budget}")
            wanted = budget.decibels
            least = least_reaching(feasible, lambda b, wanted=wanted: search.point(b).mean >= wanted)  # type: ignore[misc]
            point = search.point(least)
            if point.mean < wanted:  # compared with more than N steps even N full ones may not have it
                raise InfeasibleError(
                    f"{budget}: {least} of {num_steps} full steps have {point.mean:.1f} dB",
                    fix=f"the nearest that is feasible is {math.floor(point.mean * 10) / 10:g}",
                )
            chosen.append(point.plan)
        else:
            chosen.append(search.plan(budget))
    if pareto:
        for count in sorted({*front_budgets(num_steps, max_skip, switches), *(plan.budget for plan in chosen)}):
            search.point(count)
    return PlanSet(
        plans=list({plan.name: plan for plan in chosen}.values()),
        names=tuple(plan.name for plan in chosen),
        tables=tuple(search.tables[budget] for budget in sorted(search.tables)),
        front=search.front,
    )


def best_known(
    methods: Sequence[str], problem: Problem, layout: StepLayout, before: Mapping[int, Sequence[str]]
) -> Callable[[int | StepBudget], StepPlan]:
    """The plan of the method that did best at the nearest budget, of those that can make one here.

    Args:
        methods: with `auto`, any that was tried, and where none of those can make a plan the first of `UNFITTED`.
        before: budget → methods, the best first.

    Raises (when called):
        UsageError: none that is possible here was tried.
    """
    chosen, auto = choose_planners(methods, problem), "auto" in methods
    known = planners() if auto else {planner.name: planner for planner in chosen}

    def found(budget: int | StepBudget) -> StepPlan:
        if len(chosen) == 1 and not auto:
            return candidates_on(layout, problem, chosen)(budget)[0]
        count = budget if isinstance(budget, int) else budget.budgets[0]
        names = [name for tried in sorted(before, key=lambda tried: abs(tried - count)) for name in before[tried]]
        for name in dict.fromkeys((*names, *(UNFITTED if auto else ()))):
            if name in known:
                with contextlib.suppress(UsageError, InputError, InfeasibleError):
                    return candidates_on(layout, problem, [known[name]])(budget)[0]
        raise UsageError(
            f"{len(chosen)} methods are allowed for {count} full steps, and none that is possible here was tried",
            fix="name one, for example --method linear, or let `lemica-trt build` try them",
        )

    return found


def tried_budgets(budgets: Sequence[int], *, try_all: bool) -> list[int]:
    """Those of some budgets, in order, that try every method."""
    found: list[int] = []
    for budget in budgets:
        if try_all or not any(is_near(other, budget) for other in found):
            found.append(budget)
    return found


def budget_outcomes(
    budgets: Sequence[Budget], made: PlanSet, times: StepTimes | None, measured: Mapping[str, Speed]
) -> tuple[BudgetOutcome, ...]:
    """What was asked for beside what came of it, for every budget that is not a number of full steps.

    Args:
        times: of the steps; None: not known.
        measured: by plan.
    """
    plans = {plan.name: plan for plan in made.plans}
    rows = {} if made.front is None else {row.plan: row for row in front_rows(made.front, times)}
    found = []
    for budget, name in zip(budgets, made.names):
        if isinstance(budget, int):
            continue
        plan, speed, row = plans[name], measured.get(name), rows.get(name)
        met = None
        if isinstance(budget, MinPsnr):
            met = None if row is None else row.psnr >= budget.decibels
        elif speed is not None:
            met = speed.seconds <= budget.seconds if isinstance(budget, Latency) else speed.speedup >= budget.factor
        predicted = None if times is None else Speed(seconds=times.of(plan), speedup=times.speedup(plan))
        found.append(
            BudgetOutcome(
                asked=format_budget(budget),
                plan=name,
                full_steps=plan.budget,
                predicted=predicted,
                measured=speed,
                quality=row,
                met=met,
            )
        )
    return tuple(found)
