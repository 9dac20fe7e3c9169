"""Held-out quality of a bundle's plans beside every other way to spend the same budget, as Markdown tables.

    lemica-trt build --model cogvideox-tiny --calibration secant --budget 15,10,20,25 --output out/quality
    python benchmarks/quality.py out/quality

    lemica-trt build --model wan-tiny --budget 15,10,20,25 --output out/wan    # flow matching
    python benchmarks/quality.py out/wan

PSNR mean / 5th percentile (dB) / SSIM over 32 clips, prompts and seeds that neither calibration nor selection has seen;
differences clip by clip with 95 % bootstrap intervals. Everything runs in PyTorch, fp32. Two references: the uncached
sampler that the user has today, and one with four times the steps, which stands for the exact solution.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.compiler import calibration_prompts, profile_of_bundle
from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.metrics import psnr, ssim
from lemica_trt.core.values import read_value
from lemica_trt.evaluate.verify import baselines, held_out
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.plan import StepPlan
from lemica_trt.models import Model, denoise, load_model, scheduler_like
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.step_plan import uncached_plan

RESAMPLES = 10_000
BATCH = 8
SOLVERS = {
    FlowMatchEulerDiscreteScheduler: "Euler",
    DPMSolverMultistepScheduler: "DPM-Solver++ 2M",
    UniPCMultistepScheduler: "UniPC",
}
NAMES = {"lemica": "LeMiCa (paper)", "uniform": "equal distances, reuse", "fewer-steps": "the sampler, fewer steps"}

Clips = list[np.ndarray]  # type: ignore[type-arg]


def frames(model: Model, plan: StepPlan, requests: Sequence[tuple[str, int]]) -> Clips:
    """The clips of a plan, uint8 [F, H, W, 3] each."""
    clips: Clips = []
    for first in range(0, len(requests), BATCH):
        part = requests[first : first + BATCH]
        noises = [model.noises(seed) for _, seed in part]
        with torch.inference_mode():
            latents = denoise(
                model,
                plan,
                model.embed([prompt for prompt, _ in part]),
                torch.stack([next(noise) for noise in noises]),
                fresh_noise=lambda _, noises=noises: torch.stack([next(noise) for noise in noises]),
            )
            clips += [np.asarray(clip) for clip in model.decode(latents)]
    return clips


def gain(better: Sequence[float], worse: Sequence[float]) -> str:
    """Mean difference and its 95 % bootstrap interval, clip by clip."""
    differences = np.subtract(better, worse)
    random = np.random.default_rng(0)
    means = random.choice(differences, (RESAMPLES, len(differences))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{differences.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def ways(bundle: Bundle, model: Model, plan: StepPlan) -> dict[str, StepPlan]:
    """Name → plan of the same budget; the bundle's own first."""
    graph = None
    if ERROR_GRAPH_FILE in bundle.manifest.files:
        graph = read_value(ErrorGraph, bundle.file(ERROR_GRAPH_FILE))
    held = f", held against {plan.reference_steps} steps" if plan.reference_steps else ""
    found = {f"**the plan** ({plan.method}{held})": plan}
    found |= {NAMES[name]: other for _, name, other in baselines(plan, model, graph)}
    for solver, name in SOLVERS.items():  # as a user changes the scheduler of a diffusers pipeline
        if solver is type(model.pipeline.scheduler):  # "the sampler, fewer steps"
            continue
        try:
            scheduler = scheduler_like(solver, model.pipeline.scheduler)
        except UnsupportedError:  # Euler is for flow matching only
            continue
        model.family.set_timesteps(scheduler, plan.budget)
        table = sampler_table(scheduler)
        found[f"{name}, {plan.budget} steps"] = uncached_plan(table, guidance_scale=plan.guidance_scale)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--weights", help="where the bundle was built from a local folder")
    parser.add_argument("--clips", type=int, default=32)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    profile = profile_of_bundle(bundle, arguments.weights)
    model = load_model(profile)
    requests = held_out(calibration_prompts(profile, None, split="held_out"), arguments.clips)
    steps, guidance = profile.sampling.steps, profile.sampling.guidance_scale
    references = {
        count: frames(model, uncached_plan(sampler_table(model.scheduler(count)), guidance_scale=guidance), requests)
        for count in (steps, 4 * steps)
    }
    scores = [psnr(a, b) for a, b in zip(references[steps], references[4 * steps])]
    sampler = type(model.pipeline.scheduler).__name__
    print(f"{arguments.clips} held-out clips of {profile.name}, {steps} steps of {sampler}; ", end="")
    print(f"against {4 * steps} steps the uncached sampler itself has {np.mean(scores):.1f} dB\n")
    print(f"| full steps | | against {steps} steps | the plan − it, dB | against {4 * steps} steps |")
    print("|---|---|---|---|---|")
    plans = [bundle.plan(name) for name in bundle.plans]
    for plan in sorted((plan for plan in plans if plan.budget < plan.num_steps), key=lambda plan: plan.budget):
        own: list[float] = []
        for name, other in ways(bundle, model, plan).items():
            clips = frames(model, other, requests)
            cells = {}
            for count, reference in references.items():
                scores = [psnr(a, b) for a, b in zip(clips, reference)]
                likeness = np.mean([ssim(a, b) for a, b in zip(clips, reference)])
                cells[count] = f"{np.mean(scores):.1f} / {np.percentile(scores, 5):.1f} / {likeness:.4f}"
                if count == steps:
                    difference = gain(own, scores) if own else ""
                    own = own or scores
            print(f"| {plan.budget} | {name} | {cells[steps]} | {difference} | {cells[4 * steps]} |", flush=True)


if __name__ == "__main__":
    main()
