"""The step modules as calibration calls them: rows of several runs in one call, histories on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lemica_trt.ir.graphs import COMBINE, TERM, StepLayout, trunk_of
from lemica_trt.ir.plan import PlanRow, coefficient_vector
from lemica_trt.ir.step_model import Latents, StepInput, StepOutput
from lemica_trt.models.denoise import conditions_of
from lemica_trt.models.model import Model
from lemica_trt.models.steps import step_modules


class HostSteps:
    """Takes rows of plans (`ir.step_model.Steps`).

    Args:
        model: on its device.
        layout: of the plans; histories are filled up with zeros.
    """

    def __init__(self, model: Model, layout: StepLayout) -> None:
        self._layout, self._device = layout, model.device
        self._modules = step_modules(model, layout)

    @torch.no_grad()
    def __call__(self, row: PlanRow, runs: Sequence[StepInput], guidance_scale: float) -> list[StepOutput]:
        """See `ir.step_model.Steps`."""
        result = self._modules[row.variant or COMBINE](self._inputs(row, runs, guidance_scale))
        count, slot = len(runs), trunk_of(row.variant)
        latents, outputs = _on_host(result["latents"]), _on_host(result["output"])
        terms = _on_host(result[TERM]) if TERM in result else [None] * count
        residuals = _requests(result[slot], count) if slot in result else [None] * count
        return [StepOutput(*each) for each in zip(latents, outputs, terms, residuals)]

    def _inputs(self, row: PlanRow, runs: Sequence[StepInput], guidance_scale: float) -> dict[str, Tensor]:
        """Inputs of a step module; see `ir.graphs.StepLayout`."""
        layout, device, count = self._layout, self._device, len(runs)
        offset, factor = row.guidance
        inputs = {
            "coefficients": torch.from_numpy(coefficient_vector(row, layout)).to(device),
            "guidance": torch.full((count,), offset + factor * guidance_scale, device=device),
        }
        conditions = [conditions_of(run.conditions) for run in runs]
        for name in conditions[0]:
            inputs[name] = _joined([each[name].to(device) for each in conditions])
        blank = torch.zeros(layout.latent_shape, device=device)
        for name, depth, histories in (
            ("latents", layout.latent_history, [run.latents for run in runs]),
            ("outputs", layout.output_history, [run.outputs for run in runs]),
            ("guidance_terms", layout.guidance_history, [run.guidance_terms for run in runs]),
        ):
            for k in range(depth):
                inputs[f"{name}_{k}"] = torch.stack([self._at(history, k, blank) for history in histories])
        if layout.stochastic:
            inputs["noise"] = torch.stack([self._at(() if r.noise is None else (r.noise,), 0, blank) for r in runs])
        if row.cached:
            inputs[f"{trunk_of(row.variant)}_0"] = _joined([run.residual for run in runs])
        return inputs

    def _at(self, history: Sequence[Latents], k: int, blank: Tensor) -> Tensor:
        return torch.from_numpy(history[k]).to(self._device) if k < len(history) else blank


def _on_host(tensor: Tensor) -> list[Latents]:
    return list(tensor.cpu().numpy())


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """[R, …] of each of b requests → [R·b, …], the unconditional branches first."""
    return torch.stack(list(tensors), 1).flatten(0, 1)


def _requests(tensor: Tensor, count: int) -> list[Tensor]:
    """Inverse of `_joined`."""
    return list(tensor.reshape(-1, count, *tensor.shape[1:]).unbind(1))
