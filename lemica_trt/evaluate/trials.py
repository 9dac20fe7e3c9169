"""Plans run whole in PyTorch against their reference, an uncached run: which of several is best on this model?

The score is the signal-to-noise ratio of the final latents, 10·log₁₀(‖x_N‖² / ‖x̂_N − x_N‖²) in dB: free of the VAE,
so that it costs DiT calls only. `Trials.psnr` is of decoded frames: the number that people know, for few plans.
Finished runs are in a journal; a killed trial goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemica_trt.calibrate.exact import provenance_of
from lemica_trt.calibrate.journal import Header, Journal
from lemica_trt.calibrate.workers import InProcess, Progress, Workers, complete
from lemica_trt.core.errors import VerificationError
from lemica_trt.core.metrics import PSNR_CAP, Frames, psnr
from lemica_trt.core.values import Value, require, require_finite
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.models import Model, denoise

SNR_CAP = 120.0
"""dB; more cannot be told apart in fp32."""


class TrialHeader(Header, frozen=True, kw_only=True):
    """What a journal of scores is bound to.

    Attributes:
        reference: digest of the rows of the plan that all are held against.
    """

    reference: str


def trials_digest(model: Model, reference: StepPlan, table: SamplerTable, prompts: Sequence[str], *, seed: int) -> str:
    """SHA-256 (hex) of everything that a journal of scores is bound to."""
    return _header(model, reference, table, prompts, seed).digest


def _header(model: Model, reference: StepPlan, table: SamplerTable, prompts: Sequence[str], seed: int) -> TrialHeader:
    return TrialHeader(**provenance_of(model, table, prompts, seed), reference=reference.rows_digest)


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
        psnr: dB against the reference's frames; see `quality.psnr`.
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
        reference: the plan that all are held against: of the sampler, or of the sampler with more steps, every step.
        table: the model's sampler.
        prompts: sample s uses prompt s mod len(prompts), and seed + s for all its noise.
        seed: of sample 0.
        journal: file of finished runs.
        progress: told what is done.
        workers: run the plans; None: this process.
    """

    def __init__(
        self,
        model: Model,
        reference: StepPlan,
        table: SamplerTable,
        prompts: Sequence[str],
        *,
        seed: int,
        journal: Path,
        progress: Progress | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._job = _Runs(reference, tuple(prompts), seed)
        self._progress = progress
        self._workers = workers or InProcess(model)
        self._header = _header(model, reference, table, prompts, seed)
        self._book = Journal(journal, self._header, Score)

    def __call__(self, plans: Sequence[StepPlan], samples: range) -> list[list[float]]:
        """dB of each plan on each sample.

        Raises:
            VerificationError: the reference is not finite. (A plan whose run is not scores −`SNR_CAP`.)
        """
        self._complete(self._book, plans, samples, decoded=False)
        return [[self._book.entries[s, plan.rows_digest].snr for s in samples] for plan in plans]

    def psnr(self, plan: StepPlan, samples: range, *, journal: Path) -> tuple[float, ...]:
        """PSNR of a plan's frames on each sample, dB; see `quality.psnr`. The reference's is its cap.

        Args:
            journal: file of finished runs.

        Raises:
            VerificationError: the reference is not finite. (A plan whose run is not scores 0.)
        """
        if plan.rows == self._job.reference.rows:
            return (PSNR_CAP,) * len(samples)
        book = Journal(journal, self._header, FrameScore)
        self._complete(book, [plan], samples, decoded=True)
        return tuple(book.entries[s, plan.rows_digest].psnr for s in samples)

    def _complete(self, book: Journal[Any], plans: Sequence[StepPlan], samples: range, *, decoded: bool) -> None:
        wanted = {(s, plan.rows_digest): (s, plan, decoded) for s in samples for plan in plans}
        missing = {unit: float(unit[1].budget) for key, unit in wanted.items() if key not in book.entries}
        complete(book, wanted, self._job, missing, self._workers, self._progress)


class _Runs(NamedTuple):
    """The job of `Trials`; what is done at a time is a plan on a sample, scored by its frames if `decoded`."""

    reference: StepPlan
    prompts: tuple[str, ...]
    seed: int

    def start(self, model: Model) -> Callable[[tuple[int, StepPlan, bool]], list[Any]]:
        def run(s: int, plan: StepPlan) -> Tensor:
            noises = (noise[None] for noise in model.noises(self.seed + s))
            start = next(noises)
            embeds = model.embed([self.prompts[s % len(self.prompts)]])
            with torch.inference_mode():
                return denoise(model, plan, embeds, start, fresh_noise=lambda _: next(noises))[0].cpu()

        def frames(latents: Tensor) -> Frames:
            """uint8 [F, H, W, 3]."""
            with torch.inference_mode():
                clip: Frames = model.decode(latents[None])[0].cpu().numpy()
            return clip

        @cache
        def reference(s: int) -> Tensor:
            found = run(s, self.reference)
            if not bool(found.isfinite().all()):
                raise VerificationError(
                    f"sample {s}: the reference is not finite in {model.profile.dtype}",
                    fix="build with another --dtype",
                )
            return found

        @cache
        def reference_frames(s: int) -> Frames:
            return frames(reference(s))

        def work(unit: tuple[int, StepPlan, bool]) -> list[Any]:
            s, plan, decoded = unit
            wanted, latents = reference(s), run(s, plan)
            if not decoded:
                return [Score(sample=s, plan=plan.rows_digest, snr=_snr(latents, wanted))]
            finite = bool(latents.isfinite().all())
            score = psnr(frames(latents), reference_frames(s)) if finite else 0.0
            return [FrameScore(sample=s, plan=plan.rows_digest, psnr=score)]

        return work


def _snr(latents: Tensor, reference: Tensor) -> float:
    signal = float(reference.double().square().sum())
    noise = float((latents.double() - reference.double()).square().sum())
    if not math.isfinite(noise):
        return -SNR_CAP
    return min(10 * math.log10(signal / noise), SNR_CAP) if noise > 0 else SNR_CAP
