"""Trials: the score is what it says, and a killed trial goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_model import ToyModel, euler

from lemica_trt.compiler import uncached_plan
from lemica_trt.core.errors import InputError, VerificationError
from lemica_trt.core.metrics import PSNR_CAP, psnr
from lemica_trt.evaluate.trials import SNR_CAP, Trials, _Runs, trials_digest
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.schedule import Schedule
from lemica_trt.models import denoise
from lemica_trt.planning.step_plan import plan_from_schedule

pytestmark = pytest.mark.cpu

PROMPTS = ["a cat", "a dog"]
TABLE = euler(6)
UNCACHED = uncached_plan(TABLE, guidance_scale=3.0)


def plan(*full: int) -> StepPlan:
    schedule = Schedule(num_steps=6, full_steps=full)
    return plan_from_schedule(schedule, TABLE, name=f"b{len(full)}", guidance_scale=3.0, method="given")


def trials(model: ToyModel, journal: Path, prompts: list[str] = PROMPTS) -> Trials:
    return Trials(model, UNCACHED, TABLE, prompts, seed=5, journal=journal)


def test_the_score_is_the_ratio_of_signal_to_noise(tmp_path: Path) -> None:
    model = ToyModel()
    plans = [plan(0, 3), UNCACHED]
    scores = trials(model, tmp_path / "t")(plans, range(3))
    for s in range(3):
        noise, embeds = model.noise(5 + s)[None], model.embed([PROMPTS[s % 2]])
        reference, cached = (denoise(model, p, embeds, noise).double() for p in (UNCACHED, plans[0]))
        expected = 10 * math.log10(reference.square().sum() / (cached - reference).square().sum())
        assert scores[0][s] == pytest.approx(expected, abs=1e-3)
    assert scores[1] == [SNR_CAP] * 3
    assert all(score < 60 for score in scores[0])


def test_finished_runs_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyModel()
    whole = trials(model, tmp_path / "whole")([plan(0, 3), plan(0, 2)], range(4))
    first = trials(model, tmp_path / "t")
    assert first([plan(0, 3)], range(2)) == [whole[0][:2]]
    with (tmp_path / "t").open("ab") as file:
        file.write(b'{"plan":"torn')  # killed while it wrote
    again = trials(model, tmp_path / "t")
    runs: list[int] = []

    def record(model: ToyModel, plan: StepPlan, *arguments: Any, **fresh: Any) -> torch.Tensor:
        runs.append(plan.budget)
        return denoise(model, plan, *arguments, **fresh)

    monkeypatch.setattr("lemica_trt.evaluate.trials.denoise", record)
    assert again([plan(0, 3), plan(0, 2)], range(4)) == whole
    assert runs == [6, 2, 6, 2, 6, 2, 2, 6, 2, 2]  # each uncached run once, and what was missing
    assert again([plan(0, 2)], range(4)) == [whole[1]] and len(runs) == 10


def test_psnr_is_of_the_frames_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyModel()
    monkeypatch.setattr(model, "decode", frames)
    found = trials(model, tmp_path / "t").psnr(plan(0, 3), range(3), journal=tmp_path / "f")
    for s in range(3):
        noise, embeds = model.noise(5 + s)[None], model.embed([PROMPTS[s % 2]])
        clips = [frames(denoise(model, p, embeds, noise))[0].numpy() for p in (UNCACHED, plan(0, 3))]
        assert found[s] == pytest.approx(psnr(*clips))
    again = trials(model, tmp_path / "t")
    monkeypatch.setattr("lemica_trt.evaluate.trials.denoise", lambda *_: pytest.fail("it was run before"))
    assert again.psnr(plan(0, 3), range(3), journal=tmp_path / "f") == found
    assert again.psnr(UNCACHED, range(2), journal=tmp_path / "f") == (PSNR_CAP,) * 2


def frames(latents: torch.Tensor) -> torch.Tensor:
    """uint8 [b, 1, pixels, 1, 3], brightness by latent."""
    levels = (128 + 40 * latents.reshape(len(latents), 1, -1, 1, 1)).clamp(0, 255)
    return levels.expand(-1, -1, -1, -1, 3).to(torch.uint8)


def test_scores_of_other_prompts_are_not_taken(tmp_path: Path) -> None:
    model = ToyModel()
    trials(model, tmp_path / "t")([plan(0, 3)], range(1))
    with pytest.raises(InputError, match="prompts_digest"):
        trials(model, tmp_path / "t", ["a fish"])
    with pytest.raises(InputError, match="reference"):
        Trials(model, uncached_plan(euler(12), guidance_scale=3.0), TABLE, PROMPTS, seed=5, journal=tmp_path / "t")
    digests = {
        trials_digest(model, reference, TABLE, prompts, seed=seed)
        for reference in (UNCACHED, plan(0, 3))
        for prompts in (PROMPTS, ["x"])
        for seed in (1, 2)
    }
    assert len(digests) == 8


def test_what_is_not_finite(tmp_path: Path) -> None:
    model = ToyModel()
    start = _Runs(UNCACHED, tuple(PROMPTS), 5).start(model)
    (fine,) = start((0, plan(0, 3), False))
    assert math.isfinite(fine.snr)
    with torch.no_grad():
        model.pipeline.transformer.head.bias.fill_(math.inf)
    (score,) = start((0, plan(0, 3), False))  # against the uncached run from before
    assert score.snr == -SNR_CAP
    with pytest.raises(VerificationError, match="sample 1"):
        trials(model, tmp_path / "t")([plan(0, 3)], range(1, 2))
