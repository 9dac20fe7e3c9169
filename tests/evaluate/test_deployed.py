"""Times of plans that ran on different samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lemica_trt.evaluate.deployed import Deployed
from lemica_trt.evaluate.timing import RowSeconds
from lemica_trt.planning.planner import Problem, planners
from lemica_trt.planning.step_plan import uncached_plan
from lemica_trt.testing.values import flow_table

pytestmark = pytest.mark.null


def deployed_of(seconds: dict[str, list[float]]) -> list[Any]:
    """Timings of an uncached plan of 8 steps and one of 2, the seconds of each one's runs given."""
    table = flow_table(8)
    plans = [
        uncached_plan(table, guidance_scale=4.0),
        planners()["uniform"](Problem(table=table, guidance_scale=4.0), 2),
    ]
    deployed = Deployed(SimpleNamespace(), lambda steps: None)  # type: ignore[arg-type]
    for plan in plans:
        first, *others = seconds[plan.name]
        rows = RowSeconds([first / 10] * plan.budget, [0.01] * (plan.num_steps - plan.budget))
        deployed.know(plan, "a prompt", 0, np.zeros(1), (first, rows))
        if others:
            deployed._whole[plan.name] = others
    return deployed.timing(plans)


def test_speed_ups_compare_runs_of_the_same_samples() -> None:
    uncached, plan = deployed_of({"uncached": [10.0, 6.0, 9.0, 6.0], "b2": [9.0, 3.0, 3.0]})
    assert (uncached.total, plan.total) == (6.0, 3.0)
    assert plan.speedup == pytest.approx((6 / 3 + 9 / 3) / 2)
    assert uncached.speedup == 1


def test_a_plan_that_ran_once_is_compared_on_that_sample() -> None:
    uncached, plan = deployed_of({"uncached": [10.0, 6.0, 6.0], "b2": [5.0]})
    assert (uncached.total, plan.total) == (6.0, 5.0)
    assert plan.speedup == 2


def test_no_speed_up_is_above_the_number_of_steps_left_out() -> None:
    assert deployed_of({"uncached": [10.0], "b2": [1.0]})[1].speedup == 4
