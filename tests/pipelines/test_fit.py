"""A plan fitted to a loaded pipeline: better than what one would do without, and nothing of the pipeline changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from pipes import CASES, Case, flux, ltx
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import lemica_trt
from lemica_trt.calibrate.cost import sample_cost
from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.core.errors import InfeasibleError, InputError, UnsupportedError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import read_value
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.resources import calibration_path
from lemica_trt.models.load import scheduler_like
from lemica_trt.models.model import Model
from lemica_trt.pipelines import loop as loops
from lemica_trt.pipelines.fitting import ROLLOUTS, PipelineBars
from lemica_trt.pipelines.fitting import decibels as decibels_of
from lemica_trt.pipelines.loop import DrivenRun, Loop, RecordedSample
from lemica_trt.planning.step_plan import uncached_plan

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers under NumPy 2
]

N, B = 20, 6

Models = Callable[[str], Model]


def decibels(latents: torch.Tensor, exact: torch.Tensor) -> float:
    return decibels_of(latents.numpy(), exact.numpy())


# --- is it good ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cogvideox-tiny", "wan-tiny"])
def test_it_beats_fewer_steps_on_held_out_prompts(models: Models, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean dB of the latents against all steps. Measured on 6 clips: 43.5 against 23.3 and 31.2 (cogvideox-tiny), 33.5
    against 23.5 and 23.5 (wan-tiny, whose own sampler is UniPC)."""
    model = models(name)
    pipe, shape = model.pipeline, model.profile.shape
    call = {
        "num_frames": shape.frames, "height": shape.height, "width": shape.width,
        "max_sequence_length": model.profile.text_length, "guidance_scale": model.profile.sampling.guidance_scale,
    }  # fmt: skip
    folder = calibration_path(model.profile.calibration.prompts)
    known, held_out = (read_prompts(folder / name) for name in ("calibration.txt", "held_out.txt"))
    own, steps, budget = pipe.scheduler, 50, 15

    def clip(s: int, **more: Any) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(1000 + s)
        found: torch.Tensor = pipe(held_out[s], generator=generator, output_type="latent", **call, **more).frames
        return found

    def clips(**more: Any) -> list[torch.Tensor]:
        return [clip(s, **more) for s in range(4)]

    plan = lemica_trt.fit(pipe, budget, known[:3], samples=3, num_inference_steps=steps, reporter=Quiet(), **call)
    assert pipe.scheduler is own and plan.budget == budget and plan.num_steps == steps
    exact = clips(num_inference_steps=steps)
    with lemica_trt.apply(pipe, plan):
        fitted = clips()
    fewer = clips(num_inference_steps=budget)
    monkeypatch.setattr(pipe, "scheduler", scheduler_like(diffusers.UniPCMultistepScheduler, own))
    unipc = clips(num_inference_steps=budget)
    scores = [np.mean([decibels(a, b) for a, b in zip(found, exact)]) for found in (fitted, fewer, unipc)]
    assert scores[0] > max(scores[1:]) + 3.0, scores


@pytest.mark.parametrize("name", CASES)
def test_any_pipeline(name: str) -> None:
    """Another family, from prompts to latents: the plan that comes of it ends nearer than as many steps do."""
    case = CASES[name]()
    plan = fitted(case)
    scale = case.call.get("guidance_scale")  # of Qwen-Image the default of the call: none
    assert plan.guidance_scale == (1.0 if scale is None else scale) and plan.error_graph_digest is not None
    exact = [case(s, num_inference_steps=N) for s in range(4, 8)]
    fewer = [case(s, num_inference_steps=B) for s in range(4, 8)]
    with lemica_trt.apply(case.pipe, plan):
        found = [case(s) for s in range(4, 8)]
    scores = [np.mean([decibels(a, b) for a, b in zip(clips, exact)]) for clips in (found, fewer)]
    assert scores[0] > scores[1] + 1.0, scores


def fitted(case: Case, budget: int = B, **more: Any) -> StepPlan:
    arguments = {"samples": 4, "num_inference_steps": N, "reporter": Quiet(), **case.call, **more}
    return lemica_trt.fit(case.pipe, budget, case.prompts[:4], **arguments)


def test_branches_apart_are_better_where_they_are_seen() -> None:
    """On the samples of the fit, at the end; a plan without them runs in a scheduler alone."""
    case = ltx()
    apart, joined = fitted(case, max_skip=9), fitted(case, max_skip=9, branches=False)
    assert apart.guidance_history and not joined.guidance_history
    exact = [case(s, num_inference_steps=N) for s in range(4)]
    scores = []
    for plan in (apart, joined):
        with lemica_trt.apply(case.pipe, plan):
            scores.append(np.mean([decibels(case(s), exact[s]) for s in range(4)]))
    assert scores[0] > scores[1], scores
    assert not fitted(flux()).guidance_history, "FLUX embeds its guidance: there is one branch"


# --- is it what it says --------------------------------------------------------------------------------------------


def test_the_plan_is_what_the_fit_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Applied to the samples that it was fitted on, it ends in the very latents of the fit."""
    case, ends = ltx(), dict[int, torch.Tensor]()
    close = DrivenRun.close

    def watched(self: DrivenRun) -> None:
        ends[self.number] = torch.from_numpy(self.latents[0].copy())
        close(self)

    monkeypatch.setattr(DrivenRun, "close", watched)
    plan = fitted(case, seed=100, max_skip=9)
    monkeypatch.undo()
    with lemica_trt.apply(case.pipe, plan):
        if all(torch.equal(case(s), ends[s]) for s in range(4)):
            return
    pytest.fail("the plan does not end where the fit did")


def test_the_same_plan_again_and_as_json(tmp_path: Path) -> None:
    case = ltx()
    plan = fitted(case)
    assert fitted(case) == plan
    plan.save(tmp_path / "plan.json")
    assert read_value(StepPlan, tmp_path / "plan.json") == plan
    assert "6 of 20 steps in full" in repr(plan) and plan._repr_html_().count("<rect") == N


def test_recorded_runs_are_the_pipelines_own() -> None:
    """Latents of every step, and runs that begin in the middle end where the whole run does."""
    case = ltx()
    own = case(0, num_inference_steps=N)
    with Loop(case.pipe, case.prompts, 100, {**case.call, "num_inference_steps": N}) as loop:
        table = loop.table()
        evaluations: list[None] = []
        sample = RecordedSample(
            loop, 0, uncached_plan(table, guidance_scale=3.0), table, lambda: evaluations.append(None)
        )
        uncached = sample.trace(3, lambda *_: None)
        assert len(sample.path) == N + 1 and len(evaluations) == sample.full_count == N
        assert np.allclose(uncached.final, own.numpy(), atol=1e-4) and np.array_equal(sample.path[-1], uncached.final)
        ends = sample.roll_out({(j - 2, j): uncached.runs[j] for j in (2, N - 1, N)})
        assert sample.full_count == N + (N - 2) + 1
        for end in ends.values():
            assert np.allclose(end, uncached.final, atol=1e-4)


def test_where_latents_are_not_taken_sensitivities_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ltx()
    prepare = case.pipe.prepare_latents

    def other(*args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = prepare(*args, **kwargs)
        return found if kwargs.get("latents") is None and args[-1] is None else 2 * found

    class Notes(Quiet):
        texts: list[str] = []

        def note(self, text: str) -> None:
            self.texts.append(text)

    monkeypatch.setattr(case.pipe, "prepare_latents", other)
    plan = fitted(case, reporter=Notes())
    assert plan.budget == B and len(Notes.texts) == 1
    assert Notes.texts[0].startswith("the pipeline makes other latents of those that it is given")


def test_where_latents_are_refused_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ltx()
    prepare = case.pipe.prepare_latents

    def strict(*args: Any, **kwargs: Any) -> torch.Tensor:
        if args[-1] is not None:
            raise ValueError("unexpected latents")
        found: torch.Tensor = prepare(*args, **kwargs)
        return found

    monkeypatch.setattr(case.pipe, "prepare_latents", strict)
    assert fitted(case).budget == B


def test_progress_reaches_its_end() -> None:
    seen: dict[str, list[tuple[float, float]]] = {}

    class Watched(Quiet):
        def stage(self, name: str, detail: str) -> None:
            self.name = name
            seen.setdefault(name, [])

        def advance(self, done: float, total: float) -> None:
            seen[self.name].append((done, total))

    fitted(ltx(), reporter=Watched())
    assert seen["record"][-1] == (RECORDED, RECORDED) and seen["fit"][-1] == (4 * B, 4 * B)


def test_bars_are_the_pipelines_own(capsys: pytest.CaptureFixture[str]) -> None:
    case = flux()
    for settings, shown in (({"disable": True}, False), ({"desc": "mine"}, True)):
        case.pipe.set_progress_bar_config(**settings)
        bars = PipelineBars(case.pipe)
        case.pipe.set_progress_bar_config(disable=True)
        bars.stage("record", "")
        bars.advance(1, 2)
        bars.note("a note")
        bars.advance(2, 2)
        bars.close()
        assert case.pipe._progress_bar_config == {"disable": True}
        printed = capsys.readouterr()
        assert ("2/2" in printed.err, "a note" in printed.out) == (shown, shown)


# --- what is refused, and what is left behind ------------------------------------------------------------------------


def test_what_cannot_be_fitted() -> None:
    case = ltx()
    own = case.pipe.scheduler
    hook = case.pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("refused after work"))
    for budget, error in ((0, UsageError), (N, UsageError), (1, InfeasibleError)):
        with pytest.raises(error, match="budget"):
            fitted(case, budget, max_skip=5)
    hook.remove()
    with pytest.raises(InputError, match="prompts: expected at least one"):
        lemica_trt.fit(case.pipe, 3, [])
    plan = uncached_plan(case.table(N), guidance_scale=3.0)
    with lemica_trt.apply(case.pipe, plan), pytest.raises(UsageError, match="already"):
        fitted(case)
    case.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(UnsupportedError, match="draws noise"):
        fitted(case)
    case.pipe.scheduler = own
    case.pipe.progress_bar = lambda total: copy.deepcopy(case.pipe.scheduler)
    with pytest.raises(UnsupportedError, match="several latents"):
        fitted(case)


RECORDED = sum(sample_cost(N, s < ROLLOUTS, s) for s in range(4))
"""Evaluations that four samples take before anything is fitted."""


@pytest.mark.parametrize("evaluations", [0, 30, RECORDED + 7])
def test_a_failure_anywhere_leaves_the_pipeline_as_it_was(evaluations: int) -> None:
    """In the first call, in a recorded run, and in a driven one: its error, no thread, the own scheduler."""
    import threading

    case = ltx()
    case.pipe.set_progress_bar_config(desc="mine", disable=True)
    own, threads, calls = case.pipe.scheduler, threading.active_count(), [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] > evaluations:
            raise MemoryError("out of it")

    hook = case.pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="out of it"):
        fitted(case)
    hook.remove()
    assert case.pipe.scheduler is own and threading.active_count() == threads
    assert case.pipe._progress_bar_config == {"desc": "mine", "disable": True}


def test_an_interrupt_ends_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    case, threads = ltx(), threading.active_count()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loops.DrivenRun, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(case)
    assert threading.active_count() == threads
