"""A bundle's plans on its engines: what they make of numbered samples, and what that takes.

Every run serves twice: its latents are compared, and its denoising loop is timed. Plans run in turns, sample by sample,
so that a machine that drifts is the same to all of them. The first run of each plan waits for the device after every
row, which gives the times of rows; the others do not, and give the time of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy.typing as npt

from lemica_trt.evaluate.timing import RowSeconds, kinds_of, mean_of_kinds, row_by_row, seconds_of
from lemica_trt.ir.graphs import Role
from lemica_trt.ir.plan import StepPlan, uncached_of
from lemica_trt.ir.report import Timing
from lemica_trt.runtime.pipeline import Pipeline

Array = npt.NDArray[Any]


class Deployed:
    """Runs plans on the engines of a pipeline.

    Args:
        pipe: an open pipeline of the bundle.
        done: told of full steps that were run.
        quantized: graphs with quantised layers.

    Attributes:
        pipe, quantized: as given.
    """

    def __init__(self, pipe: Pipeline, done: Callable[[float], None], quantized: Sequence[Role] = ()) -> None:
        self.pipe, self.quantized, self._done = pipe, quantized, done
        self._kept: dict[tuple[str, str, int], Array] = {}
        self._rows: dict[str, tuple[float, RowSeconds]] = {}
        self._whole: dict[str, list[float]] = {}

    def know(self, plan: StepPlan, prompt: str, seed: int, latents: Array, run: tuple[float, RowSeconds]) -> None:
        """Take a run as made: the first of its plan."""
        self._kept[plan.name, prompt, seed], self._rows[plan.name] = latents, run

    def first_run(self, plan: StepPlan) -> tuple[float, RowSeconds]:
        """Seconds of the first run of a plan, and of its rows."""
        return self._rows[plan.name]

    def latents(self, plan: StepPlan, prompt: str, seed: int, *, keep: bool = False) -> Array:
        """One request: x_N, fp32 latent_shape.

        Args:
            keep: for the next call with the same arguments, which then runs nothing.
        """
        key = plan.name, prompt, seed
        found = self._kept.pop(key) if key in self._kept else self._run(plan, prompt, seed)
        if keep:
            self._kept[key] = found
        return found

    def _run(self, plan: StepPlan, prompt: str, seed: int) -> Array:
        pipe = self.pipe
        conditions = pipe.conditions_at(prompt, seed)
        noise = pipe.generator(seed).randn((1, *pipe.bundle.manifest.graphs.layout.latent_shape))
        results: list[Array] = []

        def request(**options: Any) -> None:
            seeds = [seed] if plan.stochastic else None
            results.append(pipe.latents(conditions, noise, plan=plan, seeds=seeds, **options))

        if plan.name in self._rows:
            self._whole.setdefault(plan.name, []).append(seconds_of(request))
        else:
            self._rows[plan.name] = row_by_row(request)
        self._done(plan.budget)
        latents: Array = results[0][0]
        return latents

    def decoded(self, plan: StepPlan, prompt: str, seed: int) -> Array:
        """The frames of one request: uint8 [F, H, W, 3]."""
        frames: Array = self.pipe.decode(self.latents(plan, prompt, seed))
        return frames

    def seconds(self, plan: StepPlan) -> tuple[float, ...]:
        """Seconds of each run of a plan but the first; of a single run that."""
        return tuple(self._whole.get(plan.name) or [self._rows[plan.name][0]])

    def full_step(self, plan: StepPlan) -> float:
        """Seconds of a full step of a plan that has run."""
        return mean_of_kinds(kinds_of([row for row in plan.rows if row.full]), self._rows[plan.name][1].full)

    def timing(self, plans: Sequence[StepPlan]) -> list[Timing]:
        """Times of plans that have run, those with the most full steps first."""
        uncached = uncached_of(plans)
        return [self._timing(plan, uncached) for plan in sorted(plans, key=lambda plan: -plan.budget)]

    def _timing(self, plan: StepPlan, uncached: StepPlan | None) -> Timing:
        whole, rows = self._rows[plan.name]
        step = self.full_step(plan)
        return Timing(
            plan=plan.name,
            budget=plan.budget,
            full_step=step,
            skipped_step=mean_of_kinds(kinds_of([row for row in plan.rows if row.cached]), rows.cached)
            if rows.cached
            else None,
            total=median(self.seconds(plan)),
            overhead=whole / (sum(rows.full) + sum(rows.cached)) - 1,
            ratio=whole / (plan.budget * step),
            speedup=None if uncached is None else self._speedup(plan, uncached),
        )

    def _speedup(self, plan: StepPlan, uncached: StepPlan) -> float:
        """Median of what the same samples took; N/B at most: what a busy machine shows beyond is none of the plan's."""
        pairs = list(zip(self._whole.get(uncached.name, ()), self._whole.get(plan.name, ())))
        pairs = pairs or [(self._rows[uncached.name][0], self._rows[plan.name][0])]  # of the first sample alone
        return min(median(before / after for before, after in pairs), plan.num_steps / plan.budget)
