"""The full steps that LeMiCa's authors published for a model, residuals reused.

From their repository; see `calibration/published_schedules.json`.
"""

from __future__ import annotations

from lemica_trt.core.errors import InputError
from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.planner import Planner, Problem
from lemica_trt.planning.schedules import published
from lemica_trt.planning.step_plan import plan_from_schedule


def make(problem: Problem, budget: int) -> StepPlan:
    """Raises InputError: nothing was published for this model, budget, or number of steps."""
    schedule = published(problem.model, budget)
    if schedule.num_steps != problem.table.num_steps:
        raise InputError(
            f"published schedule of {problem.model}: it is for {schedule.num_steps} steps, got a sampler with "
            f"{problem.table.num_steps}",
            fix=f"--denoising-steps {schedule.num_steps}",
        )
    return plan_from_schedule(
        schedule, problem.table, name="published", guidance_scale=problem.guidance_scale, method="published"
    )


PLANNERS = (
    Planner(
        name="published",
        summary="the full steps that LeMiCa's authors published for this model, residuals reused",
        needs=frozenset(),
        folds=False,
        make=make,
    ),
)
