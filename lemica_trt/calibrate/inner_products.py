"""Inner products of what runs computed, summed in float64: what Gram matrices and fits are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lemica_trt.ir.calibration import Matrix

CHUNK = 1 << 16
"""Elements that inner products are summed over at a time, in float64."""

Array = npt.NDArray[np.float64]


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Array:
    """⟨l_a, r_b⟩ of equally large tensors, float64 [len(left), len(right)], summed in float64 in a fixed order."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    parts = zip(*(torch.split(tensor.flatten(), CHUNK) for tensor in chain(left, right)))
    for part in parts:
        rows = torch.stack(part).double()
        total += rows[: len(left)] @ rows[len(left) :].T
    products: Array = total.numpy()
    return products


def matrix(array: Array) -> Matrix:
    """Rows of numbers."""
    return tuple(tuple(row) for row in array.tolist())
