"""What was measured of plans on the engines of a machine: quality without PyTorch, latency, two plans side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import UNSET, UnsetType

from lemica_trt.core.progress import count
from lemica_trt.core.values import Value, require, require_finite
from lemica_trt.ir.plan import StepPlan


class MeasuredPlan(Value, frozen=True):
    """One plan of a bundle on held-out clips.

    Attributes:
        rows_digest: of the plan, see there: what was measured, by whatever name.
        psnr: dB of each clip against the uncached run, or the sampler at `reference_steps`; of the uncached plan none.
            On quantised engines the uncached run is that of those in fp32, and the uncached plan is compared, too.
        seconds: of the denoising loop of one request, median.
        speedup: over the uncached plan, N/B at most; None where that did not run.
        machine, backend: what it ran on.
        reference_steps: M; None: the uncached run.
    """

    rows_digest: str
    psnr: tuple[float, ...]
    seconds: float
    speedup: float | None
    machine: str
    backend: str
    reference_steps: int | None = None

    def __post_init__(self) -> None:
        require_finite((*self.psnr, self.seconds, self.speedup or 0.0), "psnr, seconds, speedup")
        require(self.seconds > 0, f"seconds must be more than 0, got {self.seconds}")

    @property
    def mean(self) -> float | None:
        """dB, mean over clips; None: nothing was compared."""
        return float(np.mean(self.psnr)) if self.psnr else None


class MeasuredPlans(Value, frozen=True):
    """Those of a bundle, `reports/plans.json`; of plans that it had before, too."""

    plans: tuple[MeasuredPlan, ...] = ()

    def of(self, plan: StepPlan) -> MeasuredPlan | None:
        """What was measured of a plan last."""
        digest = plan.rows_digest
        return next((found for found in self.plans if found.rows_digest == digest), None)

    def __add__(self, others: Iterable[MeasuredPlan]) -> MeasuredPlans:
        new = {found.rows_digest: found for found in others}
        for old in self.plans:  # more clips say more
            found = new.get(old.rows_digest, old)
            same = (old.machine, old.backend, old.reference_steps) == (
                found.machine, found.backend, found.reference_steps
            )  # fmt: skip
            if same and len(old.psnr) > len(found.psnr):
                new[old.rows_digest] = old
        return MeasuredPlans(plans=(*new.values(), *(p for p in self.plans if p.rows_digest not in new)))


class PlanAtShape(Value, frozen=True):
    """A plan at a shape that it was not made for, on held-out clips.

    Attributes:
        rows_digest: of the plan, see there: what was measured, by whatever name.
        psnr: dB of each clip against the uncached run there, or the sampler at the steps that the plan was made for.
        fewer_steps: the same of the sampler itself with as few steps; unset: it has none of so few.
    """

    rows_digest: str
    psnr: tuple[float, ...]
    fewer_steps: tuple[float, ...] | UnsetType = UNSET

    def __post_init__(self) -> None:
        require_finite((*self.psnr, *(self.fewer_steps or ())), "psnr and fewer_steps")
        require(bool(self.psnr), "psnr must not be empty")
        require(
            self.fewer_steps is UNSET or len(self.fewer_steps) == len(self.psnr),
            f"fewer_steps must be of as many clips as psnr, {len(self.psnr)}",
        )

    @property
    def holds(self) -> bool:
        """Whether the plan is worth running there: in the mean no worse than the sampler with as few steps."""
        return self.fewer_steps is UNSET or float(np.mean(self.psnr)) >= float(np.mean(self.fewer_steps))

    @property
    def text(self) -> str:
        """For people: `31.2 dB on 3 clips, fewer steps 33.0`."""
        fewer = "" if self.fewer_steps is UNSET else f", fewer steps {float(np.mean(self.fewer_steps)):.1f}"
        return f"{float(np.mean(self.psnr)):.1f} dB on {count(len(self.psnr), 'clip')}{fewer}"


class RowTimes(Value, frozen=True):
    """A row of a plan, in runs that wait for the device after every row.

    Attributes:
        step: the denoising step that it stands for.
        variant: what ran; None: the DiT did not.
        seconds: of each run.
    """

    step: int
    variant: str | None
    seconds: tuple[float, ...]


class PlanTimes(Value, frozen=True):
    """One plan of a benchmark, seconds of each request (of a batch: of all its requests together).

    Attributes:
        plan: its name.
        full_steps: B.
        text, denoise, decode: parts of a request.
        latency: all of it.
        rows: see there.
    """

    plan: str
    full_steps: int
    text: tuple[float, ...]
    denoise: tuple[float, ...]
    decode: tuple[float, ...]
    latency: tuple[float, ...]
    rows: tuple[RowTimes, ...]

    def __post_init__(self) -> None:
        count = len(self.latency)
        require(count > 0, "expected at least one request")
        require({len(self.text), len(self.denoise), len(self.decode)} == {count}, "expected one number a request")

    def percentile(self, part: float) -> float:
        """Seconds of latency that so many percent of the requests do not exceed, linear between neighbours."""
        return float(np.percentile(self.latency, part))


class Bench(Value, frozen=True):
    """A benchmark of plans of one bundle, which ran in turns; what `bench --export-times` writes.

    Attributes:
        bundle: SHA-256 of its manifest.
        machine, backend: what it ran on.
        batch: requests at once.
        warm_up: seconds of requests before, at least one of each plan.
        memory: bytes, the peak of the process in host memory, engines and frames included.
        plans: in the order in which they took turns.
        device_memory: bytes held on the GPU after the last request, by all processes; None: engines ran on the host.
        format_version: of this file.
    """

    bundle: str
    machine: str
    backend: str
    batch: int
    warm_up: float
    memory: int
    plans: tuple[PlanTimes, ...]
    device_memory: int | None = None
    format_version: int = 1


class ComparedSide(Value, frozen=True):
    """One of two plans.

    Attributes:
        label: what it was called.
        bundle: SHA-256 of the manifest.
        plan, method, full_steps, num_steps: of the plan.
        backend: what ran it.
        seconds: denoising loop of each sample.
        full_step, skipped_step: median seconds of a row; None: there is none.
    """

    label: str
    bundle: str
    plan: str
    method: str
    full_steps: tuple[int, ...]
    num_steps: int
    backend: str
    seconds: tuple[float, ...]
    full_step: float
    skipped_step: float | None


class Comparison(Value, frozen=True):
    """Two plans on the same prompts and seeds, in turns.

    Attributes:
        a, b: the sides.
        machine: what it ran on.
        samples: prompt and seed of each clip.
        psnr: dB of each clip of B against that of A; 100: identical.
        ssim: the same; None where frames are smaller than its window.
    """

    a: ComparedSide
    b: ComparedSide
    machine: str
    samples: tuple[tuple[str, int], ...]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...] | None

    @property
    def same_plan(self) -> bool:
        """Whether both have the same full steps of the same number."""
        return (self.a.full_steps, self.a.num_steps) == (self.b.full_steps, self.b.num_steps)

    @property
    def speedup(self) -> float:
        """Seconds of A / seconds of B, median over samples."""
        return float(np.median(np.array(self.a.seconds) / np.array(self.b.seconds)))


def summary_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, 5th percentile, worst of numbers of which more is better."""
    return float(np.mean(values)), float(np.percentile(values, 5)), min(values)
