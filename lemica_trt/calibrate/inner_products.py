"""Inner products of what runs computed, summed in float64: what Gram matrices and fits are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lemica_trt.ir.calibration import Matrix

CHUNK = 1 << 16
"""Elements that inner products are summed over at a time, in float64."""

Array = npt.NDArray[np.float64]


def inner_products(left: Sequence[npt.NDArray[Any]], right: Sequence[npt.NDArray[Any]]) -> Array:
    """⟨l_a, r_b⟩ of equally large arrays, float64 [len(left), len(right)], summed in float64 in a fixed order.

    Not a matrix product of a library, which sums in another order with another number of threads.
    """
    rows = [array.reshape(-1) for array in (*left, *right)]
    total = np.zeros((len(left), len(right)))
    for start in range(0, rows[0].size, CHUNK):
        part = np.stack([row[start : start + CHUNK] for row in rows]).astype(np.float64)
        total += np.einsum("ik,jk->ij", part[: len(left)], part[len(left) :])
    return total


def matrix(array: Array) -> Matrix:
    """Rows of numbers."""
    return tuple(tuple(row) for row in array.tolist())
