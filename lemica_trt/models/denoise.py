"""Run a step plan with the torch step modules: short enough to be read, and the oracle of the deployed runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lemica_trt.ir.graphs import COMBINE, TERM, StepLayout
from lemica_trt.ir.plan import PlanRow, StepPlan, coefficient_vector, layout_from_plans
from lemica_trt.models.model import Model
from lemica_trt.models.steps import step_modules

Conditions = Mapping[str, Tensor] | Tensor
"""By name, each [R, …]; a tensor is `prompt_embeds`. What `Model.embed` gives."""


def conditions_of(conditions: Conditions) -> dict[str, Tensor]:
    """Conditions by name."""
    return {"prompt_embeds": conditions} if isinstance(conditions, Tensor) else dict(conditions)


class Rollout:
    """b requests under way: each call takes them one row of a plan further.

    Args:
        layout: histories deep enough for the rows to come.
        conditions: from `Model.embed`.
        noise: fp32 [b, *latent_shape], standard normal: x_{−1} of row 0.
        guidance_scale: g, one for all or [b].
        noise_history: how many draws a row mixes at most.

    Attributes:
        latents, outputs, guidance_terms, caches: histories, newest first, as deep as the layout says.
    """

    def __init__(
        self,
        model: Model,
        layout: StepLayout,
        conditions: Conditions,
        noise: Tensor,
        *,
        guidance_scale: float | Tensor,
        noise_history: int = 0,
    ) -> None:
        self._steps = step_modules(model, layout)
        self._layout = layout
        self._device = model.device
        self._conditions = {name: x.to(model.device) for name, x in conditions_of(conditions).items()}
        self._noise_history = noise_history
        self._draws: list[Tensor] = []
        self.latents = [noise.to(model.device, torch.float32)]
        self.outputs: list[Tensor] = []
        self.guidance_terms: list[Tensor] = []
        self.caches: dict[str, list[Tensor]] = {slot.name: [] for slot in layout.caches}
        self._scale = torch.as_tensor(guidance_scale).to(self.latents[0])
        self._blank = torch.zeros_like(self.latents[0])

    @torch.no_grad()
    def __call__(self, row: PlanRow, draws: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """Run a row.

        Args:
            draws: z fp32 [b, *latent_shape] of each of the row's draws, in order.

        Returns:
            `latents`, `output`, the guidance term where the layout keeps it, and the cache slots that the row writes.
        """
        layout = self._layout
        offset, factor = row.guidance
        inputs = {
            "coefficients": torch.from_numpy(coefficient_vector(row, layout)).to(self._device),
            "guidance": (offset + factor * self._scale).expand(len(self._blank)),
            **self._conditions,
        }
        for draw in draws:
            self._draws = [draw.to(self._blank), *self._draws][: self._noise_history]
        inputs["noise"] = sum((weight * z for weight, z in zip(row.noise_weights, self._draws)), self._blank)
        for name, history, count in (
            ("latents", self.latents, layout.latent_history),
            ("outputs", self.outputs, layout.output_history),
            ("guidance_terms", self.guidance_terms, layout.guidance_history),
            *((slot.name, self.caches[slot.name], slot.depth) for slot in layout.caches),
        ):
            blank = torch.zeros_like(history[0]) if history else self._blank
            for k, tensor in enumerate([*history, *[blank] * count][:count]):
                inputs[f"{name}_{k}"] = tensor
        result: dict[str, Tensor] = self._steps[row.variant or COMBINE](inputs)
        self.latents = [result["latents"], *self.latents][: layout.latent_history]
        self.outputs = [result["output"], *self.outputs][: layout.output_history]
        if layout.guidance_history:
            self.guidance_terms = [result[TERM], *self.guidance_terms][: layout.guidance_history]
        for slot in layout.caches:
            if slot.name in result:
                self.caches[slot.name] = [result[slot.name], *self.caches[slot.name]][: slot.depth]
        return result


def denoise(
    model: Model,
    plan: StepPlan,
    conditions: Conditions,
    noise: Tensor,
    *,
    guidance_scale: float | Tensor | None = None,
    fresh_noise: Callable[[int], Tensor] | None = None,
    on_row: Callable[[PlanRow, dict[str, Tensor]], None] | None = None,
) -> Tensor:
    """Denoise b requests by a plan.

    Args:
        conditions, noise: as in `Rollout`.
        guidance_scale: None: the plan's.
        fresh_noise: index of a row → z fp32 [b, *latent_shape]; called in row order, once for each draw of the row.
        on_row: called behind each row with its outputs: `latents`, `output`, and the cache slots that it writes.

    Returns:
        x_N, fp32 [b, *latent_shape], on the model's device.

    Raises:
        ValueError: the plan draws noise and `fresh_noise` is missing.
    """
    layout = layout_from_plans([plan], latent_shape=model.latent_shape, guided=model.guided)
    if layout.stochastic and fresh_noise is None:
        raise ValueError(f"{plan.scheduler} draws noise at each step: pass fresh_noise")
    scale = plan.guidance_scale if guidance_scale is None else guidance_scale
    rollout = Rollout(model, layout, conditions, noise, guidance_scale=scale, noise_history=plan.noise_history)
    for i, row in enumerate(plan.rows):
        draws = [fresh_noise(i) for _ in range(row.draws)] if fresh_noise is not None else []
        result = rollout(row, draws)
        if on_row is not None:
            on_row(row, result)
    return result["latents"]
