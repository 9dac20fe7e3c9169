"""Runs step plans whole in PyTorch on numbered samples and scores what they make: the one place that does.

Two scores, both in dB and both against the same sample by the *reference*, an uncached run of the sampler at its own N
steps or at M:

    latents   10·log₁₀(‖x_N‖² / ‖x̂_N − x_N‖²), free of the VAE: what candidates are chosen by
    frames    PSNR of the decoded frames (`core.metrics.psnr`): the number that people know, for few plans

Finished runs are kept in journals, so that a killed evaluation goes on where it was; uncached runs are made once a
sample for all plans.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemica_trt.calibrate.exact import provenance_of
from lemica_trt.calibrate.journal import Header, Journal
from lemica_trt.calibrate.workers import InProcess, Workers, complete
from lemica_trt.core.errors import VerificationError
from lemica_trt.core.metrics import PSNR_CAP, Frames, lpips, psnr, ssim
from lemica_trt.core.progress import Quiet, Reporter
from lemica_trt.core.values import Value, require, require_finite
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import CalibrationSettings
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.trials import TrialTable
from lemica_trt.models import Model, denoise
from lemica_trt.planning.planner import select
from lemica_trt.planning.step_plan import uncached_plan

SNR_CAP_DB = 120.0
"""A higher signal-to-noise ratio cannot be told apart in fp32."""

HELD_OUT_SEED = 1_000_000
"""Seed of the first held-out sample; calibration seeds start at 0."""


class Samples(Value, frozen=True):
    """Numbered (prompt, seed) pairs: sample s has prompt s, repeating, and draws all its noise from `seed` + s.

    Attributes:
        prompts: at least one.
        seed: of sample 0.
        count: how many samples there are.
    """

    prompts: tuple[str, ...]
    seed: int
    count: int

    def __post_init__(self) -> None:
        require(len(self.prompts) > 0, "expected at least one prompt, got none")
        require(self.count >= 1, f"count must be at least 1, got {self.count}")

    def __getitem__(self, number: int) -> tuple[str, int]:
        """(prompt, seed) of a sample; numbers beyond `count` are allowed."""
        return self.prompts[number % len(self.prompts)], self.seed + number


def validation_samples(prompts: Sequence[str], settings: CalibrationSettings) -> Samples:
    """The samples that candidates are compared on: prompts and seeds behind those of the calibration.

    Args:
        prompts: of the calibration.
        settings: how many samples the calibration has, and how many validation needs.
    """
    first = settings.samples % len(prompts)
    return Samples(
        prompts=(*prompts[first:], *prompts[:first]),
        seed=settings.seed + settings.samples,
        count=settings.validation_samples,
    )


def held_out_samples(prompts: Sequence[str], count: int) -> Samples:
    """The samples that verification and benchmarks report on; neither calibration nor validation has seen them."""
    return Samples(prompts=tuple(prompts), seed=HELD_OUT_SEED, count=count)


def run_plan(model: Model, plan: StepPlan, prompt: str, seed: int, *, start: Tensor | None = None) -> Tensor:
    """Run one request by a plan; noise as diffusers draws it from the seed.

    Args:
        start: fp32 latent_shape, used in place of the initial noise that the seed gives.

    Returns:
        x_N, fp32 latent_shape on the CPU; not checked for NaN.
    """
    noises = (noise[None] for noise in model.noises(seed))
    first = next(noises)
    start = first if start is None else start[None]
    with torch.inference_mode():
        embeds = model.embed([prompt])
        return denoise(model, plan, embeds, start, fresh_noise=lambda _: next(noises))[0].cpu()


def decode(model: Model, latents: Tensor) -> Frames:
    """Latents fp32 latent_shape → frames uint8 [F, H, W, 3]."""
    with torch.inference_mode():
        frames: Frames = model.decode(latents[None])[0].cpu().numpy()
    return frames


class ClipScore(NamedTuple):
    """How alike two clips are; `lpips` is None where the lpips package or its weights are not installed."""

    psnr: float
    ssim: float
    lpips: float | None


def score_clip(clip: Frames, reference: Frames) -> ClipScore:
    """Compare two clips of one shape [F, H, W, 3]; see `core.metrics`."""
    return ClipScore(psnr(clip, reference), ssim(clip, reference), lpips(clip, reference))


class TrialHeader(Header, frozen=True, kw_only=True):
    """What a journal of scores is bound to.

    Attributes:
        reference: digest of the rows of the plan that all others are compared with.
    """

    reference: str


class _PlanEntry(Value, frozen=True):
    """What is known of one plan on one sample.

    Attributes:
        sample: its number.
        plan: digest of its rows.
    """

    sample: int
    plan: str

    def __post_init__(self) -> None:
        require(self.sample >= 0, f"sample must not be negative, got {self.sample}")
        require_finite((self.decibels,), "score")

    @property
    def decibels(self) -> float:
        raise NotImplementedError

    @property
    def key(self) -> tuple[int, str]:
        return self.sample, self.plan

    def mismatch(self, measurement: Header) -> str | None:
        """Nothing can be wrong with it alone."""
        return None


class LatentScore(_PlanEntry, frozen=True):
    """The latents of one plan on one sample; `snr` is in dB, at most `SNR_CAP_DB`."""

    snr: float

    @property
    def decibels(self) -> float:
        return self.snr


class FrameScore(_PlanEntry, frozen=True):
    """The frames of one plan on one sample; `psnr` is in dB, see `core.metrics.psnr`."""

    psnr: float

    @property
    def decibels(self) -> float:
        return self.psnr


class PlanEvaluator:
    """Runs plans on samples and compares them with an uncached run. Called with plans of one budget it chooses.

    Args:
        model: opens it, on its device; called when there is something to run.
        table: the model's sampler.
        samples: what plans run on.
        reference: the sampler of the uncached runs, where it has other steps than `table`.
        folder: where journals are kept, one for each combination of model, sampler, reference and samples; None: scores
            are kept in memory.
        reporter: told what is done.
        workers: run the plans; None: this process.

    Attributes:
        samples: as given.
    """

    def __init__(
        self,
        model: Callable[[], Model],
        table: SamplerTable,
        samples: Samples,
        *,
        reference: SamplerTable | None = None,
        folder: Path | None = None,
        reporter: Reporter | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.samples = samples
        self._open, self._table, self._reference = model, table, reference or table
        self._folder, self._reporter, self._given_workers = folder, reporter or Quiet(), workers

    def __call__(self, plans: Sequence[StepPlan]) -> tuple[StepPlan, TrialTable]:
        """Choose the best of several plans by successive halving; see `planning.planner.select`."""
        budgets = "/".join(str(budget) for budget in sorted({plan.budget for plan in plans}))
        self._reporter.stage(
            "select",
            f"{len(plans)} candidates for {budgets} full steps, compared on {self.samples.count} samples with "
            f"{self._reference.num_steps} uncached steps",
        )
        plan, trials = select(plans, self.samples.count, self.scores)
        self._reporter.note(f"{trials.best.label}: {trials.best.mean:.1f} dB")
        return plan, trials

    def scores(self, plans: Sequence[StepPlan], samples: range | None = None) -> list[list[float]]:
        """Signal-to-noise ratio of the latents of each plan on each sample, dB.

        Args:
            samples: their numbers; None: all.

        Raises:
            VerificationError: the reference is not finite. (A plan whose run is not scores −`SNR_CAP_DB`.)
        """
        numbers = self._numbers(samples)
        book = self._complete(self._latent_book, plans, numbers, decoded=False)
        return [[book.entries[s, plan.rows_digest].decibels for s in numbers] for plan in plans]

    def psnr(self, plan: StepPlan, samples: range | None = None) -> tuple[float, ...]:
        """PSNR of a plan's frames on each sample, dB; of the reference itself `PSNR_CAP`.

        Args:
            samples: their numbers; None: all.

        Raises:
            VerificationError: the reference is not finite. (A plan whose run is not scores 0.)
        """
        numbers = self._numbers(samples)
        if plan.rows == self._job.reference.rows:
            return (PSNR_CAP,) * len(numbers)
        book = self._complete(self._frame_book, [plan], numbers, decoded=True)
        return tuple(book.entries[s, plan.rows_digest].decibels for s in numbers)

    def latents(self, plan: StepPlan, sample: int) -> Tensor:
        """One sample by a plan, run now and in this process: x_N, fp32 latent_shape on the CPU."""
        return run_plan(self._model, plan, *self.samples[sample])

    def clips(self, plan: StepPlan, samples: range | None = None) -> list[Frames]:
        """Clips by a plan, run now and in this process: uint8 [F, H, W, 3] each."""
        return [decode(self._model, self.latents(plan, s)) for s in self._numbers(samples)]

    def _numbers(self, samples: range | None) -> range:
        return range(self.samples.count) if samples is None else samples

    @functools.cached_property
    def _model(self) -> Model:
        return self._open()

    @functools.cached_property
    def _workers(self) -> Workers:
        return self._given_workers or InProcess(self._model)

    @functools.cached_property
    def _job(self) -> _Runs:
        scale = self._model.profile.sampling.guidance_scale
        return _Runs(uncached_plan(self._reference, guidance_scale=scale), self.samples)

    @functools.cached_property
    def _latent_book(self) -> Journal[LatentScore]:
        return Journal(self._journal("trials"), self._header, LatentScore)

    @functools.cached_property
    def _frame_book(self) -> Journal[FrameScore]:
        return Journal(self._journal("frames"), self._header, FrameScore)

    @functools.cached_property
    def _header(self) -> TrialHeader:
        origin = provenance_of(self._model, self._table, self.samples.prompts, self.samples.seed)
        return TrialHeader(**origin, reference=self._job.reference.rows_digest)

    def _journal(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}-{self._header.digest[:16]}.jsonl"

    def _complete(
        self, book: Journal[Any], plans: Sequence[StepPlan], samples: range, *, decoded: bool
    ) -> Journal[Any]:
        wanted = {(s, plan.rows_digest): (s, plan, decoded) for s in samples for plan in plans}
        missing = {unit: float(unit[1].budget) for key, unit in wanted.items() if key not in book.entries}
        complete(book, wanted, self._job, missing, self._workers, self._reporter.advance)
        return book


class _Runs(NamedTuple):
    """The job of `PlanEvaluator`; a unit is (sample, plan, whether its frames are scored)."""

    reference: StepPlan
    samples: Samples

    def start(self, model: Model) -> Callable[[tuple[int, StepPlan, bool]], list[Any]]:
        @functools.cache
        def reference(s: int) -> Tensor:
            found = run_plan(model, self.reference, *self.samples[s])
            if not bool(found.isfinite().all()):
                raise VerificationError(
                    f"sample {s}: expected a finite uncached run, got NaN or infinity in {model.profile.dtype}",
                    fix="build with another --dtype",
                )
            return found

        @functools.cache
        def reference_frames(s: int) -> Frames:
            return decode(model, reference(s))

        def work(unit: tuple[int, StepPlan, bool]) -> list[Any]:
            s, plan, decoded = unit
            wanted, latents = reference(s), run_plan(model, plan, *self.samples[s])
            if not decoded:
                return [LatentScore(sample=s, plan=plan.rows_digest, snr=_snr(latents, wanted))]
            finite = bool(latents.isfinite().all())
            score = psnr(decode(model, latents), reference_frames(s)) if finite else 0.0
            return [FrameScore(sample=s, plan=plan.rows_digest, psnr=score)]

        return work


def _snr(latents: Tensor, reference: Tensor) -> float:
    signal = float(reference.double().square().sum())
    noise = float((latents.double() - reference.double()).square().sum())
    if not math.isfinite(noise):
        return -SNR_CAP_DB
    return min(10 * math.log10(signal / noise), SNR_CAP_DB) if noise > 0 else SNR_CAP_DB
