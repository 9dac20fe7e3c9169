"""ONNX Runtime 1.31 and later write a device id and call home, unless they are told not to before they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os
from lemica_trt.backends.onnxruntime.build import import_onnxruntime
import_onnxruntime()
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_telemetry_is_off_unless_asked_for(given: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env={**environment, **given}, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


def test_running_a_bundle_leaves_nothing_at_home(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": ""}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-m", "lemica_trt", "run", str(built[0]), "red", "-q", "-o", str(tmp_path / "clip.npy")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "home").rglob("*")) == []
