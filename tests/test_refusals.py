"""One line and an exit code for what nobody has thought of, and for surroundings that nobody tried."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lemica_trt.bundle.writing import require_replaceable
from lemica_trt.cli.main import main
from lemica_trt.compiler import doctor
from lemica_trt.core.errors import INTERNAL_ERROR, InputError, UsageError
from lemica_trt.ir import resources
from lemica_trt.ir.resources import load_profile

pytestmark = pytest.mark.null

GOLDEN = Path(__file__).parent / "golden/bundle"


@pytest.mark.parametrize("fault", [ZeroDivisionError("by\nzero"), RecursionError("deep"), KeyError("\x1b[2Jname")])
def test_any_other_error_is_one_line_that_says_how_to_see_more(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise fault

    monkeypatch.setattr(doctor, "run_checks", fail)
    monkeypatch.setattr(sys, "argv", ["lemica-trt", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == INTERNAL_ERROR
    said = capsys.readouterr().err
    assert said.startswith(f"lemica-trt: a fault of lemica-trt itself: {type(fault).__name__}: ")
    assert said.count("\n") == 1 and said.strip().isprintable() and "--debug" in said
    monkeypatch.setattr(sys, "argv", ["lemica-trt", "doctor", "--debug"])
    with pytest.raises(type(fault)):
        main()


def test_a_library_that_is_missing_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda: __import__("antigravity_engine"))
    monkeypatch.setattr(sys, "argv", ["lemica-trt", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 7
    said = "lemica-trt: No module named 'antigravity_engine' → pip install 'lemica-trt[build]'\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_console_of_another_encoding(encoding: str) -> None:
    command = [sys.executable, "-m", "lemica_trt", "inspect", str(GOLDEN)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"cogvideox-tiny" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text_length = " + "[" * 2000 + "]" * 2000, "p.toml: expected a valid build profile, got: "),
        ("text_length = " + "9" * 5000, "got: "),
        ("text_length = 16\n" * 2, "got: "),
        ("#" * (resources.MAX_PROFILE_BYTES + 1), "of at most 1048576 bytes"),
    ],
)
def test_profiles_that_no_parser_takes(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_profile(str(path))


def test_a_mount_point_is_refused_before_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It cannot be replaced by renaming."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(UsageError, match="got a mount point → give a folder inside it"):
        require_replaceable(tmp_path)
    require_replaceable(tmp_path / "inside")
