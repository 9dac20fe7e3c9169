"""benchmarks/gpu.py without a GPU: every part runs, and says what it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


def gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.cpu
def test_all_parts_run_on_the_null_device(tmp_path: Path) -> None:
    done = gpu("--tiny", "--device", "null", "--output", tmp_path)
    report = json.loads((tmp_path / "report.json").read_bytes())
    parts = report["parts"]
    assert {name: part["error"] for name, part in parts.items()} == dict.fromkeys(
        ("machine", "tiny", "sanitizer", "torch", "engines")
    ), done.stderr
    assert done.returncode == 0
    assert parts["machine"]["found"]["rtx engines for the default targets"] == "runs"

    tiny = parts["tiny"]["found"]
    ways = [found for name, found in tiny.items() if "capture" in name]
    assert len(ways) == 3 and all(len(way) == 2 for way in ways), "three ways of launching, two plans"
    for found in (plan for way in ways for plan in way.values()):
        assert found["relative"] < 1e-4 and found["repeats_to_the_bit"] and found["seconds"] > 0
    assert parts["sanitizer"]["found"]["plan under it"] == {"equal": True}

    for part, budgets in (("torch", [2, 4, 8]), ("engines", [4, 8])):
        found = parts[part]["found"]
        plans = next(value for name, value in found.items() if name.startswith("plans"))
        assert [row["budget"] for row in plans] == budgets
        assert all(row["finite"] and row["seconds"] > 0 and not row["with_capture"] for row in plans)
    text = (tmp_path / "report.txt").read_text()
    assert done.stdout.strip() == text.strip()
    assert "relative" in text and "not TensorRT" not in text, "here is nothing of CUDA to label"


@pytest.mark.cpu
def test_parts_that_fail_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    """No GPU: what the parts say of it lies in the report, each by its last line."""
    done = gpu("--tiny", "--device", "cuda", "--seconds", "400", "--output", tmp_path, "--only", "tiny", "torch")
    parts = json.loads((tmp_path / "report.json").read_bytes())["parts"]
    assert "runs no engine on this device" in parts["tiny"]["error"]
    assert parts["torch"]["error"].startswith("exit code 1: ")
    assert done.returncode == 1
    assert "tiny" in done.stdout and "FAILED: " in done.stdout
