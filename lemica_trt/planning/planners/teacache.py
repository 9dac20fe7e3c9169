"""TeaCache (Liu et al., CVPR 2025, arXiv 2411.19108), its signal replayed as a static schedule.

The paper adds up, from the last full step on, an estimate of how much the model's output changes from step to step,

    f(L1_rel(F, t)),    L1_rel(O, t) = ‖O_t − O_{t+1}‖₁ / ‖O_{t+1}‖₁,

F being the input of the first block, modulated by the timestep, and f a polynomial that is fitted, once a model, to
turn changes of F into changes of the output O. As soon as the sum reaches a threshold a step is full. The first and
the last step are always full. Skipped steps reuse the last residual. Where this deviates:

- It decides anew in each run there. Here one schedule is made from the changes of the output themselves, of calibration
  runs: what f estimates. The threshold is the one that has B full steps. No polynomial is needed.
- O is the guided output, which the Gram matrix knows, and the norm the root mean square over elements and samples. The
  authors' code decides for the conditional and the unconditional branch apart.
- Of one full step it is the first: the last is full from two on.
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


def accumulated_changes(grams: TrajectoryGrams) -> Array:
    """Σ_{t = i+1}^{j} ‖m_t − m_{t−1}‖ / ‖m_{t−1}‖ at [i, j], for j > i; else nothing that is read: [N, N]."""
    gram = np.array(grams.outputs)
    power = np.diag(gram)
    squares = power[1:] + power[:-1] - 2 * np.diag(gram, 1)
    total = np.concatenate([[0.0], np.cumsum(np.sqrt(np.maximum(squares, 0.0) / power[:-1]))])
    found: Array = total[None, :] - total[:, None]
    return found


def make(problem: Problem, budget: int) -> StepPlan:
    """Raises InfeasibleError: the budget is outside 1 … N, or there are fewer full steps than kinds of steps."""
    n = problem.table.num_steps
    require_feasible(n, n, [budget])
    schedule = schedule_by_threshold(accumulated_changes(problem.grams), budget, last=budget > 1, max_skip=n)
    return plan_from_schedule(
        through(schedule, problem.table.switches),
        problem.table,
        name="teacache",
        guidance_scale=problem.guidance_scale,
        method="teacache",
    )


PLANNERS = (
    Planner(
        name="teacache",
        summary="TeaCache: a full step as soon as the output has changed by so much; residuals reused",
        needs=frozenset({"grams"}),
        folds=False,
        make=make,
        compared=True,
    ),
)
