"""A step plan as its docstring reads, in float64: lists that grow, a network of a few lines, nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.schedule import Schedule

Array = npt.NDArray[np.float64]

SIZE = 12


def schedule_of(num_steps: int, *full: int) -> Schedule:
    return Schedule(num_steps=num_steps, full_steps=full)


def trunk(x: Array, row: PlanRow) -> Array:
    """The trunk's residual: not linear, another one at every timestep."""
    assert row.timestep is not None
    return np.sin(1.3 * x + 0.01 * row.timestep) + 0.1 * np.tanh(np.roll(x, 1))


def head(x: Array, residual: Array) -> Array:
    return np.tanh(0.5 * x + residual)


def run_plan(plan: StepPlan, seed: int = 0, dtype: Any = np.float64) -> list[Array]:
    """The latents of the rows that a folded plan has too: those that run a graph, and the last.

    Args:
        seed: of the initial noise, then of each draw in order.
        dtype: what everything is rounded to.
    """
    random = np.random.default_rng(seed)
    latents = [random.standard_normal(SIZE).astype(dtype)]
    outputs, residuals, draws, kept = list[Array](), list[Array](), list[Array](), list[Array]()

    def mix(weights: tuple[float, ...], history: list[Array]) -> Any:
        assert len(weights) <= len(history)
        return sum((dtype(w) * v for w, v in zip(weights, reversed(history))), np.zeros(SIZE, dtype))

    for row in plan.rows:
        draws += [random.standard_normal(SIZE).astype(dtype) for _ in range(row.draws)]
        x = mix(row.latents, latents) + mix(row.outputs, outputs) + mix(row.noise, draws)
        latents.append(x)
        if row.variant is None:
            outputs.append(mix(row.reuse, outputs))
            continue
        kept.append(x)
        scaled = dtype(row.in_scale) * x
        if row.full:
            residuals.append(trunk(scaled, row))
        residual = residuals[-1] if row.full else mix(row.caches[0].weights, residuals)
        outputs.append(head(scaled, residual))
    return [*kept, latents[-1]]


def deviation(a: list[Array], b: list[Array]) -> float:
    """Largest difference, relative to the largest number."""
    assert len(a) == len(b)
    return float(np.abs(np.subtract(a, b)).max() / np.abs(b).max())
