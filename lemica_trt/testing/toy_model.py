"""A model small enough to replay eq. 4 naively: from the noise on, edge by edge, one latent at a time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lemica_trt.ir.plan import PlanRow
from lemica_trt.ir.profile import Profile, Sampling, Shape
from lemica_trt.ir.sampler import SamplerRow, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.models.family import Family
from lemica_trt.models.model import Model
from lemica_trt.planning.step_plan import plan_from_schedule
from lemica_trt.testing.interpreter import interpret

LATENT_SHAPE = (3, 4)
WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states) + hidden_states.mean(1, keepdim=True))


class ToyTransformer(nn.Module):
    """Tokens are the columns of a latent [3, 4]; honours what `split_transformer` asks of diffusers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(LATENT_SHAPE[0], WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm_final = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, LATENT_SHAPE[0])

    def before(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        conditions = self.time(timestep[:, None] / 1000) + self.text(text.mean(1))
        embedded: Tensor = self.embed(x.transpose(1, 2)) + conditions[:, None]
        return embedded

    def trunk(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h

    def behind(self, h: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm_final(h)).transpose(1, 2)
        return output

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        return (self.behind(self.trunk(self.before(hidden_states, timestep, encoder_hidden_states))),)


class ToyFamily(Family):
    name = "toy"
    pipeline_class = "Toy"
    block_lists = ("blocks",)
    epilogue = "norm_final"

    def latent_shape(self, pipeline: Any, shape: Shape) -> tuple[int, ...]:
        return LATENT_SHAPE


class ToyModel(Model):
    """A `Model` whose text encoder is a random vector for each prompt."""

    revision = "toy"

    def __init__(self, guidance_scale: float = 3.0, guidance_range: tuple[float, float] | None = None) -> None:
        torch.manual_seed(0)
        profile = Profile(
            name="toy",
            family="toy",
            source="none",
            dtype="fp32",
            text_length=2,
            shape=Shape(frames=1, height=8, width=8),
            sampling=Sampling(guidance_scale=guidance_scale, guidance_range=guidance_range),
        )
        pipeline = SimpleNamespace(transformer=ToyTransformer().eval(), device=torch.device("cpu"))
        super().__init__(profile, ToyFamily(), pipeline, Path())

    def embed(self, prompts: Sequence[str], negative: str | Sequence[str] | None = None) -> Tensor:
        rows = ["", *prompts] if self.guided else prompts
        assert len(prompts) == 1
        seeds = [sum(prompt.encode()) for prompt in rows]
        return torch.stack([torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def euler(num_steps: int) -> SamplerTable:
    """Rectified flow: x_{i+1} = x_i + (σ_{i+1} − σ_i)·m_i, σ from 1 to 0."""
    rows = [SamplerRow(latents=(1.0,), timestep=1000.0)]
    for i in range(1, num_steps + 1):
        timestep = None if i == num_steps else 1000.0 * (1 - i / num_steps)
        rows.append(SamplerRow(latents=(1.0,), outputs=(-1 / num_steps,), timestep=timestep))
    return SamplerTable(scheduler="Euler", rows=tuple(rows))


def awkward(num_steps: int) -> SamplerTable:
    """Everything that a table can have: histories of both kinds, noise (also at the end), scales, moving guidance."""
    rows = [SamplerRow(latents=(1.5,), timestep=1000.0, in_scale=0.7)]
    for i in range(1, num_steps + 1):
        rows.append(
            SamplerRow(
                latents=(0.9, 0.1),
                outputs=(-0.3, 0.1)[: min(i, 2)],
                noise=0.05 if i != 2 else 0.0,
                timestep=None if i == num_steps else 1000.0 * (1 - i / num_steps),
                in_scale=1 - 0.05 * i,
                guidance=(1.0, 0.1 * i),
            )
        )
    return SamplerTable(scheduler="Awkward", rows=tuple(rows))


class Naive:
    """Eq. 4 by definition: each edge's run from the noise on, in float64."""

    def __init__(self, model: ToyModel, table: SamplerTable, prompt: str, seed: int) -> None:
        self.dit = copy.deepcopy(model.pipeline.transformer).double()
        self.table = table
        self.guided = model.guided
        self.scale = model.profile.sampling.guidance_scale
        self.text = model.embed([prompt]).double()
        noises = model.noises(seed)
        self.start = next(noises).double()
        self.fresh = [next(noises).double() if row.noise else torch.zeros_like(self.start) for row in table.rows]

    @torch.no_grad()
    def final(self, start: int = 0, stop: int = 0) -> Tensor:
        """x_N where steps start < t < stop reuse the residual of step `start`."""
        full = tuple(t for t in range(self.table.num_steps) if not start < t < stop)
        schedule = Schedule(num_steps=self.table.num_steps, full_steps=full)
        plan = plan_from_schedule(schedule, self.table, name="naive", guidance_scale=self.scale, method="given")
        result: Tensor = interpret(plan, self, self.start, lambda row: self.fresh[row.step])[-1][1]
        return result

    def full(self, row: PlanRow, sample: Tensor) -> tuple[Tensor, Tensor]:
        """See `testing.interpreter.Network`."""
        hidden = self._before(row, sample)
        residual = torch.stack([self.dit.trunk(h) - h for h in hidden])
        return self.head(row, sample, residual), residual

    def head(self, row: PlanRow, sample: Tensor, residual: Tensor) -> Tensor:
        """See `testing.interpreter.Network`."""
        branches = [self.dit.behind(h + r)[0] for h, r in zip(self._before(row, sample), residual)]
        offset, factor = row.guidance
        scale = offset + factor * self.scale
        output: Tensor = branches[0] + scale * (branches[1] - branches[0]) if self.guided else branches[0]
        return output

    def _before(self, row: PlanRow, sample: Tensor) -> list[Tensor]:
        time = torch.tensor([row.timestep], dtype=torch.float64)
        return [self.dit.before(sample[None], time, text[None]) for text in self.text]

    def error(self, start: int, stop: int) -> float:
        return (self.final(start, stop) - self.final()).abs().mean().item()
