"""Numbered samples: which prompt and which seed a plan is run on."""

from __future__ import annotations

from collections.abc import Sequence

from lemica_trt.core.values import Value, require
from lemica_trt.ir.profile import CalibrationSettings
from lemica_trt.ir.prompts import prompt_from_line

HELD_OUT_SEED = 1_000_000
"""Seed of the first held-out sample; calibration seeds start at 0."""


class Samples(Value, frozen=True):
    """Numbered (prompt, seed) pairs: sample s has prompt s, repeating, and draws all its noise from `seed` + s.

    Attributes:
        prompts: at least one.
        seed: of sample 0.
        count: how many samples there are; 0: there is nothing to compare on.
    """

    prompts: tuple[str, ...]
    seed: int
    count: int

    def __post_init__(self) -> None:
        require(len(self.prompts) > 0, "expected at least one prompt, got none")
        require(self.count >= 0, f"count must not be negative, got {self.count}")

    def __getitem__(self, number: int) -> tuple[str, int]:
        """(prompt, seed) of a sample; numbers beyond `count` are allowed."""
        return self.prompts[number % len(self.prompts)], self.seed + number

    @property
    def shown(self) -> tuple[tuple[str, int], ...]:
        """All of them, of each the text of its prompt: paths of pictures are of one machine."""
        samples = [self[number] for number in range(self.count)]
        return tuple((prompt_from_line(prompt).text, seed) for prompt, seed in samples)


def validation_samples(prompts: Sequence[str], settings: CalibrationSettings) -> Samples:
    """The samples that candidates are compared on: prompts and seeds behind those that solvers are fitted to.

    Args:
        prompts: of the calibration.
        settings: how many samples fits have, and how many validation needs.
    """
    first = settings.fit_samples % len(prompts)
    return Samples(
        prompts=(*prompts[first:], *prompts[:first]),
        seed=settings.seed + settings.fit_samples,
        count=settings.validation_samples,
    )


def held_out_samples(prompts: Sequence[str], count: int) -> Samples:
    """The samples that verification and benchmarks report on; neither calibration nor validation has seen them."""
    return Samples(prompts=tuple(prompts), seed=HELD_OUT_SEED, count=count)
