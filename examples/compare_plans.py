"""Run every plan of a bundle on one prompt: seconds, and PSNR against all steps in full. No PyTorch.

python examples/compare_plans.py out/tiny "a big red circle moves left" clips
"""

from __future__ import annotations

import sys
from pathlib import Path

import lemica_trt
from lemica_trt.core.metrics import psnr
from lemica_trt.runtime.video import write_video


def main(bundle: str, prompt: str, folder: str) -> None:
    """Print a line a plan, and write its clip."""
    pipe = lemica_trt.load(bundle)
    plans = sorted((pipe.bundle.plan(name) for name in pipe.bundle.plans), key=lambda plan: -plan.budget)
    clips = {plan.name: pipe(prompt, seed=7, plan=plan.name) for plan in plans}
    reference = clips[plans[0].name].frames
    for plan in plans:
        clip = clips[plan.name]
        print(
            f"{plan.name:10} {plan.budget:3} of {plan.num_steps} full steps  "
            f"{clip.seconds['denoise']:.3f} s  {psnr(clip.frames, reference):.1f} dB"
        )
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_video(clip.frames, Path(folder) / f"{plan.name}.gif", fps=pipe.fps)


if __name__ == "__main__":
    main(*sys.argv[1:])
