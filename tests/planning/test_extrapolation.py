"""Linear extrapolation of outputs: exact where the trajectory is linear, and what rows come of it."""

from __future__ import annotations

import numpy as np
import pytest

from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.plan import trunk_reads
from lemica_trt.planning.extrapolation import linear_weights
from lemica_trt.planning.step_plan import plan_from_schedule
from lemica_trt.testing.values import N, flow_table, schedule_of

pytestmark = pytest.mark.null

FULL = (0, 1, 4, 9, 11)


def test_exact_where_outputs_are_linear_in_the_step() -> None:
    line, full = 3.0 - 0.5 * np.arange(N), list[int]()
    for t, weights in enumerate(linear_weights(schedule_of(N, *FULL))):
        assert (not weights) == (t in FULL)
        if weights:
            assert sum(w * line[f] for w, f in zip(weights, full)) == pytest.approx(line[t])
        else:
            full.insert(0, t)


def test_before_the_second_full_step_there_is_only_reuse() -> None:
    assert linear_weights(schedule_of(6, 0, 3)) == (
        (),
        (1.0,),
        (1.0,),
        (),
        pytest.approx((4 / 3, -1 / 3)),
        pytest.approx((5 / 3, -2 / 3)),
    )


def test_rows_weigh_the_outputs_of_full_rows() -> None:
    schedule = schedule_of(6, 0, 3)
    plan = plan_from_schedule(
        schedule, flow_table(6), name="a", guidance_scale=1.0, method="x", output_weights=linear_weights(schedule)
    )
    assert plan.full_steps == (0, 3)
    assert [row.reuse for row in plan.rows[:4]] == [(), (1.0,), (0.0, 1.0), ()]
    assert plan.rows[4].reuse == pytest.approx((4 / 3, 0, 0, -1 / 3))
    assert plan.rows[5].reuse == pytest.approx((0, 5 / 3, 0, 0, -2 / 3))
    assert value_from_json(type(plan), json_bytes(plan), where="test") == plan


def test_residuals_are_reused_as_they_are() -> None:
    plan = plan_from_schedule(schedule_of(N, *FULL), flow_table(), name="a", guidance_scale=1.0, method="lemica")
    assert [row.caches for row in plan.rows] == [() if t in (*FULL, N) else trunk_reads(1.0) for t in range(N + 1)]


@pytest.mark.parametrize("full", [(0, 2), (0, 3, 4)])
def test_weights_belong_to_one_schedule(full: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the weights were made for another schedule"):
        plan_from_schedule(
            schedule_of(6, 0, 3), flow_table(6), name="a", guidance_scale=1.0, method="x",
            output_weights=linear_weights(schedule_of(6, *full)),
        )  # fmt: skip
