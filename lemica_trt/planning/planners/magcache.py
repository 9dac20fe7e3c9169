"""MagCache (Ma et al., NeurIPS 2025, arXiv 2506.09045), its signal replayed as a static schedule.

The paper finds that the magnitude of the residual falls from step to step by a ratio that hardly depends on the prompt,

    γ_t = mean(‖r_t‖ / ‖r_{t−1}‖),

which is measured on one run. From the last full step i on it adds up how far the magnitude is from that of r_i,

    ε(i, j) = Σ_{t = i+1}^{j} |1 − Π_{s = i+1}^{t} γ_s|,

and a step is full as soon as the sum reaches a threshold, or after K skipped steps in a row. The first fifth of the
steps is always full. Skipped steps reuse the last residual. Where this deviates:

- r is the trunk's residual there, token by token, and the guided output here, which the Gram matrix knows; its
  magnitude is the root mean square over elements and samples.
- The threshold is the one that has B full steps.
- Of the B full steps the first fifth come at the beginning: a fifth of the N steps would leave none of 10 of 50.
- K is LeMiCa's, which the calibration allows; the paper has 2 … 5.
"""

from __future__ import annotations

import numpy as np

from lemica_trt.ir.calibration import TrajectoryGrams
from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.minimax import require_feasible
from lemica_trt.planning.planner import Planner, Problem
from lemica_trt.planning.schedules import through
from lemica_trt.planning.step_plan import plan_from_schedule
from lemica_trt.planning.threshold import Array, schedule_by_threshold

RETAINED = 0.2
"""Part of the full steps that come first."""


def accumulated_errors(grams: TrajectoryGrams) -> Array:
    """ε at [i, j], for j > i; else 0: [N, N]."""
    magnitudes = np.sqrt(np.diag(np.array(grams.outputs)))
    away = np.abs(1.0 - magnitudes[None, :] / magnitudes[:, None])  # the product of ratios is the ratio of its ends
    found: Array = np.cumsum(np.triu(away, 1), axis=1)
    return found


def make(problem: Problem, budget: int) -> StepPlan:
    """Raises InfeasibleError: there is no schedule with at most K steps skipped in a row."""
    n, max_skip = problem.table.num_steps, problem.graph.max_skip
    require_feasible(n, max_skip, [budget])
    rest = (n - 1) // (max_skip + 1)  # the most that K alone makes full behind the first ones
    first = max(1, min(int(np.ceil(RETAINED * budget)), budget - rest))
    schedule = schedule_by_threshold(accumulated_errors(problem.grams), budget, first=first, max_skip=max_skip)
    return plan_from_schedule(
        through(schedule, problem.table.switches),
        problem.table,
        name="magcache",
        guidance_scale=problem.guidance_scale,
        method="magcache",
    )


PLANNERS = (
    Planner(
        name="magcache",
        summary="MagCache: a full step as soon as the output's magnitude has changed by so much; residuals reused",
        needs=frozenset({"grams"}),
        folds=False,
        make=make,
        compared=True,
    ),
)
