"""LeMiCa (NeurIPS 2025, arXiv 2511.00090) as published.

Full steps on the lexicographic minimax path through the error graph (eq. 5), the last full step's trunk residual as
it is in between. Where the paper is silent – ties, the largest number of skipped steps – see `planning.minimax`.
"""

from __future__ import annotations

from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.minimax import solve
from lemica_trt.planning.planner import Planner, Problem
from lemica_trt.planning.step_plan import plan_from_schedule


def make(problem: Problem, budget: int) -> StepPlan:
    schedule = solve(problem.graph, [budget])[budget]
    return plan_from_schedule(
        schedule, problem.table, name="lemica", guidance_scale=problem.guidance_scale, method="lemica"
    )


PLANNERS = (
    Planner(
        name="lemica",
        summary="LeMiCa as published: minimax path through the error graph, residuals reused",
        needs=frozenset({"error-graph"}),
        folds=False,
        make=make,
    ),
)
