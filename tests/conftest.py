"""Where PyTorch is missing, files and folders that hold only `cpu` tests are not even imported."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
from command import PAPER, SMALL, lemica

hypothesis.settings.register_profile("any machine", deadline=None)  # no test depends on the clock
hypothesis.settings.load_profile("any machine")

BUILD_LIBRARIES = ("torch", "diffusers", "onnx")


def _needs_torch(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return "pytest.mark.cpu" in text and "pytest.mark.null" not in text


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """True: leave it out; None: as pytest likes."""
    if all(find_spec(name) for name in BUILD_LIBRARIES):
        return None
    files = sorted(collection_path.rglob("test_*.py")) if collection_path.is_dir() else [collection_path]
    tests = [file for file in files if file.name.startswith("test_") and file.suffix == ".py"]
    return True if tests and all(map(_needs_torch, tests)) else None


def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of the tests."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A small bundle of the bundled model, and what the command printed; built once for all processes of the tests.
    Copy it before changing it."""
    from filelock import FileLock  # PyTorch needs it, too

    folder = _shared_folder(tmp_path_factory) / "built"
    output, printed = folder / "bundle", folder / "printed.json"
    with FileLock(f"{folder}.lock"):
        if not printed.exists():
            folder.mkdir(exist_ok=True)
            done = lemica("build", *SMALL, *PAPER, "--budget", "4,5", "--verify-samples", "2", "--output", output)
            assert done.returncode == 0, done.stderr
            printed.write_text(json.dumps([done.stdout, done.stderr]))
    stdout, stderr = json.loads(printed.read_text())
    return output, subprocess.CompletedProcess([], 0, stdout, stderr)


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name in `traced_bundles.SHARED` to that bundle, which is built once for all processes of the
    tests. Copy it before changing it."""

    def bundle(name: str) -> Path:
        from filelock import FileLock
        from traced_bundles import SHARED, built

        folder = _shared_folder(tmp_path_factory) / f"traced-{name}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "bundle").exists():
                built(name, folder, *SHARED[name])
        return folder / "bundle"

    return bundle
