"""Which budgets and methods are tried, the least budget that has a quality, and whether budgets are met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from test_budget import PLANS, K, N

from lemica_trt.core.errors import InfeasibleError
from lemica_trt.core.progress import Quiet
from lemica_trt.ir.budget import Latency, MinPsnr, Speedup, StepBudget, StepTimes
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import Speed
from lemica_trt.ir.trials import Trial, TrialTable
from lemica_trt.planning.search import BudgetSearch, PlanSet, budget_outcomes, plan_budgets, tried_budgets

pytestmark = pytest.mark.null


class Fake:
    """Candidates and an evaluator: plans that fold and that do not, PSNR 10 + 2·B dB and one less where skipping."""

    def __init__(self) -> None:
        self.tried: list[tuple[int, int]] = []
        self.looked_at: list[int] = []

    @staticmethod
    def candidates(budget: int | StepBudget, method: str | None = None) -> list[StepPlan]:
        several = [
            plan
            for (count, _), plan in PLANS.items()
            if (plan.budget == budget if isinstance(budget, int) else budget.admits(plan) and count in budget.budgets)
        ]
        several = [plan for plan in several if plan.method == method] or several
        return several[:1] if len({plan.rows for plan in several}) == 1 else several

    def __call__(self, plans: Sequence[StepPlan]) -> tuple[StepPlan, TrialTable]:
        self.tried.append((plans[0].budget, len(plans)))
        best = max(plans, key=self.quality)
        order = sorted(plans, key=self.quality, reverse=True)[:1]
        trials = tuple(
            Trial(label=plan.method, full_steps=plan.full_steps, snr=(self.quality(plan),)) for plan in order
        )
        return best, TrialTable(budget=best.budget, samples=1, trials=trials)

    @staticmethod
    def quality(plan: StepPlan) -> float:
        return 10 + 2 * plan.budget - (len(plan.rows) > plan.budget + 1)

    def psnr(self, plan: StepPlan) -> tuple[float, ...]:
        self.looked_at.append(plan.budget)
        return (self.quality(plan),) * 2


def planned(fake: Fake, *budgets: Any, pareto: bool = False, try_all: bool = False) -> PlanSet:
    search = BudgetSearch(fake.candidates, fake, Quiet(), try_all=try_all)
    return plan_budgets(budgets, search, Quiet(), pareto=pareto, num_steps=N, max_skip=K)


def test_full_steps_are_not_looked_at() -> None:
    fake = Fake()
    found = planned(fake, 6, 9, 6)
    assert [plan.name for plan in found.plans] == ["b6", "b9"] and found.names == ("b6", "b9", "b6")
    assert found.front is None and fake.looked_at == []
    assert [table.budget for table in found.tables] == [6]


@pytest.mark.parametrize("wanted", [12.0, 21.5, 25.0, 40.0, 49.0])
def test_the_fewest_full_steps_that_reach_a_psnr(wanted: float) -> None:
    fake = Fake()
    found = planned(fake, MinPsnr(decibels=wanted))
    expected = next((b for b in range(4, N) if 10 + 2 * b >= wanted), N)
    assert found.plans[0].budget == expected
    assert len(fake.looked_at) == len(set(fake.looked_at)) <= 6
    assert found.front is not None and [p.budget for p in found.front.points] == sorted(fake.looked_at)


def test_a_psnr_that_no_budget_has() -> None:
    """Against more steps than N, N full ones are not perfect."""
    with pytest.raises(InfeasibleError, match=rf"{N} of {N} full steps have 50\.0 dB.*feasible is 50"):
        planned(Fake(), MinPsnr(decibels=60.0))


def test_near_budgets_take_the_methods_that_were_best_and_try_none_alone() -> None:
    fake = Fake()
    found = planned(fake, 8, pareto=True)
    assert found.front is not None and [point.budget for point in found.front.points] == [4, 5, 6, 7, 8, 9, 10]
    assert dict(fake.tried) == {8: 2}
    assert {point.plan.method for point in found.front.points} == {"linear"}
    alone = Fake()
    planned(alone, 20, pareto=True)  # 20 has one method; 4 is the first to try both, 9 is more than twice that
    assert dict(alone.tried) == {4: 2, 9: 2}
    assert tried_budgets([4, 5, 9], try_all=False) == [4, 9]  # as it is done


def test_near_budgets_that_are_asked_for_take_the_method_that_was_best() -> None:
    few, all_of_them = Fake(), Fake()
    found = planned(few, 9, 6, 8)
    assert few.tried == [(9, 2)] and [plan.method for plan in found.plans] == ["linear"] * 3
    assert [table.budget for table in found.tables] == [9]
    planned(all_of_them, 9, 6, 8, try_all=True)
    assert [budget for budget, _ in all_of_them.tried] == [9, 6, 8]
    assert tried_budgets([9, 6, 8], try_all=True) == [9, 6, 8]


def test_a_time_tries_each_kind_with_what_it_affords() -> None:
    found = planned(Fake(), StepBudget(folded=9, skipping=7))
    assert found.plans == [PLANS[9, True]]
    assert planned(Fake(), StepBudget(folded=None, skipping=7)).plans == [PLANS[7, False]]


def test_what_came_of_a_budget_is_compared_with_what_was_asked() -> None:
    times = StepTimes(full=1.0, skipped=0.1, rest=0.0)
    plans = [PLANS[5, True], PLANS[7, True]]
    found = PlanSet(plans, ("b5", "b7", "b7"), (), None)
    speeds = {"b5": Speed(seconds=5.5, speedup=3.6), "b7": Speed(seconds=6.5, speedup=3.1)}
    asked = (Latency(seconds=5.2), Speedup(factor=2.5), 7)
    first, second = budget_outcomes(asked, found, times, speeds)
    assert (first.plan, first.met, second.plan, second.met) == ("b5", False, "b7", True)
    assert first.predicted == Speed(seconds=5.0, speedup=4.0) and first.measured == speeds["b5"]
    assert [outcome.met for outcome in budget_outcomes(asked, found, times, {})] == [None, None]
