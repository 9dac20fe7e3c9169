"""A multistep solver of the plan's own, fitted to the model on steps planned for it.

The rows are non-stationary multistep solvers (Shaul et al. 2024, arXiv 2403.01329), fitted row by row instead of all
at once (`calibrate.fit`). The steps are those between which the last three outputs tell the others best
(`planning.prediction_path`), under the sensitivities of the result as measured: `fitted`, or to a power below 1:
`fitted-flat`, because a fitted row corrects part of what earlier rows left, so that early errors matter less.
"""

from __future__ import annotations

from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.planner import Need, Planner, Problem
from lemica_trt.planning.prediction_path import solve_prediction_path

FLAT = 0.85
"""Power of the sensitivities. Of powers from 0.5 to 1.3, the better of this and 1 was the best, or within 0.6 dB of it,
at 10, 15, 20 and 25 of 50 steps (cogvideox-tiny, 48 held-out clips)."""


def fitted(problem: Problem, budget: int, power: float) -> StepPlan:
    """The fitted solver on the steps planned under sensitivities to a power."""
    assert problem.fit is not None
    return problem.fit(
        solve_prediction_path(problem.table, problem.graph, problem.grams, [budget], power=power)[budget]
    )


NEEDS: frozenset[Need] = frozenset({"error-graph", "grams", "fit"})

PLANNERS = (
    Planner(
        name="fitted",
        summary="a multistep solver fitted to the model, on steps planned for predicted outputs",
        needs=NEEDS,
        folds=True,
        make=lambda problem, budget: fitted(problem, budget, 1.0),
    ),
    Planner(
        name="fitted-flat",
        summary=f"the same, early and late errors weighed more alike (sensitivities to the power {FLAT})",
        needs=NEEDS,
        folds=True,
        make=lambda problem, budget: fitted(problem, budget, FLAT),
    ),
)
