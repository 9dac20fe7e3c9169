"""Adjoints: ⟨a, Δ⟩ = ⟨v, JΔ⟩ against finite differences in float64, and the model's own products against float64."""

from __future__ import annotations

import pytest
import torch

from lemica_trt.calibrate.adjoint import adjoints, impulses, sample_adjoints
from lemica_trt.calibrate.replay import Run, Stepper
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.testing.toy_model import LATENT_SHAPE, Naive, ToyModel, awkward, euler

pytestmark = pytest.mark.cpu

N, PROBES, STEP = 7, 3, 1e-6
TABLES = pytest.mark.parametrize("table", [euler(N), awkward(N)], ids=["euler", "awkward"])


class Float64(Naive):
    """The toy DiT under a table, from any history on."""

    def output(self, t: int, x: torch.Tensor) -> torch.Tensor:
        row = self.table.rows[t]
        time = torch.tensor([row.timestep], dtype=torch.float64)
        parts = [self.dit(row.in_scale * x[None], time, text[None], False)[0][0] for text in self.text]
        offset, factor = row.guidance
        return parts[0] + (offset + factor * self.scale) * (parts[1] - parts[0]) if self.guided else parts[0]

    def combine(self, t: int, run: Run) -> torch.Tensor:
        row = self.table.rows[t]
        terms = [c * x for c, x in zip(row.latents, run.latents)] + [c * m for c, m in zip(row.outputs, run.outputs)]
        return sum(terms, row.noise * self.fresh[t])

    @torch.no_grad()
    def runs(self, run: Run, t: int = 0) -> list[Run]:
        """Histories behind steps t … N, and at last one with x_N in front."""
        found = [run]
        for step in range(t, N):
            x = self.combine(step, found[-1])
            found.append(Run((x, *found[-1].latents[:-1]), (self.output(step, x), *found[-1].outputs[:-1])))
        x = self.combine(N, found[-1])
        return [*found, Run((x, *found[-1].latents[:-1]), found[-1].outputs)]

    def vjp(self, runs: list[Run], t: int, vectors: torch.Tensor) -> torch.Tensor:
        x = runs[t + 1].latents[0].clone().requires_grad_()
        m = self.output(t, x)
        return torch.stack([torch.autograd.grad(m, x, vector, retain_graph=True)[0] for vector in vectors])


def begin(naive: Float64) -> Run:
    blank = torch.zeros(LATENT_SHAPE, dtype=torch.float64)
    latents, outputs = max(naive.table.latent_history, 1), max(naive.table.output_history, 1)
    return Run((naive.start, *[blank] * (latents - 1)), (blank,) * outputs)


@TABLES
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0], ids=["guided", "unguided"])
def test_products_with_adjoints_are_directional_derivatives(table: SamplerTable, guidance_scale: float) -> None:
    naive = Float64(ToyModel(guidance_scale), table, "a cat", 3)
    runs = naive.runs(begin(naive))
    torch.testing.assert_close(runs[-1].latents[0], naive.final(), rtol=1e-12, atol=1e-12)
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, *LATENT_SHAPE, generator=random, dtype=torch.float64)

    directions = draw(PROBES)
    found = adjoints(table, directions, lambda t, vectors: naive.vjp(runs, t, vectors))
    assert len(found) == N + 1
    for j in range(1, N + 1):
        ways = Run(tuple(draw() for _ in runs[j].latents), tuple(draw() for _ in runs[j].outputs))

        def moved(size: float, run: Run = runs[j], ways: Run = ways) -> Run:
            return Run(
                tuple(x + size * d for x, d in zip(run.latents, ways.latents)),
                tuple(m + size * d for m, d in zip(run.outputs, ways.outputs)),
            )

        ends = [naive.runs(moved(size), j)[-1].latents[0] for size in (STEP, -STEP)]
        slope = (ends[0] - ends[1]) / (2 * STEP)
        expected = (directions * slope).flatten(1).sum(1)
        put = impulses(table, j, moved(1.0), runs[j])
        got = sum((a * d).flatten(1).sum(1) for a, d in zip(found[j:], put))
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)
        assert expected.abs().min() > 1e-4, "a direction that nothing depends on would prove nothing"


@TABLES
def test_the_models_adjoints_are_those_in_float64(table: SamplerTable) -> None:
    toy = ToyModel()
    naive = Float64(toy, table, "a cat", 3)
    runs = naive.runs(begin(naive))
    directions = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(2))
    expected = adjoints(table, directions.double(), lambda t, vectors: naive.vjp(runs, t, vectors))
    sample = Stepper(toy, table, 4).sample("sample 0", "a cat", 3)
    with torch.no_grad():
        uncached = sample.uncached()
    before = sample.full_count
    found = sample_adjoints(sample, uncached, directions)
    for mine, other in zip(found, expected):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-5)
    assert (sample.full_count - before, sample.backward_count) == (N, 2 * N)
    assert all(p.requires_grad and p.grad is None for p in toy.pipeline.transformer.parameters())


def test_one_step_samplers_have_one_impulse_the_change_of_the_latent() -> None:
    table = euler(N)
    run = Run((torch.zeros(LATENT_SHAPE),), (torch.zeros(LATENT_SHAPE),))
    changed = Run((torch.full(LATENT_SHAPE, 2.0),), (torch.full(LATENT_SHAPE, 7.0),))
    (found,) = impulses(table, 3, changed, run)
    torch.testing.assert_close(found, torch.full(LATENT_SHAPE, 2.0 - 7.0 / N))
