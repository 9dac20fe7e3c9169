"""A plan run whole on one sample, and the scores that journals keep."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import UNSET, UnsetType

from lemica_trt.calibrate.exact import provenance_of
from lemica_trt.calibrate.journal import Header
from lemica_trt.calibrate.trajectories import Trajectories
from lemica_trt.core.errors import VerificationError
from lemica_trt.core.metrics import PSNR_CAP, Frames, lpips, psnr, ssim
from lemica_trt.core.values import Value, require, require_finite
from lemica_trt.evaluate.samples import Samples
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.step_model import Latents, StepModel
from lemica_trt.planning.step_plan import uncached_plan

SNR_CAP_DB = 120.0
"""A higher signal-to-noise ratio cannot be told apart in fp32."""


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
        target: what computed its runs, where that is another model.
    """

    reference: str
    target: dict[str, str] | UnsetType = UNSET


def trial_header(
    model: StepModel, table: SamplerTable, samples: Samples, reference: StepPlan, target: StepModel | None = None
) -> TrialHeader:
    """What scores of these samples are bound to; how many samples there are is not in it."""
    origin = provenance_of(model, table, samples.prompts, samples.seed)
    computed = UNSET if target is None else target.libraries
    return TrialHeader(**origin, reference=reference.rows_digest, target=computed)


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


class PlanRuns(NamedTuple):
    """The job of `PlanEvaluator`; a unit is (sample, plan, whether its frames are scored).

    Attributes:
        table: the sampler of the uncached runs that plans are compared with.
        samples: what plans run on.
        trajectories: folder of uncached runs that may have been kept.
        target: whose uncached runs they are; None: the model's.
    """

    table: SamplerTable
    samples: Samples
    trajectories: Path | None
    target: StepModel | None = None

    def reference_plan(self, model: StepModel) -> StepPlan:
        """What plans are compared with."""
        return uncached_plan(self.table, guidance_scale=model.profile.sampling.guidance_scale)

    def start(self, model: StepModel) -> Callable[[tuple[int, StepPlan, bool]], list[Any]]:
        uncached, kept = self.reference_plan(model), Trajectories(self.trajectories)
        target = self.target or model

        @functools.cache
        def reference(s: int) -> Latents:
            path = kept.find(target, self.table, *self.samples[s])
            found: Latents = target.run(uncached, *self.samples[s]) if path is None else path[-1]
            if not np.isfinite(found).all():
                raise VerificationError(
                    f"sample {s}: expected a finite uncached run, got NaN or infinity in {model.profile.dtype}",
                    fix="build with another --dtype",
                )
            return found

        @functools.cache
        def reference_frames(s: int) -> Frames:
            return model.frames(reference(s))

        def work(unit: tuple[int, StepPlan, bool]) -> list[Any]:
            s, plan, decoded = unit
            if decoded and plan.rows == uncached.rows and target is model:
                return [FrameScore(sample=s, plan=plan.rows_digest, psnr=PSNR_CAP)]
            wanted, latents = reference(s), model.run(plan, *self.samples[s])
            if not decoded:
                return [LatentScore(sample=s, plan=plan.rows_digest, snr=_snr(latents, wanted))]
            finite = bool(np.isfinite(latents).all())
            score = psnr(model.frames(latents), reference_frames(s)) if finite else 0.0
            return [FrameScore(sample=s, plan=plan.rows_digest, psnr=score)]

        return work


def _snr(latents: Latents, reference: Latents) -> float:
    signal = float(np.square(reference.astype(np.float64)).sum())
    noise = float(np.square(latents.astype(np.float64) - reference).sum())
    if not math.isfinite(noise):
        return -SNR_CAP_DB
    return min(10 * math.log10(signal / noise), SNR_CAP_DB) if noise > 0 else SNR_CAP_DB
