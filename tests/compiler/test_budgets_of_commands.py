"""Budgets in units of time and quality, on work folders and bundles: the whole chain on a small model."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from lemica_trt.backends.machine import describe_machine
from lemica_trt.bundle.manifest import FRONT_FILE, STEP_TIMES, VERIFY_REPORT
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import Workspace
from lemica_trt.cli.flags import profile_from_flags
from lemica_trt.cli.main import main
from lemica_trt.compiler import bundle_plans, work_commands
from lemica_trt.compiler.requests import BuildRequest, PlanResult, stored_inputs
from lemica_trt.core.errors import InfeasibleError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.evaluate.step_timer import StepTimer
from lemica_trt.evaluate.timing import backend_name, stored_steps
from lemica_trt.ir.budget import Latency, MinPsnr, Speedup, StepTimes
from lemica_trt.ir.profile import FEW, FEW_STEPS, NORMAL
from lemica_trt.ir.resources import load_profile

PAPER = ("lemica",)


@pytest.mark.null
@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--speedup", "2", "--latency", "1s"), "--speedup cannot be used together with --latency"),
        (("--budget", "4", "--min-psnr", "30"), "--budget cannot be used together with --min-psnr"),
        (("--latency", "1s", "--min-psnr", "30"), "--latency cannot be used together with --min-psnr"),
        (("--schedule", "0,3", "--pareto"), "--schedule cannot be used together with --pareto"),
        (("--latency", "2.5"), "a time with its unit, for example 2.5s or 800ms, got '2.5'"),
        (("--speedup", "2,fast"), "a speed-up, for example 3, got 'fast'"),
        (("--min-psnr", "120"), "less than 100, got 120"),
    ],
)
@pytest.mark.parametrize("command", [("build", "--model", "cogvideox-tiny"), ("plan", "nowhere")])
def test_flags_that_do_not_fit_together_are_refused(
    command: tuple[str, ...], flags: tuple[str, ...], word: str
) -> None:
    done = CliRunner().invoke(main, [*command, *flags])
    assert done.exit_code == 2 and word in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.null
def test_few_steps_are_measured_on_more_samples() -> None:
    def samples(**flags: Any) -> tuple[int, int, int]:
        found = profile_from_flags("wan-tiny", None, flags).calibration
        return found.samples, found.rollouts, found.validation_samples

    few = (FEW.samples, FEW.rollouts, FEW.validation_samples)
    assert samples(denoising_steps=FEW_STEPS) == samples(sigmas=(1.0, 0.8, 0.5, 0.2)) == few
    normal = (NORMAL.samples, NORMAL.rollouts, NORMAL.validation_samples)
    assert samples() == samples(denoising_steps=FEW_STEPS + 1) == normal
    assert samples(denoising_steps=8, effort="normal") == normal, "as asked"
    assert samples(denoising_steps=8, samples=3) == (3, *few[1:])


def planned(target: Path, *budgets: Any, pareto: bool = False) -> PlanResult:
    """`plan` on a bundle by LeMiCa's method."""
    request = BuildRequest(budgets=budgets, methods=PAPER, pareto=pareto)
    return bundle_plans.plan_bundle(Bundle.open(target), request, Quiet())


@pytest.fixture
def bundle(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[0], tmp_path / "bundle"))


@pytest.mark.cpu
def test_a_dry_run_tells_what_searching_costs(tmp_path: Path) -> None:
    request = BuildRequest(budgets=(Speedup(factor=2.0), MinPsnr(decibels=30.0), 7), pareto=True)
    stages = {
        stage.name: stage for stage in work_commands.dry_run(load_profile("cogvideox-tiny"), tmp_path / "b", request)
    }
    assert list(stages)[:5] == ["lower", "layout", "export", "engine", "time"]
    assert stages["quality"].what.startswith("12 budgets of 5 … 25 ") and stages["quality"].seconds
    assert stages["plan"].what.endswith("speed-up 2×, PSNR 30 dB, 7 full steps")
    published = msgspec.structs.replace(request, methods=("published",))
    with pytest.raises(UsageError, match="budgets of their own"):
        published.check("fp32")


@pytest.mark.cpu
def test_a_time_is_planned_from_what_the_engines_take(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    backend = backend_name(opened.engine().key)
    times = stored_steps(opened, backend)  # by the build's verification
    assert times is not None and times.skipped is not None and 0 < times.skipped <= times.full
    made = planned(bundle, Speedup(factor=1.2), Latency(seconds=times.total(8) * 10))
    first, second = made.outcomes
    assert first.predicted is not None and first.predicted.speedup >= 1.2 and 2 <= first.full_steps < 8
    assert first.measured is not None and first.measured.seconds > 0
    assert (second.plan, second.full_steps) == ("uncached", 8)
    assert {first.plan, "uncached"} <= set(Bundle.open(bundle).plans) == {plan.name for plan in made.plans}
    with pytest.raises(InfeasibleError, match="at least 2 are needed where at most 3"):
        planned(bundle, Latency(seconds=1e-6))


@pytest.mark.cpu
def test_times_are_measured_each_time_and_changes_are_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Notes(Quiet):
        def note(self, text: str) -> None:
            notes.append(text)

    backend, notes = backend_name(Bundle.open(bundle).engine().key), list[str]()
    (bundle / VERIFY_REPORT).unlink()
    assert stored_steps(Bundle.open(bundle), backend) is None
    for full, stored, told in ((0.010, 0.010, 0), (0.0115, 0.010, 0), (0.015, 0.015, 1), (0.014, 0.015, 1)):
        times = StepTimes(full=full, skipped=0.001, rest=0.0)
        monkeypatch.setattr("lemica_trt.evaluate.step_timer.measure_steps", lambda _, times=times: times)
        assert StepTimer(Bundle.open(bundle), Notes()).steps == times
        kept = stored_steps(Bundle.open(bundle), backend)
        assert kept is not None and kept.full == stored and len(notes) == told
    assert "took 10 ms when it was measured before: +50%" in notes[0]
    assert describe_machine() in (bundle / STEP_TIMES).read_text()
    assert stored_steps(Bundle.open(bundle), f"{backend} of another machine") is None


@pytest.mark.cpu
def test_no_speed_up_is_above_n_over_b(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    plan = opened.plan()
    monkeypatch.setattr("lemica_trt.evaluate.step_timer.measure_total", lambda *_: 0.1)
    for full, expected in ((1.0, plan.num_steps / plan.budget), (0.02, 0.02 * plan.num_steps / 0.1)):
        times = StepTimes(full=full, skipped=None, rest=0.0)
        assert StepTimer(opened, Quiet()).speeds([plan], times)[plan.name].speedup == pytest.approx(expected)


@pytest.mark.cpu
def test_a_front_is_measured_on_the_model_and_carried_by_the_bundle(
    built: tuple[Path, subprocess.CompletedProcess[str]], bundle: Path, tmp_path: Path
) -> None:
    for budgets, pareto in (((MinPsnr(decibels=30.0),), False), ((), True)):
        with pytest.raises(UsageError, match="no stored qualities"):
            planned(bundle, *budgets, pareto=pareto)
    work = Path(shutil.copytree(built[0].with_name("bundle.work"), tmp_path / "work"))
    inputs = stored_inputs(Workspace(work))
    fewer = msgspec.structs.replace(inputs.profile.calibration, validation_samples=2)
    profile = msgspec.structs.replace(inputs.profile, calibration=fewer)
    msgspec.structs.replace(inputs, profile=profile).store(Workspace(work))
    made = work_commands.plan(work, {"budgets": (3,), "pareto": True, "methods": PAPER}, Quiet())
    assert [row.budget for row in made.front] == [2, 3, 4]
    psnr = {row.budget: row.psnr for row in made.front}
    carrying = tmp_path / "carrying"
    work_commands.engine(work, carrying, {}, Quiet())
    assert FRONT_FILE in Bundle.open(carrying).manifest.files
    wanted = min(psnr.values())
    found = planned(carrying, MinPsnr(decibels=wanted), pareto=True)
    expected = min(budget for budget, decibels in psnr.items() if decibels >= wanted)
    (outcome,) = found.outcomes
    assert (outcome.plan, outcome.full_steps, outcome.met) == (f"b{expected}", expected, True)
    assert outcome.quality is not None and outcome.quality.psnr == psnr[expected]
    assert all(row.speedup is not None and row.speedup > 1 for row in found.front)
    assert (carrying / "reports" / "pareto.png").stat().st_size > 5000
    with pytest.raises(InfeasibleError, match="the best plan that was tried"):
        planned(carrying, MinPsnr(decibels=99.0))


@pytest.mark.cpu
def test_a_work_folder_plans_by_time_on_engines_that_it_builds_for_it(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    work = Path(shutil.copytree(built[0].with_name("bundle.work"), tmp_path / "work"))
    made = work_commands.plan(work, {"budgets": (Speedup(factor=1.2),), "methods": PAPER}, Quiet())
    (outcome,) = made.outcomes
    assert outcome.predicted is not None and outcome.predicted.speedup >= 1.2 and outcome.met is None
    record = Workspace(work).record("time")
    again = work_commands.plan(work, {"budgets": (Speedup(factor=1.2),), "methods": PAPER}, Quiet())
    assert again == made and Workspace(work).record("time") == record


def test_a_quality_is_not_asked_for_where_nothing_measures_it() -> None:
    request = BuildRequest(budgets=(MinPsnr(decibels=30.0),))
    with pytest.raises(UsageError, match="measure quality on validation samples, and there are none"):
        request.check(None, validation_samples=0)
    request.check(None, validation_samples=1)
    BuildRequest(budgets=(4,)).check(None, validation_samples=0)
