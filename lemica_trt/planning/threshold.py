"""Schedules of caches that decide while they run, by a threshold: replayed for a given number of full steps.

Such a cache adds up an estimate of its error from one full step on, and runs the next step in full as soon as the sum
reaches a threshold. On measured estimates that is a walk, and one threshold is one schedule. The more it allows, the
fewer steps are full: the threshold for B of them is found by bisection between all sums that there are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lemica_trt.ir.schedule import Schedule

Array = npt.NDArray[np.float64]


def schedule_by_threshold(sums: Array, budget: int, *, first: int = 1, last: bool = False, max_skip: int) -> Schedule:
    """The walk under the least threshold that has no more than B full steps.

    Where equal sums leave it fewer than B, the skipped steps of the largest sums are full, too.

    Args:
        sums: float64 [N, N]: at [i, j] what was added up when step j comes, step i being the last full one; read for
            j > i, never falling with j.
        budget: B; so many that a walk without a threshold has no more.
        first: steps at the beginning that are full, at least one.
        last: whether the last step is full.
        max_skip: most steps in a row that are skipped.
    """
    known = np.unique(sums[np.triu_indices(len(sums), 1)])
    low, high = 0, len(known)
    while low < high:
        middle = (low + high) // 2
        if len(walk(sums, known[middle], first=first, last=last, max_skip=max_skip)) <= budget:
            high = middle
        else:
            low = middle + 1
    threshold = known[low] if low < len(known) else np.inf
    steps = walk(sums, threshold, first=first, last=last, max_skip=max_skip)
    while len(steps) < budget:
        before = {j: max(i for i in steps if i < j) for j in range(len(sums)) if j not in steps}
        steps = sorted([*steps, max(before, key=lambda j: (sums[before[j], j], -j))])
    return Schedule(num_steps=len(sums), full_steps=tuple(steps))


def walk(sums: Array, threshold: float, *, first: int, last: bool, max_skip: int) -> list[int]:
    """The full steps under one threshold; arguments as in `schedule_by_threshold`."""
    n, steps = len(sums), list(range(first))
    for j in range(first, n):
        i = steps[-1]
        if sums[i, j] >= threshold or j - i > max_skip or (last and j == n - 1):
            steps.append(j)
    return steps
