"""Outputs of skipped steps extrapolated linearly in the step index from the last two full steps, and folded away.

Needs no fit, so that it is what is left for samplers that draw noise. The steps are those planned for predicted
outputs (`planning.prediction_path`) where the Gram matrices are known, else LeMiCa's (arXiv 2511.00090, eq. 5).
"""

from __future__ import annotations

from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.extrapolation import linear_plan
from lemica_trt.planning.minimax import solve
from lemica_trt.planning.planner import Planner, Problem
from lemica_trt.planning.prediction_path import solve_prediction_path


def make(problem: Problem, budget: int) -> StepPlan:
    if "grams" in problem.has:
        schedule = solve_prediction_path(problem.table, problem.graph, problem.grams, [budget])[budget]
    else:
        schedule = solve(problem.graph, [budget])[budget]
    return linear_plan(schedule, problem.table, guidance_scale=problem.guidance_scale)


PLANNERS = (
    Planner(
        name="linear",
        summary="outputs of skipped steps extrapolated linearly; runs the full steps and nothing else",
        needs=frozenset({"error-graph"}),
        folds=True,
        make=make,
    ),
)
