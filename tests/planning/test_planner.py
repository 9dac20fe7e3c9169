"""Which planners are chosen, which plans become candidates, and that the choice between them is by merit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lemica_trt.core.errors import InputError, UnsupportedError, UsageError
from lemica_trt.ir.budget import StepBudget
from lemica_trt.ir.calibration import Calibration
from lemica_trt.ir.plan import StepPlan, trunk_reads
from lemica_trt.ir.profile import FEW_STEPS
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.planner import (
    AUTO,
    PAPER,
    UNFITTED,
    Problem,
    auto_methods,
    candidates,
    choose_planners,
    plan_given,
    planners,
    planners_named,
    select,
    trial_runs,
)
from lemica_trt.testing.values import N, calibration_of, flow_table, graph_of, noisy, problem_of, sensitivity_of

pytestmark = pytest.mark.null

BUDGET = 6


def names(problem: Problem, *methods: str) -> list[str]:
    return [planner.name for planner in choose_planners(methods or ("auto",), problem)]


# --- which planners --------------------------------------------------------------------------------------------------


def test_auto_is_at_most_five_and_all_that_is_possible() -> None:
    assert len(AUTO) <= 5 and {*AUTO, *UNFITTED} <= planners().keys()
    assert names(problem_of()) == list(AUTO)
    assert names(problem_of(solver=None)) == ["fitted"]


def test_of_few_steps_auto_tries_lemica_too() -> None:
    assert PAPER not in auto_methods(FEW_STEPS + 1) == AUTO
    few = auto_methods(FEW_STEPS)
    assert few[0] == AUTO[0] and set(few) == {*AUTO, PAPER} and len(few) <= 5
    assert auto_methods(FEW_STEPS, fits=False) == UNFITTED
    assert names(problem_of(table=flow_table(FEW_STEPS))) == list(few)


def test_all_is_every_method_that_may_win() -> None:
    found = names(problem_of(), "all")
    assert found[: len(AUTO)] == list(AUTO) and set(found) == planners().keys() - {
        "uniform", "published", "dpcache", "l2p", "magcache", "mean-velocity", "teacache"
    }  # fmt: skip
    assert names(problem_of(fit=None, solver=None), "all") == ["linear", PAPER]


def test_what_is_there_to_be_compared_with_runs_where_it_is_named() -> None:
    compared = ["dpcache", "l2p", "magcache", "mean-velocity", "teacache"]
    assert [name for name, planner in planners().items() if planner.compared] == compared
    assert names(problem_of(fit=None, solver=None), *compared) == compared
    assert not {planner.name for planner in planners_named(["auto", "all"])} & set(compared)


@pytest.mark.parametrize(
    "problem",
    [
        problem_of(fit=None),
        problem_of(table=noisy(flow_table())),
        problem_of(calibration=Calibration(graph=graph_of(flow_table()))),
    ],
    ids=["no model", "draws noise", "no Grams"],
)
def test_where_nothing_can_be_fitted_outputs_are_extrapolated(problem: Problem) -> None:
    assert names(problem) == list(UNFITTED)


def test_auto_leaves_out_solvers_that_do_not_lower() -> None:
    def solver(schedule: Schedule, kind: str) -> SamplerTable:
        if kind == "unipc":
            raise UnsupportedError("no signal there")
        return flow_table(schedule.budget)

    problem = problem_of(solver=solver)
    assert names(problem) == [name for name in AUTO if name != "stock:unipc"]
    with pytest.raises(UnsupportedError, match="no signal"):
        candidates(choose_planners(["stock:unipc"], problem), problem, BUDGET)


def test_named_planners_come_in_their_order_each_once() -> None:
    assert names(problem_of(), "linear", "uniform", "linear") == ["linear", "uniform"]
    assert names(problem_of(), "uniform", "auto", "lemica") == ["uniform", *AUTO, "lemica"]
    assert {planner.name for planner in planners_named(["auto", "uniform"])} == {*AUTO, *UNFITTED, "uniform"}


def test_what_is_not_possible_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected auto or all or one of dpcache, fitted, .*lemica.*got 'signed'"):
        names(problem_of(), "signed")
    with pytest.raises(UsageError, match="no method is possible"):
        names(problem_of(calibration=None, solver=None))
    assert names(problem_of(calibration=None)) == ["stock:dpmsolver++", "stock:unipc"]


def test_a_calibration_of_another_sampler_is_refused_once_for_all() -> None:
    with pytest.raises(InputError, match=f"with {N - 1} steps, got one of FlowToy with {N} steps, or of other"):
        problem_of(table=flow_table(N - 1), calibration=calibration_of(flow_table()))
    graph = graph_of(flow_table(), sampler_probe=tuple(2 * p for p in flow_table().probe))
    with pytest.raises(InputError, match="the same settings whose coefficients differ"):
        problem_of(calibration=Calibration(graph=graph))


# --- candidates ------------------------------------------------------------------------------------------------------


def test_every_candidate_spends_the_budget_and_no_two_are_equal() -> None:
    problem = problem_of()
    plans = candidates(choose_planners(["auto", "uniform", "linear"], problem), problem, BUDGET)
    assert {(plan.budget, plan.name) for plan in plans} == {(BUDGET, f"b{BUDGET}")}
    assert len({plan.rows for plan in plans}) == len(plans)
    twice = candidates([planners()["lemica"], planners()["lemica"]], problem, BUDGET)
    assert [plan.method for plan in twice] == ["lemica"]


def test_all_steps_in_full_is_one_plan() -> None:
    problem = problem_of()
    (plan,) = candidates(choose_planners(["auto"], problem), problem, N)
    assert (plan.budget, plan.method, plan.guidance_range) == (N, "uncached", None)


def test_a_time_is_more_full_steps_for_planners_that_fold() -> None:
    problem, chosen = problem_of(), [planners()[name] for name in ("lemica", "linear", "stock:unipc")]
    found = candidates(chosen, problem, StepBudget(folded=7, skipping=5))
    assert [(plan.method, plan.budget) for plan in found] == [("lemica", 5), ("linear", 7), ("stock:unipc", 7)]
    alone = candidates(chosen, problem, StepBudget(folded=7, skipping=None))
    assert [plan.method for plan in alone] == ["linear", "stock:unipc"]
    with pytest.raises(UsageError, match="none of the methods has a plan in this time"):
        candidates(chosen[:1], problem, StepBudget(folded=7, skipping=None))


def test_given_steps_reuse_residuals() -> None:
    plan = plan_given(problem_of(), (0, 2, 5))
    assert (plan.name, plan.method, plan.full_steps, plan.error_graph_digest) == ("b3", "given", (0, 2, 5), None)
    assert sum(row.caches == trunk_reads(1.0) for row in plan.rows) == N - 3
    assert plan_given(problem_of(), range(N)).method == "uncached"
    with pytest.raises(UsageError, match=r"schedule\[1\]"):
        plan_given(problem_of(), (0, 0))


# --- the choice ------------------------------------------------------------------------------------------------------


class Fake:
    """Scores by a table [plans, samples]; counts what it is asked to run."""

    def __init__(self, plans: Sequence[StepPlan], scores: np.ndarray) -> None:  # type: ignore[type-arg]
        self.row = {plan.rows: index for index, plan in enumerate(plans)}
        self.scores = scores
        self.runs = 0

    def __call__(self, plans: Sequence[StepPlan], samples: range) -> list[list[float]]:
        self.runs += len(plans) * len(samples)
        return [[float(self.scores[self.row[plan.rows], s]) for s in samples] for plan in plans]


def every_plan() -> list[StepPlan]:
    problem = problem_of()
    return candidates([planner for planner in planners().values() if planner.name != "published"], problem, BUDGET)


@pytest.mark.parametrize("samples", [1, 3, 8, 21, 32])
@pytest.mark.parametrize("seed", range(3))
def test_a_clear_winner_wins(samples: int, seed: int) -> None:
    plans = every_plan()
    random = np.random.default_rng(seed)
    best = int(random.integers(len(plans)))
    scores = random.normal(30, 1, (len(plans), samples))
    scores[best] += 20
    fake = Fake(plans, scores)
    plan, table = select(plans, samples, fake)
    assert plan is plans[best] and table.best.label == plan.method
    assert table.best.snr == pytest.approx(scores[best]) and table.samples == samples
    assert len(table.trials) == len(plans)
    # The first plan and LeMiCa's last to the end, whatever they score.
    lasting = {PAPER, plans[0].method}
    assert {len(trial.snr) for trial in table.trials if trial.label in lasting} == {samples}
    assert trial_runs(len(plans), samples) <= fake.runs <= trial_runs(len(plans), samples) + 2 * samples
    assert fake.runs < len(plans) * samples or samples <= 4


def test_what_is_better_on_all_samples_wins_over_what_begins_well() -> None:
    plans = every_plan()[:2]
    scores = np.array([[40.0] * 4 + [20.0] * 28, [39.0] * 32])
    assert select(plans, 32, Fake(plans, scores))[0] is plans[1]


def test_on_few_samples_the_first_is_kept_unless_another_leads_by_more_than_chance() -> None:
    plans = every_plan()[:2]
    for samples, lead in ((1, 6.0), (4, 3.0), (7, 6 / 7**0.5), (8, 0.0)):
        for more, winner in ((lead - 0.1, 0), (lead + 0.1, 1)):
            scores = np.array([[30.0] * samples, [30.0 + more] * samples])
            assert select(plans, samples, Fake(plans, scores))[0] is plans[winner], (samples, more)


def test_of_equals_the_first_wins() -> None:
    plans = every_plan()
    assert select(plans, 4, Fake(plans, np.zeros((len(plans), 4))))[0] is plans[0]


def test_a_carried_over_calibration_limits_the_guidance() -> None:
    graph = graph_of(flow_table(), method="retargeted")
    assert problem_of(calibration=Calibration(graph=graph)).guidance_range() == (2.0, 7.0)
    source = sensitivity_of(flow_table(), guidance_scale=3.0)
    moved = problem_of(calibration=Calibration(graph=graph, sensitivity=source))
    assert moved.guidance_range() == (2.0, 5.25)
    assert planners()["lemica"](moved, BUDGET).guidance_range == (2.0, 5.25)
    unguided = problem_of(calibration=None, guidance_scale=1.0)
    assert planners()["uniform"](unguided, BUDGET).guidance_range is None
