"""What plans are worth at other guidance scales than the one that they were made at.

    lemica-trt build --model cogvideox-tiny --budget 15 --output out/tiny
    OMP_NUM_THREADS=1 python benchmarks/guidance.py out/tiny \\
        --output benchmarks/results/guidance-cogvideox-tiny.json

The bundle's default plan, which is a fitted one; a solver on the same steps, fitted to as many samples across a range
of scales (`--guidance-range`); LeMiCa's plan, and the sampler with as few steps. Held-out clips, in PyTorch; PSNR
against the uncached run at the request's own scale. Writes JSON (`record.Guidance`) and prints its table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import msgspec
import torch
from record import Guidance, GuidanceRow, this_run, write_result
from tables import described

from lemica_trt.bundle.reading import Bundle
from lemica_trt.calibrate.fit import Fitter
from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.core.metrics import Frames, psnr
from lemica_trt.core.progress import reporter
from lemica_trt.evaluate.baselines import baselines
from lemica_trt.evaluate.quality import error_graph_of
from lemica_trt.evaluate.samples import HELD_OUT_SEED, Samples, held_out_samples
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.resources import calibration_path
from lemica_trt.ir.schedule import Schedule
from lemica_trt.models import Model, denoise, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.step_plan import uncached_plan

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of requests, in that of the plan."""

BASELINES = ("lemica", "fewer-steps")


def fitted_across(model: Model, plan: StepPlan, low: float, high: float) -> StepPlan:
    """A solver on the plan's steps, fitted across a range of scales with the calibration's prompts and samples."""
    settings = model.profile.calibration
    sampling = msgspec.structs.replace(model.profile.sampling, guidance_range=(low, high))
    there = msgspec.structs.replace(model.profile, sampling=sampling)
    table = sampler_table(model.scheduler(), dynamic_guidance=sampling.dynamic_guidance)
    prompts = read_prompts(calibration_path(settings.prompts) / "calibration.txt")
    known, model.profile = model.profile, there
    try:
        with tempfile.TemporaryDirectory() as folder:
            fitter = Fitter(
                model, table, table, prompts, samples=settings.fit_samples, seed=settings.seed,
                journal=Path(folder) / "fits.jsonl",
            )  # fmt: skip
            return fitter(Schedule(num_steps=plan.num_steps, full_steps=plan.full_steps))
    finally:
        model.profile = known


def clips(model: Model, plan: StepPlan, samples: Samples, scale: float) -> list[Frames]:
    """Clips of all samples at one scale, in one batch."""
    given = [samples[s] for s in range(samples.count)]
    noise = torch.stack([model.noise(seed) for _, seed in given])
    with torch.inference_mode():
        latents = denoise(model, plan, model.embed([prompt for prompt, _ in given]), noise, guidance_scale=scale)
        return list(model.decode(latents).cpu().numpy())


def measure(bundle: Bundle, model: Model, count: int) -> Guidance:
    """Run everything on `count` clips."""
    profile, plan, report = bundle.manifest.profile, bundle.plan(), reporter()
    assert plan.method.startswith("fitted"), plan.method
    own = profile.sampling.guidance_scale
    scales = tuple(own * factor for factor in FACTORS)
    prompts = read_prompts(calibration_path(profile.calibration.prompts) / "held_out.txt")
    samples = held_out_samples(prompts, count)
    table = sampler_table(model.scheduler(), dynamic_guidance=profile.sampling.dynamic_guidance)
    report.stage("fit", f"across {scales[0]:g} … {scales[-1]:g}")
    others = baselines(plan, model, error_graph_of(bundle))
    plans = {
        f"fitted at {own:g}": plan,
        f"fitted across {scales[0]:g} … {scales[-1]:g}": fitted_across(model, plan, scales[0], scales[-1]),
        **{name: others[name] for name in BASELINES},
    }
    rows = []
    for scale in scales:
        report.stage("guidance", f"{scale:g}: {count} clips")
        exact = clips(model, uncached_plan(table, guidance_scale=own), samples, scale)
        for name, found in plans.items():
            scores = tuple(map(psnr, clips(model, found, samples, scale), exact))
            rows.append(GuidanceRow(method=name, scale=scale, psnr=scores))
    report.close()
    return Guidance(
        run=this_run(),
        model=profile.name,
        revision=bundle.manifest.revision,
        steps=plan.num_steps,
        budget=plan.budget,
        guidance_scale=own,
        first_seed=HELD_OUT_SEED,
        rows=tuple(rows),
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    bundle = Bundle.open(given.bundle)
    result = measure(bundle, load_model(bundle.manifest.profile), given.clips)
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
