"""Where PyTorch is missing, files and folders that hold only `cpu` tests are not even imported."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A small bundle of the bundled model, and what the command printed. Copy it before changing it."""
    output = tmp_path_factory.mktemp("built") / "bundle"
    done = lemica("build", *SMALL, *PAPER, "--budget", "4,5", "--verify-samples", "2", "--output", output)
    assert done.returncode == 0, done.stderr
    return output, done


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name in `traced_bundles.SHARED` to that bundle, which is built once for all processes of the
    tests. Copy it before changing it."""

    def bundle(name: str) -> Path:
        from filelock import FileLock  # PyTorch needs it, too
        from traced_bundles import SHARED, built

        folder = tmp_path_factory.getbasetemp()
        folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"traced-{name}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "bundle").exists():
                built(name, folder, *SHARED[name])
        return folder / "bundle"

    return bundle
