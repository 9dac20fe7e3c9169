"""What the README claims of the bundled model: the error graph is of it, and its plans beat equal distances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lemica_trt.calibrate.calibration import require_calibration_of
from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.core.errors import InputError
from lemica_trt.core.values import read_value
from lemica_trt.evaluate.evaluator import PlanEvaluator
from lemica_trt.evaluate.samples import held_out_samples
from lemica_trt.ir.calibration import Calibration, ErrorGraph
from lemica_trt.ir.resources import calibration_path, load_profile
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.models import Model, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.planner import Problem, planners

pytestmark = pytest.mark.cpu

CLIPS = 32


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(load_profile("cogvideox-tiny"))


@pytest.fixture(scope="module")
def table(model: Model) -> SamplerTable:
    return sampler_table(model.scheduler())


@pytest.fixture(scope="module")
def graph() -> ErrorGraph:
    return read_value(ErrorGraph, calibration_path("cogvideox-tiny/error_graph.json"))


def require_fits(graph: ErrorGraph, model: Model, table: SamplerTable) -> None:
    require_calibration_of(
        graph, table, model.profile, revision=model.revision, latent_shape=model.latent_shape, where="error_graph.json"
    )


def problem_of(model: Model, table: SamplerTable, graph: ErrorGraph) -> Problem:
    guidance = model.profile.sampling.guidance_scale
    return Problem(table=table, guidance_scale=guidance, calibration=Calibration(graph=graph))


def test_committed_error_graph_is_of_the_bundled_model(model: Model, table: SamplerTable, graph: ErrorGraph) -> None:
    require_fits(graph, model, table)
    assert graph.samples >= 8
    skip = min(graph.max_skip, 9)
    assert {(edge.start, edge.stop) for edge in graph.edges} >= {(0, 2), (0, skip + 1), (graph.num_steps - 2, 50)}
    # Skipping one step more costs more: no theorem, but what a trained model shows (LeMiCa's figure 3).
    errors = {(edge.start, edge.stop): edge.error for edge in graph.edges}
    longer = [(i, j) for i, j in errors if (i, j - 1) in errors]
    assert np.mean([errors[i, j] > errors[i, j - 1] for i, j in longer]) >= 0.95


@pytest.mark.long
def test_plans_beat_equal_distances_on_held_out_prompts(model: Model, table: SamplerTable, graph: ErrorGraph) -> None:
    samples = held_out_samples(
        read_prompts(calibration_path(model.profile.calibration.prompts) / "held_out.txt"), CLIPS
    )
    evaluator = PlanEvaluator(lambda: model, table, samples)
    problem = problem_of(model, table, graph)
    for budget, margin in ((15, 1.5), (20, 3.0)):
        lemica, uniform = (np.mean(evaluator.psnr(planners()[name](problem, budget))) for name in ("lemica", "uniform"))
        assert lemica - uniform >= margin, f"B={budget}: {lemica - uniform:.2f} dB"


def perturbed(scheduler: Any) -> Any:
    """The scheduler as another processor might compute it: numbers differ by 1e-7, the last bit of a float32."""
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 1:
            away = 1 + 1e-7 * (-1.0) ** torch.arange(len(value), dtype=torch.float64)
            inside = (value > 0) & (value < 1)  # 0 and 1 are exact on every machine
            setattr(scheduler, name, torch.where(inside, value.double() * away, value.double()))
    return scheduler


def test_a_calibration_holds_on_another_processor(model: Model, table: SamplerTable, graph: ErrorGraph) -> None:
    """Same identity, other last bits: the committed graph fits and gives the same plans."""
    other = sampler_table(perturbed(model.scheduler()))
    assert other.rows != table.rows
    assert other.digest == table.digest
    require_fits(graph, model, other)
    for budget in (10, 15, 25):
        plans = [planners()["lemica"](problem_of(model, sampler, graph), budget) for sampler in (table, other)]
        assert plans[0].full_steps == plans[1].full_steps
        assert plans[0].sampler_digest == plans[1].sampler_digest


def test_a_calibration_of_other_numbers_is_refused(model: Model, graph: ErrorGraph) -> None:
    scheduler = model.scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.001
    with pytest.raises(InputError, match="same settings whose coefficients differ by more than 1e-05"):
        require_fits(graph, model, sampler_table(scheduler))
