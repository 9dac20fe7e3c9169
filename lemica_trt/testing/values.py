"""Small samplers, trajectories and calibrations that planners are tested on."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lemica_trt.ir.calibration import (
    Calibration,
    Edge,
    ErrorGraph,
    Provenance,
    Sensitivity,
    TrajectoryGrams,
    gram_from_samples,
)
from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.sampler import NoiseLevels, SamplerRow, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.planner import Problem
from lemica_trt.planning.solvers import first_order_table
from lemica_trt.planning.step_plan import plan_from_solver

Array = npt.NDArray[np.float64]

N = 16


def flow_table(num_steps: int = N, shift: float = 3.0) -> SamplerTable:
    """Flow matching from pure noise to data, explicit Euler."""
    raw = 1 - np.arange(num_steps + 1) / num_steps
    sigma = (shift * raw / (1 + (shift - 1) * raw)).tolist()
    levels = NoiseLevels(target="flow_prediction", signal=tuple(1 - s for s in sigma), noise=tuple(sigma))
    rows = [SamplerRow(latents=(1.0,), timestep=1000.0)]
    for i in range(1, num_steps + 1):
        timestep = None if i == num_steps else 1000 * sigma[i]
        rows.append(SamplerRow(latents=(1.0,), outputs=(sigma[i] - sigma[i - 1],), timestep=timestep))
    return SamplerTable(scheduler="FlowToy", rows=tuple(rows), levels=levels)


def recurrence(num_steps: int, *, outputs: int = 1, latents: int = 1, noise: float = 0.0) -> SamplerTable:
    """A stable recurrence of any depth, without noise levels."""
    rows = [SamplerRow(latents=(1.0,), timestep=1000.0)]
    for i in range(1, num_steps + 1):
        rows.append(
            SamplerRow(
                latents=(0.9, 0.2, -0.1)[: min(latents, i)],
                outputs=(-0.3, 0.1, 0.05)[: min(outputs, i)],
                noise=noise,
                timestep=None if i == num_steps else 1000.0 * (1 - i / num_steps),
            )
        )
    return SamplerTable(scheduler="Toy", rows=tuple(rows))


def samples_of(seed: int, num_steps: int = N, samples: int = 3, size: int = 40, smooth: int = 6) -> Array:
    """Trajectories [samples, num_steps, size]: a few smooth functions of the step, some samples louder."""
    random = np.random.default_rng(seed)
    basis = np.array([np.cos(np.pi * k * np.arange(num_steps) / num_steps) / (1 + k) ** 2 for k in range(smooth)])
    found: Array = np.einsum("kn,skd->snd", basis, random.standard_normal((samples, smooth, size)))
    return found * 10 ** random.uniform(-1, 1, (samples, 1, 1))


def provenance(table: SamplerTable, **changes: Any) -> dict[str, Any]:
    """The fields of a `Provenance` on a sampler."""
    fields = {
        "model": "toy",
        "revision": "0",
        "scheduler": table.scheduler,
        "sampler_digest": table.digest,
        "sampler_probe": table.probe,
        "num_steps": table.num_steps,
        "dtype": "fp32",
        "guidance_scale": 4.0,
        "negative_prompt": "",
        "text_length": 16,
        "latent_shape": (4,),
        "seed": 0,
        "prompts_digest": "0",
    }
    assert set(fields) | {"versions"} == set(Provenance.__struct_fields__)
    return fields | changes


def grams_of(outputs: Array, table: SamplerTable, **changes: Any) -> TrajectoryGrams:
    """The Grams of trajectories [samples, N, size]."""
    gram = gram_from_samples([a @ a.T for a in outputs])
    return TrajectoryGrams(**provenance(table) | {"samples": len(outputs), "outputs": gram} | changes)


def graph_of(table: SamplerTable, seed: int = 0, max_skip: int = 4, **changes: Any) -> ErrorGraph:
    """An error graph of two samples: errors grow with the segment, and differ."""
    random, n = np.random.default_rng(seed), table.num_steps
    edges = [
        Edge(start=i, stop=j, errors=tuple(((j - i - 1) * random.uniform(0.1, 1.0, 2)).tolist()))
        for i in range(n - 1)
        for j in range(i + 2, min(i + max_skip + 1, n) + 1)
    ]
    return ErrorGraph(**provenance(table) | {"max_skip": max_skip, "samples": 2, "edges": tuple(edges)} | changes)


def sensitivity_of(table: SamplerTable, **changes: Any) -> Sensitivity:
    """One sample, one knot."""
    return Sensitivity(**provenance(table) | {"samples": 1, "knots": (((500.0, 2.0),),)} | changes)


def calibration_of(table: SamplerTable, **changes: Any) -> Calibration:
    """Graph and Grams of a sampler."""
    parts: dict[str, Any] = {"graph": graph_of(table), "grams": grams_of(samples_of(0, table.num_steps), table)}
    return Calibration(**parts | changes)


def noisy(table: SamplerTable) -> SamplerTable:
    """The same with fresh noise in every row but the first."""
    rows = [msgspec.structs.replace(row, noise=0.1 if i else 0.0) for i, row in enumerate(table.rows)]
    return msgspec.structs.replace(table, rows=tuple(rows))


def problem_of(table: SamplerTable | None = None, **changes: Any) -> Problem:
    """A problem that has all that a planner may need, apart from what is changed.

    Its standard solvers are all the first-order one; a fitted solver is that one with another last row.
    """
    table = flow_table() if table is None else table

    def solver(schedule: Schedule, kind: str) -> SamplerTable:
        return first_order_table(table, schedule.full_steps)

    def fit(schedule: Schedule) -> StepPlan:
        own = first_order_table(table, schedule.full_steps)
        plan = plan_from_solver(schedule, table, own, name="f", guidance_scale=4.0, method="")
        last = msgspec.structs.replace(plan.rows[-1], outputs=(0.25, 0.5))
        return msgspec.structs.replace(plan, rows=(*plan.rows[:-1], last))

    fields: dict[str, Any] = {"guidance_scale": 4.0, "fit": fit, "solver": solver}
    if "calibration" not in changes:
        fields["calibration"] = calibration_of(table)
    return Problem(table=table, **fields | changes)


def schedule_of(num_steps: int, *full_steps: int) -> Schedule:
    """A schedule by its full steps."""
    return Schedule(num_steps=num_steps, full_steps=full_steps)


def plan_of(*rows: PlanRow, name: str = "default", guidance_scale: float = 3.0) -> StepPlan:
    """A plan of given rows."""
    return StepPlan(
        name=name,
        num_steps=rows[-1].step,
        guidance_scale=guidance_scale,
        rows=rows,
        scheduler="Toy",
        sampler_digest="0" * 64,
        method="given",
    )
