"""Times say which machine they are of, and damaged reports have none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lemica_trt.backends.tensorrt.worker import Device
from lemica_trt.bundle.manifest import STEP_TIMES, VERIFY_REPORT
from lemica_trt.evaluate import timing
from lemica_trt.evaluate.timing import machine, stored_steps

pytestmark = pytest.mark.null


def test_times_are_of_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(name="NVIDIA L4", compute_capability="8.9", driver="13.0")
    monkeypatch.setattr(timing, "cuda_device", lambda: None)
    without = machine()
    monkeypatch.setattr(timing, "cuda_device", lambda: gpu)
    assert machine() == f"{without}, NVIDIA L4 (driver for CUDA 13.0)"


@pytest.mark.parametrize("damaged", [b"{", b'{"x": "\xff"}', b'{"x":' + b"[" * 100_000])
def test_damaged_reports_have_no_times(tmp_path: Path, damaged: bytes) -> None:
    for file in (STEP_TIMES, VERIFY_REPORT):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(damaged)
    assert stored_steps(SimpleNamespace(path=tmp_path), "x") is None  # type: ignore[arg-type]
