"""How the candidates for one budget did when they ran whole on the model."""

from __future__ import annotations

from typing import Literal

import numpy as np
from msgspec import UNSET, UnsetType

from lemica_trt.core.values import Value, require, require_finite

TrialScore = Literal["latents", "frames"]
"""Of what the dB are."""


class Trial(Value, frozen=True):
    """One candidate.

    Attributes:
        label: of its plan: the name of the planner that made it (`StepPlan.method`).
        full_steps: of its plan.
        snr: dB of each sample that it ran on, the first of all samples; see `PlanEvaluator`.
    """

    label: str
    full_steps: tuple[int, ...]
    snr: tuple[float, ...]

    @property
    def mean(self) -> float:
        """dB, mean over samples."""
        return float(np.mean(self.snr))


class TrialTable(Value, frozen=True):
    """All candidates of one budget.

    Attributes:
        budget: B of the winner; where a time was asked for, others may have some full steps more or less.
        samples: how many the last round ran on.
        trials: the winner first; then by the number of samples that they lasted for, then by their mean.
        of: what was scored; unset: latents.
    """

    budget: int
    samples: int
    trials: tuple[Trial, ...]
    of: TrialScore | UnsetType = UNSET

    def __post_init__(self) -> None:
        require(len(self.trials) > 0, "nothing was tried")
        for trial in self.trials:
            require(0 < len(trial.snr) <= self.samples, f"{trial.label} was tried on {len(trial.snr)} samples")
            require_finite(trial.snr, f"{trial.label}: snr")

    @property
    def best(self) -> Trial:
        """The winner."""
        return self.trials[0]


class TrialTables(Value, frozen=True):
    """Those of all budgets of a build."""

    tables: tuple[TrialTable, ...]
