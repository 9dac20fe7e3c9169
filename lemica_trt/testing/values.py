"""Builders of small values that several tests need. Numpy only."""

from __future__ import annotations

from lemica_trt.ir.schedule import Schedule


def schedule_of(num_steps: int, *full_steps: int) -> Schedule:
    """A schedule by its full steps."""
    return Schedule(num_steps=num_steps, full_steps=full_steps)
