"""The calibrator on the model that ships with the package, against plans run by `models.denoise`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from torch import Tensor

from lemica_trt.calibrate.estimate import calibrate_cheaply
from lemica_trt.calibrate.exact import measure
from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.ir.resources import calibration_path, load_profile
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.models import Model, denoise, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.step_plan import plan_from_schedule

pytestmark = pytest.mark.cpu

SEED = 11


@pytest.mark.parametrize("scheduler", [None, "CogVideoXDPMScheduler"])
def test_edges_are_plans_with_one_cached_segment(tmp_path: Path, scheduler: str | None) -> None:
    profile = load_profile("cogvideox-tiny")
    sampling = msgspec.structs.replace(profile.sampling, steps=6, scheduler=scheduler)
    model = load_model(msgspec.structs.replace(profile, sampling=sampling))
    table = sampler_table(model.scheduler())
    prompts = read_prompts(calibration_path("cogvideox-tiny") / "calibration.txt")
    graph = measure(model, table, prompts, samples=1, seed=SEED, max_skip=3, journal=tmp_path / "j").graph
    uncached = _final(model, table, prompts[0], range(6))
    assert len(graph.edges) == 12
    for edge in graph.edges[::3]:
        full = [t for t in range(6) if not edge.start < t < edge.stop]
        expected = (_final(model, table, prompts[0], full) - uncached).abs().mean().item()
        assert edge.errors[0] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_estimates_rank_edges_as_exact_errors_do(tmp_path: Path) -> None:
    model, table, prompts = _small(10)
    arguments: dict[str, Any] = {"samples": 2, "seed": SEED, "max_skip": 3}
    exact = measure(model, table, prompts, journal=tmp_path / "e", **arguments).graph
    found = calibrate_cheaply(model, table, prompts, method="secant", journal=tmp_path / "c", **arguments)
    ranks = [np.argsort(np.argsort([edge.error for edge in graph.edges])) for graph in (exact, found.graph)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def _small(steps: int) -> tuple[Model, SamplerTable, list[str]]:
    profile = load_profile("cogvideox-tiny")
    sampling = msgspec.structs.replace(profile.sampling, steps=steps)
    model = load_model(msgspec.structs.replace(profile, sampling=sampling))
    prompts = read_prompts(calibration_path("cogvideox-tiny") / "calibration.txt")
    return model, sampler_table(model.scheduler()), prompts


def _final(model: Model, table: SamplerTable, prompt: str, full: Sequence[int]) -> Tensor:
    plan = plan_from_schedule(
        Schedule(num_steps=table.num_steps, full_steps=tuple(full)),
        table,
        name="x",
        guidance_scale=model.profile.sampling.guidance_scale,
        method="given",
    )
    noises = model.noises(SEED)
    return denoise(model, plan, model.embed([prompt]), next(noises)[None], fresh_noise=lambda row: next(noises)[None])
