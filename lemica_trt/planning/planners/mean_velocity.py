"""Jumps by an estimate of the mean velocity, after MeanCache (Gao et al., ICLR 2026, arXiv 2601.19961).

From a full step t the sampler goes to the next one, s, in one step by

    û(t, s) = v_t + (s − t)·JVP,    JVP = (u(r, t) − v_r)/(t − r),    u(r, t) = (z_t − z_r)/(t − r),

with v the velocity that the model gives, z the latents, and r an earlier full step: what the mean velocity was beyond
v_r over the steps from r to t, it is taken to be beyond v_t over those to s. An edge (t, s) costs how far û is from the
mean velocity of uncached runs, L = ‖u(t, s) − û(t, s)‖, and the schedule is the path of B full steps with the least
Σ L^γ (the peak-suppressed shortest path). The paper's ablation has its best figures at γ = 4 and 5.

A variant of our own, not MeanCache. What the authors' code does (UnicomAI/MeanCache,
`MeanCache4Qwen-Image/Mc_qwenimage.py` at a4f9a38), and what is done here:

- There each edge has its own K of 1 … 6, and r lies K steps of the sampler back, whether that step was full or skipped;
  the interval (r, t) ends behind the last step taken. Here r is the full step before the one before t, or û = v_t,
  whichever costs less: what a plan of B rows can read.
- There skipped steps are taken one by one, and the JVP is computed anew in each, from a log that has the skipped steps,
  too. Here one jump covers them all.
- Time is what the first-order solver multiplies outputs by: the noise level for flow matching, as there; for other
  samplers, and where uncached runs have another solver, it stands for it.
- The norm of L is the root mean square over elements and samples. The code has finished schedules, not what made them.
- No more steps in a row are left out than the calibration allows (K of LeMiCa).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from lemica_trt.ir.calibration import TrajectoryGrams
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.planning.minimax import require_feasible
from lemica_trt.planning.planner import Planner, Problem
from lemica_trt.planning.prediction_path import Array, least_sums, output_gains
from lemica_trt.planning.solvers import first_order_step, first_order_table
from lemica_trt.planning.step_plan import plan_from_solver

GAMMA = 4
"""γ."""

LATENTS = 3
"""A row reads the latents of the last three full steps, which are those of t, of the full step before it, and of r."""


def jump_ratio(table: SamplerTable, r: int, t: int, s: int) -> float:
    """(s − t)/(t − r), in the time of the first-order solver."""
    before, (kept, ahead) = first_order_step(table, r, t)[1], first_order_step(table, t, s)
    return ahead / (kept * before)


def edge_costs(table: SamplerTable, grams: TrajectoryGrams, span: int) -> tuple[Array, Array]:
    """L of û = v_t, and of û with the correction.

    Returns:
        [N, span + 1] at index [t, s − t], infinite where there is no such edge; and [N, 2·span + 1, span + 1] at index
        [t, t − r, s − t], infinite where there is no such r. In units of the root mean power of all outputs.
    """
    n, gram = table.num_steps, np.array(grams.outputs)
    means = {(i, j): _mean_output(table, i, j) for i in range(n) for j in range(i + 1, min(i + 2 * span, n) + 1)}
    plain, corrected = np.full((n, span + 1), np.inf), np.full((n, 2 * span + 1, span + 1), np.inf)

    def size(error: Array) -> float:
        return float(np.sqrt(max(error @ gram @ error, 0.0)))

    for t in range(n):
        for s in range(t + 1, min(t + span, n) + 1):
            error = means[t, s].copy()
            error[t] -= 1.0
            plain[t, s - t] = size(error)
            for r in range(max(t - 2 * span, 0), t - 1):
                beyond = means[r, t].copy()
                beyond[r] -= 1.0
                corrected[t, t - r, s - t] = size(error - jump_ratio(table, r, t, s) * beyond)
    return plain, corrected


def _mean_output(table: SamplerTable, i: int, j: int) -> Array:
    """Weights [N] of the outputs in their mean over the steps i … j − 1, each by what it does to the latents."""
    weights = np.zeros(table.num_steps)
    gains = output_gains(table, i, j).sum(1)
    weights[i:j] = gains / gains.sum()
    return weights


def path_costs(plain: Array, corrected: Array) -> Array:
    """L^γ of the better of both, as `least_sums` takes it: [N, span + 1, span + 1, span + 1]."""
    n, span = plain.shape[0], plain.shape[1] - 1
    costs = np.broadcast_to(plain[:, None, None], (n, span + 1, span + 1, span + 1)).copy()
    for back in range(1, span + 1):
        for further in range(1, span + 1):
            costs[:, back, further] = np.minimum(costs[:, back, further], corrected[:, back + further])
    powers: Array = costs**GAMMA
    return powers


def mean_velocity_table(table: SamplerTable, steps: Sequence[int], corrections: Sequence[int | None]) -> SamplerTable:
    """The sampler with B calls that jumps by û.

    Args:
        steps: the full steps.
        corrections: for each of them r; None: û = v_t.
    """
    first_order = first_order_table(table, steps)
    rows = list(first_order.rows)
    for k, (t, s, r) in enumerate(zip(steps, [*steps[1:], table.num_steps], corrections), 1):
        if r is not None:
            (a, b), (kept, moved) = first_order_step(table, t, s), first_order_step(table, r, t)
            factor, between = b * jump_ratio(table, r, t, s), k - 2 - list(steps).index(r)
            rows[k] = msgspec.structs.replace(
                rows[k],
                latents=(a + factor / moved, *[0.0] * between, -factor * kept / moved),
                outputs=(b, *[0.0] * between, -factor),
            )
    return msgspec.structs.replace(first_order, rows=tuple(rows))


def make(problem: Problem, budget: int) -> StepPlan:
    """Raises InfeasibleError: there is no such schedule with at most K steps skipped in a row; UnsupportedError: as
    `solvers.first_order_table`."""
    table, max_skip = problem.table, problem.graph.max_skip
    require_feasible(table.num_steps, max_skip, [budget])
    plain, corrected = edge_costs(table, problem.grams, max_skip + 1)
    schedule = least_sums(path_costs(plain, corrected), [budget])[budget]
    steps = schedule.full_steps
    corrections: list[int | None] = []
    for k, (t, s) in enumerate(zip(steps, [*steps[1:], table.num_steps])):
        r = steps[k - 2] if k > 1 else None
        better = r is not None and corrected[t, t - r, s - t] < plain[t, s - t]
        corrections.append(r if better else None)
    solver = mean_velocity_table(table, steps, corrections)
    return plan_from_solver(
        schedule, table, solver, name="mean-velocity", guidance_scale=problem.guidance_scale, method="mean-velocity"
    )


PLANNERS = (
    Planner(
        name="mean-velocity",
        summary="after MeanCache: jumps by an estimate of the mean velocity, on the path of the least Σ error⁴",
        needs=frozenset({"grams", "levels"}),
        folds=True,
        make=make,
        latent_history=LATENTS,
        compared=True,
    ),
)
