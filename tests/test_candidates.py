"""Which ways are allowed, which plans they make, and that the choice between them is by merit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from test_fold import flow_table
from test_predict import grams_of, samples_of

from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.ir.calibration import TrajectoryGrams
from lemica_trt.ir.plan import FITTED, StepPlan, trunk_reads
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.trials import PAPER, way
from lemica_trt.planning.candidates import Ways, candidates, predictors, select, trial_runs
from lemica_trt.planning.solvers import first_order_table
from lemica_trt.planning.step_plan import plan_from_solver

pytestmark = pytest.mark.null

N = 10
TABLE = flow_table(N)
SCHEDULE = Schedule(num_steps=N, full_steps=(0, 2, 5, 8))
OTHER = Schedule(num_steps=N, full_steps=(0, 1, 4, 7))
THIRD = Schedule(num_steps=N, full_steps=(0, 3, 4, 7))


def grams() -> TrajectoryGrams:
    smooth = samples_of(0, size=40)
    return grams_of(smooth, smooth, sampler_digest=TABLE.digest, sampler_probe=TABLE.probe)


def made(ways: Ways, **changes: Any) -> list[StepPlan]:
    arguments: dict[str, Any] = {"name": "b4", "guidance_scale": 4.0, "grams": grams(), "solver": solver} | changes
    return candidates(ways, {"lemica": [SCHEDULE]}, TABLE, **arguments)


def solver(schedule: Schedule, kind: str) -> SamplerTable:
    return first_order_table(TABLE, schedule.full_steps)


# --- which ways ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lemica", "least-sum", "uniform", "published", "given", "signed"])
def test_a_method_alone_is_the_paper(method: Any) -> None:
    (plan,) = made(Ways(method=method))
    assert [row.caches for row in plan.rows if row.cached] == [trunk_reads(1.0)] * 6
    assert plan.full_steps == SCHEDULE.full_steps


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        (Ways(reuse="residual", predict="none"), {"residual-reuse"}),
        (Ways(method="lemica", reuse="residual"), {f"residual-{m}" for m in ("reuse", "linear", "lsq2", "lsq3")}),
        (Ways(reuse="output", predict="lsq2"), {"output-lsq2"}),
        (
            Ways(method="lemica", predict="linear", reuse="output"),
            {f"output-linear{v}{g}" for v in ("", "-log-snr") for g in ("", "-gains")},
        ),
        (Ways(method="uniform", reuse="output", predict="none"), {"output-reuse"}),
        (Ways(predict="lsq3"), {"residual-lsq3", "output-lsq3"}),
        (Ways(solver="unipc"), set()),
        (Ways(reuse="none"), set()),
    ],
)
def test_flags_narrow_the_ways(ways: Ways, expected: set[str]) -> None:
    assert {predictor.name for predictor in predictors(ways, TABLE, grams())} == expected


def test_auto_is_everything_that_can_be_fitted() -> None:
    with_grams = {predictor.name for predictor in predictors(Ways(), TABLE, grams())}
    without = {predictor.name for predictor in predictors(Ways(), TABLE, None)}
    assert len(with_grams) == 11 and without == {
        name for name in with_grams if "lsq" not in name and "gains" not in name
    }
    assert Ways().solvers == ("first-order", "dpmsolver++", "unipc", "fitted")
    assert Ways(method="auto").methods == ("lemica", "least-sum", "signed", "predicted")
    assert Ways(method="lemica").solvers == () and Ways(reuse="none", solver="unipc").solvers == ("unipc",)


@pytest.mark.parametrize(
    "flags", [{"reuse": "none", "predict": "linear"}, {"reuse": "output", "solver": "unipc"}], ids=str
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="reuse"):
        Ways(**flags)


# --- plans ---------------------------------------------------------------------------------------------------------


def test_every_candidate_spends_the_budget_and_no_two_are_equal() -> None:
    plans = candidates(
        Ways(),
        {"lemica": [SCHEDULE], "least-sum": [SCHEDULE], "signed": [OTHER]},
        TABLE,
        name="b4",
        guidance_scale=4.0,
        grams=grams(),
        solver=solver,
        error_graph_digest="0" * 64,
    )
    assert {plan.budget for plan in plans} == {4} and {plan.name for plan in plans} == {"b4"}
    assert len({plan.rows for plan in plans}) == len(plans)
    # Equal schedules of two methods are tried once; plain reuse of outputs is the first-order solver there (Euler).
    assert {plan.method for plan in plans} == {"lemica", "signed"}
    assert PAPER in {way(plan) for plan in plans}
    folded = [plan for plan in plans if plan.predictor is None or plan.predictor.of == "output"]
    assert all(len(plan.rows) == 5 for plan in folded) and len(folded) > 10


def test_all_steps_in_full_is_one_way() -> None:
    every = Schedule(num_steps=N, full_steps=tuple(range(N)))
    (plan,) = candidates(Ways(), {"lemica": [every], "least-sum": [every]}, TABLE, name="all", guidance_scale=4.0)
    assert plan.budget == N and way(plan) == "uncached"


def test_what_leaves_no_way_is_refused() -> None:
    with pytest.raises(UsageError, match="no way"):
        made(Ways(solver="unipc"), solver=None)
    with pytest.raises(UsageError, match="needs the Grams"):
        made(Ways(predict="lsq2", reuse="output"), grams=None)


# --- fitted solvers, and a reference of more steps -----------------------------------------------------------------


def fitted(schedules: Sequence[Schedule]) -> list[StepPlan]:
    """Some plans that no other way makes."""
    plans = []
    for schedule in schedules:
        table = first_order_table(TABLE, schedule.full_steps)
        plan = plan_from_solver(schedule, TABLE, table, name="f", guidance_scale=4.0, method="")
        rows = [*plan.rows[:-1], msgspec.structs.replace(plan.rows[-1], outputs=(0.25, 0.5))]
        plans.append(msgspec.structs.replace(plan, rows=tuple(rows), scheduler=FITTED))
    return plans


def test_one_method_has_its_schedules_fitted() -> None:
    """The one that plans for it where it is there; else the first. All but its first schedule are for that alone."""
    asked: list[Schedule] = []

    def fit(schedules: Sequence[Schedule]) -> list[StepPlan]:
        asked.extend(schedules)
        return fitted(schedules)

    common: dict[str, Any] = {"name": "b4", "guidance_scale": 4.0, "grams": grams(), "fitted": fit}
    plans = candidates(Ways(), {"lemica": [SCHEDULE], "predicted": [OTHER, THIRD]}, TABLE, **common)
    assert asked == [OTHER, THIRD] and [way(plan) for plan in plans][-2:] == 2 * ["predicted, fitted"]
    assert [way(plan) for plan in plans if plan.full_steps == THIRD.full_steps] == ["predicted, fitted"]
    (plan,) = candidates(Ways(solver="fitted"), {"lemica": [SCHEDULE], "least-sum": [OTHER]}, TABLE, **common)
    assert asked == [OTHER, THIRD, SCHEDULE]
    assert (plan.method, plan.name, way(plan)) == ("lemica", "b4", "lemica, fitted")
    for ways in (Ways(method="lemica"), Ways(reuse="output"), Ways(predict="lsq2"), Ways(solver="unipc")):
        candidates(ways, {"lemica": [SCHEDULE]}, TABLE, **common, solver=solver)
    assert len(asked) == 3
    with pytest.raises(UsageError, match="no way"):
        candidates(Ways(solver="fitted"), {"lemica": [SCHEDULE]}, TABLE, **common | {"fitted": lambda _: []})
    noisy = msgspec.structs.replace(
        TABLE, rows=tuple(msgspec.structs.replace(row, noise=0.1) if i else row for i, row in enumerate(TABLE.rows))
    )
    common["grams"] = None
    with pytest.raises(UnsupportedError, match="one path only"):
        candidates(Ways(solver="fitted"), {"lemica": [SCHEDULE]}, noisy, **common)
    assert all(plan.scheduler != FITTED for plan in candidates(Ways(), {"lemica": [SCHEDULE]}, noisy, **common))


def test_plans_held_against_more_steps_say_so_and_are_integrated_on_them() -> None:
    fine = flow_table(4 * N)
    plain = {way(plan): plan for plan in made(Ways(), fitted=fitted)}
    finely = {way(plan): plan for plan in made(Ways(), fitted=fitted, fine=fine)}
    assert {plan.reference_steps for plan in plain.values()} == {None}
    assert {plan.reference_steps for plan in finely.values()} == {4 * N} and finely.keys() >= plain.keys()
    moved = {name for name in plain if finely[name].rows != plain[name].rows}
    assert moved - {"lemica, output-reuse"} == {f"lemica, output-linear{variable}" for variable in ("", "-log-snr")}
    assert all(plan.full_steps == SCHEDULE.full_steps for plan in finely.values())


# --- the choice ----------------------------------------------------------------------------------------------------


class Fake:
    """Scores by a table [plans, samples]; counts what it is asked to run."""

    def __init__(self, plans: Sequence[StepPlan], scores: np.ndarray) -> None:  # type: ignore[type-arg]
        self.row = {plan.rows: index for index, plan in enumerate(plans)}
        self.scores = scores
        self.runs = 0

    def __call__(self, plans: Sequence[StepPlan], samples: range) -> list[list[float]]:
        self.runs += len(plans) * len(samples)
        return [[float(self.scores[self.row[plan.rows], s]) for s in samples] for plan in plans]


@pytest.mark.parametrize("samples", [1, 3, 8, 21, 32])
@pytest.mark.parametrize("seed", range(3))
def test_a_clear_winner_wins(samples: int, seed: int) -> None:
    plans = made(Ways())
    random = np.random.default_rng(seed)
    best = int(random.integers(len(plans)))
    scores = random.normal(30, 1, (len(plans), samples))
    scores[best] += 20
    fake = Fake(plans, scores)
    plan, selection = select(plans, samples, fake)
    assert plan is plans[best] and selection.tried[0].way == way(plan)
    assert selection.tried[0].snr == pytest.approx(scores[best]) and selection.samples == samples
    assert len(selection.tried) == len(plans)
    # The paper's way lasts to the end, whatever it scores.
    assert {len(tried.snr) for tried in selection.tried if tried.way == PAPER} == {samples}
    assert trial_runs(len(plans), samples) <= fake.runs <= trial_runs(len(plans), samples) + samples
    assert fake.runs < len(plans) * samples or samples <= 4


def test_what_is_better_on_all_samples_wins_over_what_begins_well() -> None:
    plans = made(Ways(method="lemica", reuse="residual"))[:2]
    scores = np.array([[40.0] * 4 + [20.0] * 28, [39.0] * 32])
    assert select(plans, 32, Fake(plans, scores))[0] is plans[1]


def test_of_equals_the_first_wins() -> None:
    plans = made(Ways())
    assert select(plans, 4, Fake(plans, np.zeros((len(plans), 4))))[0] is plans[0]
