"""The scripts in examples/ run as their docstrings say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROMPT = "a big red circle moves left"


def _run(name: str, *arguments: object) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "build.py", "compare_plans.py", "fit_pipeline.py", "make_plan.py",
    }  # fmt: skip


def test_compare_plans(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    lines = [line.split() for line in _run("compare_plans.py", built[0], PROMPT, tmp_path)]
    assert [line[0] for line in lines] == ["uncached", "b5", "b4"]
    assert float(lines[0][-2]) == 100.0 > float(lines[1][-2])  # all steps in full are the reference itself
    assert {path.name for path in tmp_path.iterdir()} == {"uncached.gif", "b5.gif", "b4.gif"}


def test_make_plan_makes_the_plan_of_the_build(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    import lemica_trt

    (line,) = _run("make_plan.py", built[0], "lemica", 4, PROMPT, tmp_path / "clip.gif")
    steps = lemica_trt.Bundle.open(built[0]).plan("b4").full_steps
    assert line == f"lemica, 4 of 8 steps in full: {' '.join(map(str, steps))}"
    assert (tmp_path / "clip.gif").stat().st_size > 500


@pytest.mark.long
def test_build(tmp_path: Path) -> None:
    assert _run("build.py", tmp_path / "bundle") == ["b4 (0, 2, 4, 6)", "uncached (0, 1, 2, 3, 4, 5, 6, 7)"]


def test_fit_pipeline(tmp_path: Path) -> None:
    folder, plan = ROOT / "lemica_trt" / "zoo" / "cogvideox-tiny", tmp_path / "b5.json"
    settings = "num_inference_steps=12", "max_sequence_length=16"
    lines = _run("fit_pipeline.py", folder, 5, plan, *settings, PROMPT, "a small blue square moves up")
    assert "5 of 12 steps in full" in lines[0] and plan.is_file()
    by_plan, by_scheduler = (float(line.split()[3]) for line in lines[1:])
    assert by_plan < by_scheduler


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in order, as a notebook runs them; it is kept without outputs."""
    book = json.loads((EXAMPLES / "fit_pipeline.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert book["nbformat"] == 4 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    errors = [float(line.split()[-3]) for line in capsys.readouterr().out.splitlines() if "mean difference" in line]
    assert errors[0] == 0.0 < errors[1] < errors[2] and (tmp_path / "plan.json").is_file()
