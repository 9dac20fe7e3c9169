"""Fit a step plan to a diffusers pipeline that is loaded, and run the pipeline by it: no bundle, no export.

python examples/fit_pipeline.py lemica_trt/zoo/cogvideox-tiny 15 b15.json max_sequence_length=16 "a big red circle"

The arguments: a pipeline's folder or hub id, full steps, the plan's file, and in any order keywords of the pipeline's
call and prompts to fit to. `pipe.to("cuda")` or `pipe.enable_model_cpu_offload()` go behind the line that loads it.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import diffusers
import torch

import lemica_trt


def main(source: str, budget: str, output: str, *rest: str) -> None:
    """Fit, save, and compare latents with those of all steps: by the plan, and by as few steps of the scheduler."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(source)
    prompts = [text for text in rest if not re.match(r"\w+=", text)]
    call = {name: json.loads(value) for name, value in (text.split("=", 1) for text in rest if text not in prompts)}
    plan = lemica_trt.fit(pipe, int(budget), prompts, **call)
    plan.save(output)
    print(plan)

    def latents(**more: Any) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(1000)
        arguments = {**call, **more, "generator": generator, "output_type": "latent", "return_dict": False}
        found: torch.Tensor = pipe(prompts[0], **arguments)[0]
        return found.float()

    exact = latents(num_inference_steps=plan.num_steps)
    with lemica_trt.apply(pipe, output):
        clips = {"plan": latents(num_inference_steps=plan.num_steps)}
    clips["scheduler"] = latents(num_inference_steps=plan.budget)
    for name, clip in clips.items():
        print(
            f"{name}: {plan.budget} steps, {float((clip - exact).norm() / exact.norm()):.4f} away from {plan.num_steps}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
