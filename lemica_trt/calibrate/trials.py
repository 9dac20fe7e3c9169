"""Plans run whole in PyTorch against the uncached run: which of several is best on this model?

The score is the signal-to-noise ratio of the final latents, 10·log₁₀(‖x_N‖² / ‖x̂_N − x_N‖²) in dB: free of the VAE,
so that it costs DiT calls only. `Trials.psnr` is of decoded frames: the number that people know, for few plans.
Finished runs are in a journal; a killed trial goes on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lemica_trt.calibrate.journal import Header, Journal
from lemica_trt.calibrate.measure import Progress, provenance_of
from lemica_trt.errors import VerificationError
from lemica_trt.models import Model, denoise
from lemica_trt.plan import StepPlan
from lemica_trt.quality import PSNR_CAP, Frames, psnr
from lemica_trt.sampler import SamplerTable
from lemica_trt.values import Value, require, require_finite

SNR_CAP = 120.0
"""dB; more cannot be told apart in fp32."""


def trials_digest(model: Model, table: SamplerTable, prompts: Sequence[str], *, seed: int) -> str:
    """SHA-256 (hex) of everything that a journal of scores is bound to."""
    return Header(**provenance_of(model, table, prompts, seed)).digest


class Score(Value, frozen=True):
    """One plan on one sample.

    Attributes:
        sample: its number; the prompt is number `sample` of all, repeating, the seed `Header.seed` + sample.
        plan: digest of its rows.
        snr: dB, at most `SNR_CAP`.
    """

    sample: int
    plan: str
    snr: float

    def __post_init__(self) -> None:
        require(self.sample >= 0, f"sample must not be negative, got {self.sample}")
        require_finite((self.snr,), "snr")

    @property
    def key(self) -> tuple[int, str]:
        return self.sample, self.plan

    def mismatch(self, measurement: Header) -> str | None:
        """Nothing can be wrong with it alone."""
        return None


class FrameScore(Value, frozen=True):
    """The frames of one plan on one sample.

    Attributes:
        sample, plan: as in `Score`.
        psnr: dB against the uncached run's frames; see `quality.psnr`.
    """

    sample: int
    plan: str
    psnr: float

    def __post_init__(self) -> None:
        require(self.sample >= 0, f"sample must not be negative, got {self.sample}")
        require_finite((self.psnr,), "psnr")

    @property
    def key(self) -> tuple[int, str]:
        return self.sample, self.plan

    def mismatch(self, measurement: Header) -> str | None:
        """Nothing can be wrong with it alone."""
        return None


class Trials:
    """Runs plans on numbered samples.

    Args:
        model: on its device.
        uncached: the plan that runs every step.
        table: the model's sampler.
        prompts: sample s uses prompt s mod len(prompts), and seed + s for all its noise.
        seed: of sample 0.
        journal: file of finished runs.
        progress: told what is done.
    """

    def __init__(
        self,
        model: Model,
        uncached: StepPlan,
        table: SamplerTable,
        prompts: Sequence[str],
        *,
        seed: int,
        journal: Path,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._uncached, self._prompts, self._seed = model, uncached, prompts, seed
        self._progress = progress
        self._header = Header(**provenance_of(model, table, prompts, seed))
        self._book = Journal(journal, self._header, Score)
        self._references: dict[int, Tensor] = {}
        self._clips: dict[int, Frames] = {}

    def __call__(self, plans: Sequence[StepPlan], samples: range) -> list[list[float]]:
        """dB of each plan on each sample.

        Raises:
            VerificationError: the uncached run is not finite. (A plan whose run is not scores −`SNR_CAP`.)
        """
        digests = [plan.rows_digest for plan in plans]
        work = [(s, plan) for s in samples for plan in plans if (s, plan.rows_digest) not in self._book.entries]
        for s, plan in self._told(work):
            self._book.add([Score(sample=s, plan=plan.rows_digest, snr=self._snr(s, plan))])
        return [[self._book.entries[s, digest].snr for s in samples] for digest in digests]

    def psnr(self, plan: StepPlan, samples: range, *, journal: Path) -> tuple[float, ...]:
        """PSNR of a plan's frames on each sample, dB; see `quality.psnr`. The uncached plan's is its cap.

        Args:
            journal: file of finished runs.

        Raises:
            VerificationError: the uncached run is not finite. (A plan whose run is not scores 0.)
        """
        if plan.rows == self._uncached.rows:
            return (PSNR_CAP,) * len(samples)
        book, digest = Journal(journal, self._header, FrameScore), plan.rows_digest
        for s, _ in self._told([(s, plan) for s in samples if (s, digest) not in book.entries]):
            reference, latents = self._reference(s), self._run(s, plan)
            if s not in self._clips:
                self._clips[s] = self._frames(reference)
            finite = bool(latents.isfinite().all())
            score = psnr(self._frames(latents), self._clips[s]) if finite else 0.0
            book.add([FrameScore(sample=s, plan=digest, psnr=score)])
        return tuple(book.entries[s, digest].psnr for s in samples)

    def _told(self, work: list[tuple[int, StepPlan]]) -> Iterator[tuple[int, StepPlan]]:
        """The work, piece by piece, with progress."""
        began = time.monotonic()
        for done, piece in enumerate(work):
            if self._progress is not None:
                left = (time.monotonic() - began) / done * (len(work) - done) if done else None
                self._progress(done, len(work), left)
            yield piece

    def _frames(self, latents: Tensor) -> Frames:
        """uint8 [F, H, W, 3]."""
        with torch.inference_mode():
            frames: Frames = self._model.decode(latents[None])[0].cpu().numpy()
        return frames

    def _reference(self, s: int) -> Tensor:
        if s not in self._references:
            self._references[s] = self._run(s, self._uncached)
            if not bool(self._references[s].isfinite().all()):
                raise VerificationError(
                    f"sample {s}: the uncached run is not finite in {self._model.profile.dtype}",
                    fix="build with another --dtype",
                )
        return self._references[s]

    def _snr(self, s: int, plan: StepPlan) -> float:
        reference = self._reference(s)
        signal = float(reference.double().square().sum())
        noise = float((self._run(s, plan).double() - reference.double()).square().sum())
        if not math.isfinite(noise):
            return -SNR_CAP
        return min(10 * math.log10(signal / noise), SNR_CAP) if noise > 0 else SNR_CAP

    def _run(self, s: int, plan: StepPlan) -> Tensor:
        noises = (noise[None] for noise in self._model.noises(self._seed + s))
        start = next(noises)
        embeds = self._model.embed([self._prompts[s % len(self._prompts)]])
        with torch.inference_mode():
            return denoise(self._model, plan, embeds, start, fresh_noise=lambda _: next(noises))[0].cpu()
