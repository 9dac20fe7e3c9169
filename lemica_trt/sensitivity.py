"""What of a calibration holds for other steps, another shift or guidance: how much a change at a noise level matters.

The error of segment (i, j) is what its chain of skipped steps does at step j, times c_j: what the full steps behind
make of it (`calibrate.cheap`). The first depends on the grid, and one uncached run on the new grid shows it. The
second belongs to the flow of the model from a noise level to the data; it took roll-outs to measure, and is
interpolated at the levels of the new grid. Plans go by noise level here, not by index. (Design of lemica-trt.)

A level is named by the timestep that the model is given there: of one scheduler class it means the same noise whatever
the number of steps or the shift, also where diffusers' rounding of steps leaves no exact noise levels.

Knows numbers only; `calibrate` measures.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lemica_trt.errors import UnsupportedError
from lemica_trt.plan import guidance_range
from lemica_trt.provenance import Provenance
from lemica_trt.sampler import SamplerTable
from lemica_trt.values import require, require_finite

FORMAT_VERSION = 1

STEPS_RANGE = (0.5, 1.5)
"""Numbers of steps, in those of the calibration, that it is carried over to."""

MARGIN = 0.02
"""How far above the highest timestep that was measured one may lie, as a part of it; the sensitivity is that one's."""

RESULT = -1.0
"""Stands for the timestep of the result, where there is none: behind all others."""

FIX = "calibrate anew: leave --calibration-from out"

Knots = tuple[tuple[float, float], ...]
Array = npt.NDArray[np.float64]


class Sensitivity(Provenance, frozen=True, kw_only=True):
    """Sensitivities at a few levels for each sample, and what they were measured on.

    Attributes:
        samples: number of (prompt, seed) pairs; all else as in `Provenance`.
        knots: for each sample (t, c), t rising: the mean absolute change of the result for each unit of mean absolute
            change of the latents at timestep t (`RESULT`: of the result itself).
        format_version: 1.
    """

    samples: int
    knots: tuple[Knots, ...]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        Provenance.__post_init__(self)
        require(
            self.format_version == FORMAT_VERSION, f"format_version must be {FORMAT_VERSION}, got {self.format_version}"
        )
        require(len(self.knots) == self.samples >= 1, f"knots are of {len(self.knots)} samples, not {self.samples}")
        for s, knots in enumerate(self.knots):
            require(len(knots) > 0, f"knots[{s}] is empty")
            times = [time for time, _ in knots]
            require_finite(times, f"knots[{s}]")
            require(
                times == sorted(set(times)) and times[0] >= RESULT, f"knots[{s}]: timesteps must rise from {RESULT:g}"
            )
            require_finite((value for _, value in knots), f"knots[{s}]")
            require(min(value for _, value in knots) > 0, f"knots[{s}]: sensitivities must be above 0")

    def at(self, sample: int, table: SamplerTable) -> Array:
        """c_0 … c_N of a sample for the rows of a sampler, float64: log c is linear in the timestep."""
        known, values = np.array(self.knots[sample]).T
        found: Array = np.exp(np.interp([*table.timesteps, RESULT], known, np.log(values)))
        return found


def knots_from_stops(found: Mapping[int, float], table: SamplerTable) -> Knots:
    """Knots from c_j at some stops j ≤ N of a sampler; of stops at the same timestep the last."""
    times = [*table.timesteps, RESULT]
    return tuple(sorted({times[j]: value for j, value in sorted(found.items())}.items()))


def require_retargetable(known: Sensitivity, target: Provenance, table: SamplerTable, *, samples: int) -> None:
    """Raise UnsupportedError, saying why, unless a sensitivity holds for another measurement.

    Args:
        known: what was measured.
        target: what it is wanted for.
        table: the sampler there.
        samples: how many are wanted.
    """
    if samples > known.samples:
        raise _refused(f"{known.samples} samples", str(samples))
    for name in (
        "model",
        "revision",
        "dtype",
        "latent_shape",
        "text_length",
        "negative_prompt",
        "prompts_digest",
        "seed",
    ):
        there, here = getattr(known, name), getattr(target, name)
        if there != here:
            raise _refused(f"{name.replace('_', ' ')} {there!r}", f"{here!r}")
    if table.scheduler != known.scheduler:
        raise _refused(f"{known.scheduler}", table.scheduler)
    if table.stochastic:
        raise _refused("a deterministic sampler", f"{table.scheduler}, which draws noise")
    low, high = (round(bound * known.num_steps) for bound in STEPS_RANGE)
    if not low <= table.num_steps <= high:
        raise _refused(f"{low} … {high} steps ({known.num_steps} were measured)", str(table.num_steps))
    lowest, highest = guidance_range(known.guidance_scale) or (known.guidance_scale, known.guidance_scale)
    if not lowest <= target.guidance_scale <= highest:
        raise _refused(
            f"guidance {lowest:g} … {highest:g} ({known.guidance_scale:g} was measured)", f"{target.guidance_scale:g}"
        )
    highest_known = min(knots[-1][0] for knots in known.knots) * (1 + MARGIN)
    highest_wanted = max(table.timesteps[2:], default=RESULT)
    if highest_wanted > highest_known:
        raise _refused(f"timesteps up to {highest_known:.0f} behind the second step", f"{highest_wanted:.0f}")


def _refused(expected: str, got: str) -> UnsupportedError:
    return UnsupportedError(f"the calibration holds for {expected}, asked for is {got}", fix=FIX)
