"""Solvers set to the steps of a schedule, from the noise levels of a table."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.sampler import SamplerTable, require_levels


def first_order_table(table: SamplerTable, steps: Sequence[int]) -> SamplerTable:
    """The first-order ODE solver on some steps of a sampler, one model call each.

    It keeps the data and the noise that the output says and moves to the next level: DDIM (Song et al. 2021, eq. 12
    with η = 0), which for flow matching is explicit Euler, in any parameterisation.

    Args:
        table: N steps, with noise levels.
        steps: rising, the first is 0; behind the last comes the table's final level.

    Returns:
        len(steps) model calls with the timesteps, input scales and guidance of the table's rows.

    Raises:
        UnsupportedError: no noise levels, or a level at which the output does not tell the data (noise prediction
            at zero signal).
    """
    levels = require_levels(table)
    rows = [table.rows[0]]
    for i, j in zip(steps, [*steps[1:], table.num_steps]):
        latent, output = first_order_step(table, i, j)
        rows.append(msgspec.structs.replace(table.rows[j], latents=(latent,), outputs=(output,), noise=0.0))
    kept = [*steps, table.num_steps]
    return SamplerTable(
        scheduler=table.scheduler,
        rows=tuple(rows),
        levels=msgspec.structs.replace(
            levels, signal=tuple(levels.signal[k] for k in kept), noise=tuple(levels.noise[k] for k in kept)
        ),
    )


def first_order_step(table: SamplerTable, i: int, j: int) -> tuple[float, float]:
    """The first-order ODE solver from step i to step j > i: factors of x_i and of m_i in x_j.

    Raises:
        UnsupportedError: as `first_order_table`.
    """
    levels = require_levels(table)
    (a, s), (p, q) = (levels.signal[i], levels.noise[i]), levels.output(i)
    det = a * q - s * p
    if not det:
        raise UnsupportedError(
            f"step {i} of {table.scheduler} has no signal: {levels.target} says nothing of the data there",
            fix="use a model with v_prediction",
        )
    b, z = levels.signal[j], levels.noise[j]
    return (b * q - z * p) / det, (z * a - b * s) / det
