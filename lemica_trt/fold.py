"""Folding: skipped steps that run no graph are taken out of a plan, the result stays the same.

A row with output reuse or extrapolation is linear, like the sampler's own combination. So its latents and output are a
known combination of the latents and outputs of rows that run a graph, and of noise draws; put into the rows behind it,
the row itself is not needed – a compiler's constant folding. A folded plan has one row for each graph that runs and
the last: with B full steps, B engine calls and nothing else.

A sampler that reads several latents back (DPM-Solver++, UniPC) may read latents of a row that is gone, these others,
and so on to the beginning. Each remaining row is therefore written over the shortest window of remaining rows that
will do, by the elimination of `shortest_combination`. Noise is drawn step by step as before, several draws before one
row: the same seed gives the same latents.

Knows plans and numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from lemica_trt.plan import PlanRow, StepPlan, plan_from_schedule, relabelled
from lemica_trt.predict import Predictor, predict
from lemica_trt.sampler import SamplerTable, newest_first, shortest_combination
from lemica_trt.schedule import Schedule
from lemica_trt.values import require

Array = npt.NDArray[np.float64]

MAX_MULTIPLIER = 10.0
"""The largest multiple of an earlier row that a shorter window may cost: larger ones would show rounding in fp32."""

ZERO = 1e-13
"""Coefficients up to this part of a row's largest one are round-off of terms that cancel."""


def fold(plan: StepPlan) -> StepPlan:
    """Take away the rows that run no graph, but for the last; exact to float64.

    Returns:
        A plan of the same steps, latents and draws; the same plan where there is nothing to fold.
    """
    rows = plan.rows
    kept = [i for i, row in enumerate(rows) if row.graph != "none" or row is rows[-1]]
    draws = np.cumsum([0, *(row.draws for row in rows)])  # draws before each row
    count = len(kept)
    # Coordinates: x_{−1} and the latents of the kept rows, their outputs, all draws; each oldest first.
    basis = np.eye(1 + 2 * count + int(draws[-1]))
    latents, outputs = [basis[0]], list[Array]()
    updates: list[Array] = []
    folded: list[PlanRow] = []
    for i, row in enumerate(rows):
        x = _combination(row.latents, latents) + _combination(row.outputs, outputs)
        x = x + _combination(row.noise, basis[1 + 2 * count : 1 + 2 * count + draws[i + 1]])
        if i not in kept:
            latents.append(x)
            outputs.append(_combination(row.reuse, outputs))
            continue
        k = len(folded)
        updates.append(x)
        folded.append(_row(row, k, updates, count, draws[[0, *(f + 1 for f in kept[: k + 1])]]))
        latents.append(basis[1 + k])
        outputs.append(basis[1 + count + k])
    return msgspec.structs.replace(plan, rows=tuple(folded))


def _row(row: PlanRow, k: int, updates: Sequence[Array], count: int, draws: npt.NDArray[np.int64]) -> PlanRow:
    """Kept row k: its update over the shortest window of kept rows.

    Args:
        updates: of the kept rows 0 … k.
        draws: how many draws there are before row 0, and behind the draws of each kept row 0 … k.
    """
    size = len(updates[0])

    def older_than(depth: int) -> npt.NDArray[np.bool_]:
        """Coordinates that a window of `depth` rows does not reach, and the draws of the rows that it does not."""
        old, first = np.zeros(size, bool), k - depth
        old[: 1 + first] = True  # x_{−1} belongs to row −1
        old[1 + count : 1 + count + max(first, 0)] = True
        old[1 + 2 * count : 1 + 2 * count + draws[first + 1]] = True
        return old

    relations = [-update for update in updates[:k]]
    for j, relation in enumerate(relations):
        relation[1 + j] += 1.0
    c = shortest_combination(
        updates[k], relations, older_than, max_depth=k + 1, max_multiplier=MAX_MULTIPLIER, zero=ZERO
    )
    assert c is not None  # a window of k + 1 rows leaves nothing out
    noise = c[1 + 2 * count : 1 + 2 * count + draws[-1]]
    return msgspec.structs.replace(
        row,
        latents=newest_first(c[: 1 + k]),
        outputs=newest_first(c[1 + count : 1 + count + k]),
        draws=int(draws[-1] - draws[-2]),
        noise=newest_first(noise),
    )


def _combination(weights: Sequence[float], vectors: Sequence[Array] | Array) -> Array | float:
    """Σ_k weights[k]·vectors[−1−k]."""
    return sum((weight * vectors[-1 - k] for k, weight in enumerate(weights)), 0.0)
