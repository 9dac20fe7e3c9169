"""A build that is interrupted while it calibrates leaves a fitted plan, and has paid next to nothing for it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from build_cost import Counting, counted

from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.reports import stored_report
from lemica_trt.bundle.workspace import work_folder
from lemica_trt.compiler import work_commands
from lemica_trt.compiler.requests import BuildRequest, Inputs
from lemica_trt.core.progress import Quiet, Within
from lemica_trt.evaluate.quality import is_ahead
from lemica_trt.ir.profile import EFFORTS, Profile
from lemica_trt.ir.report import PLAN, Quality
from lemica_trt.ir.resources import load_profile
from lemica_trt.planning.planner import chance_lead
from lemica_trt.runtime.pipeline import load

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of diffusers

N, B, SAMPLES = 12, 4, 4
REQUEST = BuildRequest(budgets=(B,), verify_samples=1)


class Told(Counting):
    """Counts full steps by stage, and interrupts where a stage begins."""

    def __init__(self, at: str | None = None) -> None:
        super().__init__()
        self.at, self.lines, self.notes = at, list[tuple[str, str]](), list[str]()

    def stage(self, name: str, detail: str) -> None:
        super().stage(name, detail)
        self.lines.append((name, detail))
        if name == self.at:
            self.at = None
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def small() -> Profile:
    profile = load_profile("cogvideox-tiny")
    return msgspec.structs.replace(
        profile,
        sampling=msgspec.structs.replace(profile.sampling, steps=N),
        calibration=msgspec.structs.replace(
            profile.calibration, samples=SAMPLES, rollouts=1, max_skip=4, validation_samples=1
        ),
    )


class Interrupted(NamedTuple):
    output: Path
    told: Told
    draft: Path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interrupted]:
    """A build that was interrupted before, and then behind its first fitted plan."""
    folder = tmp_path_factory.mktemp("early")
    output, told = folder / "bundle", Told(at="calibrate")
    with contextlib.suppress(KeyboardInterrupt):
        work_commands.build(small(), output, REQUEST, Told(at="early"))
    shutil.copytree(output, folder / "draft")
    with contextlib.suppress(KeyboardInterrupt), counted(told):
        work_commands.build(small(), output, REQUEST, told)
    yield Interrupted(output, told, folder / "draft")


def test_it_leaves_a_verified_bundle_with_a_fitted_plan(interrupted: Interrupted) -> None:
    bundle, draft = Bundle.open(interrupted.output), Bundle.open(interrupted.draft)
    bundle.check()
    assert draft.plan().method != "fitted" and bundle.plan().method == "fitted"
    assert bundle.plans == draft.plans == (f"b{B}", "uncached")
    report, before = stored_report(bundle), stored_report(draft)
    assert report is not None and before is not None and not report.failures()
    assert report.manifest_digest == bundle.digest
    assert report.quality[0].psnr > before.quality[0].psnr
    name, line = interrupted.told.lines[-1]
    assert name == "draft" and f"by fitted in {B} of {N}: a draft; the same command goes on" in line
    with load(interrupted.output) as pipe:
        assert pipe("a big red circle moves left").frames.shape == (9, 64, 64, 3)


def test_it_goes_on_and_measures_nothing_twice(interrupted: Interrupted) -> None:
    early, told = interrupted.told, Told()
    with counted(told):
        found = work_commands.build(small(), interrupted.output, REQUEST, told)
    assert ("draft", "unchanged") in told.lines and ("early", "unchanged") in told.lines
    assert found.bundle.plan().method == "fitted" and found.bundle.path == interrupted.output
    journals = work_folder(interrupted.output) / "journals"
    (pieces,) = journals.glob("journal-*.jsonl")
    assert pieces.read_bytes().count(b"\n") == 1 + SAMPLES
    assert told.counts["calibrate"] == (SAMPLES - 1) * N, "the first sample was not measured again"
    assert early.counts["early"] > N + 2 * B and early.counts["draft"] == 0


def test_a_plan_that_is_no_better_is_not_taken(
    interrupted: Interrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    shutil.copytree(interrupted.draft, output)
    shutil.copytree(work_folder(interrupted.output), tmp_path / "bundle.work")
    for stage in ("early", "calibrate", "plan", "bundle", "verify"):
        (tmp_path / "bundle.work" / "records" / f"{stage}.json").unlink(missing_ok=True)
    monkeypatch.setattr("lemica_trt.compiler.early_stage._decibels", lambda report: 30.0)
    told = Told(at="calibrate")
    with contextlib.suppress(KeyboardInterrupt):
        work_commands.build(small(), output, REQUEST, told)
    assert Bundle.open(output).digest == Bundle.open(interrupted.draft).digest
    assert "the draft keeps its plan: 30.0 dB on one clip, the fitted one has 30.0" in told.notes
    assert not (tmp_path / "bundle.unverified").exists()


def test_a_baseline_that_is_ahead_takes_the_plans_place(
    interrupted: Interrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    shutil.copytree(interrupted.output, output)
    shutil.copytree(work_folder(interrupted.output), tmp_path / "bundle.work")
    (tmp_path / "bundle.work" / "records" / "verify.json").unlink(missing_ok=True)
    compared = list[tuple[str, str]]()

    def ahead(other: Quality, own: Quality) -> bool:
        compared.append((other.method, own.method))
        return True

    monkeypatch.setattr("lemica_trt.evaluate.quality.is_ahead", ahead)
    told = Told()
    found = work_commands.build(small(), output, REQUEST, told)
    assert compared == [("lemica", PLAN)] and f"b{B}: lemica takes the place of fitted" in told.notes
    bundle = Bundle.open(output)
    bundle.check()
    assert found.bundle.digest == bundle.digest and bundle.plan().method == "lemica"
    report = stored_report(bundle)
    assert report is not None and report.manifest_digest == bundle.digest and not report.failures()
    again = Told()
    assert work_commands.build(small(), output, REQUEST, again).bundle.digest == bundle.digest
    assert ("verify", "unchanged") in again.lines and ("bundle", "unchanged") in again.lines


def test_what_is_ahead_by_more_than_chance() -> None:
    def quality(method: str, *psnr: float) -> Quality:
        return Quality(
            plan="b4", method=method, budget=4, psnr=float(np.mean(psnr)), psnr_p5=min(psnr), ssim=1.0, ssim_p5=1.0,
            lpips=None, each_psnr=psnr,
        )  # fmt: skip

    own = quality(PLAN, 30.0, 30.0, 30.0)
    assert chance_lead(3) == pytest.approx(6 / 3**0.5) and chance_lead(8) == 0
    assert not is_ahead(quality("lemica", 33.0, 33.0, 33.0), own) and is_ahead(quality("lemica", 34.0, 34.0, 34.0), own)
    tail = quality(PLAN, 20.0, 34.0, 36.0)
    assert is_ahead(quality("lemica", 30.0, 30.0, 30.0), tail), "as good in the mean, 10 dB better in the worst clip"
    assert not is_ahead(quality("lemica", 29.0, 29.0, 29.0), tail)
    assert not is_ahead(quality("lemica", 25.0, 33.0, 35.0), tail)


def test_who_gets_one() -> None:
    def samples(effort: str, **changes: object) -> int:
        chosen, profile = EFFORTS[effort], load_profile("cogvideox-tiny")
        settings = msgspec.structs.replace(
            profile.calibration,
            samples=chosen.samples,
            rollouts=chosen.rollouts,
            validation_samples=chosen.validation_samples,
        )
        request = BuildRequest(methods=chosen.methods, verify_samples=chosen.verify_samples)
        request = msgspec.structs.replace(request, **changes)
        profile = msgspec.structs.replace(profile, calibration=settings)
        return Inputs(profile=profile, request=request, prompts=("a",), held_out=("b",)).early_samples

    assert (samples("quick"), samples("normal"), samples("thorough")) == (0, 2, 2)
    assert samples("normal", methods=("lemica",)) == samples("normal", verify_samples=0) == 0
    assert samples("normal", schedule=(0, 9)) == samples("normal", reference_steps=100) == 0


def test_what_a_part_of_a_stage_tells() -> None:
    class Heard(Quiet):
        def __init__(self) -> None:
            self.told, self.notes = list[tuple[float, float]](), list[str]()

        def advance(self, done: float, total: float) -> None:
            self.told.append((done, total))

        def note(self, text: str) -> None:
            self.notes.append(text)

    heard = Heard()
    part = Within(heard, 10.0)
    part.stage("calibrate", "two samples")
    part.advance(3, 7)  # done in an earlier run
    part.advance(7, 7)
    part.stage("fit", "one")
    part.advance(0, 2)
    part.advance(2, 2)
    part.note("a word")
    assert heard.told == [(4.0, 10.0), (6.0, 10.0)]
    assert heard.notes == ["calibrate: two samples", "fit: one", "a word"]
