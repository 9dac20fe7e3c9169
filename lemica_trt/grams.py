"""Trajectory Grams: the inner products of what the DiT computes at the N steps of uncached runs.

With a_t the trunk residual r_t (both branches of the guidance as one vector), or the guided output m_t, of step t:

    G[k, l] = mean over samples of ⟨a_k, a_l⟩ / ((1/N)·Σ_t ⟨a_t, a_t⟩)

Each sample is divided by its own mean square first, so that none counts for more because it is louder. Every least
squares fit of a step by any other steps – coefficients, and the error that is left – needs only this matrix:

    mean ‖a_t − Σ_k c_k·a_k‖² = G[t, t] − 2·Σ_k c_k·G[k, t] + Σ_kl c_k·c_l·G[k, l]

so that one pass over some uncached runs serves every schedule. What is left of a good fit is 1e-4 … 1e-6 of G[t, t]:
inner products must be summed in float64.

Knows values only; `calibrate` measures, `predict` fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lemica_trt.provenance import Provenance
from lemica_trt.values import require, require_finite

FORMAT_VERSION = 1

SYMMETRY = 1e-9
"""How far G[k, l] and G[l, k] may differ, relative to the largest entry."""

Matrix = tuple[tuple[float, ...], ...]
Array = npt.NDArray[np.float64]


class TrajectoryGrams(Provenance, frozen=True, kw_only=True):
    """Gram matrices of the residuals and of the outputs of uncached runs, and what they were measured on.

    Attributes:
        samples: number of (prompt, seed) pairs; all else as in `Provenance`.
        outputs: N rows of N numbers: G of the guided outputs m_0 … m_{N−1}.
        residuals: the same of the trunk residuals; empty where they were not kept.
        format_version: 1.
    """

    samples: int
    outputs: Matrix
    residuals: Matrix = ()
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        Provenance.__post_init__(self)
        require(
            self.format_version == FORMAT_VERSION, f"format_version must be {FORMAT_VERSION}, got {self.format_version}"
        )
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        _require_gram(self.outputs, self.num_steps, "outputs")
        if self.residuals:
            _require_gram(self.residuals, self.num_steps, "residuals")


def gram_from_samples(grams: Sequence[Array] | Array) -> Matrix:
    """G of one kind from each sample's raw inner products: normalise each sample, then average.

    Args:
        grams: float64 [N, N] for each sample, ⟨a_k, a_l⟩ summed in float64 over any fixed set of elements.

    Returns:
        N rows of N numbers, symmetric to the bit.

    Raises:
        ValueError: no sample, another shape, or a sample whose vectors are all zero or not finite.
    """
    stack = np.asarray(grams, np.float64)
    require(stack.ndim == 3 and len(stack) > 0 and stack.shape[1] == stack.shape[2], f"grams has shape {stack.shape}")
    require_finite(stack.ravel(), "grams")
    power = np.trace(stack, axis1=1, axis2=2) / stack.shape[1]
    require(bool((power > 0).all()), "a sample's vectors are all zero")
    mean = (stack / power[:, None, None]).mean(0)
    return tuple(tuple(row) for row in ((mean + mean.T) / 2).tolist())


def _require_gram(matrix: Matrix, num_steps: int, name: str) -> None:
    """Raise ValueError unless `matrix` is [N, N], finite, symmetric and positive on its diagonal."""
    require(
        len(matrix) == num_steps and all(len(row) == num_steps for row in matrix),
        f"{name} must have {num_steps} rows of {num_steps} numbers",
    )
    for k, row in enumerate(matrix):
        require_finite(row, f"{name}[{k}]")
        require(row[k] > 0, f"{name}[{k}][{k}] must be above 0, got {row[k]}")
    array = np.array(matrix)
    asymmetry = float(np.abs(array - array.T).max())
    require(asymmetry <= SYMMETRY * float(np.abs(array).max()), f"{name} must be symmetric, is off by {asymmetry:.1e}")
