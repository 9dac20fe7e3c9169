"""Run a step plan with the torch step modules: short enough to be read, and the oracle of the deployed runtime."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lemica_trt.models.model import Model
from lemica_trt.models.steps import CombineStep, FullStep, SkipStep
from lemica_trt.plan import PlanRow, StepPlan, coefficient_vector, layout_from_plans


@torch.no_grad()
def denoise(
    model: Model,
    plan: StepPlan,
    prompt_embeds: Tensor,
    noise: Tensor,
    *,
    guidance_scale: float | Tensor | None = None,
    fresh_noise: Callable[[int], Tensor] | None = None,
    on_row: Callable[[PlanRow, dict[str, Tensor]], None] | None = None,
) -> Tensor:
    """Denoise b requests by a plan.

    Args:
        prompt_embeds: DiT dtype [R, text_length, width], from `Model.embed`.
        noise: fp32 [b, *latent_shape], standard normal: x_{−1} of row 0.
        guidance_scale: g, one for all or [b]; None: the plan's.
        fresh_noise: index of a row → z fp32 [b, *latent_shape]; called in row order, once for each draw of the row.
        on_row: called behind each row with its outputs (`latents`, `output`, and of full rows `residual` where the
            plan reads residuals).

    Returns:
        x_N, fp32 [b, *latent_shape], on the model's device.

    Raises:
        ValueError: the plan draws noise and `fresh_noise` is missing.
    """
    layout = layout_from_plans([plan], latent_shape=model.latent_shape, guided=model.guided)
    if layout.stochastic and fresh_noise is None:
        raise ValueError(f"{plan.scheduler} draws noise at each step: pass fresh_noise")
    steps = {"full": FullStep(model, layout), "skip": SkipStep(model, layout), "none": CombineStep(layout)}
    noise = noise.to(model.device, torch.float32)
    scale = torch.as_tensor(plan.guidance_scale if guidance_scale is None else guidance_scale).to(noise)
    latents: list[Tensor] = [noise]
    outputs: list[Tensor] = []
    residuals: list[Tensor] = []
    draws: list[Tensor] = []
    for i, row in enumerate(plan.rows):
        offset, factor = row.guidance
        inputs = {
            "coefficients": torch.from_numpy(coefficient_vector(row, layout)).to(model.device),
            "guidance": (offset + factor * scale).expand(len(noise)),
            "prompt_embeds": prompt_embeds.to(model.device),
        }
        for _ in range(row.draws):
            assert fresh_noise is not None
            draws = [fresh_noise(i).to(noise), *draws][: plan.noise_history]
        inputs["noise"] = sum((weight * z for weight, z in zip(row.noise_weights, draws)), torch.zeros_like(noise))
        for name, history, count in (
            ("latents", latents, layout.latent_history),
            ("outputs", outputs, layout.output_history),
            ("residual", residuals, layout.residual_history),
        ):
            blank = torch.zeros_like(history[0] if history else noise)
            for k, tensor in enumerate([*history, *[blank] * count][:count]):
                inputs[f"{name}_{k}"] = tensor
        result: dict[str, Tensor] = steps[row.graph](inputs)
        latents = [result["latents"], *latents][: layout.latent_history]
        outputs = [result["output"], *outputs][: layout.output_history]
        if "residual" in result:
            residuals = [result["residual"], *residuals][: layout.residual_history]
        if on_row is not None:
            on_row(row, result)
    return result["latents"]
