"""Make a step plan from a bundle's calibration and run it, without changing the bundle. No PyTorch.

python examples/make_plan.py out/tiny lemica 12 "a big red circle moves left" clip.gif

`lemica-trt plan BUNDLE --method lemica --budget 12` does the same and puts the plan into the bundle.
"""

from __future__ import annotations

import sys

import numpy as np

import lemica_trt
from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE, SAMPLER_FILE
from lemica_trt.core.values import read_value
from lemica_trt.ir.calibration import Calibration, ErrorGraph
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.planning.planner import Problem, planners
from lemica_trt.runtime.random import Generator
from lemica_trt.runtime.video import write_video


def main(path: str, method: str, budget: str, prompt: str, output: str) -> None:
    """Print the full steps of the plan, and write a clip."""
    pipe = lemica_trt.load(path)
    bundle = pipe.bundle
    problem = Problem(
        table=read_value(SamplerTable, bundle.file(SAMPLER_FILE)),
        guidance_scale=bundle.manifest.profile.sampling.guidance_scale,
        calibration=Calibration(graph=read_value(ErrorGraph, bundle.file(ERROR_GRAPH_FILE))),
    )
    plan = planners()[method](problem, int(budget))
    print(f"{method}, {plan.budget} of {plan.num_steps} steps in full: {' '.join(map(str, plan.full_steps))}")
    branches = [pipe.encode(text) for text in ("", prompt)]  # the unconditional one first
    conditions = {name: np.stack([branch[name] for branch in branches]) for name in branches[0]}
    noise = Generator(7).randn((1, *bundle.manifest.graphs.layout.latent_shape))
    write_video(pipe.decode(pipe.latents(conditions, noise, plan=plan)[0]), output, fps=pipe.fps)


if __name__ == "__main__":
    main(*sys.argv[1:])
