"""Folding: skipped steps that run no graph are taken out of a plan, the result stays the same.

A row with output reuse or extrapolation is linear, like the sampler's own combination. So its latents and output are a
known combination of the latents and outputs of rows that run a graph, and of noise draws; put into the rows behind it,
the row itself is not needed – a compiler's constant folding. A folded plan has one row for each graph that runs and
the last: with B full steps, B engine calls and nothing else.

A sampler that reads several latents back (DPM-Solver++, UniPC) may read latents of a row that is gone, these others,
and so on to the beginning. A row that would read further back than the sampler does is therefore written over the
shortest window of remaining rows that will do, by the elimination of `shortest_combination`. Noise is drawn step by
step as before, several draws before one row: the same seed gives the same latents.

Knows plans and numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import UsageError
from lemica_trt.core.values import require
from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.planning.elimination import newest_first, shortest_combination

Array = npt.NDArray[np.float64]

MAX_MULTIPLIER = 10.0
"""The largest multiple of an earlier row that a shorter window may cost: larger ones would show rounding in fp32."""

ZERO = 1e-13
"""Coefficients up to this part of a row's largest one are round-off of terms that cancel."""


def fold(plan: StepPlan) -> StepPlan:
    """Take away the rows that run no graph, except the last; exact to float64.

    Returns:
        A plan of the same steps, latents and draws; the same plan where there is nothing to fold.
    """
    rows = plan.rows
    kept = [i for i, row in enumerate(rows) if row.variant is not None or row is rows[-1]]
    if len(kept) == len(rows):
        return plan
    require(not plan.guidance_history, "a plan that weighs guidance terms must have no rows without a graph")
    draws = np.cumsum([0, *(row.draws for row in rows)])  # draws before each row
    count = len(kept)
    # Coordinates: x_{−1} and the latents of the kept rows, their outputs, all draws; each oldest first.
    size = 1 + 2 * count + int(draws[-1])
    basis = np.eye(size)
    latents, outputs = [basis[0]], list[Array]()
    updates: list[Array] = []
    folded: list[PlanRow] = []
    for i, row in enumerate(rows):
        x = _combination(row.latents, latents, size) + _combination(row.outputs, outputs, size)
        x += _combination(row.noise, basis[1 + 2 * count : 1 + 2 * count + draws[i + 1]], size)
        if i not in kept:
            latents.append(x)
            outputs.append(_combination(row.reuse, outputs, size))
            continue
        k = len(folded)
        updates.append(x)
        until = draws[[0, *(f + 1 for f in kept[: k + 1])]]
        if len(newest_first(x[: 1 + k])) > plan.latent_history:
            x = _shortest(k, updates, count, until)
        folded.append(
            msgspec.structs.replace(
                row,
                latents=newest_first(x[: 1 + k]),
                outputs=newest_first(x[1 + count : 1 + count + k]),
                draws=int(until[-1] - until[-2]),
                noise=newest_first(x[1 + 2 * count : 1 + 2 * count + until[-1]]),
            )
        )
        latents.append(basis[1 + k])
        outputs.append(basis[1 + count + k])
    return msgspec.structs.replace(plan, rows=tuple(folded))


def nearest_steps(table: SamplerTable, finer: SamplerTable) -> tuple[int, ...]:
    """The step of a sampler with more steps that is nearest in timestep to each of N; the first stays the first, where
    the noise comes in.

    Raises:
        UsageError: the other sampler has no more steps than N, or two of the N have the same nearest one; it draws
            noise, so that its every step belongs to a path of its own.
    """
    if finer.stochastic:
        raise UsageError(f"{finer.scheduler} draws noise at each step: a finer grid is another path, not a better one")
    there = np.array(finer.timesteps)
    found = (0, *(int(np.abs(there - timestep).argmin()) for timestep in table.timesteps[1:]))
    if finer.num_steps <= table.num_steps or len(set(found)) < len(found):
        raise UsageError(
            f"expected more reference steps than {table.num_steps}, all of these apart, got {finer.num_steps}",
            fix="use a multiple of the sampler's steps, 4 times as many say",
        )
    return found


def _shortest(k: int, updates: Sequence[Array], count: int, draws: npt.NDArray[np.int64]) -> Array:
    """The update of kept row k over the shortest window of kept rows.

    Args:
        updates: of the kept rows 0 … k.
        count: of all kept rows.
        draws: how many draws there are before row 0, and up to each kept row 0 … k.
    """

    def older_than(depth: int) -> npt.NDArray[np.bool_]:
        """Coordinates that a window of `depth` rows does not reach: latents, outputs, and draws before its rows."""
        old, first = np.zeros(len(updates[k]), bool), k - depth
        old[: 1 + first] = True  # x_{−1} belongs to row −1
        old[1 + count : 1 + count + max(first, 0)] = True
        old[1 + 2 * count : 1 + 2 * count + draws[first + 1]] = True
        return old

    relations = [-update for update in updates[:k]]
    for j, relation in enumerate(relations):
        relation[1 + j] += 1.0
    shortest = shortest_combination(
        updates[k], relations[::-1], older_than, max_depth=k + 1, max_multiplier=MAX_MULTIPLIER, zero=ZERO
    )
    assert shortest is not None  # a window of k + 1 rows leaves nothing out
    return shortest


def _combination(weights: Sequence[float], vectors: Sequence[Array] | Array, size: int) -> Array:
    """Σ_k weights[k]·vectors[−1−k], [size]."""
    return sum((weight * vectors[-1 - k] for k, weight in enumerate(weights)), np.zeros(size))
