"""A pipeline's own loop as what calibration runs: samples that are recorded, and runs that are driven row by row.

A sample is one call of the pipeline: a prompt, and a seed for its noise. What the loop does beside the scheduler –
guidance, packing, conditions – is the pipeline's, and stays in its call.

Driven runs of several samples walk side by side. Each is a call in a thread of its own, which waits in the scheduler
until it is given its next row; one of them computes at a time.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lemica_trt.calibrate.replay import Run, Uncached, Visit
from lemica_trt.core.errors import UnsupportedError, VerificationError
from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.step_model import Latents
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.pipelines.branches import BranchOutputs
from lemica_trt.pipelines.scheduler import History, PlanScheduler, combination

INJECTED = 0.02
"""Largest deviation of latents from those that a pipeline was given, relative to the largest: it may round them."""

Ran = Callable[[], None]
"""Called behind each evaluation of the transformer for one sample."""


class NoMiddle(UnsupportedError):
    """A loop cannot begin in the middle: the pipeline takes no latents, or makes others of them."""


class _Stop(BaseException):
    """Ends a call of a pipeline from within its scheduler."""


class LoopScheduler(PlanScheduler):
    """A plan scheduler that keeps everything, and can be looked into while the loop runs.

    Args:
        own: the pipeline's scheduler, which is known to be the plan's sampler.
        start: row that the loop begins with, on latents that it is given.
        before: latents and outputs behind which that row begins, newest first, on the device of the loop.
        depths: of the history; None: all is kept.
        branches: where guidance terms come from; None: there are none.
        ready: called when the loop is about to begin.
        behind: called behind each evaluation; what it returns, if anything, runs in place of the next row.
    """

    def __init__(
        self,
        plan: StepPlan,
        own: Any,
        *,
        start: int = 0,
        before: tuple[list[Tensor], list[Tensor]] | None = None,
        depths: tuple[int, int] | None = None,
        branches: BranchOutputs | None = None,
        ready: Callable[[], object] = lambda: None,
        behind: Callable[[], PlanRow | None] = lambda: None,
    ) -> None:
        self._before, self._ready, self._behind = before, ready, behind
        self._depths = depths or (2 * len(plan.rows), 2 * len(plan.rows))
        super().__init__(plan, own)
        self._checked = True
        if branches is not None:
            self.see_branches(branches)
        self._rows = self._rows[start:]
        if start:
            self.init_noise_sigma = 1.0

    @property
    def history(self) -> History:
        """Of the call under way, or the last."""
        return self._history

    @property
    def sample(self) -> Tensor:
        """The latents that the loop was given last, in its own dtype."""
        assert self._returned is not None
        return self._returned

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._ready()

    set_timesteps.__signature__ = inspect.signature(PlanScheduler.set_timesteps)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: object) -> Any:
        raise UnsupportedError("the pipeline copies its scheduler: several latents at a time cannot be fitted to")

    def _begin(self) -> History:
        super()._begin()
        history = History((*self._depths, 1))
        if self._before is not None:
            history.latents[:], history.outputs[:] = self._before
        return history

    def _next_row(self) -> PlanRow:
        row = super()._next_row()
        return self._behind() or row


class Loop:
    """A pipeline's calls; a context manager, behind which the pipeline is as it was.

    Args:
        pipe: with a scheduler of its own.
        samples: what each call is given beyond `arguments`, by keyword.
        seed: of sample 0; sample s has seed + s.
        arguments: of every call.
    """

    def __init__(
        self, pipe: Any, samples: Sequence[Mapping[str, Any]], seed: int, arguments: Mapping[str, Any]
    ) -> None:
        self._pipe, self._samples, self._seed = pipe, samples, seed
        takes = inspect.signature(type(pipe).__call__).parameters
        self._arguments = ({"output_type": "latent"} if "output_type" in takes else {}) | dict(arguments)
        self.takes_latents = "latents" in takes
        self.own = pipe.scheduler

    def __enter__(self) -> Loop:
        self._bars = dict(getattr(self._pipe, "_progress_bar_config", {}))
        self._pipe.set_progress_bar_config(**{**self._bars, "disable": True})
        return self

    def __exit__(self, *_: object) -> None:
        self.use(self.own)
        self._pipe.set_progress_bar_config(**self._bars)

    def branches(self) -> BranchOutputs:
        """Hooks that see the branches of the guidance, to be removed behind their use."""
        return BranchOutputs(self._pipe)

    def use(self, scheduler: Any) -> None:
        """Let the pipeline's loop find this scheduler."""
        self._pipe.scheduler = scheduler

    def call(self, number: int, scheduler: Any, **more: Any) -> None:
        """One call of the pipeline; what comes of it is in the scheduler."""
        self.use(scheduler)
        generator = torch.Generator("cpu").manual_seed(self._seed + number)
        self._pipe(**{**self._arguments, **self._samples[number], "generator": generator, **more})

    def table(self) -> SamplerTable:
        """The sampler, set as the pipeline sets it; a call that ends before its loop.

        Raises:
            UnsupportedError: the sampler is not linear, or the pipeline sets no timesteps.
        """
        probe = copy.deepcopy(self.own)

        @functools.wraps(probe.set_timesteps)
        def set_timesteps(*args: Any, device: Any = None, **kwargs: Any) -> None:
            del probe.set_timesteps
            probe.set_timesteps(*args, **kwargs)
            raise _Stop

        probe.set_timesteps = set_timesteps
        try:
            self.call(0, probe)
        except _Stop:
            if hasattr(probe, "set_begin_index"):
                probe.set_begin_index(0)
            return sampler_table(probe, dynamic_guidance=bool(self._arguments.get("use_dynamic_cfg")))
        raise UnsupportedError(f"expected {type(self._pipe).__name__} to call scheduler.set_timesteps, it did not")


class RecordedSample:
    """One sample as calibration measures it (`calibrate.estimate.Traced`); skipped steps reuse the last output.

    Args:
        plan: uncached.
        table: its sampler.
        ran: see `Ran`.

    Attributes:
        full_count, skip_count: see `Traced`.
    """

    def __init__(self, loop: Loop, number: int, plan: StepPlan, table: SamplerTable, ran: Ran) -> None:
        self._loop, self._number, self._plan, self._table, self._ran = loop, number, plan, table, ran
        self.full_count = self.skip_count = 0
        self._latents: list[Latents] = []
        self._outputs: list[Latents] = []

    def _record(self) -> None:
        """Run uncached; once."""
        if self._latents:
            return
        scheduler = LoopScheduler(self._plan, self._loop.own, behind=self._counted)
        self._loop.call(self._number, scheduler)
        self._latents = on_host(scheduler.history.latents)[::-1]  # x_{−1} … x_N
        self._outputs = on_host(scheduler.history.outputs)[::-1]
        self._like = scheduler.sample
        if not all(np.isfinite(latents).all() for latents in self._latents):
            raise VerificationError(f"sample {self._number}, the uncached run: expected finite latents")

    @property
    def path(self) -> list[Latents]:
        """Latents of the uncached run at each of the N steps and at the end: fp32."""
        self._record()
        return self._latents[1:]

    def drop_outputs(self) -> None:
        """Keep the path only: there is nothing left to trace."""
        self._outputs.clear()

    def trace(self, max_skip: int, visit: Visit) -> Uncached:
        """The uncached run, and the chains of skipped steps of all starts, which run nothing."""
        self._record()
        rows, end, latents, outputs = self._plan.rows, self._table.num_steps, self._latents, self._outputs
        blank = np.zeros_like(latents[0])
        begin = Run((latents[0], *[blank] * (self._table.latent_history - 1)), (blank,) * self._table.output_history)
        chains: dict[int, Run] = {}
        runs = [begin]
        for t in range(end):
            for i, chain in chains.items():
                chains[i] = _stepped(chain, combined(rows[t], chain), outputs[i])
                self.skip_count += 1
            chains[t] = _stepped(runs[t], latents[t + 1], outputs[t])
            runs.append(chains[t])
            for i in list(chains):
                if t > i:
                    visit(i, t + 1, chains[i], runs[-1])
                if t == min(i + max_skip, end - 1):
                    del chains[i]
        return Uncached(tuple(runs), latents[-1])

    def roll_out(self, branches: Mapping[tuple[int, int], Run]) -> dict[tuple[int, int], Latents]:
        """Run branches to the end: calls that begin at their stop, on latents that the pipeline is given.

        Raises:
            NoMiddle: see there.
        """
        self._record()
        rows, end, like = self._plan.rows, self._table.num_steps, self._like
        found: dict[tuple[int, int], Latents] = {}
        for (i, j), run in branches.items():
            latents = found[i, j] = combined(rows[j], run)
            if j == end:
                continue
            if not self._loop.takes_latents:
                raise NoMiddle("the pipeline takes no latents")
            before = _tensors(run.latents, like.device), _tensors(run.outputs, like.device)
            scheduler = LoopScheduler(self._plan, self._loop.own, start=j, before=before, behind=self._counted)
            try:
                self._loop.call(self._number, scheduler, latents=torch.from_numpy(latents).to(like))
            except (TypeError, ValueError) as error:
                raise NoMiddle(f"the pipeline does not take its own latents: {error}") from error
            entered, final = on_host([scheduler.history.latents[end - j], scheduler.history.latents[0]])
            if not np.abs(entered - latents).max() <= INJECTED * np.abs(latents).max():
                raise NoMiddle("the pipeline makes other latents of those that it is given")
            found[i, j] = final
        return found

    def _counted(self) -> None:
        self.full_count += 1
        self._ran()


class DrivenRun:
    """One sample under a plan whose rows come one by one (`calibrate.fit.Run`).

    Args:
        plan: B full rows and the last.
        depths: of the histories.
        branches: where guidance terms come from; None: the branches are not weighed apart.

    Attributes:
        number: as given.
        latents, outputs, guidance_terms: see `Run`.
    """

    def __init__(
        self,
        loop: Loop,
        number: int,
        plan: StepPlan,
        depths: tuple[int, int],
        branches: BranchOutputs | None = None,
    ) -> None:
        self._loop, self.number = loop, number
        self._given: SimpleQueue[PlanRow | None] = SimpleQueue()
        self._reports: SimpleQueue[BaseException | None] = SimpleQueue()
        self._scheduler = LoopScheduler(
            plan, loop.own, depths=depths, branches=branches, ready=self._wait, behind=self._wait
        )
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._listen()  # it has encoded its prompt, and is about to begin

    @property
    def latents(self) -> list[Latents]:
        return on_host(self._scheduler.history.latents)

    @property
    def outputs(self) -> list[Latents]:
        return on_host(self._scheduler.history.outputs)

    @property
    def guidance_terms(self) -> list[Latents]:
        return on_host(self._scheduler.history.guidance_terms)

    def __call__(self, row: PlanRow) -> None:
        """Take the row: its latents, and the transformer on them unless it is the last."""
        self._loop.use(self._scheduler)
        self._given.put(row)
        self._listen()

    def close(self) -> None:
        """End the call, wherever it is."""
        self._given.put(None)
        self._thread.join()

    def _listen(self) -> None:
        report = self._reports.get()
        if report is not None:
            self._thread.join()
            raise report

    def _wait(self) -> PlanRow:
        self._reports.put(None)
        row = self._given.get()
        if row is None:
            raise _Stop
        return row

    def _work(self) -> None:
        try:
            self._loop.call(self.number, self._scheduler)
        except _Stop:
            return
        except BaseException as error:  # it is raised where the reports are read
            self._reports.put(error)
        else:
            self._reports.put(None)


def on_host(tensors: Sequence[Tensor]) -> list[Latents]:
    """Latents of a pipeline as calibration has them, fp32."""
    return [tensor.cpu().numpy() for tensor in tensors]


def combined(row: PlanRow, run: Run) -> Latents:
    """`combination` of what is on the host."""
    found: Latents = combination(row, _tensors(run.latents), _tensors(run.outputs)).numpy()
    return found


def _tensors(arrays: Sequence[Latents], device: torch.device | None = None) -> list[Tensor]:
    return [torch.from_numpy(array).to(device) for array in arrays]


def _stepped(run: Run, latents: Latents, output: Latents) -> Run:
    return Run((latents, *run.latents[:-1]), (output, *run.outputs[:-1]))
