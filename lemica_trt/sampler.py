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

from lemica_trt.values import Value, require, require_finite


class SamplerRow(Value, frozen=True):
    """One step: coefficients of the combination, and what the model is called with.

    Attributes:
        latents: coefficient of x_{i−1−j} at index j; row 0 sees the initial noise as x_{−1}.
        outputs: coefficient of the guided model output m_{i−1−k} at index k.
        noise: coefficient of fresh noise z_i; 0 for a deterministic sampler.
        timestep: what the model gets as timestep; None in the last row.
        in_scale: factor on x_i before the model (1 but for sigma-parameterised samplers such as Euler).
        guidance: (offset, factor) of the guidance scale at this step.
    """

    latents: tuple[float, ...]
    outputs: tuple[float, ...] = ()
    noise: float = 0.0
    timestep: float | None = None
    in_scale: float = 1.0
    guidance: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        require_finite(self.latents, "latents")
        require_finite(self.outputs, "outputs")
        require_finite((self.noise, self.in_scale, *self.guidance), "noise, in_scale, guidance")
        if self.timestep is not None:
            require_finite((self.timestep,), "timestep")


class SamplerTable(Value, frozen=True):
    """All steps of one sampler at one number of steps.

    Attributes:
        scheduler: class name of the diffusers scheduler that it was lowered from.
        rows: N + 1 rows; see the module docstring.
    """

    scheduler: str
    rows: tuple[SamplerRow, ...]

    def __post_init__(self) -> None:
        require(len(self.rows) >= 2, f"a sampler table needs at least 2 rows, got {len(self.rows)}")
        for i, row in enumerate(self.rows):
            last = i == self.num_steps
            require((row.timestep is None) == last, f"rows[{i}]: timestep must be {'absent' if last else 'given'}")
            require(len(row.latents) <= i + 1, f"rows[{i}]: {len(row.latents)} latents, but only {i + 1} exist there")
            require(len(row.outputs) <= i, f"rows[{i}]: {len(row.outputs)} outputs, but only {i} exist there")

    @property
    def num_steps(self) -> int:
        """N, the number of model evaluations."""
        return len(self.rows) - 1

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The N timesteps, in sampling order."""
        return tuple(row.timestep for row in self.rows if row.timestep is not None)

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
