"""A build has a bundle that runs long before it has a calibrated plan, and leaves it when it is interrupted."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.reports import stored_report
from lemica_trt.cli.flags import plan_target
from lemica_trt.compiler import work_commands
from lemica_trt.compiler.requests import BuildRequest, BuildResult
from lemica_trt.core.errors import UsageError, VerificationError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import read_value
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.report import PLAN
from lemica_trt.ir.resources import load_profile
from lemica_trt.runtime.pipeline import load

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of diffusers

REQUEST = BuildRequest(budgets=(3,), verify_samples=2)


class Told(Quiet):
    """Interrupts when a stage begins.

    Attributes:
        lines: the stages.
    """

    def __init__(self, at: str | None = None) -> None:
        self.at, self.lines = at, list[tuple[str, str]]()

    def stage(self, name: str, detail: str) -> None:
        self.lines.append((name, detail))
        if name == self.at:
            self.at = None
            raise KeyboardInterrupt


def small() -> Profile:
    profile = load_profile("cogvideox-tiny")
    return msgspec.structs.replace(
        profile,
        sampling=msgspec.structs.replace(profile.sampling, steps=6),
        calibration=msgspec.structs.replace(
            profile.calibration, samples=2, rollouts=1, max_skip=3, validation_samples=0
        ),
    )


def build(output: Path, request: BuildRequest = REQUEST, at: str | None = None) -> tuple[BuildResult | None, Told]:
    told = Told(at)
    with contextlib.suppress(KeyboardInterrupt):
        return work_commands.build(small(), output, request, told), told
    return None, told


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Told]]:
    """An output where a build was interrupted before its calibration."""
    output = tmp_path_factory.mktemp("draft") / "bundle"
    found, told = build(output, at="calibrate")
    assert found is None
    yield output, told


def test_an_interrupted_build_leaves_a_verified_draft(drafted: tuple[Path, Told]) -> None:
    output, told = drafted
    bundle = Bundle.open(output)
    bundle.check()
    assert bundle.plans == ("b3", "uncached") and bundle.plan().method == "uniform"
    report = stored_report(bundle)
    assert report is not None and not report.failures() and report.manifest_digest == bundle.digest
    assert {run.plan for run in report.agreement} == {"uncached"}
    assert [(row.plan, row.method) for row in report.quality] == [("b3", PLAN)]
    name, line = told.lines[-1]
    assert name == "draft" and "by uniform in 3 of 6: a draft; the same command goes on" in line
    with load(output) as pipe:
        assert pipe("a big red circle moves left").frames.shape == (9, 64, 64, 3)


def test_the_same_command_goes_on_and_runs_nothing_twice(drafted: tuple[Path, Told]) -> None:
    from build_cost import Counting, counted

    class Both(Counting, Told):
        def __init__(self) -> None:
            Counting.__init__(self)
            Told.__init__(self)

        def stage(self, name: str, detail: str) -> None:
            Counting.stage(self, name, detail)
            Told.stage(self, name, detail)

    output, _ = drafted
    told = Both()
    with counted(told):
        found = work_commands.build(small(), output, REQUEST, told)
    assert ("draft", "unchanged") in told.lines and ("export", "unchanged") in told.lines
    assert found.bundle.path == output and found.bundle.plan().method == "fitted"
    assert found.report is not None and len(found.report.quality[0].each_psnr) == 2
    assert {run.against for run in found.report.agreement} == {"diffusers", "torch"}
    cases = len(found.report.quality)
    # One more uncached clip, the plan in PyTorch once, it and its baselines on both clips, and some steps to be timed.
    assert told.counts["verify"] == 6 + 3 + 2 * 3 * cases + 4

    before = Bundle.open(output).digest
    changed = msgspec.structs.replace(REQUEST, budgets=(4,))
    none, other = build(output, changed, at="fit")
    assert none is None and Bundle.open(output).digest == before, "a bundle is better than a draft"
    assert other.lines[-1][0] == "fit", "nothing is said of a draft"


def test_a_bundle_is_calibrated_on(drafted: tuple[Path, Told], tmp_path: Path) -> None:
    output, _ = drafted
    assert build(output)[0] is not None
    (journal,) = (output.parent / "bundle.work" / "journals").glob("journal-*.jsonl")
    before, told = journal.read_bytes(), Told()
    made = plan_target(output, {}, told, samples="+1")
    after = journal.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 1, "one sample was measured"
    assert ("export", "unchanged") in told.lines
    assert [plan.name for plan in made.plans] == ["b3", "uncached"]
    assert read_value(ErrorGraph, output / ERROR_GRAPH_FILE).samples == 3
    report = stored_report(Bundle.open(output))
    assert report is not None and report.manifest_digest == Bundle.open(output).digest

    plan_target(output, {}, Told(), samples="2")
    assert read_value(ErrorGraph, output / ERROR_GRAPH_FILE).samples == 2
    assert journal.read_bytes() == after, "nothing was measured"
    for samples in ("+x", "0", "-1"):
        with pytest.raises(UsageError, match=r"expected how many in all, or \+K more than 2"):
            plan_target(output, {}, Quiet(), samples=samples)
    shutil.copytree(output, tmp_path / "alone")
    with pytest.raises(UsageError, match=r"expected the work folder of the build, alone\.work beside"):
        plan_target(tmp_path / "alone", {}, Quiet(), samples="+1")


def test_a_draft_of_other_inputs_is_replaced(drafted: tuple[Path, Told], tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    (drafted[0].parent / "bundle.work").rename(tmp_path / "bundle.work")
    try:
        for budget in (3, 4):
            request = msgspec.structs.replace(REQUEST, budgets=(budget,), verify_samples=0)
            assert build(output, request, at="calibrate")[0] is None
            assert Bundle.open(output).plan().budget == budget
        assert stored_report(Bundle.open(output)) is None, "nothing was verified, as was asked for"
    finally:
        (tmp_path / "bundle.work").rename(drafted[0].parent / "bundle.work")


def test_engines_that_are_wrong_fail_before_anything_is_calibrated(
    drafted: tuple[Path, Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lemica_trt.evaluate.agreement.psnr", lambda *_: 1.0)
    output, told = tmp_path / "bundle", Told()
    (drafted[0].parent / "bundle.work").rename(tmp_path / "bundle.work")
    try:
        with pytest.raises(VerificationError, match=r"frames of plan uncached have 1\.0 dB against diffusers"):
            work_commands.build(small(), output, msgspec.structs.replace(REQUEST, budgets=(3,)), told)
    finally:
        (tmp_path / "bundle.work").rename(drafted[0].parent / "bundle.work")
    assert told.lines[-1][0] == "draft" and not output.exists()
    assert Bundle.open(tmp_path / "bundle.unverified").plans == ("b3", "uncached")
