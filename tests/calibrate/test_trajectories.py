"""Uncached runs that are made once: kept by who needs them first, found by all, never taken from an altered file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemica_trt.calibrate.estimate import calibrate_cheaply
from lemica_trt.calibrate.fit import Fitter
from lemica_trt.calibrate.replay import Stepper
from lemica_trt.calibrate.trajectories import Trajectories
from lemica_trt.evaluate.evaluator import PlanEvaluator
from lemica_trt.evaluate.samples import Samples
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.step_plan import uncached_plan
from lemica_trt.testing.toy_model import ToyModel, awkward, euler

pytestmark = pytest.mark.cpu

PROMPTS = ["a cat", "a dog"]
SCHEDULE = Schedule(num_steps=12, full_steps=(0, 3, 7))


def counting(model: ToyModel) -> list[int]:
    """Full steps of the model from now on, both branches of one latent as one."""
    rows: list[int] = []
    model.pipeline.transformer.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0] // 2))
    return rows


@pytest.mark.parametrize("table", [euler(12), awkward(12)], ids=["euler", "stochastic"])
def test_a_run_is_that_of_the_uncached_plan(tmp_path: Path, table: object) -> None:
    model, kept = ToyModel(), Trajectories(tmp_path / "t")
    made = kept.run(Stepper(model, table, 1), "a cat", 5, "sample 0")  # type: ignore[arg-type]
    assert made.shape == (13, *model.latent_shape) and made.dtype == np.float32
    final = model.run(uncached_plan(table, guidance_scale=3.0), "a cat", 5)  # type: ignore[arg-type]
    np.testing.assert_allclose(made[-1], final, rtol=1e-5, atol=1e-6)
    found = kept.find(model, table, "a cat", 5)  # type: ignore[arg-type]
    assert found is not None and np.array_equal(found, made)


def test_another_run_is_not_found(tmp_path: Path) -> None:
    model, kept, table = ToyModel(), Trajectories(tmp_path / "t"), euler(12)
    kept.run(Stepper(model, table, 1), "a cat", 5, "sample 0")
    other = ToyModel(guidance_scale=4.0)
    assert kept.find(model, table, "a dog", 5) is kept.find(model, table, "a cat", 6) is None
    assert kept.find(model, euler(10), "a cat", 5) is kept.find(other, table, "a cat", 5) is None
    assert kept.files(model, table, "a cat", 5) and not kept.files(model, table, "a dog", 5)
    nowhere = Trajectories(None)
    nowhere.run(Stepper(model, table, 1), "a cat", 5, "sample 0")
    assert nowhere.find(model, table, "a cat", 5) is None


def test_an_altered_file_is_not_used(tmp_path: Path) -> None:
    model, kept, table = ToyModel(), Trajectories(tmp_path / "t"), euler(12)
    kept.run(Stepper(model, table, 1), "a cat", 5, "sample 0")
    (file,) = (tmp_path / "t").iterdir()
    data = file.read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        assert kept.find(model, table, "a cat", 5) is None and not file.exists()
    file.write_bytes(data)
    assert kept.find(model, table, "a cat", 5) is not None


def test_what_calibrates_leaves_the_targets_of_fits_and_the_references_of_trials(tmp_path: Path) -> None:
    """The same plan and the same scores as without, and not one uncached run more."""
    table, folder = euler(12), tmp_path / "t"

    def fitter(model: ToyModel, trajectories: Path | None) -> Fitter:
        return Fitter(model, table, table, PROMPTS, samples=2, seed=5, journal=tmp_path / str(trajectories is None),
                      trajectories=trajectories)  # fmt: skip

    def evaluator(model: ToyModel, trajectories: Path | None) -> PlanEvaluator:
        return PlanEvaluator(lambda: model, table, Samples(tuple(PROMPTS), 5, 2), trajectories=trajectories)

    model = ToyModel()
    calibrate_cheaply(
        model, table, PROMPTS, method="secant", samples=2, seed=5, max_skip=4, journal=tmp_path / "c",
        trajectories=folder,
    )  # fmt: skip
    rows, fits = counting(model), fitter(model, folder)
    assert fits.evaluations_for(SCHEDULE) == 2 * 3
    plan = fits(SCHEDULE)
    assert (fits.evaluations, sum(rows)) == (6, 6)
    scores = evaluator(model, folder).scores([plan])
    assert sum(rows) == 6 + 2 * 3
    without = ToyModel()
    rows = counting(without)
    again = fitter(without, None)(SCHEDULE)
    assert sum(rows) == 2 * (12 + 3)
    for mine, other in zip(plan.rows, again.rows):
        np.testing.assert_allclose(mine.outputs, other.outputs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores, evaluator(without, None).scores([plan]), rtol=1e-4)
