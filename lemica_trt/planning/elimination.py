"""Rows of a linear recurrence written over the smallest window of earlier rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from lemica_trt.ir.sampler import Array


def shortest_combination(
    update: Array,
    relations: Sequence[Array] | Array,
    older_than: Callable[[int], npt.NDArray[np.bool_]],
    *,
    max_depth: int,
    max_multiplier: float,
    zero: float,
) -> Array | None:
    """A row's latents as a combination over the smallest window of earlier rows, or None.

    Earlier row k's own update says x_k − updates[k] = 0; any multiple may be added. For a window of `depth` rows, the
    multiples λ of the newest `count` earlier rows are those that make every coordinate older than the window vanish.
    Few earlier rows come first: an update that is short by itself is taken as it is.

    Args:
        update: float64 [D], the row's latents over the coordinates.
        relations: float64 [D] each, newest first: what is zero.
        older_than: depth → which coordinates a window of that many rows does not reach, [D].
        max_depth: the largest window to try.
        max_multiplier: the largest |λ| to accept.
        zero: coefficients up to this part of the largest one count as zero.

    Returns:
        float64 [D], exactly zero outside the window.
    """
    scale = np.abs(update).max()
    for depth in range(1, max_depth + 1):
        old = older_than(depth)
        for count in range(min(depth, len(relations)) + 1):
            newest = np.reshape(relations[:count], (count, len(update)))
            multiples = np.linalg.lstsq(newest[:, old].T, -update[old], rcond=None)[0] if count else np.zeros(0)
            if np.abs(multiples).max(initial=0.0) > max_multiplier:
                continue
            combination: Array = update + multiples @ newest
            if np.abs(combination[old]).max(initial=0.0) <= zero * scale:
                combination[old] = 0.0
                return combination
    return None


def newest_first(coefficients: Array) -> tuple[float, ...]:
    """Coefficients by age (oldest first) → newest first, without the zeros at the old end."""
    return tuple(float(c) for c in np.trim_zeros(coefficients, "f")[::-1])
