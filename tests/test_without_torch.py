"""A bundle is looked at, re-planned and run where nothing that built it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

SCRIPT = """
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "accelerate"):
    sys.modules[name] = None
from lemica_trt.cli.main import main
main()
"""


def test_inspect_plan_and_run(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(built[0], bundle)
    clip = tmp_path / "clip.npy"
    for arguments in (
        ("inspect", bundle),
        ("plan", bundle, "--budget", "3"),
        ("run", bundle, "a big red circle moves left", "--plan", "b3", "--output", clip),
    ):
        command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments[0]}: {done.stderr}"
    assert clip.stat().st_size > 0
