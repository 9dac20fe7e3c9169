"""One sample: the uncached run, and every cached segment replayed on its saved states.

LeMiCa (NeurIPS 2025, arXiv 2511.00090, eq. 4): the error of edge (i, j) is the mean over the elements of
|x0_cached − x0_uncached|, where the cached run is the uncached one up to step i, skips with the trunk residual of
step i at each t, i < t < j – both branches of the guidance alike – and runs in full from j on. All of these steps are
of one kind (`SamplerRow.kind`): what one network adds to its stream does not stand in for another.

The segments of one start share their beginning: the chain of skipped steps behind i is run once, at every stop j a
run branches off it, and all runs of a wave of starts walk through the full steps side by side. A run is nothing but
its history, so that branching costs nothing. Steps are taken with the sampler's *table* (see `ir.sampler`), from
explicit histories; no scheduler has any state here. Where they run is the model's affair (`ir.step_model`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from lemica_trt.core.errors import VerificationError
from lemica_trt.ir.graphs import full_name
from lemica_trt.ir.plan import PlanRow, layout_from_plans
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.step_model import Beginning, Latents, StepInput, StepModel, StepOutput
from lemica_trt.planning.step_plan import plan_from_schedule

T = TypeVar("T")


class Run(NamedTuple):
    """The history of one run, newest first, zeros where there is none yet: fp32 latent_shape each."""

    latents: tuple[Latents, ...]
    outputs: tuple[Latents, ...]


class Uncached(NamedTuple):
    """The uncached run of a sample.

    Attributes:
        runs: the history before each step 0 … N.
        final: x_N, fp32 latent_shape.
    """

    runs: tuple[Run, ...]
    final: Latents


class Stepper:
    """Takes steps of a sampler on a model, many runs at once.

    Args:
        model: in PyTorch, or on engines.
        table: the sampler.
        batch: the most latents in one call of the DiT (each is two samples under guidance).

    Attributes:
        model, table, batch: as given.
        layout: what the steps read and give.
        ends: for each step the last one behind it up to which all are of its kind: a chain of skipped steps ends there.
        skipped: rows 0 … N; but for the first of each kind and the last they read the residual.
        full: rows 0 … N − 1 that compute everything.
    """

    def __init__(self, model: StepModel, table: SamplerTable, batch: int) -> None:
        self.model, self.table, self.batch = model, table, batch
        self.guidance_scale = model.profile.sampling.guidance_scale
        plan = plan_from_schedule(
            Schedule(num_steps=table.num_steps, full_steps=(0, *table.switches)),
            table,
            name="replay",
            guidance_scale=self.guidance_scale,
            method="none",
        )
        self.layout = layout_from_plans([plan], latent_shape=model.latent_shape, guided=model.guided)
        self.skipped = plan.rows
        self.full = [
            msgspec.structs.replace(row, variant=full_name(kind), caches=())
            for row, kind in zip(plan.rows, table.kinds)
        ]
        last = [switch - 1 for switch in table.switches] + [table.num_steps - 1]
        self.ends = [next(end for end in last if end >= i) for i in range(table.num_steps)]
        self.take = model.steps(self.layout)

    def sample(self, name: str, prompt: str, seed: int) -> Sample:
        """Fix what all runs of one sample share: prompt, initial noise, and the fresh noise of each step."""
        begun = self.model.begin(prompt, seed)
        start = next(begun.noises)
        fresh = {i: next(begun.noises) for i, row in enumerate(self.table.rows) if row.noise != 0.0}
        return Sample(self, name, begun, start, fresh)


Visit = Callable[[int, int, Run, Run], None]
"""Called with a segment (i, j), the history behind which its chain reaches step j, and the uncached one there."""


class Sample:
    """One prompt and seed; see `Stepper.sample`.

    Args:
        stepper: takes the steps.
        name: for messages.
        begun: its prompt.
        noise: x_{−1}, fp32 latent_shape.
        fresh: step → z, fp32 latent_shape; the same for every run, as eq. 4 needs it.

    Attributes:
        name: as given.
        full_count, skip_count: evaluations made so far, counted for one latent, both branches of the guidance together.
    """

    def __init__(
        self, stepper: Stepper, name: str, begun: Beginning, noise: Latents, fresh: dict[int, Latents]
    ) -> None:
        self._stepper = stepper
        self.name = name
        self.full_count = self.skip_count = 0
        self._conditions = begun.conditions
        self._fresh = fresh
        layout = stepper.layout
        blank = np.zeros_like(noise)
        self._begin = Run((noise, *[blank] * (layout.latent_history - 1)), (blank,) * layout.output_history)

    @property
    def model(self) -> StepModel:
        return self._stepper.model

    @property
    def table(self) -> SamplerTable:
        return self._stepper.table

    def uncached(self) -> Uncached:
        """Run all steps in full, one latent a call.

        Raises:
            VerificationError: latents are not finite; says at which step.
        """
        runs = [self._begin, *(run for run, _ in self._walk())]
        return Uncached(tuple(runs), self._end(runs[-1]))

    def trace(self, max_skip: int, visit: Visit) -> Uncached:
        """The uncached run with the chains of skipped steps of all starts beside it.

        Each full step is run once: its residual serves the chain that begins there, and is dropped with it. So K
        residuals are held at a time, whatever N is.

        Args:
            max_skip: K.
            visit: called for every segment, j rising.

        Raises:
            VerificationError: as `uncached`.
        """
        chains: dict[int, Run] = {}
        residuals: dict[int, Any] = {}
        runs = [self._begin]
        for t, (run, residual) in enumerate(self._walk()):
            chains = dict(zip(chains, self.skip(t, list(chains.values()), list(residuals.values()))))
            chains[t], residuals[t] = run, residual
            runs.append(run)
            for i in list(chains):
                if t > i:
                    visit(i, t + 1, chains[i], run)
                if t == min(i + max_skip, self._stepper.ends[i]):
                    del chains[i], residuals[i]
        return Uncached(tuple(runs), self._end(runs[-1]))

    def _walk(self) -> Iterator[tuple[Run, Any]]:
        """The uncached run behind each step 0 … N − 1, with the step's residual."""
        run = self._begin
        for t in range(self.table.num_steps):
            run, residual = self.full(t, [run])[0]
            self._check(run.latents[0], t)
            yield run, residual

    def _end(self, run: Run) -> Latents:
        """x_N of the uncached run."""
        end = self.table.num_steps
        final = self.combine(end, [run])[0]
        self._check(final, end)
        return final

    def _check(self, latents: Latents, t: int) -> None:
        if not np.isfinite(latents).all():
            raise VerificationError(
                f"{self.name}, the uncached run: expected finite latents, got NaN or infinity at step {t}",
                fix="build with another dtype (--dtype fp32 or bf16), or check the model's weights",
            )

    def errors(self, uncached: Uncached, starts: Sequence[int], max_skip: int) -> dict[int, list[float]]:
        """Eq. 4 for all segments that begin at these starts.

        Args:
            uncached: of this sample.
            starts: rising.
            max_skip: K.

        Returns:
            Start i → errors of the stops i + 2 … min(i + K + 1, N). Not checked for NaN.
        """
        end = self.table.num_steps
        chains: dict[int, Run] = {}  # start → the run that has only skipped since
        residuals: dict[int, Any] = {}
        branches: dict[tuple[int, int], Run] = {}  # (start, stop) → the run that is full again
        for t in range(starts[0], end + 1):
            for i, run in list(chains.items()):
                if t >= i + 2:
                    branches[i, t] = run
                if t == min(i + max_skip, self._stepper.ends[i]) + 1:
                    del chains[i], residuals[i]
            if t == end:
                break
            branches = dict(zip(branches, (run for run, _ in self.full(t, list(branches.values())))))
            chains = dict(zip(chains, self.skip(t, list(chains.values()), list(residuals.values()))))
            if t in starts:
                chains[t], residuals[t] = self.full(t, [uncached.runs[t]])[0]
        finals = self.combine(end, list(branches.values()))
        errors: dict[int, list[float]] = {i: [] for i in starts}
        for (i, _), final in sorted(zip(branches, finals), key=lambda item: item[0]):
            errors[i].append(distance(final, uncached.final))
        return errors

    def roll_out(self, branches: Mapping[tuple[int, int], Run]) -> dict[tuple[int, int], Latents]:
        """Run branches in full to the end, side by side.

        Args:
            branches: segment (i, j) → history behind which its run goes on at step j; at least one.

        Returns:
            Segment → x_N of its run, fp32 latent_shape.
        """
        end = self.table.num_steps
        waiting, runs = dict(branches), dict[tuple[int, int], Run]()
        for t in range(min(j for _, j in branches), end):
            runs |= {segment: waiting.pop(segment) for segment in branches if segment[1] == t}
            runs = dict(zip(runs, (run for run, _ in self.full(t, list(runs.values())))))
        runs |= waiting  # of stop N: nothing is left to run
        return dict(zip(runs, self.combine(end, list(runs.values()))))

    def full(self, t: int, runs: Sequence[Run]) -> list[tuple[Run, Any]]:
        """Step t in full: the runs one step on, and each one's trunk residual, the model's own."""
        self.full_count += len(runs)
        found = self._take(self._stepper.full[t], runs)
        return [(_stepped(run, result), result.residual) for run, result in zip(runs, found)]

    def skip(self, t: int, runs: Sequence[Run], residuals: Sequence[Any]) -> list[Run]:
        """Step t with each run's residual in place of the trunk: the runs one step on."""
        self.skip_count += len(runs)
        return [_stepped(*each) for each in zip(runs, self._take(self._stepper.skipped[t], runs, residuals))]

    def combine(self, t: int, runs: Sequence[Run]) -> list[Latents]:
        """Only the latents of the last step, t = N: fp32 latent_shape each."""
        return [result.latents for result in self._take(self._stepper.skipped[t], runs)]

    def _take(self, row: PlanRow, runs: Sequence[Run], residuals: Sequence[Any] | None = None) -> list[StepOutput]:
        """A row of several runs, as many in a call as `batch` allows."""
        stepper, noise = self._stepper, self._fresh.get(row.step)
        residuals = [None] * len(runs) if residuals is None else residuals
        given = [
            StepInput(self._conditions, run.latents, run.outputs, noise=noise, residual=residual)
            for run, residual in zip(runs, residuals)
        ]
        parts = [stepper.take(row, part, stepper.guidance_scale) for part in _parts(given, stepper.batch)]
        return [result for part in parts for result in part]


def distance(final: Latents, uncached: Latents) -> float:
    """Eq. 4: the mean absolute difference of two x_N, summed in float64."""
    return float(np.abs(final - uncached).mean(dtype=np.float64))


def _parts(items: Sequence[T], batch: int) -> list[Sequence[T]]:
    """Cut into as few parts as `batch` allows, as even as can be."""
    count = -(-len(items) // batch)
    return [items[len(items) * k // count : len(items) * (k + 1) // count] for k in range(count)]


def _stepped(run: Run, result: StepOutput) -> Run:
    """Put a step's results in front of a run's history, and let the oldest go."""
    return Run((result.latents, *run.latents[:-1]), (result.output, *run.outputs[:-1]))
