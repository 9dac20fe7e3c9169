"""Held-out clips by any plan, in PyTorch, in batches: of small models a clip alone takes two to three times as long."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.evaluate.samples import held_out_samples
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.resources import calibration_path
from lemica_trt.models import Model, denoise

BATCH = 16
"""Clips in one call of the DiT."""


class HeldOutClips:
    """The first held-out samples of a model's prompts."""

    def __init__(self, model: Model, count: int) -> None:
        prompts = read_prompts(calibration_path(model.profile.calibration.prompts) / "held_out.txt")
        self._model, self._samples = model, held_out_samples(prompts, count)

    def __call__(self, plan: StepPlan) -> list[npt.NDArray[Any]]:
        """uint8 [F, H, W, 3] of each sample."""
        found: list[npt.NDArray[Any]] = []
        with torch.inference_mode():
            for start in range(0, self._samples.count, BATCH):
                samples = [self._samples[s] for s in range(start, min(start + BATCH, self._samples.count))]
                noise = torch.stack([next(iter(self._model.noises(seed))) for _, seed in samples])
                embeds = self._model.embed([prompt for prompt, _ in samples])
                found += list(self._model.decode(denoise(self._model, plan, embeds, noise)).cpu().numpy())
        return found
