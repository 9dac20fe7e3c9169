"""A plan on the torch backend is the plan that `models.denoise` runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from lemica_trt.backends.base import Capture
from lemica_trt.backends.torch.options import TorchOptions
from lemica_trt.evaluate.torch_runtime import torch_denoiser
from lemica_trt.ir.plan import StepPlan, layout_from_plans
from lemica_trt.ir.schedule import Schedule
from lemica_trt.models import Model, denoise, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.step_plan import plan_from_schedule


def plan_of(model: Model, full_steps: tuple[int, ...]) -> StepPlan:
    table = sampler_table(model.scheduler())
    schedule = Schedule(num_steps=table.num_steps, full_steps=full_steps)
    return plan_from_schedule(schedule, table, name=f"b{len(full_steps)}", guidance_scale=3.0, method="given")


def compare(model: Model, **settings: object) -> float:
    """Largest difference of a plan with skipped steps and of one without, at two batch sizes, run three times each."""
    plans = [plan_of(model, (0, 2)), plan_of(model, (0, 1, 2, 3))]
    layout = layout_from_plans(plans, latent_shape=model.latent_shape, guided=model.guided, conditions=model.conditions)
    denoiser = torch_denoiser(model, layout, **settings)  # type: ignore[arg-type]
    largest = 0.0
    for batch in (1, 2):
        embeds = model.embed(["a cat", "x"][:batch])
        noise = torch.stack([model.noise(i) for i in range(batch)])
        scales = torch.tensor([3.0, 4.5])[:batch]
        for plan in plans:
            expected = denoise(model, plan, embeds, noise, guidance_scale=scales).cpu().numpy()
            arrays = ({"prompt_embeds": embeds.float().cpu().numpy()}, noise.cpu().numpy(), scales.double().numpy())
            found = [denoiser.run(plan, *arrays) for _ in range(3)]  # on CUDA: enqueued, captured, replayed
            assert all(np.array_equal(found[0], other) for other in found)
            largest = max(largest, float(np.abs(found[0] - expected).max()))
    return largest


@pytest.mark.cpu
@pytest.mark.parametrize("variant", ["sincos", "wan"])
def test_a_plan_gives_the_latents_of_denoise(variant: str, tmp_path: Path) -> None:
    assert compare(load_model(tiny.make_variant(variant, tmp_path))) < 1e-6


@pytest.mark.cpu
def test_modules_are_compiled_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: (compiled.append(module), module)[1])
    assert compare(load_model(tiny.make_variant("sincos", tmp_path)), options=TorchOptions(compile=True)) < 1e-6
    assert [type(module).__name__ for module in compiled] == ["CombineStep", "FullStep", "SkipStep"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
@pytest.mark.parametrize("capture", ["plan", "step", "none"])
def test_cuda_graphs_change_nothing(capture: Capture, tmp_path: Path) -> None:
    model = load_model(tiny.make_variant("sincos", tmp_path))
    model.pipeline.to("cuda")
    assert compare(model, capture=capture) < 1e-5
