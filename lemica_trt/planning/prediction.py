"""What a skipped step computes: a weighted sum of what the last full steps did.

A `Predictor` is the recipe, a `Prediction` its weights for one schedule. With a_f the trunk residual r_f or the guided
output m_f of full step f, f_0 > f_1 > … the full steps before the skipped step t:

    reuse    a_t ≈ a_{f_0}                                                  LeMiCa (arXiv 2511.00090), of residuals
    linear   a_t ≈ (1 + β·α)·a_{f_0} − β·α·a_{f_1},  α = (τ_t − τ_{f_0})/(τ_{f_0} − τ_{f_1})
    lsq      a_t ≈ Σ_k c_k·a_{f_k}, c by least squares over uncached runs   see `grams`

τ is the step index or log-SNR. A gain β_t is fitted to the Grams, or given. Where there are fewer full steps before t
than a recipe reads, it reads those: before the second one, everything is reuse but for a least-squares scale.

A predicted residual goes through the head of the DiT (the `skip` graph); a predicted output needs no graph at all, and
`fold` takes its row away.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.values import require
from lemica_trt.ir.calibration import TrajectoryGrams
from lemica_trt.ir.prediction import Method, Prediction, Predictor
from lemica_trt.ir.sampler import SamplerTable, require_levels
from lemica_trt.ir.schedule import Schedule

Array = npt.NDArray[np.float64]


TERMS: dict[Method, int] = {"reuse": 1, "linear": 2, "lsq2": 2, "lsq3": 3}
"""How many full steps each method reads."""


RIDGE = 1e-8
"""Least squares: penalty on the distance of the weights from reuse, in units of the newest full step's power. Small:
neighbouring steps differ by 1e-2 of it and less, and that difference is what is fitted."""


GAIN_RIDGE = 1.0
"""Gains: penalty on (β − 1)², in units of the power of the extrapolated difference: 1 halves what the uncached runs ask
for. The run that is predicted is not the uncached one; measured on the bundled model, 0.5 to 2 beat 0 and 0.1."""


def predict(
    predictor: Predictor,
    schedule: Schedule,
    table: SamplerTable,
    *,
    grams: TrajectoryGrams | None = None,
    gains: Sequence[float] | None = None,
) -> Prediction:
    """The weights of a recipe for a schedule.

    Args:
        table: the sampler, of as many steps as the schedule.
        grams: of uncached runs of this sampler; needed where the predictor is fitted and no gains are given.
        gains: N numbers, β of each step, instead of fitted ones; those of full steps are not read.

    Raises:
        UsageError: a fitted predictor without Grams; gains that the predictor does not take or of another length.
        InputError: Grams of another sampler, or without the residuals that are to be predicted.
        UnsupportedError: log-SNR of a sampler whose noise levels are not known.
    """
    n = schedule.num_steps
    require(n == table.num_steps, f"the schedule is for {n} steps, the sampler has {table.num_steps}")
    if gains is not None and (not predictor.gains or len(gains) != n):
        raise UsageError(f"expected {n} gains for a predictor that takes them, got {len(gains)} for {predictor.name}")
    gram = None
    if predictor.fitted and gains is None:
        gram = _gram(predictor, table, grams)
    position = np.array(require_levels(table).log_snr if predictor.variable == "log-snr" else range(n + 1), np.float64)
    weights: list[tuple[float, ...]] = []
    full: list[int] = []
    for t in range(n):
        if t in schedule.full_steps:
            full.insert(0, t)
            weights.append(())
            continue
        read = full[: TERMS[predictor.method]]
        if predictor.method == "reuse" or (predictor.method == "linear" and len(read) == 1):
            weights.append((1.0,))
        elif predictor.method == "linear":
            slope = extrapolation(position, read[1], read[0], t)
            if gains is not None:
                slope *= gains[t]
            elif gram is not None:
                slope *= fitted_gain(gram, read[1], read[0], t, slope)
            weights.append((1.0 + slope, -slope))
        else:
            assert gram is not None
            weights.append(tuple(float(c) for c in least_squares(gram, t, read)))
    return Prediction(predictor=predictor, weights=tuple(weights))


def extrapolation(position: Array, p: int, i: int, t: int) -> float:
    """α = (τ_t − τ_i)/(τ_i − τ_p); 0, which is reuse, where τ_p or τ_i is infinite."""
    run = position[i] - position[p]
    return float((position[t] - position[i]) / run) if np.isfinite(run) and run else 0.0


def least_squares(gram: Array, t: int, steps: Sequence[int], ridge: float = RIDGE) -> Array:
    """Weights c of some steps that predict another best: they minimise

        mean ‖a_t − Σ_k c_k·a_{s_k}‖² + ridge·G[s_0, s_0]·‖c − (1, 0, …)‖²

    Args:
        gram: float64 [N, N], see `grams`.
        steps: s_0 is what reuse would take.
        ridge: 0: plain least squares, of least norm where it is not unique.

    Returns:
        float64 [len(steps)].
    """
    basis = np.asarray(steps)
    penalty = ridge * gram[basis[0], basis[0]]
    reuse = np.eye(len(basis))[0]
    matrix = gram[np.ix_(basis, basis)] + penalty * np.eye(len(basis))
    weights: Array = np.linalg.lstsq(matrix, gram[basis, t] + penalty * reuse, rcond=None)[0]
    return weights


def fitted_gain(gram: Array, p: int, i: int, t: int, slope: float, ridge: float = GAIN_RIDGE) -> float:
    """The gain β that minimises mean ‖a_t − a_i − β·d‖² + ridge·‖d‖²·(β − 1)² with d = slope·(a_i − a_p)."""
    power = slope**2 * (gram[i, i] - 2 * gram[i, p] + gram[p, p])
    along = slope * (gram[t, i] - gram[t, p] - gram[i, i] + gram[i, p])
    return float((along + ridge * power) / ((1 + ridge) * power)) if power > 0 else 1.0


def squared_error(gram: Array, t: int, steps: Sequence[int], weights: Sequence[float]) -> float:
    """mean ‖a_t − Σ_k c_k·a_{s_k}‖², in units of the mean power of all steps."""
    index = [t, *steps]
    signed = np.array([1.0, *(-w for w in weights)])
    return float(signed @ gram[np.ix_(index, index)] @ signed)


def _gram(predictor: Predictor, table: SamplerTable, grams: TrajectoryGrams | None) -> Array:
    if grams is None:
        raise UsageError(f"predictor {predictor.name} needs the Grams of uncached runs", fix="calibrate first")
    if not grams.is_of(table):
        raise InputError("expected Grams of this sampler, got some that were measured with another", fix="calibrate")
    matrix = grams.residuals if predictor.of == "residual" else grams.outputs
    if not matrix:
        raise InputError("expected Grams of the residuals, these have the outputs alone", fix="predict outputs")
    return np.array(matrix)
