"""The oracle: a step plan as the docstring of `ir.plan` reads, with lists that grow and nothing else.

Works on numpy arrays and torch tensors of any float type. No rings, no graphs, no padding, no coefficient vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lemica_trt.ir.plan import PlanRow, StepPlan

Array = npt.NDArray[np.float64]

SIZE = 12
"""Numbers in a latent of `run_plan`."""


class Network(Protocol):
    """What the graphs of a plan compute; guidance is its own affair."""

    def full(self, row: PlanRow, sample: Any) -> tuple[Any, Any]:
        """The whole DiT on `in_scale`·x: (model output, trunk residual)."""

    def head(self, row: PlanRow, sample: Any, residual: Any) -> Any:
        """The DiT with a residual in the place of its trunk: the model output."""


@runtime_checkable
class Branches(Protocol):
    """A network that plans can be run on that weigh guidance terms."""

    def guidance_term(self, row: PlanRow, sample: Any, residual: Any) -> Any:
        """What guidance adds to the conditional output of `Network.head`."""


def mix(weights: Sequence[float], newest_last: Sequence[Any], *, like: Any) -> Any:
    """Σ_k weights[k]·v_k with v_0 the newest; zeros of the shape of `like` where there are no weights."""
    if len(weights) > len(newest_last):
        raise ValueError(f"expected at most {len(newest_last)} weights, got {len(weights)}")
    if not len(weights):
        return 0.0 * like
    first, *rest = (weight * value for weight, value in zip(map(float, weights), reversed(newest_last)))
    return sum(rest, first)


def interpret(
    plan: StepPlan, network: Network, noise: Any, draw: Callable[[PlanRow], Any] | None = None
) -> list[tuple[PlanRow, Any]]:
    """Run a plan.

    Args:
        network: of the plan's graphs.
        noise: x_{−1} of row 0.
        draw: row → the next z of this row; of plans that draw noise.

    Returns:
        Each row with its latents; the last are the result.
    """
    latents, outputs, terms, residuals, draws = [noise], list[Any](), list[Any](), list[Any](), list[Any]()
    for row in plan.rows:
        draws += [draw(row) for _ in range(row.draws)] if draw is not None else []
        x = mix(row.latents, latents, like=noise) + mix(row.outputs, outputs, like=noise)
        x = x + mix(row.guidance_terms, terms, like=noise)
        if row.noise:
            x = x + row.noise_scale * mix(row.noise_weights, draws, like=noise)
        latents.append(x)
        if row.variant is None:
            outputs.append(mix(row.reuse, outputs, like=noise))
            if plan.guidance_history:
                terms.append(mix(row.reuse, terms, like=noise))
            continue
        if row.full:
            output, residual = network.full(row, row.in_scale * x)
            residuals.append(residual)
        else:
            (read,) = row.caches
            residual = mix(read.weights, residuals, like=residuals[-1])
            output = network.head(row, row.in_scale * x, residual)
        outputs.append(output)
        if plan.guidance_history:
            assert isinstance(network, Branches)
            terms.append(network.guidance_term(row, row.in_scale * x, residual))
    return list(zip(plan.rows, latents[1:]))


class Waves:
    """A network of a few lines, not linear, with another residual at every timestep. Arrays of any one shape."""

    def full(self, row: PlanRow, sample: Any) -> tuple[Any, Any]:
        if row.timestep is None:
            raise ValueError(f"step {row.step}: a row that runs a graph must have a timestep")
        residual = np.sin(1.3 * sample + 0.01 * row.timestep) + 0.1 * np.tanh(np.roll(sample, 1))
        return self.head(row, sample, residual), residual

    def head(self, row: PlanRow, sample: Any, residual: Any) -> Any:
        return np.tanh(0.5 * sample + residual)

    def guidance_term(self, row: PlanRow, sample: Any, residual: Any) -> Any:
        return 0.75 * np.sin(sample - residual)


def run_plan(plan: StepPlan, seed: int = 0, dtype: Any = np.float64) -> list[Array]:
    """Run a plan on `Waves`; the latents of the rows that a folded plan has too: those that run a graph, and the last.

    Args:
        seed: of the initial noise, then of each draw in order.
        dtype: what everything is rounded to.
    """
    random = np.random.default_rng(seed)

    def draw() -> Any:
        return random.standard_normal(SIZE).astype(dtype)

    *rows, (_, result) = interpret(plan, Waves(), draw(), lambda row: draw())
    return [*(x for row, x in rows if row.variant is not None), result]


def deviation(a: list[Array], b: list[Array]) -> float:
    """Largest difference, relative to the largest number.

    Raises:
        ValueError: the runs have different numbers of rows.
    """
    return float(np.abs(np.subtract(a, b)).max() / np.abs(b).max())
