"""Inner products of what runs computed, summed in float64: what Gram matrices and fits are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lemica_trt.ir.calibration import Matrix

GRAM_ELEMENTS = 1 << 20
"""Of larger residuals the Gram matrix takes about so many elements: whole tokens, drawn once."""

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


def some_tokens(residual: Tensor) -> Tensor:
    """A residual [R, tokens, width] for its Gram matrix, on the host; of a large one always the same tokens."""
    tokens = residual.shape[1]
    count = max(GRAM_ELEMENTS * tokens // residual.numel(), 1)
    if count < tokens:
        chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:count]
        residual = residual[:, chosen.sort().values.to(residual.device)]
    return residual.cpu()


def matrix(array: Array) -> Matrix:
    """Rows of numbers."""
    return tuple(tuple(row) for row in array.tolist())
