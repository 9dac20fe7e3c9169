"""A schedule and a sampler → the rows of a step plan."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lemica_trt.core.errors import InfeasibleError
from lemica_trt.core.values import require
from lemica_trt.ir.graphs import full_name, skip_name
from lemica_trt.ir.plan import UNCACHED as UNCACHED
from lemica_trt.ir.plan import PlanRow, StepPlan, trunk_reads
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule

OutputWeights = Sequence[tuple[float, ...]]
"""For each step 0 … N − 1 the weight of the k-th last full step's output at index k; empty exactly at full steps."""


def plan_from_schedule(
    schedule: Schedule,
    table: SamplerTable,
    *,
    name: str,
    guidance_scale: float,
    method: str,
    output_weights: OutputWeights | None = None,
) -> StepPlan:
    """Join a schedule and a sampler: full rows where the schedule says so, reuse elsewhere.

    Args:
        output_weights: skipped steps take a combination of outputs and run no graph; None: they run what is left of
            the model on the last full step's residual, which is LeMiCa (arXiv 2511.00090).

    Raises:
        ValueError: schedule, sampler and weights do not belong together.
        InfeasibleError: a residual would be read by steps of another kind than it is of.
    """
    n, full, kinds = table.num_steps, set(schedule.full_steps), table.kinds
    require(schedule.num_steps == n, f"the schedule is for {schedule.num_steps} steps, the sampler has {n}")
    require(
        output_weights is None
        or (len(output_weights) == n and all((not output_weights[t]) == (t in full) for t in range(n))),
        "the weights were made for another schedule",
    )
    rows, before = [], list[int]()
    for i, row in enumerate(table.rows):
        skipped = i < n and i not in full
        cached = skipped and output_weights is None
        if cached:
            require_start(i, before[0], table)
        variant = full_name(kinds[i]) if i in full else skip_name(kinds[i]) if cached else None
        rows.append(
            PlanRow(
                step=i,
                variant=variant,
                latents=row.latents,
                outputs=row.outputs,
                draws=int(row.noise != 0.0),
                noise=(row.noise,) if row.noise else (),
                timestep=row.timestep,
                in_scale=row.in_scale,
                guidance=row.guidance,
                caches=trunk_reads(1.0, kind=kinds[i]) if cached else (),
                reuse=_reuse(output_weights[i], before, i) if skipped and output_weights is not None else (),
            )
        )
        if i in full:
            before.insert(0, i)
    return StepPlan(
        name=name,
        num_steps=n,
        guidance_scale=guidance_scale,
        rows=tuple(rows),
        scheduler=table.scheduler,
        sampler_digest=table.digest,
        method=method,
    )


def require_start(skipped: int, full: int, table: SamplerTable) -> None:
    """Raise InfeasibleError unless a skipped step may reuse what a full one cached: both are of one kind."""
    switch = next((step for step in table.switches if full < step <= skipped), None)
    if switch is not None:
        raise InfeasibleError(
            f"expected step {switch} among the full steps: it is the first of another kind, for which step {full} has "
            "cached nothing",
            fix=f"plan step {switch} in full, or use a --method that reuses no residuals (fitted, linear)",
        )


def uncached_plan(table: SamplerTable, *, guidance_scale: float, name: str = UNCACHED) -> StepPlan:
    """The plan that runs every step in full."""
    every = Schedule(num_steps=table.num_steps, full_steps=tuple(range(table.num_steps)))
    return plan_from_schedule(every, table, name=name, guidance_scale=guidance_scale, method=UNCACHED)


def plan_from_solver(
    schedule: Schedule, table: SamplerTable, solver: SamplerTable, *, name: str, guidance_scale: float, method: str
) -> StepPlan:
    """The plan of a solver that has the schedule's full steps for its own and skips none.

    Args:
        table: the N-step sampler that the schedule is for.
        solver: B model calls, see `solvers.first_order_table` and `models.scheduler.solver_table`.

    Raises:
        ValueError: B differs.
    """
    plan = uncached_plan(solver, guidance_scale=guidance_scale, name=name)
    return assign_steps(msgspec.structs.replace(plan, method=method), schedule, table)


def assign_steps(plan: StepPlan, schedule: Schedule, table: SamplerTable) -> StepPlan:
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
        scheduler=table.scheduler,
        sampler_digest=table.digest,
        rows=tuple(msgspec.structs.replace(row, step=step) for row, step in rows),
    )


def _reuse(weights: tuple[float, ...], full: Sequence[int], i: int) -> tuple[float, ...]:
    """Weights of the last full rows, newest first, as weights of m_{i−1}, m_{i−2} …"""
    reuse = [0.0] * (i - full[len(weights) - 1])
    for f, weight in zip(full, weights):
        reuse[i - 1 - f] = weight
    return tuple(reuse)
