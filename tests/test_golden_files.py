"""Files as this release writes them, of every format on disk: what reads them today must read them tomorrow.

They are of one small build (`tests/golden/README.md` has the command). A format that changes gets a new version number
in its class, and new files here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lemica_trt.bundle.manifest import Manifest, manifest_digest_line, manifest_from_json
from lemica_trt.bundle.workspace import Record
from lemica_trt.compiler.artifacts import Draft, Engines, Exported, ModelFacts, PlanIndex, Verified, Written
from lemica_trt.compiler.requests import BuildRequest, Given
from lemica_trt.core.errors import IntegrityError
from lemica_trt.core.values import json_bytes, read_value, value_from_json
from lemica_trt.ir.budget import Front
from lemica_trt.ir.calibration import ErrorGraph, Sensitivity, TrajectoryGrams
from lemica_trt.ir.graphs import StepLayout
from lemica_trt.ir.kept import KeptClips
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.prompts import PromptFacts
from lemica_trt.ir.report import Measured, VerifyReport
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.trials import TrialTables

GOLDEN = Path(__file__).parent / "golden"

FILES: dict[str, Any] = {
    "bundle/calibration/error_graph.json": ErrorGraph,
    "bundle/calibration/front.json": Front,
    "bundle/calibration/grams.json": TrajectoryGrams,
    "bundle/calibration/prompts.json": PromptFacts,
    "bundle/calibration/sampler.json": SamplerTable,
    "bundle/calibration/selection.json": TrialTables,
    "bundle/calibration/sensitivity.json": Sensitivity,
    "bundle/manifest.json": Manifest,
    "bundle/plans/b3.json": StepPlan,
    "bundle/plans/uncached.json": StepPlan,
    "reports/clips.json": KeptClips,
    "reports/step_times.json": Measured,
    "reports/verify.json": VerifyReport,
    "work/bundle.json": Written,
    "work/draft.json": Draft,
    "work/engines.json": Engines,
    "work/export.json": Exported,
    "work/inputs/given.json": Given,
    "work/inputs/profile.json": Profile,
    "work/inputs/request.json": BuildRequest,
    "work/layout.json": StepLayout,
    "work/model.json": ModelFacts,
    "work/plans.json": PlanIndex,
    "work/records/lower.json": Record,
    "work/verified.json": Verified,
}


@pytest.mark.null
def test_every_file_has_a_class() -> None:
    there = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.json")}
    assert there == set(FILES)


@pytest.mark.null
@pytest.mark.parametrize("name", FILES)
def test_files_are_read_and_written_again_as_they_are(name: str) -> None:
    path = GOLDEN / name
    assert json_bytes(read_value(FILES[name], path)) == path.read_bytes()


@pytest.mark.null
def test_the_digest_beside_the_manifest() -> None:
    line = (GOLDEN / "bundle/manifest.sha256").read_bytes()
    assert line == manifest_digest_line((GOLDEN / "bundle/manifest.json").read_bytes())


@pytest.mark.null
def test_an_older_bundle_is_refused_with_the_command_that_builds_it_again() -> None:
    data = (GOLDEN / "bundle/manifest.json").read_bytes().replace(b'"format_version": 4', b'"format_version": 1')
    with pytest.raises(IntegrityError, match=r"expected bundle format 4, got 1.*build --model cogvideox-tiny --budget"):
        manifest_from_json(data, where="manifest.json")


@pytest.mark.cpu
def test_journals() -> None:
    from lemica_trt.calibrate.fit import Fit, FitMeasurement
    from lemica_trt.calibrate.journal import CheapMeasurement, Piece, line_content
    from lemica_trt.evaluate.runs import FrameScore, LatentScore, TrialHeader

    kinds: dict[str, tuple[Any, Any]] = {
        "fits": (FitMeasurement, Fit),
        "frames": (TrialHeader, FrameScore),
        "journal": (CheapMeasurement, Piece),
        "trials": (TrialHeader, LatentScore),
    }
    assert {path.stem for path in GOLDEN.rglob("*.jsonl")} == set(kinds)
    for name, (header, entry) in kinds.items():
        first, *lines = (GOLDEN / f"work/journals/{name}.jsonl").read_bytes().splitlines()
        measurement = value_from_json(header, line_content(first), where=name)
        assert lines, name
        for line in lines:
            found = value_from_json(entry, line_content(line), where=name)
            assert found.mismatch(measurement) is None, name
