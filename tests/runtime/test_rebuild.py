"""The command that builds a bundle again is one that the command line takes."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from command import lemica

from lemica_trt.bundle import Bundle
from lemica_trt.runtime.rebuild import rebuild_command


@pytest.mark.cpu
def test_it_asks_for_the_same_bundle(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """A dry run of it: same profile, same plans, nothing to calibrate."""
    bundle = Bundle.open(built[0])
    words = shlex.split(rebuild_command(bundle, "onnxruntime"))
    assert words[:4] == ["lemica-trt", "build", "--model", "cogvideox-tiny"]
    assert "--weights" not in words, "the profile's own"
    assert words[words.index("--budget") + 1] == "4,5"
    assert words[words.index("--error-graph") + 1] == str(bundle.path / "calibration/error_graph.json")
    done = lemica(*words[1:], "--dry-run")
    assert done.returncode == 0, done.stderr
