"""A build that is killed at random moments and run again ends in the very bundle of one that was not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lemica_trt.bundle.reading import Bundle

pytestmark = pytest.mark.cpu

KILLS = 4


def _command(output: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "lemica_trt", "build", "--model", "cogvideox-tiny", "--denoising-steps", "6"),
        *("--samples", "3", "--max-skip", "3", "--validation-samples", "2", "--budget", "3", "--verify-samples", "0"),
        "--quiet",
        *("--output", str(output)),
    ]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_killed_builds_resume_to_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    subprocess.run(_command(whole), check=True)
    lasted = time.monotonic() - start
    chance = random.Random(7)
    killed_for_real = 0
    for _ in range(KILLS):
        process = subprocess.Popen(_command(killed))
        try:
            # Half of a run is imports: kill in what comes behind them, up to the very end.
            process.wait(timeout=lasted * chance.uniform(0.35, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed_for_real += 1
        assert process.returncode in (0, -signal.SIGKILL)
        if killed.exists():
            Bundle.open(killed).check()
    assert killed_for_real >= 1
    subprocess.run(_command(killed), check=True)
    assert _contents(killed) == _contents(whole)
    leftovers = {path.name for path in tmp_path.iterdir()} - {"whole", "whole.work", "killed", "killed.work"}
    assert leftovers == set()
