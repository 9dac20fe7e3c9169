"""Runs step plans whole on numbered samples and scores what they make: the one place that does.

Two scores, both in dB and both against the same sample by the *reference*, an uncached run of the sampler at its own N
steps or at M:

    latents   10·log₁₀(‖x_N‖² / ‖x̂_N − x_N‖²), free of the VAE: what candidates are chosen by
    frames    PSNR of the decoded frames (`core.metrics.psnr`): the number that people know, for few plans; and what
              candidates are chosen by where the sampler has few steps. Plans are far from the reference there, and what
              is nearer in latents need not be nearer in frames

Finished runs are kept in journals, so that a killed evaluation goes on where it was; uncached runs are made once a
sample for all plans.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lemica_trt.calibrate.journal import Journal
from lemica_trt.calibrate.trajectories import Trajectories
from lemica_trt.calibrate.workers import InProcess, Workers, complete
from lemica_trt.core.metrics import Frames
from lemica_trt.core.progress import Quiet, Reporter, count
from lemica_trt.evaluate.runs import FrameScore, LatentScore, PlanRuns, TrialHeader, trial_header
from lemica_trt.evaluate.samples import Samples
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import FEW_STEPS
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.step_model import StepModel
from lemica_trt.ir.trials import TrialTable
from lemica_trt.planning.planner import select


class PlanEvaluator:
    """Runs plans on samples and compares them with an uncached run. Called with plans of one budget it chooses.

    Args:
        model: opens it, on its device; called when there is something to run.
        table: the model's sampler.
        samples: what plans run on.
        reference: the sampler of the uncached runs, where it has other steps than `table`.
        folder: where journals are kept, one for each combination of model, sampler, reference and samples; None: scores
            are kept in memory.
        trajectories: folder of uncached runs that may have been kept (`calibrate.trajectories`); None: none.
        reporter: told what is done.
        workers: run the plans; None: this process.
        target: whose uncached runs plans are compared with, of the same latents; None: the model's own.

    Attributes:
        samples: as given.
    """

    def __init__(
        self,
        model: Callable[[], StepModel],
        table: SamplerTable,
        samples: Samples,
        *,
        reference: SamplerTable | None = None,
        folder: Path | None = None,
        trajectories: Path | None = None,
        reporter: Reporter | None = None,
        workers: Workers | None = None,
        target: StepModel | None = None,
    ) -> None:
        self._target = target
        self.samples = samples
        self._open, self._table, self._reference = model, table, reference or table
        self._folder, self._trajectories = folder, trajectories
        self._reporter, self._given_workers = reporter or Quiet(), workers
        self._compared: set[int] = set()

    def __call__(self, plans: Sequence[StepPlan]) -> tuple[StepPlan, TrialTable]:
        """Choose the best of several plans by successive halving; see `planning.planner.select`."""
        budgets = "/".join(str(budget) for budget in sorted({plan.budget for plan in plans}))
        self._reporter.stage(
            "select",
            f"{len(plans)} candidates for {budgets} full steps, compared on "
            f"{count(self.samples.count, 'sample')} with {self._reference.num_steps} uncached steps",
        )
        if self._table.num_steps > FEW_STEPS:
            plan, trials = select(plans, self.samples.count, self.scores)
        else:
            plan, trials = select(plans, self.samples.count, self.psnrs, of="frames")
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
        """The same of one plan as `psnrs`."""
        (found,) = self.psnrs([plan], samples)
        return tuple(found)

    def psnrs(self, plans: Sequence[StepPlan], samples: range | None = None) -> list[list[float]]:
        """PSNR of the frames of each plan on each sample, dB; of the reference itself `PSNR_CAP`.

        Args:
            samples: their numbers; None: all.

        Raises:
            VerificationError: the reference is not finite. (A plan whose run is not scores 0.)
        """
        numbers = self._numbers(samples)
        book = self._complete(self._frame_book, plans, numbers, decoded=True)
        return [[book.entries[s, plan.rows_digest].decibels for s in numbers] for plan in plans]

    def clips(self, plan: StepPlan, samples: range | None = None) -> list[Frames]:
        """Clips by a plan, run now and in this process: uint8 [F, H, W, 3] each."""
        model = self._model
        return [model.frames(model.run(plan, *self.samples[s])) for s in self._numbers(samples)]

    def _numbers(self, samples: range | None) -> range:
        return range(self.samples.count) if samples is None else samples

    @functools.cached_property
    def _model(self) -> StepModel:
        return self._open()

    @functools.cached_property
    def _workers(self) -> Workers:
        return self._given_workers or InProcess(self._model)

    @functools.cached_property
    def _job(self) -> PlanRuns:
        return PlanRuns(self._reference, self.samples, self._trajectories, self._target)

    @functools.cached_property
    def _latent_book(self) -> Journal[LatentScore]:
        return Journal(self._journal("trials"), self._header, LatentScore)

    @functools.cached_property
    def _frame_book(self) -> Journal[FrameScore]:
        return Journal(self._journal("frames"), self._header, FrameScore)

    @functools.cached_property
    def _header(self) -> TrialHeader:
        return trial_header(self._model, self._table, self.samples, self._job.reference_plan(self._model), self._target)

    def _journal(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}-{self._header.digest[:16]}.jsonl"

    def _complete(
        self, book: Journal[Any], plans: Sequence[StepPlan], samples: range, *, decoded: bool
    ) -> Journal[Any]:
        units = {
            (s, plan, decoded): float(plan.budget + (self._reference_steps(s) if plan is plans[0] else 0))
            for s in samples
            for plan in plans
        }
        complete(
            book,
            units,
            lambda unit: [(unit[0], unit[1].rows_digest)],
            self._job,
            self._workers,
            self._reporter.advance,
        )
        self._compared |= set(samples)
        return book

    def _reference_steps(self, s: int) -> int:
        """Full steps of the uncached run of a sample that are still to be made."""
        known = s in self._compared or Trajectories(self._trajectories).files(
            self._target or self._model, self._reference, *self.samples[s]
        )
        return 0 if known else self._reference.num_steps
