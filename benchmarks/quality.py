"""Held-out quality of a bundle's plans beside other ways to spend the same number of full steps.

    lemica-trt build --model wan-tiny --budget 15,10,8,12,20,25 --output out/wan-tiny
    python benchmarks/quality.py out/wan-tiny --clips 64 --output benchmarks/results/quality-wan-tiny.json

The same of cogvideox-tiny, and with `--seed 100` for another calibration (quality-wan-tiny-seed100.json).

Clips of prompts and seeds that neither calibration nor the choice between plans has seen. PSNR and SSIM of each clip
against two references: the uncached sampler of N steps, and the same sampler with 4·N steps, which stands for the exact
solution; FLIP against the first. Everything runs in PyTorch. Writes JSON (`record.Quality`) and prints its table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from clips import HeldOutClips
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from record import Quality, QualityRow, this_run, write_result
from tables import described

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.metrics import Frames, psnr, ssim
from lemica_trt.core.progress import reporter
from lemica_trt.evaluate.baselines import baselines
from lemica_trt.evaluate.kept import seen_flip
from lemica_trt.evaluate.quality import error_graph_of
from lemica_trt.evaluate.samples import HELD_OUT_SEED
from lemica_trt.ir.plan import StepPlan
from lemica_trt.models import Model, load_model, scheduler_like
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.step_plan import uncached_plan

FINE = 4
"""Steps of the fine reference, in those of the sampler."""

SCHEDULERS = (FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
"""Baselines with B steps: schedulers as a user sets them in a diffusers pipeline, beside the sampler's own."""


def with_other_schedulers(plan: StepPlan, model: Model) -> Iterator[tuple[str, StepPlan]]:
    """Scheduler → its plan with the same number of steps, all in full."""
    own = model.pipeline.scheduler
    for scheduler in SCHEDULERS:
        if scheduler is not type(own):  # that is the baseline `fewer-steps`
            try:
                model.pipeline.scheduler = scheduler_like(scheduler, own)
                table = sampler_table(
                    model.scheduler(plan.budget), dynamic_guidance=model.profile.sampling.dynamic_guidance
                )
            except UnsupportedError:  # Euler is for flow matching only
                continue
            finally:
                model.pipeline.scheduler = own
            yield scheduler.__name__, uncached_plan(table, guidance_scale=plan.guidance_scale)


def row(
    method: str, plan: StepPlan, clips: list[Frames], coarse: list[Frames], fine: list[Frames], *, own: bool = False
) -> QualityRow:
    """Scores of one plan's clips."""
    return QualityRow(
        method=method,
        own=own,
        full_steps=plan.full_steps,
        psnr=tuple(map(psnr, clips, coarse)),
        ssim=tuple(map(ssim, clips, coarse)),
        fine_psnr=tuple(map(psnr, clips, fine)),
        fine_ssim=tuple(map(ssim, clips, fine)),
        flip=tuple(found[0] for found in map(seen_flip, clips, coarse) if found is not None),
    )


def measure(bundle: Bundle, model: Model, count: int) -> Quality:
    """Run everything on `count` clips."""
    profile = model.profile
    guidance, steps = profile.sampling.guidance_scale, profile.sampling.steps
    table, fine_table = (sampler_table(model.scheduler(n), dynamic_guidance=profile.sampling.dynamic_guidance)
                         for n in (steps, FINE * steps))  # fmt: skip
    clips = HeldOutClips(model, count)
    report = reporter()
    report.stage("quality", f"{count} clips, {steps} and {FINE * steps} uncached steps")
    coarse, fine = (clips(uncached_plan(sampler, guidance_scale=guidance)) for sampler in (table, fine_table))
    graph, rows = error_graph_of(bundle), list[QualityRow]()
    plans = [plan for plan in map(bundle.plan, bundle.plans) if plan.budget < plan.num_steps]
    for plan in sorted(plans, key=lambda plan: plan.budget):
        report.note(f"{plan.name}: {plan.method}")
        rows.append(row(plan.method, plan, clips(plan), coarse, fine, own=True))
        others = {**baselines(plan, model, graph), **dict(with_other_schedulers(plan, model))}
        rows += [row(method, other, clips(other), coarse, fine) for method, other in others.items()]
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
        seed=profile.calibration.seed,
        flow_shift=profile.sampling.flow_shift,
        reference_steps=bundle.plan().reference_steps,
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
    result = measure(bundle, model, given.clips)
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
