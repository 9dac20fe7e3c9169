"""Plans for extrapolated outputs, by signed errors: skipped segments may cancel one another.

A skipped step t between the full steps i and j, with p the full step before i, computes no output but takes

    m̂_t = (1 + βα_t)·m_i − βα_t·m_p,    α_t = (τ_t − τ_i)/(τ_i − τ_p)

(β = 0: plain reuse; before there is a p, too). To first order the result moves along a direction v by

    e(p, i, j) = Σ_{i<t<j} ⟨b_t, m̂_t − m_t⟩

with m on the uncached run, and b_t the adjoint of m_t where the steps between i and j are no longer functions of
their latents. The sampler's table alone leads from there to the adjoints of the latents at and behind j,
b_t = Σ_{s≥j} γ_ts·a_s, so that the products M[s, t] = ⟨a_s, m_t⟩/√n, measured once (`calibrate`), price every triple
without any evaluation of the DiT. For a one-step sampler x_{t+1} = A_t·x_t + B_t·m_t that is
γ_tj = B_t·Π_{s=t+1}^{j−1} A_s, all others 0. (design of lemica-trt; the linearisation is that of adjoint
sensitivity analysis.)

Knows numbers only; `calibrate` measures the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import InputError
from lemica_trt.core.values import require, require_finite
from lemica_trt.ir.calibration import Matrix, Provenance
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.minimax import require_feasible
from lemica_trt.planning.schedules import uniform

FORMAT_VERSION = 1

STARTS = 24
"""Random schedules that the search begins with, beside those it is given."""

DOUBT = 1.0
"""κ of `signed_objective`. At κ = 0 the search finds segments that cancel in the directions that were probed and in no
others. Bundled model, 8 samples with 2 probes each, outputs extrapolated, 32 other clips; mean / 5th percentile of the
signal to noise of the latents, dB, at κ = 0, 0.3, 1, 3, 10, 30: with 15 full steps 38.0/21.7, 41.2/29.1, 41.0/29.0,
39.3/30.1, 39.6/25.1, 40.0/25.3; with 10 full steps, κ ≤ 3: 32.0/20.4, 31.5/18.1, 31.0/20.4, 31.0/20.4."""

FLOOR = 1e-24
"""Squared errors below this are round-off; keeps the logarithm finite."""

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class AdjointProducts(Provenance, frozen=True, kw_only=True):
    """M of each sample and probe, and what it was measured on.

    Attributes:
        samples: number of (prompt, seed) pairs; all else as in `Provenance`.
        probes: R, directions v of the result for each sample; ⟨v, e⟩/√n has the RMS of e where v is random signs.
        products: for each sample, for each probe: N + 1 rows (a_0 … a_N) of N numbers (m_0 … m_{N−1}), in latent units.
        format_version: 1.
    """

    samples: int
    probes: int
    products: tuple[tuple[Matrix, ...], ...]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        Provenance.__post_init__(self)
        require(
            self.format_version == FORMAT_VERSION, f"format_version must be {FORMAT_VERSION}, got {self.format_version}"
        )
        require(
            self.samples == len(self.products) >= 1, f"products are of {len(self.products)} samples, not {self.samples}"
        )
        for s, probes in enumerate(self.products):
            require(len(probes) == self.probes >= 1, f"products[{s}] has {len(probes)} probes, not {self.probes}")
            for r, matrix in enumerate(probes):
                where = f"products[{s}][{r}]"
                shape = {(len(matrix), len(row)) for row in matrix}
                require(
                    shape == {(self.num_steps + 1, self.num_steps)},
                    f"{where} must have {self.num_steps + 1} rows of {self.num_steps} numbers",
                )
                for row in matrix:
                    require_finite(row, where)

    @property
    def array(self) -> Array:
        """[samples, probes, N + 1, N]."""
        return np.array(self.products)


def signed_errors(
    table: SamplerTable, products: Array, *, max_skip: int, times: Sequence[float] | None = None, gain: float = 1.0
) -> Array:
    """e(p, i, j) of all triples.

    Args:
        table: the sampler.
        products: M, [..., N + 1, N], see `AdjointProducts.array`.
        max_skip: K.
        times: τ_0 … τ_{N−1}, strictly monotone; None: the step index. Across an infinite one there is only reuse.
        gain: β.

    Returns:
        [N, K + 2, K + 2, ...] at index [i, i − p, j − i]; i − p = 0: no step before i, plain reuse. NaN where there
        is no such triple.

    Raises:
        InputError: `times` are not N strictly monotone numbers.
    """
    n = table.num_steps
    tau = np.arange(n, dtype=float) if times is None else np.array(times, float)
    slopes = np.diff(tau)
    if tau.shape != (n,) or not ((slopes > 0).all() or (slopes < 0).all()):
        raise InputError(f"times: expected {n} strictly monotone numbers, got {len(tau)}")
    span = max_skip + 1
    errors = np.full((n, span + 1, span + 1, *products.shape[:-2]), np.nan)
    for j in range(1, n + 1):
        first = max(j - span, 0)
        carried = np.einsum("ts,...sm->...tm", output_adjoints(table, first, j), products)  # ⟨b_t, m⟩, t = first …
        for i in range(first, j):
            skipped = carried[..., i + 1 - first :, :]
            held = skipped[..., i].sum(-1) - np.trace(skipped[..., i + 1 : j], axis1=-2, axis2=-1)
            errors[i, 0, j - i] = held
            errors[i, 1 : min(i, span) + 1, j - i] = held
            before = [p for p in range(max(i - span, 0), i) if np.isfinite(tau[i] - tau[p])]
            if before:
                slope = np.einsum("t,...tm->...m", tau[i + 1 : j] - tau[i], skipped)
            for p in before:
                errors[i, i - p, j - i] += gain / (tau[i] - tau[p]) * (slope[..., i] - slope[..., p])
    return errors


def output_adjoints(table: SamplerTable, first: int, stop: int) -> Array:
    """γ: b_t = Σ_s γ[t − first, s]·a_s for first ≤ t < stop, where none of these steps runs the DiT.

    Returns:
        [stop − first, N + 1]; 0 for s < stop.
    """
    n = table.num_steps
    latents = np.eye(n + 1)  # row t: the adjoint of x_t in terms of a_stop …
    outputs = np.zeros((n, n + 1))
    for t in range(stop - 1, first - 1, -1):
        later = list(enumerate(table.rows[t + 1 :]))
        outputs[t] = sum(row.outputs[k] * latents[t + 1 + k] for k, row in later if k < len(row.outputs))
        latents[t] = sum(row.latents[k] * latents[t + 1 + k] for k, row in later if k < len(row.latents))
    return outputs[first:stop]


def plan_errors(errors: Array, plans: IntArray) -> Array:
    """e of each segment of each plan.

    Args:
        errors: from `signed_errors`.
        plans: rising full steps [P, B], the first 0; segments no longer than K + 1.

    Returns:
        [P, B, ...].
    """
    n = len(errors)
    stops = np.concatenate([plans[:, 1:], np.full((len(plans), 1), n)], axis=1)
    back = np.diff(plans, axis=1, prepend=plans[:, :1])  # 0 at the first full step: none before it
    found: Array = errors[plans, back, stops - plans]
    return found


def signed_objective(errors: Array, doubt: float = DOUBT) -> Array:
    """Mean over samples of log(mean over probes of (Σ e)² + κ·Σ e²), sums over the segments of a plan.

    The logarithm: a few chaotic samples would decide everything else. κ: how far segments are trusted to cancel also
    where nothing was probed; 0: fully.

    Args:
        errors: [..., B, samples, probes].
        doubt: κ.

    Returns:
        [...].
    """
    squares = np.square(errors.sum(-3)) + doubt * np.square(errors).sum(-3)
    objective: Array = np.log(squares.mean(-1) + FLOOR).mean(-1)
    return objective


def solve_signed(
    errors: Array,
    budget: int,
    *,
    seeds: Sequence[Schedule] = (),
    doubt: float = DOUBT,
    starts: int = STARTS,
    random_seed: int = 0,
) -> Schedule:
    """The schedule with the least `signed_objective` that descents from many starts find.

    A descent moves one full step at a time to wherever that gains most, until nothing gains. Starts: the seeds
    (give the minimax and the least-sum schedules), equal distances, and random schedules. Not exact, and blind to what
    is not linear: compare its plan with others end to end before it is used.

    Args:
        errors: from `signed_errors`, with axes samples and probes.
        budget: B, the number of full steps, step 0 among them.
        seeds: schedules of this budget; those with longer gaps than K + 1 are left out.
        doubt: κ of the objective.
        starts: random starts.
        random_seed: of these.

    Raises:
        InfeasibleError: no schedule has this budget.
        InputError: a seed has another number of steps or another budget.
    """
    n, span = len(errors), errors.shape[1] - 1
    require_feasible(n, span - 1, (budget,))
    for seed in seeds:
        if (seed.num_steps, seed.budget) != (n, budget):
            raise InputError(
                f"seeds: expected schedules with {budget} of {n} steps, got one with {seed.budget} of {seed.num_steps}"
            )
    random = np.random.default_rng(random_seed)
    begin = {schedule.full_steps for schedule in (*seeds, uniform(n, budget))}
    begin |= {_random_steps(random, n, budget, span) for _ in range(starts)}
    found = {_descend(errors, np.array(steps), doubt) for steps in begin if _fits(np.array([steps]), n, span)[0]}
    return Schedule(num_steps=n, full_steps=min(found)[1])


def _descend(errors: Array, steps: IntArray, doubt: float) -> tuple[float, tuple[int, ...]]:
    """(objective, full steps) of the local optimum behind a schedule; ties: the least steps."""
    n, span = len(errors), errors.shape[1] - 1
    best = float(signed_objective(plan_errors(errors, steps[None]), doubt)[0])
    while True:
        moved = _moves(steps, n)
        moved = moved[_fits(moved, n, span)]
        values = signed_objective(plan_errors(errors, moved), doubt)
        if len(values) == 0 or not values.min() < best:
            return best, tuple(steps.tolist())
        best, steps = float(values.min()), moved[values.argmin()]


def _moves(steps: IntArray, n: int) -> IntArray:
    """All schedules with one full step (but step 0) elsewhere: [(B − 1)·(N − B), B], each rising."""
    free = np.setdiff1d(np.arange(n), steps)
    moved = np.tile(steps, (len(steps) - 1, len(free), 1))
    for k in range(1, len(steps)):
        moved[k - 1, :, k] = free
    return np.sort(moved.reshape(-1, len(steps)), axis=1)


def _fits(plans: IntArray, n: int, span: int) -> npt.NDArray[np.bool_]:
    """[P]: whether no segment is longer than `span` = K + 1."""
    fits: npt.NDArray[np.bool_] = np.all(np.diff(plans, axis=1, append=n) <= span, axis=1)
    return fits


def _random_steps(random: np.random.Generator, n: int, budget: int, span: int) -> tuple[int, ...]:
    """A random schedule: segments of 1, lengthened one by one where there is room."""
    lengths = np.ones(budget, int)
    for _ in range(n - budget):
        lengths[random.choice(np.flatnonzero(lengths < span))] += 1
    return (0, *np.cumsum(lengths[:-1]).tolist())
