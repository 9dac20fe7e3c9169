"""Equal distances, residuals reused: what LeMiCa (arXiv 2511.00090) compares with first.

The first step of each kind of steps is full: the nearest full step is moved there."""

from __future__ import annotations

from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.planner import Planner, Problem
from lemica_trt.planning.schedules import through, uniform
from lemica_trt.planning.step_plan import plan_from_schedule


def make(problem: Problem, budget: int) -> StepPlan:
    schedule = through(uniform(problem.table.num_steps, budget), problem.table.switches)
    return plan_from_schedule(
        schedule, problem.table, name="uniform", guidance_scale=problem.guidance_scale, method="uniform"
    )


PLANNERS = (
    Planner(
        name="uniform",
        summary="full steps at equal distances, residuals reused; needs no calibration",
        needs=frozenset(),
        folds=False,
        make=make,
    ),
)
