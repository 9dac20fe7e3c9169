"""Held-out quality of a bundle's plans beside other ways to spend the same number of full steps.

    lemica-trt build --model cogvideox-tiny --budget 15,10,20,25 --output out/quality
    python benchmarks/quality.py out/quality --output benchmarks/results/quality-cogvideox-tiny.json

    lemica-trt build --model wan-tiny --budget 15,10,20 --output out/wan
    python benchmarks/quality.py out/wan --output benchmarks/results/quality-wan-tiny.json

32 clips of prompts and seeds that neither calibration nor the choice between plans has seen. PSNR and SSIM of each clip
against two references: the uncached sampler of N steps, and the same sampler with 4·N steps, which stands for the exact
solution. Everything runs in PyTorch. Writes JSON (`record.Quality`) and prints its table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from record import Quality, QualityRow, this_run, write_result
from tables import described

from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.core.errors import InfeasibleError, UnsupportedError
from lemica_trt.core.metrics import Frames, psnr, ssim
from lemica_trt.core.progress import reporter
from lemica_trt.core.values import read_value
from lemica_trt.evaluate.evaluator import HELD_OUT_SEED, PlanEvaluator, held_out_samples
from lemica_trt.ir.calibration import Calibration, ErrorGraph
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.resources import calibration_path
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.models import Model, load_model, scheduler_like
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.planner import Problem, planners
from lemica_trt.planning.step_plan import uncached_plan

FINE = 4
"""Steps of the fine reference, in those of the sampler."""

PLANNERS = ("lemica", "uniform")
"""Baselines that skip steps of the same sampler."""

SCHEDULERS = (FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
"""Baselines with B steps: schedulers as a user sets them in a diffusers pipeline, beside the sampler's own."""


def baselines(problem: Problem, model: Model, budget: int) -> Iterator[StepPlan]:
    """Plans of B full steps without anything of this tool's own, as far as they exist; `method` says which."""
    for name in PLANNERS:
        planner = planners()[name]
        if planner.needs <= problem.has:
            try:
                yield planner(problem, budget)
            except InfeasibleError:  # the error graph's longest segment is too short for so few steps
                continue
    own = type(model.pipeline.scheduler)
    for scheduler in (own, *(other for other in SCHEDULERS if other is not own)):
        try:
            table = scheduler_table(model, scheduler, budget)
        except UnsupportedError:  # Euler is for flow matching only
            continue
        if table.num_steps == budget:  # Heun and PNDM call the model more than once a step
            plan = uncached_plan(table, guidance_scale=problem.guidance_scale)
            yield msgspec.structs.replace(plan, method="fewer-steps" if scheduler is own else scheduler.__name__)


def scheduler_table(model: Model, scheduler: type, steps: int) -> SamplerTable:
    """A diffusers scheduler with the settings of the model's own, lowered for so many steps."""
    made = scheduler_like(scheduler, model.pipeline.scheduler)
    model.family.set_timesteps(made, steps)
    return sampler_table(made, dynamic_guidance=model.profile.sampling.dynamic_guidance)


def row(plan: StepPlan, clips: list[Frames], coarse: list[Frames], fine: list[Frames], *, own: bool) -> QualityRow:
    """Scores of one plan's clips."""
    return QualityRow(
        method=plan.method,
        own=own,
        full_steps=plan.full_steps,
        psnr=tuple(map(psnr, clips, coarse)),
        ssim=tuple(map(ssim, clips, coarse)),
        fine_psnr=tuple(map(psnr, clips, fine)),
        fine_ssim=tuple(map(ssim, clips, fine)),
    )


def measure(bundle: Bundle, model: Model, count: int) -> Quality:
    """Run everything on `count` clips."""
    profile = model.profile
    guidance, steps = profile.sampling.guidance_scale, profile.sampling.steps
    table, fine_table = (sampler_table(model.scheduler(n), dynamic_guidance=profile.sampling.dynamic_guidance)
                         for n in (steps, FINE * steps))  # fmt: skip
    calibration = None
    if ERROR_GRAPH_FILE in bundle.manifest.files:
        calibration = Calibration(graph=read_value(ErrorGraph, bundle.file(ERROR_GRAPH_FILE)))
    problem = Problem(table, guidance, calibration, model=profile.name)
    prompts = read_prompts(calibration_path(profile.calibration.prompts) / "held_out.txt")
    evaluator = PlanEvaluator(lambda: model, table, held_out_samples(prompts, count))
    report = reporter()
    report.stage("quality", f"{count} clips, {steps} and {FINE * steps} uncached steps")
    coarse, fine = (evaluator.clips(uncached_plan(sampler, guidance_scale=guidance)) for sampler in (table, fine_table))
    rows = []
    plans = sorted((bundle.plan(name) for name in bundle.plans), key=lambda plan: plan.budget)
    for plan in plans:
        if plan.budget < plan.num_steps:
            for other in (plan, *baselines(problem, model, plan.budget)):
                rows.append(row(other, evaluator.clips(other), coarse, fine, own=other is plan))
                report.note(f"B = {plan.budget}: {other.method}")
    report.close()
    return Quality(
        run=this_run(),
        model=profile.name,
        revision=bundle.manifest.revision,
        scheduler=table.scheduler,
        steps=steps,
        fine_steps=FINE * steps,
        guidance_scale=guidance,
        calibration=profile.calibration.method,
        samples=profile.calibration.samples,
        validation_samples=profile.calibration.validation_samples,
        first_seed=HELD_OUT_SEED,
        uncached_fine_psnr=tuple(map(psnr, coarse, fine)),
        rows=tuple(rows),
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--weights", help="diffusers folder, where the bundle was built from one")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    bundle = Bundle.open(given.bundle)
    model = load_model(bundle.manifest.profile, source=given.weights, device=given.device)
    with torch.inference_mode():
        result = measure(bundle, model, given.clips)
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
