"""Synthetic data that looks like the real thing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lemica_trt.ir.calibration import Edge, ErrorGraph
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import Quality
from lemica_trt.planning.step_plan import plan_from_schedule
from lemica_trt.testing.values import provenance, recurrence, schedule_of


def error_graph(num_steps: int = 50, max_skip: int = 9) -> ErrorGraph:
    """Monotone in length and U-shaped in position, early segments the worst: what real models show."""
    edges = []
    for i in range(num_steps):
        for j in range(i + 2, min(num_steps, i + max_skip + 1) + 1):
            place = i / num_steps
            error = (0.0008 + 0.006 * np.exp(-12 * place) + 0.012 * max(0.0, place - 0.8)) * (j - i - 1) ** 1.3
            edges.append(Edge(start=i, stop=j, errors=(float(error),)))
    fields = provenance(recurrence(num_steps), model="cogvideox-tiny", guidance_scale=6.0)
    return ErrorGraph(**fields, max_skip=max_skip, samples=1, edges=tuple(edges))


def plan(full_steps: tuple[int, ...], num_steps: int = 50, name: str = "default", method: str = "lemica") -> StepPlan:
    schedule = schedule_of(num_steps, *full_steps)
    return plan_from_schedule(schedule, recurrence(num_steps), name=name, guidance_scale=6.0, method=method)


def quality(budget: int, method: str, psnr: float, clips: int, plan: str | None = None) -> Quality:
    """Clips half a decibel apart, `psnr` in the middle."""
    each = tuple(psnr + 0.5 * (number - (clips - 1) / 2) for number in range(clips))
    return Quality(
        plan=plan or f"b{budget}", method=method, budget=budget, psnr=psnr, psnr_p5=min(each), ssim=0.99, ssim_p5=0.98,
        lpips=None, each_psnr=each,
    )  # fmt: skip


def clip(frames: int = 9, height: int = 64, width: int = 64, noise: float = 0.0) -> npt.NDArray[np.uint8]:
    """A disc that crosses a gradient, uint8 [F, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    pixels = np.empty((frames, height, width, 3))
    for f in range(frames):
        pixels[f] = np.stack([60 + 100 * x / width, 90 + 80 * y / height, np.full(x.shape, 170.0)], axis=-1)
        centre = width * (0.2 + 0.6 * f / max(1, frames - 1))
        pixels[f][(x - centre) ** 2 + (y - height / 2) ** 2 < (min(height, width) / 5) ** 2] = (222, 74, 60)
    pixels += noise * np.random.default_rng(0).standard_normal(pixels.shape)
    return np.clip(pixels.round(), 0, 255).astype(np.uint8)
