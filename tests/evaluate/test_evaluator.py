"""The evaluator: scores are what they say, finished runs are kept, samples are numbered alike everywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import UNSET

from lemica_trt.core.errors import InputError, VerificationError
from lemica_trt.core.metrics import PSNR_CAP, psnr
from lemica_trt.evaluate.evaluator import PlanEvaluator
from lemica_trt.evaluate.runs import SNR_CAP_DB, PlanRuns
from lemica_trt.evaluate.samples import HELD_OUT_SEED, Samples, held_out_samples, validation_samples
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import FEW_STEPS, CalibrationSettings
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.step_model import Latents
from lemica_trt.models import denoise
from lemica_trt.planning.step_plan import plan_from_schedule, uncached_plan
from lemica_trt.testing.toy_model import ToyModel, euler

pytestmark = pytest.mark.cpu

PROMPTS = ("a cat", "a dog")
TABLE = euler(6)
UNCACHED = uncached_plan(TABLE, guidance_scale=3.0)


def plan(*full: int) -> StepPlan:
    schedule = Schedule(num_steps=6, full_steps=full)
    return plan_from_schedule(schedule, TABLE, name=f"b{len(full)}", guidance_scale=3.0, method="given")


def evaluator(
    model: ToyModel, folder: Path | None = None, *, prompts: tuple[str, ...] = PROMPTS, seed: int = 5, **options: Any
) -> PlanEvaluator:
    return PlanEvaluator(lambda: model, TABLE, Samples(prompts=prompts, seed=seed, count=4), folder=folder, **options)


def journals(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.glob("*.jsonl"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Budgets of the plans that are run."""
    found: list[int] = []
    run = ToyModel.run

    def record(model: ToyModel, plan: StepPlan, *arguments: Any) -> Latents:
        found.append(plan.budget)
        return run(model, plan, *arguments)

    monkeypatch.setattr(ToyModel, "run", record)
    return found


def test_the_score_is_the_ratio_of_signal_to_noise() -> None:
    model = ToyModel()
    plans = [plan(0, 3), UNCACHED]
    scores = evaluator(model).scores(plans, range(3))
    for s in range(3):
        noise, embeds = model.noise(5 + s)[None], model.embed([PROMPTS[s % 2]])
        reference, cached = (denoise(model, p, embeds, noise).double() for p in (UNCACHED, plans[0]))
        expected = 10 * math.log10(reference.square().sum() / (cached - reference).square().sum())
        assert scores[0][s] == pytest.approx(expected, abs=1e-3)
    assert scores[1] == [SNR_CAP_DB] * 3
    assert all(score < 60 for score in scores[0])


def test_finished_runs_are_not_run_again(tmp_path: Path, runs: list[int]) -> None:
    model = ToyModel()
    whole = evaluator(model).scores([plan(0, 3), plan(0, 2)])
    assert evaluator(model, tmp_path).scores([plan(0, 3)], range(2)) == [whole[0][:2]]
    with next(tmp_path.iterdir()).open("ab") as file:
        file.write(b'{"plan":"torn')  # killed while it wrote
    again = evaluator(model, tmp_path)
    del runs[:]
    assert again.scores([plan(0, 3), plan(0, 2)]) == whole
    assert runs == [6, 2, 6, 2, 6, 2, 2, 6, 2, 2]  # each uncached run once, and what was missing
    assert again.scores([plan(0, 2)]) == [whole[1]] and len(runs) == 10


def test_psnr_is_of_the_frames_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    model = ToyModel()
    monkeypatch.setattr(model, "decode", frames)
    first = evaluator(model, tmp_path)
    first.scores([plan(0, 3)], range(3))
    found = first.psnr(plan(0, 3), range(3))
    assert runs == [6, 2] * 3 + [2] * 3  # the uncached runs serve both scores
    for s in range(3):
        noise, embeds = model.noise(5 + s)[None], model.embed([PROMPTS[s % 2]])
        clips = [frames(denoise(model, p, embeds, noise))[0].numpy() for p in (UNCACHED, plan(0, 3))]
        assert found[s] == pytest.approx(psnr(*clips))
        assert psnr(*(first.clips(p, range(s, s + 1))[0] for p in (UNCACHED, plan(0, 3)))) == found[s]
    del runs[:]
    again = evaluator(model, tmp_path)
    assert again.psnr(plan(0, 3), range(3)) == found
    assert again.psnr(UNCACHED) == (PSNR_CAP,) * 4
    assert not runs and journals(tmp_path) == ["frames", "trials"]


def test_plans_can_be_compared_with_the_runs_of_another_model(tmp_path: Path, runs: list[int]) -> None:
    """Of quantised engines, those in fp32: then the uncached plan is one of those that are compared."""
    model, target = ToyModel(), ToyModel()
    target.pipeline.transformer.head.weight.data *= 1.01
    found = evaluator(model, tmp_path, target=target)
    own, other = evaluator(model).scores([UNCACHED], range(2)), found.scores([UNCACHED], range(2))
    assert own == [[SNR_CAP_DB] * 2] and all(20 < score < 60 for score in other[0])
    del runs[:]
    assert evaluator(model, tmp_path, target=target).scores([UNCACHED], range(2)) == other and not runs
    assert evaluator(model, tmp_path).scores([UNCACHED], range(2)) == own, "in a journal of its own"
    assert journals(tmp_path) == ["trials", "trials"]


def frames(latents: torch.Tensor) -> torch.Tensor:
    """uint8 [b, 1, pixels, 1, 3], brightness by latent."""
    levels = (128 + 40 * latents.reshape(len(latents), 1, -1, 1, 1)).clamp(0, 255)
    return levels.expand(-1, -1, -1, -1, 3).to(torch.uint8)


@pytest.mark.parametrize("steps", [6, FEW_STEPS + 1])
def test_the_best_plan_is_chosen_of_few_steps_by_frames(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, model = euler(steps), ToyModel()
    monkeypatch.setattr(model, "decode", frames)

    def of(*full: int) -> StepPlan:
        schedule = Schedule(num_steps=steps, full_steps=full)
        return plan_from_schedule(schedule, table, name=f"b{len(full)}", guidance_scale=3.0, method="given")

    candidates = [of(0, 5), of(0, 3), of(0, 2)]
    samples = Samples(prompts=PROMPTS, seed=5, count=8)  # enough for chance not to matter
    chosen, trials = PlanEvaluator(lambda: model, table, samples)(candidates)
    other = PlanEvaluator(lambda: model, table, samples)
    scores = other.psnrs(candidates) if steps <= FEW_STEPS else other.scores(candidates)
    best = max(range(3), key=lambda index: sum(scores[index]))
    assert chosen == candidates[best] and trials.best.snr == tuple(scores[best])
    assert trials.of == ("frames" if steps <= FEW_STEPS else UNSET)


def test_scores_of_something_else_are_not_taken(tmp_path: Path) -> None:
    model = ToyModel()
    for options in ({}, {"prompts": ("a fish",)}, {"seed": 6}, {"reference": euler(12)}):
        evaluator(model, tmp_path, **options).scores([plan(0, 3)], range(1))
    assert journals(tmp_path) == ["trials"] * 4
    one, other = sorted(tmp_path.iterdir())[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match="expected a journal of this measurement"):
        for options in ({}, {"prompts": ("a fish",)}, {"seed": 6}, {"reference": euler(12)}):
            evaluator(model, tmp_path, **options).scores([plan(0, 3)], range(1))


def test_samples_of_each_kind_are_others() -> None:
    prompts = ("a", "b", "c")
    settings = CalibrationSettings(samples=4, seed=10, validation_samples=3)
    calibration = [(prompts[s % 3], 10 + s) for s in range(4)]
    validation = validation_samples(prompts, settings)
    assert [validation[s] for s in range(validation.count)] == [("b", 14), ("c", 15), ("a", 16)]
    held_out = held_out_samples(prompts, 2)
    assert [held_out[s] for s in range(held_out.count)] == [("a", HELD_OUT_SEED), ("b", HELD_OUT_SEED + 1)]
    assert not {seed for _, seed in calibration} & {validation[s][1] for s in range(3)}
    with pytest.raises(ValueError, match="at least one prompt"):
        held_out_samples((), 2)


def test_what_is_not_finite() -> None:
    model = ToyModel()
    start = PlanRuns(TABLE, Samples(prompts=PROMPTS, seed=5, count=4), None).start(model)
    (fine,) = start((0, plan(0, 3), False))
    assert math.isfinite(fine.snr)
    with torch.no_grad():
        model.pipeline.transformer.head.bias.fill_(math.inf)
    (score,) = start((0, plan(0, 3), False))  # against the uncached run from before
    assert score.snr == -SNR_CAP_DB
    with pytest.raises(VerificationError, match="sample 1"):
        evaluator(model).scores([plan(0, 3)], range(1, 2))
