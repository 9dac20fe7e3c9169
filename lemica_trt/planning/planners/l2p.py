"""L2P (Shen et al., CVPR 2026, arXiv 2604.26365): linear weights for each skipped step, learned open loop.

Where TaylorSeer and its like predict what a skipped step would give by fixed coefficients, L2P learns them: a skipped
step t takes Σ_j W[t, j]·F_j, with W the weights that leave the least mean squared error on the trajectories of uncached
runs. Full steps lie at equal distances. Open loop means that the runs W is learned from are not changed by what W
predicts, which is what sets it apart from our fitted solver (`calibrate.fit`), its nearest relative.

Known from public summaries of the paper and the authors' training script, not from the paper's text. Where this
deviates:

- F is the feature of the last layer there, and the guided output here, which the Gram matrix knows.
- The paper's W weighs all earlier steps, those that were skipped by what was predicted for them. Here it weighs the
  last two full steps: a prediction of predictions is one of full steps, too, and engines keep only so many.
- The paper trains by Adam, 200 epochs from W[t, t − 1] = 1. Here it is the minimum itself, with a ridge for outputs
  that are nearly alike.
"""

from __future__ import annotations

import numpy as np

from lemica_trt.ir.calibration import TrajectoryGrams
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.fold import fold
from lemica_trt.planning.planner import Planner, Problem
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.step_plan import OutputWeights, plan_from_schedule

OUTPUTS = 2
"""Full steps that a skipped one is predicted from: chosen small, as for linear extrapolation, and not searched."""

RIDGE = 1e-9
"""Of the mean power of an output: G is of fp32 outputs, so that less is rounding."""


def learned_weights(grams: TrajectoryGrams, schedule: Schedule) -> OutputWeights:
    """For each step 0 … N − 1 the weights of the last full steps' outputs, newest first; empty at full steps.

    They minimise mean ‖m_t − Σ_k w_k·m_k‖² + ridge·‖w − e_0‖², e_0 being reuse of the last output.
    """
    gram, full = np.array(grams.outputs), set(schedule.full_steps)
    found: list[tuple[float, ...]] = []
    for t in range(schedule.num_steps):
        if t in full:
            found.append(())
            continue
        read = [step for step in schedule.full_steps if step < t][: -OUTPUTS - 1 : -1]
        ridge = RIDGE * np.eye(len(read))
        found.append(tuple(np.linalg.solve(gram[np.ix_(read, read)] + ridge, gram[read, t] + ridge[0]).tolist()))
    return tuple(found)


def make(problem: Problem, budget: int) -> StepPlan:
    schedule = uniform(problem.table.num_steps, budget)
    return fold(
        plan_from_schedule(
            schedule,
            problem.table,
            name="l2p",
            guidance_scale=problem.guidance_scale,
            method="l2p",
            output_weights=learned_weights(problem.grams, schedule),
        )
    )


PLANNERS = (
    Planner(
        name="l2p",
        summary="L2P: full steps at equal distances, outputs in between by weights learned on uncached runs",
        needs=frozenset({"grams"}),
        folds=True,
        make=make,
        compared=True,
    ),
)
