"""How good a bundle's plans are on held-out prompts, beside other ways of spending the same number of full steps.

The bundle's plans run on its engines, the baselines in PyTorch, whose step modules take any plan; all frames are
decoded by the bundle's engine. Each plan is compared with the uncached run, or with the M steps that it was made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.progress import Reporter
from lemica_trt.core.values import read_value
from lemica_trt.evaluate.agreement import deployed_latents
from lemica_trt.evaluate.baselines import baselines, table_of_steps
from lemica_trt.evaluate.runs import ClipScore, run_plan, score_clip
from lemica_trt.evaluate.samples import Samples
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import PLAN, Clip, Quality
from lemica_trt.models import Model
from lemica_trt.planning.step_plan import uncached_plan
from lemica_trt.runtime.pipeline import Pipeline

Array = npt.NDArray[Any]

CLIPS = 4
"""Clips that are kept to be looked at."""


class Case(NamedTuple):
    """What runs on every sample: a plan of the bundle (`method` is `PLAN`), or a baseline of that plan's budget."""

    plan: StepPlan
    method: str
    run: StepPlan


class Request(NamedTuple):
    """One sample; gives its clips, uint8 [F, H, W, 3]."""

    pipe: Pipeline
    model: Model
    prompt: str
    seed: int

    def on_engines(self, plan: StepPlan) -> Array:
        return self.pipe.decode(deployed_latents(self.pipe, plan, self.prompt, self.seed))

    def in_torch(self, plan: StepPlan) -> Array:
        return self.pipe.decode(run_plan(self.model, plan, self.prompt, self.seed).numpy())


def measure_quality(
    pipe: Pipeline, model: Model, samples: Samples, reporter: Reporter
) -> tuple[list[Quality], list[Clip]]:
    """Score every cached plan of a bundle and its baselines; nothing where the bundle has no uncached plan.

    Returns:
        Scores, each plan before its baselines, and the first `CLIPS` clips by the default plan.
    """
    plans = [pipe.bundle.plan(name) for name in pipe.bundle.plans]
    uncached = next((plan for plan in plans if plan.budget == plan.num_steps), None)
    cached = [plan for plan in plans if plan.budget < plan.num_steps]
    if uncached is None or not cached:
        return [], []
    graph = error_graph_of(pipe.bundle)
    cases = [Case(plan, *case) for plan in cached for case in [(PLAN, plan), *baselines(plan, model, graph).items()]]
    finer = _finer_references(cached, model, uncached.guidance_scale)
    default, clips = pipe.bundle.plan().name, list[Clip]()
    scores: list[list[ClipScore]] = [[] for _ in cases]
    for number in range(samples.count):
        request = Request(pipe, model, *samples[number])
        references: dict[int | None, Array] = {None: request.on_engines(uncached)}
        references |= {steps: request.in_torch(plan) for steps, plan in finer.items()}
        for case, found in zip(cases, scores):
            clip = request.on_engines(case.run) if case.method == PLAN else request.in_torch(case.run)
            reference = references[case.plan.reference_steps]
            found.append(score_clip(clip, reference))
            if case.method == PLAN and case.plan.name == default and number < CLIPS:
                clips.append(Clip(request.prompt, reference, clip))
        reporter.advance(number + 1, samples.count)
    return [_quality(case, found) for case, found in zip(cases, scores)], clips


def error_graph_of(bundle: Bundle) -> ErrorGraph | None:
    """The error graph that a bundle carries."""
    if ERROR_GRAPH_FILE not in bundle.manifest.files:
        return None
    return read_value(ErrorGraph, bundle.file(ERROR_GRAPH_FILE))


def _finer_references(plans: Sequence[StepPlan], model: Model, guidance_scale: float) -> dict[int, StepPlan]:
    """M → the sampler with M steps in full, for every M that a plan is compared with."""
    counts = {plan.reference_steps for plan in plans if plan.reference_steps is not None}
    return {
        steps: uncached_plan(table_of_steps(model, steps), guidance_scale=guidance_scale) for steps in sorted(counts)
    }


def _quality(case: Case, scores: Sequence[ClipScore]) -> Quality:
    psnrs, ssims, perceptual = zip(*scores)
    measured = [value for value in perceptual if value is not None]
    return Quality(
        plan=case.plan.name,
        method=case.method,
        budget=case.plan.budget,
        psnr=float(np.mean(psnrs)),
        psnr_p5=float(np.percentile(psnrs, 5)),
        ssim=float(np.mean(ssims)),
        ssim_p5=float(np.percentile(ssims, 5)),
        lpips=float(np.mean(measured)) if measured else None,
        each_psnr=psnrs,
        reference_steps=case.plan.reference_steps,
    )
