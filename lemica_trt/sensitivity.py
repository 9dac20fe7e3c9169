"""What of a calibration holds for other steps, another shift or guidance: how much a change at a noise level matters.

The error of segment (i, j) is what its chain of skipped steps does at step j, times c_j: what the full steps behind
make of it (`calibrate.cheap`). The first depends on the grid, and one uncached run on the new grid shows it. The
second belongs to the flow of the model from a noise level to the data; it took roll-outs to measure, and is
interpolated at the levels of the new grid. Plans go by noise level here, not by index. (Design of lemica-trt.)

A level is the angle φ = 2/π·atan(noise/signal), 0 for data, 1 for noise: log-SNR = −2·log tan(φ·π/2), but finite at
both ends. Changes are those of latents of unit variance, x/√(signal² + noise²), so that it does not matter how a
sampler scales its latents.

Knows numbers only; `calibrate` measures.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lemica_trt.errors import UnsupportedError
from lemica_trt.plan import guidance_range
from lemica_trt.provenance import Provenance
from lemica_trt.sampler import NoiseLevels, SamplerTable, require_levels
from lemica_trt.values import require, require_finite

FORMAT_VERSION = 1

STEPS_RANGE = (0.5, 1.5)
"""Numbers of steps, in those of the calibration, that it is carried over to."""

MARGIN = 0.02
"""How far beyond the levels that were measured a level may lie; the sensitivity there is that of the nearest one."""

FIX = "calibrate anew: leave --calibration-from out"

Knots = tuple[tuple[float, float], ...]
Array = npt.NDArray[np.float64]


class Sensitivity(Provenance, frozen=True, kw_only=True):
    """Sensitivities at a few levels for each sample, and what they were measured on.

    Attributes:
        samples: number of (prompt, seed) pairs; all else as in `Provenance`.
        knots: for each sample (φ, c), φ rising: the mean absolute change of the result for each unit of change of the
            latents at level φ.
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
            levels = [level for level, _ in knots]
            require(levels == sorted(set(levels)), f"knots[{s}]: levels must rise")
            require(levels[0] >= 0 and levels[-1] <= 1, f"knots[{s}]: levels must be 0 … 1")
            require_finite((value for _, value in knots), f"knots[{s}]")
            require(min(value for _, value in knots) > 0, f"knots[{s}]: sensitivities must be above 0")

    def at(self, sample: int, levels: NoiseLevels) -> Array:
        """c_0 … c_N of a sample for the latents of a sampler with these levels, float64: log c is linear in φ."""
        known, values = np.array(self.knots[sample]).T
        found: Array = np.exp(np.interp(levels.angles, known, np.log(values)))
        return found / np.hypot(levels.signal, levels.noise)


def knots_from_stops(found: dict[int, float], levels: NoiseLevels) -> Knots:
    """Knots from c_j, for latents as the sampler has them, at some stops j; of stops of one level the last."""
    scale = np.hypot(levels.signal, levels.noise)
    by_level = {levels.angles[j]: value * float(scale[j]) for j, value in sorted(found.items())}
    return tuple(sorted(by_level.items()))


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
    stops = require_levels(table).angles[2:]
    first = max(knots[0][0] for knots in known.knots) - MARGIN
    last = min(knots[-1][0] for knots in known.knots) + MARGIN
    if not first <= min(stops) <= max(stops) <= last:
        raise _refused(f"noise levels {max(first, 0):.3f} … {min(last, 1):.3f}", f"{min(stops):.3f} … {max(stops):.3f}")


def _refused(expected: str, got: str) -> UnsupportedError:
    return UnsupportedError(f"the calibration holds for {expected}, asked for is {got}", fix=FIX)
