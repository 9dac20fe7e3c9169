"""Standard normal noise from a seed: the numbers that PyTorch's CPU generator draws.

Follows torch 2.x: the engine is mt19937, seeded with the lower 32 bits of the seed by Knuth's multiplier
(aten/src/ATen/core/MT19937RNGEngine.h), which is numpy's legacy seeding; 16 or more float32 numbers are made in blocks
of 16 by Box and Muller (1958) (aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill`). The last places of
logarithm, sine and cosine differ: agreement is to about 1e-6, not to the bit.
"""

from __future__ import annotations

import operator
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import UsageError

Floats = npt.NDArray[np.float32]

_PIECE_NUMBERS = 1 << 20
"""Numbers made at a time; bounds the working memory."""


class Generator:
    """Like `torch.Generator("cpu").manual_seed(seed)`; draws go on where the last one ended. One thread at a time.

    Args:
        seed: 0 … 2^63 − 1, of which torch uses the lower 32 bits.

    Raises:
        UsageError: another seed.
    """

    def __init__(self, seed: SupportsIndex) -> None:
        try:
            number = -1 if isinstance(seed, bool) else operator.index(seed)
        except TypeError:
            number = -1
        if not 0 <= number < 1 << 63:
            raise UsageError(f"a seed must be an integer from 0 to 2^63 - 1, got {seed!r}", fix="for example 0")
        self._bits = np.random.RandomState(number & 0xFFFFFFFF)

    def randn(self, shape: tuple[int, ...]) -> Floats:
        """Like `torch.randn(shape, generator=...)`: float32.

        Raises:
            ValueError: fewer than 16 numbers, which torch makes in another way.
        """
        size = int(np.prod(shape, dtype=np.int64))
        if size < 16:
            raise ValueError(f"noise needs at least 16 numbers, got shape {shape}")
        numbers = np.empty(size, np.float32)
        for start in range(0, size, _PIECE_NUMBERS):
            piece = numbers[start : start + _PIECE_NUMBERS]
            piece[:] = self._uniform(len(piece))
            whole = len(piece) // 16 * 16
            _box_muller(piece[:whole])
        if size % 16:  # torch draws the last 16 once more
            numbers[-16:] = self._uniform(16)
            _box_muller(numbers[-16:])
        return numbers.reshape(shape)

    def _uniform(self, size: int) -> Floats:
        """Uniform in [0, 1) on multiples of 2^-24, float32 [size]."""
        bits = self._bits.randint(0, 1 << 32, size=size, dtype=np.uint32) & np.uint32(0xFFFFFF)
        numbers: Floats = bits.astype(np.float32)
        numbers *= np.float32(2.0**-24)
        return numbers


def _box_muller(numbers: Floats) -> None:
    """Uniform → standard normal in place, in blocks of 16: the first half are radii, the second are angles."""
    blocks = numbers.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - blocks[:, 0]))
    angle = np.float32(2.0 * np.pi) * blocks[:, 1]
    blocks[:, 0] = radius * np.cos(angle)
    blocks[:, 1] = radius * np.sin(angle)
