"""How good a bundle's plans are on held-out prompts, beside other ways of spending the same number of full steps.

The bundle's plans run on its engines, the baselines in PyTorch, whose step modules take any plan; all frames are
decoded by the bundle's engine. Each plan is compared with the uncached run, or with the M steps that it was made for.
Where engines are quantised the uncached run is PyTorch's, so that baselines, which run there, are not quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.progress import count
from lemica_trt.core.values import read_value
from lemica_trt.evaluate.baselines import baselines
from lemica_trt.evaluate.deployed import Deployed
from lemica_trt.evaluate.kept import Keeper
from lemica_trt.evaluate.runs import ClipScore, score_clip
from lemica_trt.evaluate.samples import Samples
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.kept import UNCACHED
from lemica_trt.ir.plan import StepPlan, uncached_of
from lemica_trt.ir.report import PLAN, Quality
from lemica_trt.models import Model
from lemica_trt.planning.planner import chance_lead
from lemica_trt.planning.step_plan import uncached_plan

Array = npt.NDArray[Any]

BASELINES = ("lemica",)
"""What the default plan is compared with, beside the sampler with as few steps."""


class Case(NamedTuple):
    """What runs on the first `clips` samples: a plan of the bundle (`method` is `PLAN`), or a baseline of that plan's
    budget."""

    plan: StepPlan
    method: str
    run: StepPlan
    clips: int


def cases_of(
    bundle: Bundle,
    model: Model,
    clips: int,
    further: int | None,
    *,
    compared: bool = True,
    every: bool = False,
    quantized: bool = False,
) -> list[Case]:
    """The cached plans of a bundle, and baselines of the default one; of quantised engines the uncached plan, too.

    Args:
        clips: of the default plan and its baselines.
        further: clips of the other plans; None: as many.
        compared: whether there are baselines.
        every: whether the other plans have some, too: the sampler with as few steps.
        quantized: whether the engines are: then the uncached plan is not what others are compared with.
    """
    plans = [plan for plan in map(bundle.plan, bundle.plans) if plan.budget < plan.num_steps]
    default, found = bundle.plan(), list[Case]()
    for plan in plans:
        found.append(Case(plan, PLAN, plan, clips if plan.name == default.name or further is None else further))
        if compared and (every or plan.name == default.name):
            own = BASELINES if plan.name == default.name else ()
            others = baselines(plan, model, error_graph_of(bundle), own)
            found += [Case(plan, method, other, found[-1].clips) for method, other in others.items()]
    uncached = uncached_of(map(bundle.plan, bundle.plans)) if quantized else None
    return found if uncached is None else [*found, Case(uncached, PLAN, uncached, clips)]


def quality_steps(cases: Sequence[Case], clips: int) -> int:
    """Full steps of `measure_quality`."""
    references = {case.plan.reference_steps or case.plan.num_steps for case in cases}
    references |= {case.plan.num_steps for case in cases}
    return sum(case.run.budget * case.clips for case in cases) + clips * sum(references)


def measure_quality(
    deployed: Deployed,
    model: Model,
    samples: Samples,
    cases: Sequence[Case],
    done: Callable[[float], None],
    keeper: Keeper,
) -> list[Quality]:
    """Score plans and baselines; nothing where the bundle has no uncached plan.

    Args:
        deployed: the bundle's plans; of quantised engines they are compared with PyTorch's uncached run.
        cases: as `cases_of`.
        done: told of full steps in PyTorch.
        keeper: given the clips of the default plan and its baselines.

    Returns:
        Scores, each plan before its baselines.
    """
    pipe = deployed.pipe
    bundle = pipe.bundle
    uncached = uncached_of(map(bundle.plan, bundle.plans))
    if uncached is None or not cases:
        return []
    finer = _finer_references([case.plan for case in cases], model, uncached.guidance_scale)
    default = bundle.plan()
    scores: list[list[ClipScore]] = [[] for _ in cases]
    for number in range(samples.count):
        prompt, seed = samples[number]

        def in_torch(plan: StepPlan, prompt: str = prompt, seed: int = seed) -> Array:
            latents = model.run(plan, prompt, seed)
            done(plan.budget)
            return pipe.decode(latents)

        exact = in_torch(uncached) if deployed.quantized else deployed.decoded(uncached, prompt, seed)
        references: dict[int | None, Array] = {None: exact}
        references |= {count: in_torch(plan) for count, plan in finer.items()}
        steps = default.reference_steps
        keeper.add(number, UNCACHED, uncached if steps is None else finer[steps], references[steps], None)
        for case, found in zip(cases, scores):
            if number >= case.clips:
                continue
            clip = deployed.decoded(case.run, prompt, seed) if case.method == PLAN else in_torch(case.run)
            found.append(score_clip(clip, references[case.plan.reference_steps]))
            if case.plan.name == default.name:
                keeper.add(number, case.method, case.run, clip, found[-1].psnr)
    return [_quality(case, found) for case, found in zip(cases, scores)]


def is_ahead(other: Quality, own: Quality) -> bool:
    """Whether a baseline did better than a plan on the same clips by more than chance (`planner.chance_lead`): in the
    mean, or in the worst clip and no worse in the mean."""
    if other.psnr - own.psnr > chance_lead(len(own.each_psnr)):
        return True
    return other.psnr >= own.psnr and other.psnr_worst - own.psnr_worst > chance_lead(1)


def baselines_ahead(quality: Sequence[Quality], plan: StepPlan) -> list[str]:
    """A line for each baseline of a plan that has a better mean or a better worst clip, by however much."""
    own = next((row for row in quality if row.plan == plan.name and row.method == PLAN), None)
    found = []
    for row in quality:
        if own is None or row.plan != plan.name or row.method == PLAN:
            continue
        if row.psnr > own.psnr or row.psnr_worst > own.psnr_worst:
            found.append(
                f"{plan.name} by {plan.method}: mean {own.psnr:.1f}, worst clip {own.psnr_worst:.1f} dB; {row.method} "
                f"has {row.psnr:.1f} and {row.psnr_worst:.1f} on {count(len(row.each_psnr), 'clip')}"
            )
    return found


def error_graph_of(bundle: Bundle) -> ErrorGraph | None:
    """The error graph that a bundle carries."""
    if ERROR_GRAPH_FILE not in bundle.manifest.files:
        return None
    return read_value(ErrorGraph, bundle.file(ERROR_GRAPH_FILE))


def _finer_references(plans: Sequence[StepPlan], model: Model, guidance_scale: float) -> dict[int, StepPlan]:
    """M → the sampler with M steps in full, for every M that a plan is compared with."""
    counts = {plan.reference_steps for plan in plans if plan.reference_steps is not None}
    return {steps: uncached_plan(model.table(steps), guidance_scale=guidance_scale) for steps in sorted(counts)}


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
