"""Bundled models that have no family are built by name, through their trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from traced_bundles import lemica

import lemica_trt
from lemica_trt.core.values import read_value
from lemica_trt.ir.report import PLAN, VerifyReport

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers, transformers and exporters

FRAMES = {"flux-tiny": 1}


@pytest.mark.long
def test_a_bundle_of_few_steps_is_the_pipeline(tmp_path: Path) -> None:
    build("flux-tiny", tmp_path, "--denoising-steps", 5, "--schedule", "0,2,4", "--verify-samples", 1)


@pytest.mark.long
@pytest.mark.parametrize("name", FRAMES)
def test_fifteen_of_fifty_steps(name: str, tmp_path: Path) -> None:
    """From a budget to engines: what is drawn is what all steps draw, and nearer to it than with LeMiCa's plan."""
    report = build(name, tmp_path, "--budget", 15)
    psnr = {quality.method: quality.psnr for quality in report.quality if quality.reference_steps is None}
    assert psnr[PLAN] > max(30, psnr["lemica"])


def build(name: str, output: Path, *flags: object) -> VerifyReport:
    """A bundle is built, and its report says that it computes what diffusers does; then it runs."""
    done = lemica("build", "--model", name, *flags, "--quiet", "--output", output)
    assert done.exit_code == 0, done.output
    report = read_value(VerifyReport, output / "reports" / "verify.json")
    found = {(run.plan, run.against): run.difference for run in report.agreement}
    assert found["uncached", "diffusers"] < 1e-4 and max(found.values()) < 1e-4
    with lemica_trt.load(output) as pipe:
        assert pipe("a big red circle", seed=3).frames.shape == (FRAMES[name], 64, 64, 3)
    return report
