"""A calibration by secant, carried over to fewer steps and more guidance: the stages, with the bundled model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from lemica_trt.bundle.manifest import SENSITIVITY_FILE
from lemica_trt.compiler import work_commands
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import read_value
from lemica_trt.ir.calibration import ErrorGraph, Sensitivity
from lemica_trt.ir.profile import CalibrationMethod
from lemica_trt.ir.resources import load_profile

pytestmark = pytest.mark.cpu


def calibrated(
    root: Path, steps: int, guidance: float, *, source: Path | None = None, method: CalibrationMethod = "secant"
) -> ErrorGraph:
    replace, profile = msgspec.structs.replace, load_profile("cogvideox-tiny")
    profile = replace(
        profile,
        sampling=replace(profile.sampling, steps=steps, guidance_scale=guidance),
        calibration=replace(profile.calibration, samples=1, max_skip=3, method=method),
    )
    request = BuildRequest(device="cpu", calibration_from=None if source is None else str(source))
    return work_commands.calibrate(profile, root, request, Quiet())


def test_plans_for_fewer_steps_and_more_guidance_say_what_they_hold_for(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    before = calibrated(source, 8, 4.0)
    graph = calibrated(target, 6, 6.0, source=source)
    assert (graph.method, graph.num_steps, graph.guidance_scale, graph.samplings) == ("retargeted", 6, 6.0, 1.0)
    assert before.samplings is not msgspec.UNSET and before.samplings > 3
    known = read_value(Sensitivity, target / SENSITIVITY_FILE)
    assert (known.num_steps, known.guidance_scale) == (8, 4.0)
    (plan,) = work_commands.plan(target, {"budgets": (3,), "methods": ("lemica",)}, Quiet()).plans
    assert plan.guidance_range == (3.0, 7.0)  # its own half, and what the source was found to hold for
    with pytest.raises(UnsupportedError, match=r"guidance 2 … 7 \(4 was measured\), asked for is 8"):
        calibrated(tmp_path / "far", 6, 8.0, source=target)


def test_only_a_calibration_by_secant_can_be_carried_over(tmp_path: Path) -> None:
    calibrated(tmp_path / "exact", 4, 4.0, method="exact")
    with pytest.raises(InputError, match="expected a calibration by secant, got another or none → calibrate it with"):
        calibrated(tmp_path / "other", 4, 5.0, source=tmp_path / "exact")
