"""Which measurement a sensitivity of another one may be used for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.calibration import RESULT, Knots, Provenance, Sensitivity
from lemica_trt.ir.plan import guidance_range
from lemica_trt.ir.sampler import SamplerTable

STEPS_RANGE = (0.5, 1.5)
"""Numbers of steps, in those of the calibration, that it is carried over to."""


TIMESTEP_MARGIN = 0.02
"""How far above the highest timestep that was measured one may lie, as a part of it; the sensitivity is that one's."""


CALIBRATE_ANEW = "calibrate anew: leave --calibration-from out"


Array = npt.NDArray[np.float64]


def knots_from_stops(found: Mapping[int, float], table: SamplerTable) -> Knots:
    """Knots from c_j at some stops j ≤ N of a sampler; of stops at the same timestep the last."""
    times = [*table.timesteps, RESULT]
    return tuple(sorted({times[j]: value for j, value in sorted(found.items())}.items()))


def require_retargetable(known: Sensitivity, target: Provenance, table: SamplerTable) -> None:
    """Raise UnsupportedError, saying why, unless a sensitivity holds for another measurement.

    Args:
        known: what was measured.
        target: what it is wanted for.
        table: the sampler there.
    """
    for name in ("model", "revision", "dtype", "latent_shape", "text_length", "negative_prompt"):
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
    highest_known = max(knots[-1][0] for knots in known.knots) * (1 + TIMESTEP_MARGIN)
    highest_wanted = max(table.timesteps[2:], default=RESULT)
    if highest_wanted > highest_known:
        raise _refused(f"timesteps up to {highest_known:.0f} behind the second step", f"{highest_wanted:.0f}")


def _refused(expected: str, got: str) -> UnsupportedError:
    return UnsupportedError(f"the calibration holds for {expected}, asked for is {got}", fix=CALIBRATE_ANEW)
