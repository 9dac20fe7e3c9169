"""The command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner

SMALL = (
    *("--model", "cogvideox-tiny", "--denoising-steps", "8", "--samples", "1", "--max-skip", "3"),
    *("--validation-samples", "1", "--calibration", "exact"),
)
"""Flags of the smallest build of the bundled model that has something to plan."""

PAPER = ("--method", "lemica")
"""Flags of planning that have nothing tried."""


def result_of(printed: str) -> Any:
    """What `--json` printed of a result."""
    found = json.loads(printed)
    assert set(found) == {"schema_version", "result"} and found["schema_version"] == 1
    return found["result"]


class Done(NamedTuple):
    """What a command left, as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


def in_process(*arguments: object) -> Done:
    """`lemica-trt` in this process: seconds faster, and all that is imported stays."""
    from lemica_trt.cli.main import main

    found = CliRunner().invoke(main, [*map(str, arguments)], env={"NO_COLOR": "1", "COLUMNS": "160"})
    return Done(found.exit_code, found.stdout, found.stderr)


def lemica(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `lemica-trt`."""
    return subprocess.run(
        [sys.executable, "-m", "lemica_trt", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "160"},
        check=False,
    )
