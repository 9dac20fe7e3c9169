"""Budgets in any unit → plans: which budgets and methods are looked at, and the whole chain on a small bundle."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from test_budget import PLANS, K, N

from lemica_trt import compiler as pipeline
from lemica_trt.backends.tensorrt.worker import Device
from lemica_trt.bundle.manifest import FRONT_FILE, STEP_TIMES, VERIFY_REPORT
from lemica_trt.bundle.reading import Bundle
from lemica_trt.cli.main import main
from lemica_trt.compiler.budgets import Planned, Scout, answers, plan_budgets, scouting_cost
from lemica_trt.core.errors import InfeasibleError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import read_value, write_value
from lemica_trt.evaluate import timing
from lemica_trt.evaluate.timing import backend_name, machine, stored_steps
from lemica_trt.ir.budget import Afforded, Latency, MinPsnr, Speedup, StepTimes
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.resources import load_profile
from lemica_trt.ir.trials import Trial, TrialTable

PAPER = ("lemica",)


# --- which budgets and methods are looked at --------------------------------------------------------------------------


class Fake:
    """Candidates and a judge: plans that fold and plans that do not, PSNR 10 + 2·B dB and one less where skipping."""

    def __init__(self) -> None:
        self.tried: list[tuple[int, int]] = []
        self.looked_at: list[int] = []

    def make(self, *, budgets: list[Any], choose: Any) -> tuple[list[StepPlan], tuple[TrialTable, ...]]:
        (budget,) = budgets
        several = [
            plan
            for (count, _), plan in PLANS.items()
            if (plan.budget == budget if isinstance(budget, int) else budget.admits(plan) and count in budget.budgets)
        ]
        if len({plan.rows for plan in several}) == 1:
            return several[:1], ()
        plan, selection = choose(several)
        return [plan], (selection,)

    def __call__(self, plans: Sequence[StepPlan]) -> tuple[StepPlan, TrialTable]:
        self.tried.append((plans[0].budget, len(plans)))
        best = max(plans, key=self.quality)
        order = sorted(plans, key=self.quality, reverse=True)[:1]
        trials = tuple(
            Trial(label=plan.method, full_steps=plan.full_steps, snr=(self.quality(plan),)) for plan in order
        )
        return best, TrialTable(budget=best.budget, samples=1, trials=trials)

    @staticmethod
    def quality(plan: StepPlan) -> float:
        return 10 + 2 * plan.budget - (len(plan.rows) > plan.budget + 1)

    def psnr(self, plan: StepPlan) -> tuple[float, ...]:
        self.looked_at.append(plan.budget)
        return (self.quality(plan),) * 2


def planned(fake: Fake, *budgets: Any, pareto: bool = False) -> Planned:
    scout = Scout(fake.make, fake)  # type: ignore[arg-type]
    return plan_budgets(budgets, scout, Quiet(), pareto=pareto, num_steps=N, max_skip=K)


@pytest.mark.null
def test_full_steps_are_not_looked_at() -> None:
    fake = Fake()
    found = planned(fake, 6, 9, 6)
    assert [plan.name for plan in found.plans] == ["b6", "b9"] and found.names == ("b6", "b9", "b6")
    assert found.front is None and fake.looked_at == []
    assert [selection.budget for selection in found.selections] == [6, 9]


@pytest.mark.null
@pytest.mark.parametrize("wanted", [12.0, 21.5, 25.0, 40.0, 49.0])
def test_the_fewest_full_steps_that_reach_a_psnr(wanted: float) -> None:
    fake = Fake()
    found = planned(fake, MinPsnr(decibels=wanted))
    expected = next((b for b in range(4, N) if 10 + 2 * b >= wanted), N)
    assert found.plans[0].budget == expected
    assert len(fake.looked_at) == len(set(fake.looked_at)) <= 6
    assert found.front is not None and [p.budget for p in found.front.points] == sorted(fake.looked_at)


@pytest.mark.null
def test_a_psnr_that_no_budget_has() -> None:
    """Against more steps than N, N full ones are not perfect."""
    with pytest.raises(InfeasibleError, match=rf"{N} of {N} full steps have 50\.0 dB.*feasible is 50"):
        planned(Fake(), MinPsnr(decibels=60.0))


@pytest.mark.null
def test_times_are_of_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(name="NVIDIA L4", compute_capability="8.9", driver="13.0")
    monkeypatch.setattr(timing, "cuda_device", lambda: None)
    without = machine()
    monkeypatch.setattr(timing, "cuda_device", lambda: gpu)
    assert machine() == f"{without}, NVIDIA L4 (driver for CUDA 13.0)"


@pytest.mark.null
@pytest.mark.parametrize("damaged", [b"{", b'{"x": "\xff"}', b'{"x":' + b"[" * 100_000])
def test_damaged_reports_have_no_times(tmp_path: Path, damaged: bytes) -> None:
    for file in (STEP_TIMES, VERIFY_REPORT):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(damaged)
    assert stored_steps(SimpleNamespace(path=tmp_path), "x") is None  # type: ignore[arg-type]


@pytest.mark.null
def test_near_budgets_try_the_methods_that_were_best() -> None:
    fake = Fake()
    found = planned(fake, 8, pareto=True)
    assert found.front is not None and [point.budget for point in found.front.points] == [4, 5, 6, 7, 8, 9, 10]
    assert dict(fake.tried) == {8: 2, 4: 1, 5: 1, 6: 1, 7: 1, 9: 1, 10: 1}
    assert {point.plan.method for point in found.front.points} == {"linear"}
    alone = Fake()
    planned(alone, 20, pareto=True)  # 20 has one method; 4 is the first to try both, 9 is more than twice that
    assert dict(alone.tried) == {4: 2, 5: 1, 6: 1, 7: 1, 8: 1, 9: 2, 10: 1}
    # Counted as it is done: two methods where none is near, the best elsewhere.
    assert scouting_cost([4, 5, 9], N, 2, 8) == 8 * N + 8 * (4 + 5 + 9) + 4 * 16 + 5 * 16 + 9 * 16


@pytest.mark.null
def test_a_time_tries_each_kind_with_what_it_affords() -> None:
    found = planned(Fake(), Afforded(folded=9, skipping=7))
    assert found.plans == [PLANS[9, True]]
    assert planned(Fake(), Afforded(folded=None, skipping=7)).plans == [PLANS[7, False]]


@pytest.mark.null
def test_what_came_of_a_budget_is_held_against_what_was_asked() -> None:
    times = StepTimes(full=1.0, skipped=0.1, rest=0.0)
    plans = [PLANS[5, True], PLANS[7, True]]
    found = Planned(plans, ("b5", "b7", "b7"), (), None)
    paces = {"b5": pipeline.Pace(seconds=5.5, speedup=3.6), "b7": pipeline.Pace(seconds=6.5, speedup=3.1)}
    asked = (Latency(seconds=5.2), Speedup(factor=2.5), 7)
    first, second = answers(asked, found, times, paces)
    assert (first.plan, first.kept, second.plan, second.kept) == ("b5", False, "b7", True)
    assert first.predicted == pipeline.Pace(seconds=5.0, speedup=4.0) and first.measured == paces["b5"]
    assert [answer.kept for answer in answers(asked, found, times, {})] == [None, None]


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


# --- the whole chain -----------------------------------------------------------------------------------------------


def replanned(bundle: Path, *budgets: Any, pareto: bool = False) -> pipeline.Replanned:
    return pipeline.plan_stage(
        bundle, budgets=budgets, methods=PAPER, schedule=None, default=None, reporter=Quiet(), pareto=pareto
    )


@pytest.fixture
def bundle(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[0], tmp_path / "bundle"))


@pytest.mark.cpu
def test_a_dry_run_tells_what_searching_costs(tmp_path: Path) -> None:
    request = pipeline.Request(budgets=(Speedup(factor=2.0), MinPsnr(decibels=30.0), 7), pareto=True)
    stages = {stage.name: stage for stage in pipeline.dry_run(load_profile("cogvideox-tiny"), tmp_path / "b", request)}
    assert list(stages)[:5] == ["time", "calibrate", "fit", "select", "quality"]
    assert stages["quality"].what.startswith("12 budgets of 5 … 25 ") and stages["quality"].seconds
    assert stages["plan"].what.endswith("speed-up 2×, PSNR 30 dB, 7 full steps")
    published = msgspec.structs.replace(request, methods=("published",))
    with pytest.raises(UsageError, match="budgets of their own"):
        pipeline.check_request(load_profile("cogvideox-tiny"), tmp_path / "b", published)


@pytest.mark.cpu
def test_a_time_is_planned_from_what_the_engines_take(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    backend = backend_name(opened.engine().key)
    times = stored_steps(opened, backend)  # by the build's verification
    assert times is not None and times.skipped is not None and 0 < times.skipped <= times.full
    made = replanned(bundle, Speedup(factor=1.2), Latency(seconds=times.total(8) * 2))
    first, second = made.answers
    assert first.predicted is not None and first.predicted.speedup >= 1.2 and 2 <= first.full_steps < 8
    assert first.measured is not None and first.measured.seconds > 0
    assert (second.plan, second.full_steps) == ("b8", 8)
    assert {first.plan, "b8"} <= set(Bundle.open(bundle).plans) == {plan.name for plan in made.plans}
    with pytest.raises(InfeasibleError, match="at least 2 are needed where at most 3"):
        replanned(bundle, Latency(seconds=1e-6))
    (bundle / VERIFY_REPORT).unlink()  # then it is measured, once
    assert stored_steps(Bundle.open(bundle), backend) is None
    replanned(bundle, Speedup(factor=1.2))
    stored = (bundle / STEP_TIMES).read_bytes()
    assert machine() in stored.decode() and stored_steps(Bundle.open(bundle), backend) is not None
    replanned(bundle, Speedup(factor=1.2))
    assert (bundle / STEP_TIMES).read_bytes() == stored
    assert stored_steps(Bundle.open(bundle), f"{backend} of another machine") is None


@pytest.mark.cpu
def test_a_front_is_measured_on_the_model_and_carried_by_the_bundle(
    built: tuple[Path, subprocess.CompletedProcess[str]], bundle: Path, tmp_path: Path
) -> None:
    for budgets, pareto in (((MinPsnr(decibels=30.0),), False), ((), True)):
        with pytest.raises(UsageError, match="no stored qualities"):
            replanned(bundle, *budgets, pareto=pareto)
    work = pipeline.Work(Path(shutil.copytree(built[0].with_name("bundle.work"), tmp_path / "work")))
    profile = read_value(Profile, work.profile)
    fewer = msgspec.structs.replace(profile.calibration, validation_samples=2)
    write_value(msgspec.structs.replace(profile, calibration=fewer), work.profile)
    with pytest.raises(UsageError, match="a time needs engines"):
        replanned(work.root, Latency(seconds=1.0))
    made = replanned(work.root, 3, pareto=True)
    assert [row.budget for row in made.front] == [2, 3, 4]
    psnr = {row.budget: row.psnr for row in made.front}
    carrying = tmp_path / "carrying"
    pipeline.engine_stage(work.root, carrying, ["onnxruntime"], {}, Quiet())
    assert FRONT_FILE in Bundle.open(carrying).manifest.files
    wanted = min(psnr.values())
    found = replanned(carrying, MinPsnr(decibels=wanted), pareto=True)
    expected = min(budget for budget, decibels in psnr.items() if decibels >= wanted)
    (answer,) = found.answers
    assert (answer.plan, answer.full_steps, answer.kept) == (f"b{expected}", expected, True)
    assert answer.quality is not None and answer.quality.psnr == psnr[expected]
    assert all(row.speedup is not None and row.speedup > 1 for row in found.front)
    assert (carrying / "reports" / "pareto.png").stat().st_size > 5000
    with pytest.raises(InfeasibleError, match="the best plan that was tried"):
        replanned(carrying, MinPsnr(decibels=99.0))
