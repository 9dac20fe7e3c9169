"""How the candidates for one budget did when they ran whole on the model."""

from __future__ import annotations

import numpy as np

from lemica_trt.core.values import Value, require, require_finite
from lemica_trt.ir.plan import StepPlan

PAPER = "lemica, residual-reuse"
"""What LeMiCa does (arXiv 2511.00090), as `way` has it."""


def way(plan: StepPlan) -> str:
    """What a plan does, for tables: `lemica, output-linear`, `signed, UniPCMultistepScheduler`."""
    if plan.budget == plan.num_steps:
        return "uncached"
    return f"{plan.method}, {plan.scheduler if plan.predictor is None else plan.predictor.name}"


def recipe(name: str) -> str:
    """What a way does in a skipped step, however its full steps are chosen: `output-linear` of them all."""
    return name.split(", ", 1)[-1]


class Tried(Value, frozen=True):
    """How one way did.

    Attributes:
        way: see there.
        full_steps: of its plan.
        snr: dB of each sample that it was tried on, the first of all samples; see `calibrate.trials`.
    """

    way: str
    full_steps: tuple[int, ...]
    snr: tuple[float, ...]

    @property
    def mean(self) -> float:
        """dB, mean over samples."""
        return float(np.mean(self.snr))


class Selection(Value, frozen=True):
    """All ways that were tried for one budget.

    Attributes:
        budget: B, of the winner; where a time was asked for, others may have some full steps more or less.
        samples: of the last round.
        tried: the winner first; then by the number of samples that they lasted for, then by their mean.
    """

    budget: int
    samples: int
    tried: tuple[Tried, ...]

    def __post_init__(self) -> None:
        require(len(self.tried) > 0, "nothing was tried")
        for tried in self.tried:
            require(0 < len(tried.snr) <= self.samples, f"{tried.way} was tried on {len(tried.snr)} samples")
            require_finite(tried.snr, f"{tried.way}: snr")


class Selections(Value, frozen=True):
    """Of all budgets of a build."""

    selections: tuple[Selection, ...]
