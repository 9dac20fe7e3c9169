"""Outputs of skipped steps, extrapolated linearly from those of the last two full steps.

With i the last full step before the skipped step t and p the one before it,

    m̂_t = (1 + α)·m_i − α·m_p,    α = (t − i)/(i − p)

and m̂_t = m_i where there is no p. Such a row needs no graph at all, and `fold` takes it away. In the step index: in
log-SNR, or in sigma, it was never better on any model that was tried. (Well known as a multistep method: under a
first-order sampler it is a variable-step Adams-Bashforth scheme of order 2.)
"""

from __future__ import annotations

from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.fold import fold
from lemica_trt.planning.step_plan import OutputWeights, plan_from_schedule


def linear_plan(
    schedule: Schedule, table: SamplerTable, *, guidance_scale: float, name: str = "linear", method: str = "linear"
) -> StepPlan:
    """The folded plan of a schedule whose skipped outputs are extrapolated: B rows and the last.

    Raises:
        ValueError: schedule and sampler differ in N.
    """
    return fold(
        plan_from_schedule(
            schedule,
            table,
            name=name,
            guidance_scale=guidance_scale,
            method=method,
            output_weights=linear_weights(schedule),
        )
    )


def linear_weights(schedule: Schedule) -> OutputWeights:
    """For each step 0 … N − 1 the weights of the last full steps' outputs, newest first; empty at full steps."""
    found: list[tuple[float, ...]] = []
    p, i = None, 0
    for t in range(schedule.num_steps):
        if t in schedule.full_steps:
            p, i = (i if t else None), t
            found.append(())
        elif p is None:
            found.append((1.0,))
        else:
            slope = (t - i) / (i - p)
            found.append((1.0 + slope, -slope))
    return tuple(found)
