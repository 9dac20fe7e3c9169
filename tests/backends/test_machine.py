"""What a measured time is of."""

from __future__ import annotations

import pytest

from lemica_trt.backends import machine
from lemica_trt.backends.machine import Gpu, describe_machine


@pytest.mark.null
def test_a_machine_is_its_processor_and_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="NVIDIA L4", compute_capability="8.9", driver="13.0")
    monkeypatch.setattr(machine, "find_gpu", lambda: None)
    without = describe_machine()
    assert " cores" in without
    monkeypatch.setattr(machine, "find_gpu", lambda: gpu)
    assert describe_machine() == f"{without}, NVIDIA L4 (driver for CUDA 13.0)"
