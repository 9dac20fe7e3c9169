"""What verification and diagnosis find, as values."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import UNSET, UnsetType

from lemica_trt.core.metrics import margin_95
from lemica_trt.core.values import Value
from lemica_trt.ir.budget import FrontRow, StepTimes
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.measured import MeasuredPlans
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Profile


class Timing(Value, frozen=True):
    """Wall-clock time of one plan, one request, seconds.

    Attributes:
        plan: its name.
        budget: full steps.
        full_step, skipped_step: median of a row that runs the full or the skip graph; None where there is none.
        total: the whole denoising loop, median of the runs but the first; of a single run that.
        overhead: what a run takes beyond its full and skipped steps, as a fraction of them: of the first run, which
            waits for the device after every row, its whole time against its own rows.
        ratio: of the same run, whole time / (budget · its median full step): 1 would be skipping at no cost at all.
        speedup: time of the uncached plan / time of this one on the same samples, the median, N/B at most; None where
            the bundle has no uncached plan.
    """

    plan: str
    budget: int
    full_step: float
    skipped_step: float | None
    total: float
    overhead: float
    ratio: float
    speedup: float | None


class Measured(Value, frozen=True):
    """Step times, and what they are of; `reports/step_times.json`.

    Attributes:
        machine: see there.
        backend: see `backend_name`.
        steps: the times.
    """

    machine: str
    backend: str
    steps: StepTimes


PLAN = "plan"
"""The method of a bundle's own plan in a `Quality`."""


GRAPH_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-1}
"""Largest difference between an engine and its torch module, as a part of the largest number in the result."""


ONE_LEVEL = 1.0
"""Frames are rounded to 8 bits: what lies on the edge between two levels may fall to either side."""


RUN_TOLERANCE = 1e-4
"""Largest absolute difference of final latents in fp32. A whole run amplifies rounding, so that half precision runs
are held to the quality of their frames instead: `HALF_PSNR`."""


HALF_PSNR = 30.0
"""Half precision: lowest PSNR (dB) of frames decoded from a whole run against the same run in PyTorch."""


QUANTIZED_PSNR = 20.0
"""The same of quantised linear layers: an error of a tenth of the range, root mean square, on average. It finds engines
that are broken, and says nothing of quality: that is what `quality` has of the uncached plan, on held-out clips."""


class GraphCheck(Value, frozen=True):
    """One graph against its torch module on random input.

    Attributes:
        role: of the graph.
        difference: largest absolute difference over all outputs.
        scale: largest absolute number in the torch result.
    """

    role: str
    difference: float
    scale: float


class Agreement(Value, frozen=True):
    """One whole run against another.

    Attributes:
        plan: its name.
        against: `diffusers` or `torch`.
        difference: largest absolute difference of the final latents.
        psnr: of the decoded frames, dB.
    """

    plan: str
    against: str
    difference: float
    psnr: float


class FirstRun(Value, frozen=True):
    """What a verification found of the engines and the uncached plan, which another one of the same need not run again.

    Attributes:
        backend: and its version.
        prompt, seed: of the run.
        graphs: each compared with PyTorch.
        agreement: of the uncached plan.
        seconds: of its run.
        rows: seconds of each of its steps.
    """

    backend: str
    prompt: str
    seed: int
    graphs: tuple[GraphCheck, ...]
    agreement: Agreement
    seconds: float
    rows: tuple[float, ...]


class Quality(Value, frozen=True):
    """Held-out quality of a bundle's plan, or of another method that spends the same budget.

    Attributes:
        plan: the bundle's plan, or the plan whose budget a baseline has.
        method: `PLAN`, or see `evaluate.baselines.baselines`.
        budget: full steps.
        psnr, ssim: mean over clips (dB; 1 is best).
        psnr_p5, ssim_p5: 5th percentile over clips.
        lpips: mean over clips; None where the lpips package or its weights are not here.
        each_psnr: one a clip, so that two methods can be compared clip by clip.
        reference_steps: M, where this is against the sampler with M steps; None: against the uncached plan.
    """

    plan: str
    method: str
    budget: int
    psnr: float
    psnr_p5: float
    ssim: float
    ssim_p5: float
    lpips: float | None
    each_psnr: tuple[float, ...]
    reference_steps: int | None = None

    @property
    def psnr_margin(self) -> float | None:
        """dB: the 95 % interval of the mean is `psnr` ± this (Student's t); None for a single clip."""
        return margin_95(self.each_psnr)

    @property
    def psnr_worst(self) -> float:
        """dB of the worst clip."""
        return min(self.each_psnr)


class ShapeSummary(Value, frozen=True):
    """A further shape of a bundle, for people.

    Attributes:
        name: `FRAMESxHEIGHTxWIDTH`.
        held: plans that hold there, and what was measured; of the uncached one nothing.
        refused: the others, and why.
    """

    name: str
    held: dict[str, str]
    refused: dict[str, str]


class BundleSummary(NamedTuple):
    """What a bundle is, for people.

    Attributes:
        profile, revision: of the model.
        dtype: of the graphs.
        plans: all, the default one among them.
        default_plan: its name.
        engines: of all backends.
        size, files: bytes, and how many.
        versions: of the libraries that built it.
        pictures: path in the bundle → what it shows.
        measured: what is known of the plans on the bundle's engines.
        image, last_image: whether requests need one.
        changeable: weights that LoRA weights can be added to without a build; 0: none.
        further: shapes beside that of the profile.
    """

    profile: Profile
    revision: str | None
    dtype: str
    plans: tuple[StepPlan, ...]
    default_plan: str
    engines: tuple[EngineEntry, ...]
    size: int
    files: int
    versions: dict[str, str]
    pictures: dict[str, str]
    measured: MeasuredPlans = MeasuredPlans()
    image: bool = False
    changeable: int = 0
    further: tuple[ShapeSummary, ...] = ()
    last_image: bool = False

    @property
    def default(self) -> StepPlan:
        """The default plan."""
        return next(plan for plan in self.plans if plan.name == self.default_plan)


class VerifyReport(Value, frozen=True):
    """Everything that was verified, `reports/verify.json`.

    Attributes:
        manifest_digest: SHA-256 of the bundle's manifest: what all this is of.
        samples: held-out clips behind `quality`.
        machine: what it ran on.
        backend: backend and version.
        graphs, agreement, quality, timing: see there.
        steps: what budgets in seconds are made from; None in reports of versions before there were any.
        precision: of the linear layers of the DiT, where they are quantised: those graphs are compared with PyTorch in
            whole runs alone, `quality` is against the uncached run in PyTorch and has the uncached plan, too. Baselines
            run in PyTorch, in `dtype`.
    """

    manifest_digest: str
    samples: int
    machine: str
    backend: str
    dtype: str
    graphs: tuple[GraphCheck, ...]
    agreement: tuple[Agreement, ...]
    quality: tuple[Quality, ...]
    timing: tuple[Timing, ...]
    steps: StepTimes | None = None
    precision: str | UnsetType = UNSET

    @property
    def lowest_psnr(self) -> float:
        """That frames of a whole run must have, dB."""
        return HALF_PSNR if self.precision is UNSET else QUANTIZED_PSNR

    def failures(self) -> list[str]:
        """What is not as it must be; empty when all is well. A number that is not finite fails every comparison."""
        found = []
        compared = {run.plan for run in self.agreement}
        found += [
            f"plan {timing.plan} was compared with nothing" for timing in self.timing if timing.plan not in compared
        ]
        for graph in self.graphs:
            limit = max(GRAPH_TOLERANCE[self.dtype] * max(graph.scale, 1.0), ONE_LEVEL * (graph.role == "vae_decoder"))
            if not graph.difference <= limit:
                found.append(f"graph {graph.role} differs from PyTorch by {graph.difference:.1e}, allowed {limit:.1e}")
        for run in self.agreement:
            if self.dtype == "fp32" and self.precision is UNSET and not run.difference <= RUN_TOLERANCE:
                found.append(
                    f"plan {run.plan} differs from {run.against} by {run.difference:.1e}, allowed {RUN_TOLERANCE:.0e}"
                )
            if not run.psnr >= self.lowest_psnr:
                found.append(
                    f"frames of plan {run.plan} have {run.psnr:.1f} dB against {run.against}, {self.lowest_psnr} needed"
                )
        return found


class Check(Value, frozen=True):
    """One line of `doctor`.

    Attributes:
        what: what was looked for.
        found: what there is, or what to do.
        ok: False: something is missing; None: merely told.
    """

    what: str
    found: str
    ok: bool | None = None


class Speed(Value, frozen=True):
    """Time of one request's denoising loop.

    Attributes:
        seconds: of the loop.
        speedup: against the uncached plan.
    """

    seconds: float
    speedup: float


class BudgetOutcome(Value, frozen=True):
    """A budget that is not a number of full steps, and the plan that was made for it.

    Attributes:
        asked: in words.
        plan: its name.
        full_steps: B.
        predicted: from the times of single steps; None where those are not known.
        measured: of the whole plan; None where its engines do not run here.
        quality: of the plan on validation clips, where they were run.
        met: whether what was measured is within what was asked; None where nothing was measured.
    """

    asked: str
    plan: str
    full_steps: int
    predicted: Speed | None
    measured: Speed | None
    quality: FrontRow | None
    met: bool | None


class StageEstimate(Value, frozen=True):
    """One stage of a build that has not run yet; estimates, None where there is none.

    Attributes:
        name: of the stage.
        what: what it would do.
        full_steps: of the DiT that it would run, both branches of the guidance together.
        samplings: uncached samplings that are as many steps.
        seconds: wall-clock time on this machine.
        disk, memory: bytes; memory is the peak of the process.
    """

    name: str
    what: str
    full_steps: float = 0.0
    samplings: float = 0.0
    seconds: float | None = None
    disk: int | None = None
    memory: int | None = None
