"""A bundle is looked at, re-planned and run where nothing that built it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import result_of

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError, MissingDependencyError

pytestmark = pytest.mark.cpu

SCRIPT = """
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "accelerate"):
    sys.modules[name] = None
from lemica_trt.cli.main import main
main()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "--model", "cogvideox-tiny", "--output", "out"),
        ("calibrate", "--model", "cogvideox-tiny", "--output", "out"),
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[3:4]),
)
def test_what_needs_the_model_says_so_before_it_does_anything(arguments: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == MissingDependencyError.exit_code
    assert done.stderr.startswith("lemica-trt: building needs PyTorch and diffusers, got: ")
    assert done.stderr.endswith("→ pip install 'lemica-trt[build]'\n") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_samplings_and_knows_no_times(tmp_path: Path) -> None:
    for model in ("cogvideox-tiny", "cogvideox"):  # one that is here, and one of the hub's
        command = [sys.executable, "-c", SCRIPT, "build", "--model", model, "--dry-run", "--json", "--output", "out"]
        root = str(Path(__file__).parents[1])
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}
        )
        assert done.returncode == 0, done.stderr
        stages = {stage["name"]: stage for stage in result_of(done.stdout)}
        assert 20 < sum(stage["samplings"] for stage in stages.values()) < 27
        assert stages["calibrate"]["seconds"] is stages["verify"]["seconds"] is stages["export"]["disk"] is None
    assert not list(tmp_path.iterdir())


def test_export_takes_a_work_folder_and_leaves_a_bundle_as_it_is(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    bundle = shutil.copytree(built[0], tmp_path / "bundle")
    command = [sys.executable, "-c", SCRIPT, "export", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == InputError.exit_code
    assert "expected a work folder, got a bundle, whose graphs are exported → give the work folder" in done.stderr
    Bundle.open(bundle).check()


def test_inspect_plan_and_run(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(built[0], bundle)
    clip, prompts = tmp_path / "clip.npy", tmp_path / "mine.txt"
    prompts.write_text("a small blue square grows\na wide green ring moves up\n")
    for arguments in (
        ("inspect", bundle),
        ("plan", bundle, "--budget", "3"),
        ("plan", bundle, "--budget", "4", "--calibrate-on", "engine", "--prompts", prompts, "--samples", "2"),
        ("run", bundle, "a big red circle moves left", "--plan", "b3", "--output", clip),
    ):
        command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments[0]}: {done.stderr}"
    assert clip.stat().st_size > 0


def test_engines_are_built_and_dry_runs_count_on_a_work_folder_without_the_model(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    work = Path(shutil.copytree(built[0].with_name("bundle.work"), tmp_path / "bundle.work"))
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    script = SCRIPT.replace('"onnx", "onnxscript", ', "")  # with which the build half of ONNX Runtime rewrites graphs
    command = [sys.executable, "-c", script, "engine", str(work), "--output", str(tmp_path / "other"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "other").plans == Bundle.open(built[0]).plans
    command = [sys.executable, "-c", SCRIPT, "build", "--model", "cogvideox-tiny", "--dry-run", "--json"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "bundle")], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "unchanged" not in {stage["what"] for stage in result_of(done.stdout)}
