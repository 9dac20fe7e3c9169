"""The plans of the bundled models as they have always been: steps, fitted weights, and what they are worth.

`golden_plans.json` has, by model, then planner and budget, the full steps, the weights of each row's latents, outputs
and guidance terms, and the mean PSNR of held-out frames against the uncached run; of two calibration samples, on one
thread. Another processor rounds differently, so that only steps are compared exactly. Where either is meant to
change, `OMP_NUM_THREADS=1 PYTHONPATH=. python tests/planning/test_golden_plans.py` writes it anew.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
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
from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.resources import calibration_path, load_profile
from lemica_trt.models import Model, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.planner import Problem, planners

pytestmark = pytest.mark.cpu

FILE = Path(__file__).with_name("golden_plans.json")
GOLDEN: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
SAMPLES, CLIPS = 2, 8
WEIGHT_TOLERANCE = 1e-3  # of the largest weight of a row
OTHER_ORDERS = 1
"""Rows of a plan that may have another order: another CPU's last bits decide between two that fit equally well."""
PSNR_TOLERANCE = 0.5  # dB


def planned(name: str, work: Path) -> tuple[Model, list[StepPlan]]:
    """A model, and its plans in the order of the file."""
    model = load_model(load_profile(name))
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
        trajectories=work / "trajectories",
    )
    problem = Problem(
        table=table,
        guidance_scale=profile.sampling.guidance_scale,
        calibration=Calibration(graph=measured.graph, grams=measured.grams, sensitivity=measured.sensitivity),
        fit=Fitter(
            model, table, table, prompts, samples=SAMPLES, seed=0, journal=work / "fits",
            trajectories=work / "trajectories",
        ),
    )  # fmt: skip
    named = (key.split() for key in GOLDEN[name])
    return model, [planners()[method](problem, int(budget)) for method, budget in named]


def weights_of(row: PlanRow) -> list[float]:
    return [*row.latents, *row.outputs, *row.guidance_terms]


def scores(model: Model, plans: Sequence[StepPlan]) -> dict[str, float]:
    """Mean PSNR of held-out frames."""
    prompts = read_prompts(calibration_path(model.profile.calibration.prompts) / "held_out.txt")
    evaluator = PlanEvaluator(lambda: model, sampler_table(model.scheduler()), held_out_samples(prompts, CLIPS))
    return {f"{plan.method} {plan.budget}": float(np.mean(evaluator.psnr(plan))) for plan in plans}


@pytest.fixture(scope="module", params=sorted(GOLDEN))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[StepPlan]]:
    return planned(request.param, tmp_path_factory.mktemp(request.param))


def test_steps_and_weights(found: tuple[Model, list[StepPlan]]) -> None:
    model, plans = found
    for plan, (key, golden) in zip(plans, GOLDEN[model.profile.name].items(), strict=True):
        assert f"{plan.method} {plan.budget}" == key
        assert list(plan.full_steps) == golden["full_steps"], key
        others = []
        for row, weights in zip(plan.rows, golden.get("weights", []), strict="weights" in golden):
            if len(weights_of(row)) != len(weights):
                others.append(row.step)
                continue
            tolerance = WEIGHT_TOLERANCE * max(map(abs, weights))
            assert weights_of(row) == pytest.approx(weights, rel=0, abs=tolerance), (key, row.step)
        assert len(others) <= OTHER_ORDERS, (key, others)


def test_quality(found: tuple[Model, list[StepPlan]]) -> None:
    model, plans = found
    expected = {key: golden["psnr"] for key, golden in GOLDEN[model.profile.name].items()}
    assert scores(model, plans) == pytest.approx(expected, abs=PSNR_TOLERANCE)


def write() -> None:
    """Make the file anew."""
    made: dict[str, dict[str, Any]] = {}
    for name in GOLDEN:
        with tempfile.TemporaryDirectory() as folder:
            model, plans = planned(name, Path(folder))
        for plan, (key, psnr) in zip(plans, scores(model, plans).items()):
            entry: dict[str, Any] = {"full_steps": list(plan.full_steps), "psnr": round(psnr, 3)}
            if plan.method.startswith("fitted"):
                entry["weights"] = [[float(f"{weight:.7g}") for weight in weights_of(row)] for row in plan.rows]
            made.setdefault(name, {})[key] = entry
    text = json.dumps(made, indent=1)
    text = re.sub(r"\[\s+([-\d.,e\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    FILE.write_text(f"{text}\n")


if __name__ == "__main__":
    write()
