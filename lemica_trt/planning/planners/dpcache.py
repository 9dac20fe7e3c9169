"""DPCache (Cui et al., CVPR 2026, arXiv 2602.22654): steps by dynamic programming over a path-dependent cost.

What it costs to leave out the steps between the full steps i and j depends on the full step p before i, because that is
what the outputs in between are predicted from. The paper's cost tensor holds the accumulated error of the prediction,

    C[p, i, j] = Σ_{i<t<j} ‖h_t − ĥ_t(p, i)‖₁,

and the schedule is the one of B full steps with the least sum, the first three of them steps 0, 1 and 2.

Known from public summaries of the paper, not from its text. Where this deviates:

- h is the feature of the last layer there, and the guided output here, which the Gram matrix knows: the norm is the
  root mean square over elements and samples in place of the sum of absolute values.
- The prediction is the Taylor expansion of first order, which p and i determine. The paper's default is the second
  order; on which step before p its tensor relies then, is not known here.
- The paper's recurrence keeps the best path to each step, and so one p for each i. Here it is exact: the best path to
  each pair (p, i).
- No more steps in a row are left out than the calibration allows (K); the paper has no such bound.
"""

from __future__ import annotations

import numpy as np

from lemica_trt.ir.calibration import TrajectoryGrams
from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.extrapolation import linear_plan
from lemica_trt.planning.minimax import require_feasible
from lemica_trt.planning.planner import Planner, Problem
from lemica_trt.planning.prediction_path import Array, least_sums

FORCED = 3
"""Steps at the beginning that are full (M in the paper)."""


def path_costs(grams: TrajectoryGrams, span: int) -> Array:
    """C[p, i, j], in units of the root mean power of all outputs.

    Returns:
        [N, span + 1, span + 1] at index [i, i − p, j − i]; 0 for i − p: no such step. Infinite where there are no such
        steps, and for j = i.
    """
    gram, n = np.array(grams.outputs), grams.num_steps
    costs = np.full((n, span + 1, span + 1), np.inf)
    for i in range(n):
        stop = min(i + span, n)
        for back in range(min(i, span) + 1):
            left = []
            for t in range(i + 1, stop):
                slope = (t - i) / back if back else 0.0
                steps, weights = (t, i, i - back), np.array([1.0, -(1.0 + slope), slope])
                left.append(float(weights @ gram[np.ix_(steps, steps)] @ weights))
            costs[i, back, 1 : stop - i + 1] = np.cumsum([0.0, *np.sqrt(np.maximum(left, 0.0))])
    return costs


def make(problem: Problem, budget: int) -> StepPlan:
    """Raises InfeasibleError: there is no such schedule with at most K steps skipped in a row."""
    n, max_skip = problem.table.num_steps, problem.graph.max_skip
    require_feasible(n, max_skip, [budget])
    costs = path_costs(problem.grams, max_skip + 1)
    for step in range(forced_steps(n, max_skip, budget) - 1):
        costs[step, :, 2:] = np.inf
    schedule = least_sums(np.repeat(costs[:, :, None], max_skip + 2, axis=2), [budget])[budget]
    return linear_plan(schedule, problem.table, guidance_scale=problem.guidance_scale)


def forced_steps(num_steps: int, max_skip: int, budget: int) -> int:
    """`FORCED`, or as many as leave a budget for the other steps."""
    fitting = (k for k in range(1, min(FORCED, budget) + 1) if num_steps - k + 1 <= (budget - k + 1) * (max_skip + 1))
    return max(fitting)


PLANNERS = (
    Planner(
        name="dpcache",
        summary="DPCache: the least sum of a path-dependent prediction error; outputs extrapolated linearly",
        needs=frozenset({"grams"}),
        folds=True,
        make=make,
        compared=True,
    ),
)
