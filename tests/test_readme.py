"""What the README says is so: its commands parse, its tables are the code's, its Python runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lemica_trt.cli.main import main
from lemica_trt.core.errors import EXIT_CODES
from lemica_trt.ir.resources import load_profile, profile_names

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for block in _blocks("")
        for line in block.splitlines()
        if line.startswith("lemica-trt")
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("out/tiny", "out/repository", "work"):
        (tmp_path / folder).mkdir(parents=True)
    _, name, *arguments = shlex.split(line)
    command = main.commands[name]
    with command.make_context(name, arguments) as context:
        assert context.command is command


def test_there_are_commands() -> None:
    assert {line.split()[1] for line in COMMANDS} >= {
        "build",
        "run",
        "inspect",
        "plan",
        "verify",
        "doctor",
        "calibrate",
    }


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^make (\w+)", "\n".join(_blocks("")), re.MULTILINE))
    assert targets == {"demo", "test"}
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_exit_codes() -> None:
    section = README.split("## Exit codes")[1].split("\n## ")[0]
    table = {int(code): text for code, text in re.findall(r"^\| (\d+) \| (.+?) \|$", section, re.MULTILINE)}
    assert set(table) == {0, 130, *EXIT_CODES}
    for code, text in EXIT_CODES.items():
        assert table[code].lower() == text.rstrip(".").lower()


def test_profiles() -> None:
    listed = dict(re.findall(r"^\| `([\w.-]+)` \| `([\w./-]+)` \|", README, re.MULTILINE))
    for name in profile_names():
        source = load_profile(name).source
        if source == f"package:{name}":
            assert f"| `{name}` | ships with the package |" in README
        else:
            assert listed[name] == source


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_python_runs(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny").symlink_to(built[0])
    (snippet,) = _blocks("python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "clip.mp4").stat().st_size > 500
