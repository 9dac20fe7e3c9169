"""The pins, and the script that tests other Pythons."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.null

ROOT = Path(__file__).parents[2]


def test_every_pin_leaves_python_3_10_alone() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert not [line for line in pins if "==" not in line or not line.endswith('; python_version >= "3.11"')]


def test_a_machine_without_other_pythons_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname"):
        found = shutil.which(name)
        assert found
        (tmp_path / "bin" / name).symlink_to(found)
    script = ROOT / "tools" / "test_pythons.sh"
    environment = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "null tests ran on Python: none of 3.10 3.12"
