"""The step graphs as torch modules: what is exported, and what the exported graphs are compared with.

All take one dict of tensors and return one; names, dtypes and shapes are those of `lemica_trt.ir.graphs.StepLayout`.
Everything around the DiT – the combination, guidance, the mix of residuals – is fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.ir.graphs import COMBINE, FULL, SKIP, TERM, TRUNK, StepLayout, kind_of_variant, trunk_name
from lemica_trt.models.model import Model
from lemica_trt.models.trace.body import Step
from lemica_trt.models.traced import TracedModel


class Branch(NamedTuple):
    """The one branch of the guidance that this process runs; another process runs the other (CFG-parallel).

    Attributes:
        rank: 0: the unconditional one, 1: the conditional one; also that of the process.
        gather: the collective of a step: what the DiT gives here, [b, …] → that of both branches [2b, …].
    """

    rank: int
    gather: Callable[[Tensor], Tensor]


class CombineStep(nn.Module):
    """x_i = Σ latents[j]·x_{i−1−j} + Σ outputs[k]·m_{i−1−k} + noise·z_i, and m_i = Σ reuse[k]·m_{i−1−k}."""

    def __init__(self, layout: StepLayout) -> None:
        super().__init__()
        self.layout = layout

    def combine(self, inputs: dict[str, Tensor]) -> Tensor:
        """x_i, fp32 [b, *latent_shape]."""
        layout = self.layout
        latents = self._mix(inputs, "latents", layout.latent_history)
        latents = latents + self._mix(inputs, "outputs", layout.output_history)
        if layout.guidance_history:
            latents = latents + self._mix(inputs, "guidance_terms", layout.guidance_history)
        if layout.stochastic:
            latents = latents + self._coefficients(inputs, "noise")[0] * inputs["noise"]
        return latents

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Combine only; `latents`, `output`, and the guidance term where the layout keeps it."""
        output = self._mix(inputs, "outputs", self.layout.output_history, weights="reuse")
        result = {"latents": self.combine(inputs), "output": output}
        if self.layout.guidance_history:
            result[TERM] = self._mix(inputs, "guidance_terms", self.layout.guidance_history, weights="reuse")
        return result

    def _coefficients(self, inputs: dict[str, Tensor], group: str) -> Tensor:
        return inputs["coefficients"][self.layout.offsets[group]]

    def _mix(self, inputs: dict[str, Tensor], name: str, count: int, *, weights: str | None = None) -> Tensor:
        """Σ_k weights[k]·inputs[name_k] in fp32."""
        factors = self._coefficients(inputs, weights or name)
        total = factors[0] * inputs[f"{name}_0"].float()
        for k in range(1, count):
            total = total + factors[k] * inputs[f"{name}_{k}"].float()
        return total


class FullStep(CombineStep):
    """Combine, then the whole DiT under guidance; `latents`, `output`, and what else the layout keeps.

    Args:
        branch: None: both run here. Else inputs and outputs are the same, but cache slots hold the rows of the branch.
    """

    def __init__(self, model: Model, layout: StepLayout, branch: Branch | None = None) -> None:
        super().__init__(layout)
        self._branch = branch
        self.dit: nn.Module = self._dit(model)
        self._family = model.family
        self._dtype = model.dtype
        self._constants = list(model.constants)
        for name, constant in model.constants.items():
            self.register_buffer(name, constant, persistent=False)

    def _dit(self, model: Model) -> nn.Module:
        return model.split.full

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The full graph."""
        latents = self.combine(inputs)
        output, residual = self.dit(**self._dit_inputs(latents, inputs))
        result = {"latents": latents, **self._guide(output, inputs)}
        return {**result, TRUNK: residual} if self.layout.depth(TRUNK) else result

    def _dit_inputs(self, latents: Tensor, inputs: dict[str, Tensor]) -> dict[str, object]:
        sample = (self._coefficients(inputs, "in_scale")[0] * latents).to(self._dtype)
        embeds = inputs["prompt_embeds"]
        if self._branch is not None:
            embeds = embeds.chunk(2)[self._branch.rank]
        elif self.layout.guided:
            sample = torch.cat([sample, sample])
        timestep = self._coefficients(inputs, "timestep").expand(sample.shape[0])
        constants = {name: self.get_buffer(name) for name in self._constants}
        return self._family.transformer_inputs(sample, timestep, embeds, constants)

    def _guide(self, output: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """m = u + g·(c − u), and where the layout keeps it (g − 1)·(c − u); fp32 [b, *latent_shape]."""
        if self._branch is not None:
            output = self._branch.gather(output)
        output = output.float()
        if not self.layout.guided:
            return {"output": output}
        guidance = inputs["guidance"]
        unconditional, conditional = output.reshape(2, guidance.shape[0], *self.layout.latent_shape).unbind(0)
        scale = guidance.view(-1, *[1] * len(self.layout.latent_shape))
        result = {"output": unconditional + scale * (conditional - unconditional)}
        if self.layout.guidance_history:
            result[TERM] = (scale - 1) * (conditional - unconditional)
        return result


class SkipStep(FullStep):
    """Combine, then the DiT with Σ_k weights[k]·trunk_k in place of its blocks; `latents`, `output`."""

    def _dit(self, model: Model) -> nn.Module:
        return model.split.skip

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The skip graph."""
        latents = self.combine(inputs)
        residual = self._mix(inputs, TRUNK, self.layout.depth(TRUNK)).to(self._dtype)
        output = self.dit(residual, **self._dit_inputs(latents, inputs))
        return {"latents": latents, **self._guide(output, inputs)}


class TracedFullStep(CombineStep):
    """Combine, then the whole body of a traced loop; as `FullStep`.

    Args:
        kind: of the steps.
    """

    def __init__(self, model: TracedModel, layout: StepLayout, kind: int) -> None:
        super().__init__(layout)
        self.body = model.body(kind)
        self._trunk = trunk_name(kind)
        self._dtype = model.dtype
        self._names = [spec.name for spec in model.conditions]

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The full graph."""
        latents, step = self._run(inputs, None)
        result = {"latents": latents, **self._kept(step)}
        return {**result, self._trunk: step.residual.to(self._dtype)} if self.layout.depth(self._trunk) else result

    def _kept(self, step: Step) -> dict[str, Tensor]:
        term = {TERM: step.guidance_term} if self.layout.guidance_history else {}
        return {"output": step.output, **term}

    def _run(self, inputs: dict[str, Tensor], residual: Tensor | None) -> tuple[Tensor, Step]:
        """Latents, and what the body makes of them; it takes one request, so that several run one after another."""
        latents = self.combine(inputs)
        count = latents.shape[0]
        results = []
        for i in range(count):
            rows = slice(i, None, count)  # of one request: a row a branch
            results.append(
                self.body(
                    latents[i : i + 1],
                    self._coefficients(inputs, "timestep"),
                    self._coefficients(inputs, "in_scale"),
                    inputs["guidance"][i : i + 1] if self.layout.guided else None,
                    {name: inputs[name][rows] for name in self._names},
                    None if residual is None else residual[rows],
                )
            )
        if count == 1:
            return latents, results[0]
        outputs, terms, added = zip(*results)
        return latents, Step(torch.cat(outputs), torch.cat(terms), torch.stack(added, 1).flatten(0, 1))


class TracedSkipStep(TracedFullStep):
    """Combine, then a traced body with Σ_k weights[k]·trunk_k in place of the blocks."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The skip graph."""
        residual = self._mix(inputs, self._trunk, self.layout.depth(self._trunk))
        latents, step = self._run(inputs, residual)
        return {"latents": latents, **self._kept(step)}


VARIANTS: dict[str, type[FullStep]] = {FULL.name: FullStep, SKIP.name: SkipStep}
"""Variant → the module that runs it."""


def step_modules(model: Model, layout: StepLayout, branch: Branch | None = None) -> dict[str, CombineStep]:
    """The step graphs of a layout as modules, by name.

    Args:
        branch: the one that runs here; None: both.

    Raises:
        UsageError: `branch` of a model without guidance.
        UnsupportedError: `branch` of a traced pipeline, whose loop calls the branches as it likes.
    """
    if branch is not None and not layout.guided:
        raise UsageError(
            "expected two branches of guidance to split, the model runs without guidance", fix="one device"
        )
    if branch is not None and isinstance(model, TracedModel):
        raise UnsupportedError(
            f"{model.profile.source}: expected CogVideoX or Wan, got a traced pipeline: it cannot be split by branches",
            fix="run it on one device",
        )
    made: dict[str, CombineStep] = {COMBINE: CombineStep(layout)}
    for variant in layout.variants:
        if isinstance(model, TracedModel):
            traced = TracedSkipStep if variant.reads else TracedFullStep
            made[variant.name] = traced(model, layout, kind_of_variant(variant.name))
        else:
            made[variant.name] = VARIANTS[variant.name](model, layout, branch)
    return made
