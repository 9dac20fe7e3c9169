"""What every planner does, whichever it is; they are found by listing, so that a new one is tested by being there."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest

from lemica_trt.core.errors import InfeasibleError, InputError, UsageError
from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.budget import skipped_steps
from lemica_trt.ir.calibration import Calibration
from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.planner import MISSING, Need, Planner, Problem, planners
from lemica_trt.testing.interpreter import run_plan
from lemica_trt.testing.values import calibration_of, flow_table, problem_of

pytestmark = pytest.mark.null

N, BUDGET, MODEL = 50, 17, "wan2.1-t2v-1.3b"  # what LeMiCa's authors published steps for
TABLE = flow_table(N)
PROBLEM = problem_of(TABLE, model=MODEL)

every_planner = pytest.mark.parametrize("planner", planners().values(), ids=list(planners()))


def without(need: Need) -> Problem:
    """The problem without one thing; what depends on it is missing, too."""
    changes: dict[Need, dict[str, Any]] = {
        "error-graph": {"calibration": None},
        "grams": {"calibration": Calibration(graph=PROBLEM.graph)},
        "fit": {"fit": None},
        "levels": {"table": msgspec.structs.replace(TABLE, levels=None)},
        "solver": {"solver": None},
    }
    return replace(PROBLEM, **changes[need])


@every_planner
def test_the_plan_spends_the_budget_and_runs(planner: Planner) -> None:
    plan = planner(PROBLEM, BUDGET)
    assert (plan.budget, plan.num_steps, plan.full_steps[0]) == (BUDGET, N, 0)
    assert all(a < b for a, b in pairwise(plan.full_steps))
    assert (plan.rows[-1].step, plan.sampler_digest, plan.scheduler) == (N, TABLE.digest, TABLE.scheduler)
    assert bool(skipped_steps(plan)) != planner.folds
    assert len(plan.rows) == (BUDGET if planner.folds else N) + 1
    assert all(np.isfinite(latents).all() for latents in run_plan(plan))
    assert value_from_json(StepPlan, json_bytes(plan), where="test") == plan


@every_planner
def test_the_plan_says_where_it_comes_from(planner: Planner) -> None:
    plan = planner(replace(PROBLEM, reference=flow_table(4 * N)), BUDGET)
    assert (plan.name, plan.method, plan.reference_steps) == (f"b{BUDGET}", planner.name, 4 * N)
    fitted = "fit" in planner.needs
    assert (plan.guidance_scale, plan.guidance_range) == (4.0, (2.0, 5.0) if fitted else (2.0, 7.0))
    across = planner(replace(PROBLEM, fit_range=(3.0, 9.0)), BUDGET)
    assert across.guidance_range == ((3.0, 9.0) if fitted else (2.0, 7.0))
    assert plan.error_graph_digest == (PROBLEM.graph.digest if "error-graph" in planner.needs else None)
    assert planner(PROBLEM, BUDGET).reference_steps is None


@every_planner
def test_the_same_plan_twice(planner: Planner) -> None:
    again = problem_of(flow_table(N), model=MODEL)
    assert json_bytes(planner(again, BUDGET)) == json_bytes(planner(PROBLEM, BUDGET))


@every_planner
@pytest.mark.parametrize("need", sorted(MISSING))
def test_it_needs_what_it_says_and_no_more(planner: Planner, need: Need) -> None:
    problem = without(need)
    if planner.needs <= problem.has:
        assert planner(problem, BUDGET).full_steps[0] == 0
        return
    with pytest.raises(UsageError, match=f"method {re.escape(planner.name)} needs") as caught:
        planner(problem, BUDGET)
    assert caught.value.what.endswith(MISSING[min(planner.needs - problem.has)][0]) and caught.value.fix


@every_planner
@pytest.mark.parametrize("budget", [-1, 0, N + 1])
def test_a_budget_that_no_plan_has(planner: Planner, budget: int) -> None:
    with pytest.raises((InfeasibleError, InputError), match=f"got {budget}"):
        planner(PROBLEM, budget)


@every_planner
def test_all_steps_in_full_is_the_uncached_plan(planner: Planner) -> None:
    plan = planner(PROBLEM, N)
    assert (plan.full_steps, plan.method, plan.name) == (tuple(range(N)), "uncached", "uncached")
    assert plan.error_graph_digest is plan.reference_steps is plan.guidance_range is None


@every_planner
def test_a_calibration_of_another_sampler_is_refused(planner: Planner) -> None:
    with pytest.raises(InputError, match="expected a calibration of FlowToy"):
        planner(replace(PROBLEM, calibration=calibration_of(flow_table(N - 1))), BUDGET)


@every_planner
def test_it_is_told_in_one_line(planner: Planner) -> None:
    assert planner.summary and "\n" not in planner.summary and len(planner.summary) <= 100
    assert planner.name == planner.name.lower() and "," not in planner.name and planner.name != "auto"
