"""Full steps between which the last three outputs tell the others best: schedules for plans that predict outputs.

The edges of an `ErrorGraph` are errors of reuse: large where outputs move. A plan that predicts outputs errs where they
bend. With q < p < i the last full steps before the skipped ones i < t < j, and g_t what the sampler makes of m_t in the
latents behind j (`output_gains`), what prediction leaves at j, at its best, is the mean over samples of

    ε²(q, p, i, j) = min_b ‖Σ_{i<t<j} g_t·m_t − b_0·m_i − b_1·m_p − b_2·m_q‖²

which follows from the Gram matrix of the outputs alone (`TrajectoryGrams`). What an error at j does to the result is
taken from the error graph: the sensitivity c_j is the geometric mean, over segments (i, j) of at most
`SENSITIVITY_SPAN` steps, of their measured error over what reuse leaves there by the same formula (b_0 = Σ g_t,
b_1 = b_2 = 0). The schedule minimises

    Σ (c_j·ε(q, p, i, j))²        over its segments

as if errors of different segments were independent; exact, by dynamic programming over (q, p, i), without any
evaluation of the DiT. A solver that is fitted row by row corrects part of what its earlier rows left, so that early
errors matter less than c says: c may be taken to a power below 1.

Our own method, from no paper. Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import InputError
from lemica_trt.ir.calibration import ErrorGraph, TrajectoryGrams
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.minimax import require_feasible

SENSITIVITY_SPAN = 5
"""The longest segments that sensitivities are taken from: longer ones are less linear."""

OUTPUT_RIDGE = 1e-8
"""Part of an output's power below which what it has beyond another is rounding."""

Array = npt.NDArray[np.float64]


def solve_prediction_path(
    table: SamplerTable, graph: ErrorGraph, grams: TrajectoryGrams, budgets: Sequence[int], *, power: float = 1.0
) -> dict[int, Schedule]:
    """The schedule of each budget with the least sum of squares; see the module docstring.

    Args:
        graph: gives sensitivities, and K.
        grams: of the same sampler.
        budgets: each B.
        power: of the sensitivities.

    Raises:
        InfeasibleError: no schedule has this budget.
        InputError: graph or Grams of another sampler.
    """
    for name, measured in (("an error graph", graph), ("Grams", grams)):
        if not measured.is_of(table):
            raise InputError(f"expected {name} of this sampler, got another's", fix="calibrate")
    n, span = table.num_steps, graph.max_skip + 1
    require_feasible(n, graph.max_skip, budgets)
    weights = sensitivities(table, graph, grams) ** (2 * power)
    costs = prediction_errors(table, grams, span) * weights[_stops(n, span)]
    return least_sums(costs, budgets)


def least_sums(costs: Array, budgets: Sequence[int]) -> dict[int, Schedule]:
    """The schedule of each budget whose segments' costs have the least sum; exact.

    What a segment from the full step i to the next one, j (or the end, N), costs may depend on the two full steps
    before i. Dynamic programming over (q, p, i) and the number of full steps.

    Args:
        costs: [N, span + 1, span + 1, span + 1] at index [i, i − p, p − q, j − i]; 0 for a difference: no such step.
            Infinite where there are no such steps. Schedules have gaps of at most `span`.
        budgets: each B, with a path of that many full steps.
    """
    n, span = costs.shape[0], costs.shape[1] - 1
    least = np.full((n, span + 1, span + 1), np.inf)  # [i, i − p, p − q], of paths that end there
    least[0, 0, 0] = 0.0
    found, before = {}, list[npt.NDArray[np.intp]]()
    for budget in range(1, max(budgets) + 1):
        totals = least[..., None] + costs
        best = totals.min(2)  # [i, i − p, j − i]
        before.append(totals.argmin(2))
        if budget in budgets:
            i = np.arange(max(n - span, 0), n)
            ends = best[i, :, n - i]
            last, back = np.unravel_index(ends.argmin(), ends.shape)
            found[budget] = _path(before, int(i[last]), int(back), n)
        least = np.full_like(least, np.inf)
        for ahead in range(1, span + 1):
            least[ahead:, ahead] = best[: n - ahead, :, ahead]
    return {budget: found[budget] for budget in sorted(found)}


def prediction_errors(table: SamplerTable, grams: TrajectoryGrams, span: int) -> Array:
    """ε²(q, p, i, j), in units of the mean power of all outputs.

    Returns:
        [N, span + 1, span + 1, span + 1] at index [i, i − p, p − q, j − i]; 0 for a difference: no such step. Infinite
        where there are no such steps.
    """
    n, gram = table.num_steps, np.array(grams.outputs)
    errors = np.full((n, span + 1, span + 1, span + 1), np.inf)
    for i, j, skipped in _segments(table, span):
        along = gram @ skipped
        held = float(skipped @ along - along[i] ** 2 / gram[i, i])
        # What outputs and target have beyond m_i.
        left = along - gram[i] * along[i] / gram[i, i]
        beyond = gram - np.outer(gram[i], gram[i]) / gram[i, i] + OUTPUT_RIDGE * np.diag(np.diag(gram))
        errors[i, 0, 0, j - i] = held
        for p in range(max(i - span, 0), i):
            told = left[p] ** 2 / beyond[p, p]
            errors[i, i - p, 0, j - i] = held - told
            q = np.arange(max(p - span, 0), p)
            rest = left[q] - beyond[q, p] * left[p] / beyond[p, p]
            more = rest**2 / (beyond[q, q] - beyond[q, p] ** 2 / beyond[p, p])
            errors[i, i - p, p - q, j - i] = held - told - more
    found: Array = np.maximum(errors, 0.0)
    return found


def sensitivities(table: SamplerTable, graph: ErrorGraph, grams: TrajectoryGrams) -> Array:
    """c_0 … c_N, up to a common factor; between stops that no segment tells of interpolated in log c."""
    gram = np.array(grams.outputs)
    errors = {(edge.start, edge.stop): edge.errors for edge in graph.edges}
    known: dict[int, list[float]] = {}
    for i, j, skipped in _segments(table, min(graph.max_skip + 1, SENSITIVITY_SPAN)):
        reused = skipped.copy()
        reused[i] -= skipped.sum()
        left = float(reused @ gram @ reused)
        measured = np.array(errors.get((i, j), (0.0,)))
        if left > 0 and (measured > 0).all():
            known.setdefault(j, []).append(float(np.log(measured).mean()) - np.log(left) / 2)
    if not known:
        return np.ones(table.num_steps + 1)
    stops = sorted(known)
    found: Array = np.exp(np.interp(np.arange(table.num_steps + 1), stops, [np.mean(known[j]) for j in stops]))
    return found


def _segments(table: SamplerTable, span: int) -> list[tuple[int, int, Array]]:
    """(i, j, weights [N] of the outputs i < t < j in the latents behind j) of all segments of at most `span` steps."""
    n = table.num_steps
    found = []
    for j in range(1, n + 1):
        first = max(j - span, 0)
        weights = np.zeros(n)
        weights[first:j] = output_gains(table, first, j).sum(1)
        found += [(i, j, np.where(np.arange(n) > i, weights, 0.0)) for i in range(first, j)]
    return found


def output_gains(table: SamplerTable, first: int, stop: int) -> Array:
    """γ[t − first, s]: what the output of step t, first ≤ t < stop, puts into the latents of row s ≥ stop directly or
    through the latents and outputs of rows before `stop`, none of which runs the DiT.

    For a one-step sampler x_{t+1} = A_t·x_t + B_t·m_t it is B_t·Π_{s=t+1}^{stop−1} A_s at s = stop, 0 elsewhere.

    Returns:
        [stop − first, N + 1]; 0 for s < stop.
    """
    n = table.num_steps
    latents = np.eye(n + 1)  # row t: what x_t puts into rows `stop` …
    outputs = np.zeros((n, n + 1))
    for t in range(stop - 1, first - 1, -1):
        later = list(enumerate(table.rows[t + 1 :]))
        outputs[t] = sum(row.outputs[k] * latents[t + 1 + k] for k, row in later if k < len(row.outputs))
        latents[t] = sum(row.latents[k] * latents[t + 1 + k] for k, row in later if k < len(row.latents))
    return outputs[first:stop]


def _stops(n: int, span: int) -> npt.NDArray[np.intp]:
    """j of each (i, ·, ·, j − i), at most N: [N, 1, 1, span + 1]."""
    stops: npt.NDArray[np.intp] = np.minimum(np.arange(n)[:, None, None, None] + np.arange(span + 1), n)
    return stops


def _path(choices: Sequence[npt.NDArray[np.intp]], i: int, back: int, n: int) -> Schedule:
    """Follow the choices from the last full step i and the one before it, i − back.

    Args:
        choices: of each number of full steps: p − q at index [i, i − p, j − i].
    """
    steps, ahead = [i], n - i
    for choice in reversed(choices):
        if back == 0:
            break
        before = int(choice[i, back, ahead])
        i, ahead, back = i - back, back, before
        steps.insert(0, i)
    return Schedule(num_steps=n, full_steps=tuple(steps))
