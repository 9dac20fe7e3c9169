"""What calibrations cost, before anything is measured: counts of evaluations. No PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

from lemica_trt.ir.profile import CalibrationSettings

KNOTS = 3
"""Stops j whose sensitivity is measured, at equal distances, beside the first and the last ones."""

FIRST = 0.1
"""Stop 2 is a knot unless another one is at most this part of N: to roll out from there is nearly a whole sampling."""

TAIL = 3
"""N − 3 … N are knots in any case: they cost next to nothing, and sensitivity jumps there. See `knot_stops`."""

STAGGER = (math.sqrt(5) - 1) / 2
"""Knots of sample s + 1 lie this part of their distance behind those of sample s: together they see every j."""


class Cost(NamedTuple):
    """What a measurement costs, counted in evaluations for one latent (both branches of the guidance together).

    Attributes:
        units: (sample, start) pairs.
        full: evaluations of the whole DiT.
        skip: evaluations without its trunk: a few percent of a full one each.
        samplings: uncached samplings that do the same number of full evaluations.
    """

    units: int
    full: int
    skip: int
    samplings: float

    @classmethod
    def of(cls, units: int, full: int, skip: int, num_steps: int) -> Cost:
        """The cost of these counts."""
        return cls(units, full, skip, full / num_steps)


def calibration_cost(settings: CalibrationSettings, num_steps: int) -> Cost:
    """What a calibration costs from its beginning."""
    if settings.method == "exact":
        return exact_cost(num_steps, settings.max_skip, settings.samples)
    return cheap_cost(num_steps, settings.max_skip, settings.samples, rollouts=rollouts_of(settings))


def rollouts_of(settings: CalibrationSettings) -> int:
    """Samples whose sensitivity is measured."""
    return min(settings.rollouts, settings.samples) if settings.method == "secant" else 0


def exact_cost(num_steps: int, max_skip: int, samples: int) -> Cost:
    """Cost of a measurement from its beginning, exact where all steps are of one kind, else a little more.

    Each sample runs once uncached: N full steps. Each start i ≤ N − 2 runs step i again for its residual – keeping
    all residuals would need tens of gigabytes for a large model – then skips up to its last stop J = min(i + K + 1, N),
    and every stop j runs the N − j steps behind it in full:

        full = S·(N + Σ_i (1 + Σ_{j=i+2}^{J} (N − j))),    skip = S·Σ_i (J − i − 1)
    """
    starts = range(num_steps - 1)
    full = samples * (num_steps + sum(start_cost(num_steps, max_skip, i) for i in starts))
    skip = samples * sum(min(max_skip, num_steps - i - 1) for i in starts)
    return Cost.of(samples * len(starts), full, skip, num_steps)


def start_cost(num_steps: int, max_skip: int, start: int) -> int:
    """Full evaluations of all segments of a start; see `exact_cost`."""
    return 1 + sum(num_steps - j for j in range(start + 2, min(start + max_skip + 1, num_steps) + 1))


def cheap_cost(num_steps: int, max_skip: int, samples: int, *, rollouts: int) -> Cost:
    """Cost from the beginning, exact: N evaluations, N − j for each knot j, a skipped step for each in every chain."""
    full = sum(sample_cost(num_steps, s < rollouts, s) for s in range(samples))
    skip = samples * sum(min(max_skip, num_steps - i - 1) for i in range(num_steps - 1))
    return Cost.of(samples, full, skip, num_steps)


def sample_cost(num_steps: int, rolled_out: bool, sample: int) -> int:
    """Full evaluations."""
    return num_steps + sum(num_steps - j for j in (knot_stops(num_steps, KNOTS, sample) if rolled_out else ()))


def knot_stops(num_steps: int, count: int, sample: int) -> list[int]:
    """Stops of a sample: `count` at equal distances in 3 … N − 4, N − 3 … N, and 2 where none of them is near it; fewer
    where N is small."""
    first, last = 3, num_steps - TAIL
    shift = (0.5 + sample * STAGGER) % 1.0
    spread = {int(first + (last - first) * (k + shift) / count) for k in range(count)}
    found = {j for j in spread | set(range(last, num_steps + 1)) if first <= j <= num_steps}
    return sorted(found if min(found, default=num_steps) <= FIRST * num_steps else found | {2})
