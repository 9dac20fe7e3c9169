"""Requests that run together.

Answers are the same bits whatever shares the batch: `Batches` measures at load whether the engines give every request
the same bits in a batch as alone, and runs requests one by one where they do not. It runs them one by one, too, where
shapes follow the prompt: not every length can be measured, and requests of other lengths have no batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from lemica_trt.backends.base import Array, decode, encode
from lemica_trt.core.errors import UsageError
from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.runtime.denoise import Cancelled, OnStep, RowDone
from lemica_trt.runtime.pipeline import Pipeline
from lemica_trt.triton.server.requests import DenoiseJob


class Batches:
    """Runs jobs together where that changes no bit of any result.

    Args:
        pipeline: with the engines of the denoising steps.
        rule: `exact`: together if measured equal, else one by one; `off`: one by one.

    Attributes:
        size: most jobs in one engine batch.
    """

    def __init__(self, pipeline: Pipeline, rule: str = "exact") -> None:
        if rule not in ("exact", "off"):
            raise UsageError(f"batching must be exact or off, got {rule!r}")
        self._pipeline = pipeline
        graphs = pipeline.bundle.manifest.graphs
        self._layout = graphs.layout
        self.plans = {name: pipeline.bundle.plan(name) for name in pipeline.bundle.plans}
        self.size = self.equal_up_to(graphs.max_batch) if rule == "exact" and not self._layout.text_axes else 1

    def warm_up(self) -> None:
        """Run every plan's first rows, until each graph has run; all its rows are bound.

        Raises:
            LemicaError: an engine does not run.
        """
        for plan in self.plans.values():
            last = len(_first_rows(plan).rows) - 2

            def stop(row: RowDone, last: int = last) -> None:
                if row.index >= last:
                    raise Cancelled

            with suppress(Cancelled):
                self.run([self._probe(plan, 0)], on_step=stop)

    def equal_up_to(self, largest: int) -> int:
        """The largest batch b ≤ `largest` such that batches of 2 … b give the bits of batches of 1.

        Measured on the first rows of each plan until every graph has run, on normal noise. Which numbers are added in
        which order does not depend on their values, so that another order shows in the last places of such numbers.
        """
        plans = [_first_rows(plan) for plan in self.plans.values()]
        jobs = {id(plan): [self._probe(plan, seed) for seed in range(largest)] for plan in plans}
        alone = {id(plan): [self.run([job])[0] for job in jobs[id(plan)]] for plan in plans if largest > 1}
        for size in range(2, largest + 1):
            for plan in plans:
                together = self.run(jobs[id(plan)][:size])
                if not all(np.array_equal(one, other) for one, other in zip(together, alone[id(plan)])):
                    return size - 1
        return largest

    def groups(self, jobs: Sequence[DenoiseJob]) -> list[list[DenoiseJob]]:
        """Jobs that may run together: one plan, at most `size`; in order of arrival."""
        groups: list[list[DenoiseJob]] = []
        for job in jobs:
            for group in groups:
                if group[0].plan is job.plan and len(group) < self.size:
                    group.append(job)
                    break
            else:
                groups.append([job])
        return groups

    def run(self, jobs: Sequence[DenoiseJob], on_step: OnStep | None = None) -> Array:
        """Latents of jobs of one plan, float32 [b, *latent_shape]; a stochastic plan draws from each job's seed."""
        guided = self._layout.guided
        return self._pipeline.latents(
            {name: _stacked([job.conditions[name] for job in jobs]) for name in jobs[0].conditions},
            np.stack([self._pipeline.generator(job.seed).randn(self._layout.latent_shape) for job in jobs]),
            guidance_scale=np.array([job.guidance_scale for job in jobs], np.float64) if guided else None,
            plan=jobs[0].plan,
            seeds=[job.seed for job in jobs],
            on_step=on_step,
        )

    def _probe(self, plan: StepPlan, seed: int) -> DenoiseJob:
        """Normal noise as conditions, ones where they are whole numbers; texts as long as can be."""
        random = np.random.default_rng(seed)
        conditions = {}
        for spec in self._layout.conditions:
            numbers = np.ones(spec.at(1)) if spec.dtype in ("int64", "int32") else random.standard_normal(spec.at(1))
            conditions[spec.name] = decode(encode(numbers, spec.dtype), spec.dtype)
        return DenoiseJob(conditions, plan, seed, plan.guidance_scale + seed)


def _stacked(rows: Sequence[Array]) -> Array:
    """A condition of several requests, each [1 or 2, …]: the rows of the negative prompts first."""
    return np.concatenate([*(each[:-1] for each in rows), *(each[-1:] for each in rows)])


def _first_rows(plan: StepPlan) -> StepPlan:
    """The rows of a plan until each kind of row has run, closed by a row that gives the latents."""
    kinds = {row.variant for row in plan.rows[:-1]}
    rows: list[PlanRow] = []
    for row in plan.rows[:-1]:
        rows.append(row)
        if {row.variant for row in rows} == kinds:
            break
    last = PlanRow(step=plan.num_steps, latents=(1.0,), outputs=(-0.1,))
    return StepPlan(
        name="probe",
        num_steps=plan.num_steps,
        guidance_scale=plan.guidance_scale,
        rows=(*rows, last),
        scheduler=plan.scheduler,
        sampler_digest=plan.sampler_digest,
        method="none",
    )
