"""A real tritonserver on loopback, with cogvideox-tiny on ONNX Runtime; fetched once into `.cache/triton`.

The folder is not called `triton`: pytest puts `tests/` on the path, and torch would take it for the compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton_server import CACHE, CASES, PREFIX, REFERENCE, ROOT, STEPS, Server, serving


@pytest.fixture(scope="session")
def tritonserver() -> Path:
    """The launcher; fetches the server if it is not here."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("the tritonserver of the wheel nvidia-pytriton runs on Linux x86_64 only")
    done = subprocess.run(
        [str(ROOT / "tools" / "fetch_tritonserver.sh"), str(CACHE)], capture_output=True, text=True, timeout=550
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"tritonserver cannot be fetched: {reason}")
    return CACHE / "tritonserver"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cogvideox-tiny with few steps: plans b4, b6 and uncached; and a repository beside it."""
    from filelock import FileLock

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tiny"
    output = folder / "bundle"
    command = ["build", "--model", "cogvideox-tiny", "--denoising-steps", str(STEPS), "--method", "uniform"]
    command += ["--budget", "4,6", "--verify-samples", "0", "--quiet", "--output", str(output)]
    command += ["--triton", str(output.parent / "repository")]
    with FileLock(f"{folder}.lock"):  # once for all processes of the tests
        if not (folder / "repository").exists():
            done = subprocess.run(
                [sys.executable, "-m", "lemica_trt", *command], capture_output=True, text=True, cwd=ROOT
            )
            assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def reference(tritonserver: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the in-process pipeline makes of `CASES`, in the interpreter that the server's models run in.

    Another numpy draws noise that differs in the last places (`runtime.random`), so it has to be the same one.
    """
    file = tmp_path_factory.mktemp("reference") / "reference.npz"
    python = CACHE / "modelenv" / "bin" / "python"
    subprocess.run([str(python), "-c", REFERENCE, str(tiny), json.dumps(CASES), str(file)], check=True, timeout=120)
    with np.load(file) as found:
        return dict(found)


@pytest.fixture(scope="session")
def server(tritonserver: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.triton.repository import write_repository

    folder = tmp_path_factory.mktemp("triton")
    write_repository(Bundle.open(tiny), folder / "repository")
    flag = f"--backend-config=python,shm-region-prefix-name={PREFIX}"  # not the usual one: nothing may hang on that
    with serving(tritonserver, folder / "repository", folder / "log", flag) as found:
        yield found
