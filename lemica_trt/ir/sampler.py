"""A sampler is a table: the coefficients of every step of a linear diffusion sampler.

Rows read *combine, then run*. With x_{−1} the initial noise (standard normal), the latents at step i are

    x_i = Σ_j latents[j]·x_{i−1−j} + Σ_k outputs[k]·m_{i−1−k} + noise·z_i          (combine)
    m_i = u_i + g_i·(c_i − u_i),   (u_i, c_i) = DiT(in_scale·x_i, timestep)          (run)

where z_i is fresh standard normal noise, u and c are the unconditional and the conditional output, and
g_i = guidance[0] + guidance[1]·g for the guidance scale g of the request (diffusers' `use_dynamic_cfg` makes it
vary by step). A table for N steps has N + 1 rows; the last one only combines: x_N is the result.

This room knows numbers only; `lower` makes tables from diffusers schedulers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from msgspec import UNSET, UnsetType

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.values import Value, json_bytes, require, require_finite

Array = npt.NDArray[np.float64]


Target = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
"""What the model predicts, by diffusers' names."""


Setting = bool | int | float | str | None
"""One setting of a sampler; lists and the like as JSON text."""


SAMPLER_TOLERANCE = 1e-5
"""Largest relative difference between the `probe`s of one sampler on two machines. diffusers computes noise schedules
in float32, and processors round its last bits (1e-7) differently."""


class SamplerRow(Value, frozen=True):
    """One step: coefficients of the combination, and what the model is called with.

    Attributes:
        latents: coefficient of x_{i−1−j} at index j; row 0 sees the initial noise as x_{−1}.
        outputs: coefficient of the guided model output m_{i−1−k} at index k.
        noise: coefficient of fresh noise z_i; 0 for a deterministic sampler.
        timestep: what the model gets as timestep; None in the last row.
        in_scale: factor on x_i before the model (1 except for sigma-parameterised samplers such as Euler).
        guidance: (offset, factor) of the guidance scale at this step.
        kind: which of the model's kinds of steps it is (Wan 2.2 runs another transformer in late ones); unset: 0.
    """

    latents: tuple[float, ...]
    outputs: tuple[float, ...] = ()
    noise: float = 0.0
    timestep: float | None = None
    in_scale: float = 1.0
    guidance: tuple[float, float] = (0.0, 1.0)
    kind: int | UnsetType = UNSET

    def __post_init__(self) -> None:
        require(self.kind is UNSET or self.kind > 0, f"kind must be above 0 or unset, got {self.kind}")
        require_finite(self.latents, "latents")
        require_finite(self.outputs, "outputs")
        require_finite((self.noise, self.in_scale, *self.guidance), "noise, in_scale, guidance")
        if self.timestep is not None:
            require_finite((self.timestep,), "timestep")


class NoiseLevels(Value, frozen=True):
    """How much noise is in the latents of each row: x_i = signal[i]·x0 + noise[i]·ε for data x0 and ε ~ N(0, 1).

    Attributes:
        target: what the model predicts of x0 and ε.
        signal, noise: N + 1 numbers each, not negative, never both 0.
    """

    target: Target
    signal: tuple[float, ...]
    noise: tuple[float, ...]

    def __post_init__(self) -> None:
        require(len(self.signal) == len(self.noise), f"{len(self.signal)} signal and {len(self.noise)} noise levels")
        for name in ("signal", "noise"):
            require_finite(getattr(self, name), name)
            require(min(getattr(self, name), default=0.0) >= 0, f"{name} must not be negative")
        require(all(a + s > 0 for a, s in zip(self.signal, self.noise)), "signal and noise must not both be 0")

    def output(self, i: int) -> tuple[float, float]:
        """(p, q) of row i: a perfect model's output is m_i = p·x0 + q·ε."""
        if self.target == "epsilon":
            return 0.0, 1.0
        if self.target == "sample":
            return 1.0, 0.0
        if self.target == "flow_prediction":
            return -1.0, 1.0
        size = math.hypot(self.signal[i], self.noise[i])
        return -self.noise[i] / size, self.signal[i] / size


class SamplerTable(Value, frozen=True, omit_defaults=True):
    """All steps of one sampler at one number of steps.

    Two tables are of the same sampler if their `digest` is equal and their numbers agree to `SAMPLER_TOLERANCE`
    (`probe`). The digest covers what a sampler *is*, and none of its coefficients: their last bits differ between
    processors.

    Attributes:
        scheduler: class name of the diffusers scheduler that it was lowered from.
        rows: N + 1 rows; see the module docstring.
        settings: the scheduler's configuration where it differs from the class's defaults, and conventions of the
            pipeline (`use_dynamic_cfg`).
        levels: the noise level of each row; None where the sampler's is not known.
    """

    scheduler: str
    rows: tuple[SamplerRow, ...]
    settings: dict[str, Setting] = {}
    levels: NoiseLevels | None = None

    def __post_init__(self) -> None:
        require(len(self.rows) >= 2, f"a sampler table needs at least 2 rows, got {len(self.rows)}")
        if self.levels is not None:
            count = len(self.levels.signal)
            require(count == len(self.rows), f"{count} noise levels for {len(self.rows)} rows")
        for i, row in enumerate(self.rows):
            last = i == self.num_steps
            require((row.timestep is None) == last, f"rows[{i}]: timestep must be {'absent' if last else 'given'}")
            require(len(row.latents) <= i + 1, f"rows[{i}]: {len(row.latents)} latents, but only {i + 1} exist there")
            require(len(row.outputs) <= i, f"rows[{i}]: {len(row.outputs)} outputs, but only {i} exist there")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the sampler's identity: class, settings, number of steps. The same on every machine."""
        identity = {"scheduler": self.scheduler, "settings": self.settings, "num_steps": self.num_steps}
        return hashlib.sha256(json_bytes(identity)).hexdigest()

    @property
    def probe(self) -> tuple[float, ...]:
        """`PROBES` fixed linear combinations of all coefficients, timesteps (in thousands) and scales of the rows."""
        sums = np.zeros(PROBES)
        for i, row in enumerate(self.rows):
            numbers = (*row.guidance, row.in_scale, row.noise, (row.timestep or 0.0) / 1000)
            for first, part in ((0, numbers), (8, row.latents), (32, row.outputs)):
                places = 64 * i + first + np.arange(len(part))
                sums += np.cos(np.outer(np.arange(1, PROBES + 1), places)) @ np.array(part)
        return tuple(sums.tolist())

    @property
    def num_steps(self) -> int:
        """N, the number of model evaluations."""
        return len(self.rows) - 1

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The N timesteps, in sampling order."""
        return tuple(row.timestep for row in self.rows if row.timestep is not None)

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kind of each of the N steps."""
        return tuple(row.kind or 0 for row in self.rows[:-1])

    @property
    def switches(self) -> tuple[int, ...]:
        """The steps that are of another kind than the one before: nothing that is cached reaches beyond."""
        kinds = self.kinds
        return tuple(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1])

    @property
    def latent_history(self) -> int:
        """How many earlier latents a step reads."""
        return max(len(row.latents) for row in self.rows)

    @property
    def output_history(self) -> int:
        """How many earlier model outputs a step reads."""
        return max(len(row.outputs) for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """Whether any step draws fresh noise."""
        return any(row.noise != 0.0 for row in self.rows)


PROBES = 4
"""Numbers in a `SamplerTable.probe`."""


def probes_agree(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two `SamplerTable.probe`s are of the same numbers, to `SAMPLER_TOLERANCE` of the largest."""
    if len(first) != len(second):
        return False
    scale = max(map(abs, (*first, *second)), default=0.0)
    return all(abs(a - b) <= SAMPLER_TOLERANCE * scale for a, b in zip(first, second))


def same_sampler(one: SamplerTable, other: SamplerTable) -> bool:
    """Whether two tables are of one sampler: the same identity, and numbers that agree."""
    return one.digest == other.digest and probes_agree(one.probe, other.probe)


def require_levels(table: SamplerTable) -> NoiseLevels:
    """The noise levels of a table.

    Raises:
        UnsupportedError: it has none.
    """
    if table.levels is None:
        raise UnsupportedError(
            f"expected the noise level of each step of {table.scheduler}, its table has none",
            fix="lower the sampler again; if it still has none, use a --method without a standard solver",
        )
    return table.levels
