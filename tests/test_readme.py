"""The commands of README.md, one after the other, as a newcomer types them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from command import lemica

pytestmark = [pytest.mark.cpu, pytest.mark.long]

README = Path(__file__).parents[1] / "README.md"

ELSEWHERE = ("build", "serve")
"""Commands that are not run here: the build has been made, and `tests/endpoint` serves."""

SMALLER = {"b10": "b4", "somebody/tiny-bundle": "file:kept"}
"""What is typed instead: names of the small bundle, and a folder for the hub."""


def commands() -> list[list[str]]:
    """Those of "Use it"."""
    (block,) = re.findall(r"## Use it\n+```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_commands_of_the_readme_run(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    shutil.copytree(built[0], tmp_path / "out" / "tiny")
    (tmp_path / "mine.txt").write_text("a big red circle moves left\na green star grows\n", encoding="utf-8")
    ran = []
    for program, name, *arguments in commands():
        assert program == "lemica-trt"
        if name in ELSEWHERE:
            continue
        for long, short in SMALLER.items():
            arguments = [argument.replace(long, short) for argument in arguments]
        done = lemica(name, *arguments, cwd=tmp_path)
        assert done.returncode == 0, (name, arguments, done.stderr)
        ran.append(name)
    assert {"run", "inspect", "plan", "compare", "bench", "verify", "report", "triton", "push", "doctor"} <= {*ran}
    for made in ("clip.mp4", "report.html", "out/repository/start.sh", "kept/manifest.json", "kept/README.md"):
        assert (tmp_path / made).stat().st_size > 0, made
