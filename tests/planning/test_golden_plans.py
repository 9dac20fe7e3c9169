"""The plans of the bundled models as they have always been: steps, fitted weights, and what they are worth.

`golden_plans.json` was written with another version of the planners (two calibration samples, one thread): by model,
then planner and budget, the full steps, the weights of each row's latents and outputs, and the mean PSNR of held-out
frames against the uncached run. Another processor rounds differently, so that only steps are compared exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lemica_trt.calibrate.estimate import calibrate_cheaply
from lemica_trt.calibrate.fit import Fitter
from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.evaluate.evaluator import PlanEvaluator
from lemica_trt.evaluate.samples import held_out_samples
from lemica_trt.ir.calibration import Calibration
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.resources import calibration_path, load_profile
from lemica_trt.models import Model, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.planner import Problem, planners

pytestmark = pytest.mark.cpu

GOLDEN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("golden_plans.json").read_text())
SAMPLES, CLIPS = 2, 8
WEIGHT_TOLERANCE = 1e-3  # of the largest weight of a row
PSNR_TOLERANCE = 0.5  # dB


@pytest.fixture(scope="module", params=sorted(GOLDEN))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[StepPlan]]:
    """A model, and its plans in the order of the file."""
    work = tmp_path_factory.mktemp(request.param)
    model = load_model(load_profile(request.param))
    table, profile = sampler_table(model.scheduler()), model.profile
    prompts = read_prompts(calibration_path(profile.calibration.prompts) / "calibration.txt")
    measured = calibrate_cheaply(
        model,
        table,
        prompts,
        method="secant",
        samples=SAMPLES,
        seed=0,
        max_skip=profile.calibration.max_skip,
        journal=work / "calibration",
    )
    problem = Problem(
        table=table,
        guidance_scale=profile.sampling.guidance_scale,
        calibration=Calibration(graph=measured.graph, grams=measured.grams, sensitivity=measured.sensitivity),
        fit=Fitter(model, table, table, prompts, samples=SAMPLES, seed=0, journal=work / "fits"),
    )
    named = (key.split() for key in GOLDEN[request.param])
    return model, [planners()[name](problem, int(budget)) for name, budget in named]


def test_steps_and_weights(found: tuple[Model, list[StepPlan]]) -> None:
    model, plans = found
    for plan, (key, golden) in zip(plans, GOLDEN[model.profile.name].items(), strict=True):
        assert f"{plan.method} {plan.budget}" == key
        assert list(plan.full_steps) == golden["full_steps"], key
        for row, weights in zip(plan.rows, golden.get("weights", []), strict="weights" in golden):
            tolerance = WEIGHT_TOLERANCE * max(map(abs, weights))
            assert [*row.latents, *row.outputs] == pytest.approx(weights, rel=0, abs=tolerance), (key, row.step)


def test_quality(found: tuple[Model, list[StepPlan]]) -> None:
    model, plans = found
    profile = model.profile
    prompts = read_prompts(calibration_path(profile.calibration.prompts) / "held_out.txt")
    evaluator = PlanEvaluator(lambda: model, sampler_table(model.scheduler()), held_out_samples(prompts, CLIPS))
    scores = {f"{plan.method} {plan.budget}": np.mean(evaluator.psnr(plan)) for plan in plans}
    expected = {key: golden["psnr"] for key, golden in GOLDEN[profile.name].items()}
    assert scores == pytest.approx(expected, abs=PSNR_TOLERANCE)
