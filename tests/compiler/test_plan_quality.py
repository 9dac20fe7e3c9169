"""Which plan of several is kept, and what is known of a bundle's plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemica_trt.bundle.manifest import PLANS_REPORT
from lemica_trt.compiler.plan_quality import better_rival, is_fitted, known_quality, rivals_of, store_quality
from lemica_trt.ir.budget import StepBudget
from lemica_trt.ir.measured import MeasuredPlan, MeasuredPlans
from lemica_trt.ir.plan import StepPlan, uncached_of
from lemica_trt.planning.planner import planners
from lemica_trt.testing.values import problem_of

pytestmark = pytest.mark.null

PROBLEM = problem_of()
N = PROBLEM.table.num_steps


def made(method: str, budget: int, name: str | None = None) -> StepPlan:
    plan = planners()[method](PROBLEM, budget)
    return (
        plan if name is None else type(plan)(**{**{f: getattr(plan, f) for f in plan.__struct_fields__}, "name": name})
    )


def measured(plan: StepPlan, *psnr: float) -> MeasuredPlan:
    return MeasuredPlan(
        rows_digest=plan.rows_digest, psnr=psnr, seconds=1.0, speedup=2.0, machine="here", backend="null"
    )


FITTED, LINEAR, PAPER = made("fitted", 6), made("linear", 7), made("lemica", 6)


def test_a_time_allows_folded_plans_and_plans_that_skip_different_numbers_of_steps() -> None:
    assert rivals_of(LINEAR, StepBudget(folded=7, skipping=6), [FITTED, PAPER]) == [FITTED, PAPER]
    assert rivals_of(LINEAR, StepBudget(folded=7, skipping=5), [FITTED, PAPER]) == [FITTED]
    assert rivals_of(LINEAR, StepBudget(folded=5, skipping=None), [FITTED, PAPER]) == []
    assert rivals_of(LINEAR, 7, [FITTED, PAPER]) == []  # somebody asked for 7
    assert rivals_of(FITTED, StepBudget(folded=6, skipping=6), [made("fitted", 6, "good")]) == []  # itself


def test_the_better_plan_is_kept_where_both_ran() -> None:
    known = {plan.rows_digest: found for plan, found in (
        (LINEAR, measured(LINEAR, 53.0, 54.0)), (FITTED, measured(FITTED, 55.0, 56.0)), (PAPER, measured(PAPER, 40.0)),
    )}  # fmt: skip
    assert better_rival(LINEAR, [PAPER, FITTED], known) is FITTED
    assert better_rival(LINEAR, [PAPER], known) is None
    assert better_rival(LINEAR, [], known) is None


def test_where_nothing_runs_a_fitted_plan_of_nearly_as_many_steps_is_kept() -> None:
    assert is_fitted(FITTED) and not is_fitted(LINEAR)
    assert better_rival(LINEAR, [PAPER, FITTED], {}) is FITTED
    assert better_rival(FITTED, [PAPER, made("fitted", 7)], {}) is None
    assert better_rival(made("linear", 9), [FITTED], {}) is None


def test_all_steps_in_full_are_the_uncached_plan_whoever_makes_it() -> None:
    for method in ("fitted", "linear", "lemica", "uniform"):
        assert made(method, N).name == "uncached"
    other = made("lemica", N, "b20")
    assert uncached_of([FITTED, other, made("lemica", N)]) == made("lemica", N)  # not the first of N steps
    assert uncached_of([FITTED, other]) == other and uncached_of([FITTED]) is None


def test_what_was_measured_is_kept_by_what_a_plan_computes(tmp_path: Path) -> None:
    assert known_quality(tmp_path) == MeasuredPlans()
    store_quality(tmp_path, [measured(FITTED, 50.0), measured(LINEAR, 40.0)])
    store_quality(tmp_path, [measured(FITTED, 51.0, 53.0)])
    found = known_quality(tmp_path)
    renamed = made("fitted", 6, "good")
    assert (known := found.of(renamed)) is not None and known.mean == 52.0
    assert found.of(PAPER) is None and len(found.plans) == 2
    (tmp_path / PLANS_REPORT).write_bytes(b"no JSON")
    assert known_quality(tmp_path) == MeasuredPlans()
