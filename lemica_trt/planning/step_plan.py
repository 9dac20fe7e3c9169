"""A schedule and a sampler → the rows of a step plan."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lemica_trt.core.values import require
from lemica_trt.ir.plan import Graph, PlanRow, StepPlan
from lemica_trt.ir.prediction import LEMICA, Prediction
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.prediction import predict

UNCACHED = "uncached"
"""Name of the plan that runs every step in full; every bundle has it: it is what the others are compared with."""


def uncached_plan(table: SamplerTable, *, guidance_scale: float, name: str = UNCACHED) -> StepPlan:
    """The plan that runs every step in full."""
    every = Schedule(num_steps=table.num_steps, full_steps=tuple(range(table.num_steps)))
    return plan_from_schedule(every, table, name=name, guidance_scale=guidance_scale, method="none")


def plan_from_schedule(
    schedule: Schedule,
    table: SamplerTable,
    *,
    name: str,
    guidance_scale: float,
    method: str,
    error_graph_digest: str | None = None,
    prediction: Prediction | None = None,
) -> StepPlan:
    """Join a schedule and a sampler: full rows where the schedule says so, skipped ones as predicted elsewhere.

    Args:
        prediction: made for this schedule; None: LeMiCa's residual reuse.

    Raises:
        ValueError: schedule, sampler and prediction do not belong together.
    """
    require(
        schedule.num_steps == table.num_steps,
        f"the schedule is for {schedule.num_steps} steps, the sampler has {table.num_steps}",
    )
    prediction = predict(LEMICA, schedule, table) if prediction is None else prediction
    of, weights = prediction.predictor.of, prediction.weights
    full = set(schedule.full_steps)
    require(
        len(weights) == table.num_steps and all((not weights[t]) == (t in full) for t in range(table.num_steps)),
        "the prediction was made for another schedule",
    )
    rows, before = [], list[int]()
    for i, row in enumerate(table.rows):
        skipped = i < table.num_steps and i not in full
        graph: Graph = "full" if i in full else "skip" if skipped and of == "residual" else "none"
        rows.append(
            PlanRow(
                graph=graph,
                step=i,
                latents=row.latents,
                outputs=row.outputs,
                draws=int(row.noise != 0.0),
                noise=(row.noise,) if row.noise else (),
                timestep=row.timestep,
                in_scale=row.in_scale,
                guidance=row.guidance,
                residuals=weights[i] if graph == "skip" else (),
                reuse=_reuse(weights[i], before, i) if skipped and graph == "none" else (),
            )
        )
        if i in full:
            before.insert(0, i)
    return StepPlan(
        name=name,
        num_steps=table.num_steps,
        guidance_scale=guidance_scale,
        rows=tuple(rows),
        scheduler=table.scheduler,
        sampler_digest=table.digest,
        method=method,
        error_graph_digest=error_graph_digest,
        predictor=prediction.predictor if len(full) < table.num_steps else None,
    )


def plan_from_solver(
    schedule: Schedule,
    table: SamplerTable,
    solver: SamplerTable,
    *,
    name: str,
    guidance_scale: float,
    method: str,
    error_graph_digest: str | None = None,
) -> StepPlan:
    """The plan of a solver that has the schedule's full steps for its own and skips none.

    Args:
        table: the N-step sampler that the schedule is for.
        solver: B model calls, see `sampler.first_order_table` and `lower.solver_table`.

    Raises:
        ValueError: B differs.
    """
    every = Schedule(num_steps=solver.num_steps, full_steps=tuple(range(solver.num_steps)))
    plan = plan_from_schedule(
        every,
        solver,
        name=name,
        guidance_scale=guidance_scale,
        method=method,
        error_graph_digest=error_graph_digest,
    )
    return relabelled(plan, schedule, table)


def relabelled(plan: StepPlan, schedule: Schedule, table: SamplerTable) -> StepPlan:
    """The same plan, its B full rows standing for the full steps of a schedule of an N-step sampler.

    Raises:
        ValueError: the plan has other rows than B full ones and the last, or B or N differ.
    """
    require(
        schedule.num_steps == table.num_steps,
        f"the schedule is for {schedule.num_steps} steps, the sampler has {table.num_steps}",
    )
    require(
        len(plan.rows) == schedule.budget + 1 == plan.budget + 1,
        f"expected a plan of {schedule.budget} full rows and the last, got {len(plan.rows)} rows, {plan.budget} full",
    )
    rows = zip(plan.rows, [*schedule.full_steps, schedule.num_steps])
    return msgspec.structs.replace(
        plan,
        num_steps=schedule.num_steps,
        sampler_digest=table.digest,
        rows=tuple(msgspec.structs.replace(row, step=step) for row, step in rows),
    )


def _reuse(weights: tuple[float, ...], full: Sequence[int], i: int) -> tuple[float, ...]:
    """Weights of the last full rows, newest first, as weights of m_{i−1}, m_{i−2} …"""
    reuse = [0.0] * (i - full[len(weights) - 1])
    for f, weight in zip(full, weights):
        reuse[i - 1 - f] = weight
    return tuple(reuse)
