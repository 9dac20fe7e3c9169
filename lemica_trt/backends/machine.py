"""What machine this is: its processor and its first GPU, asked of the NVIDIA driver itself. No library is imported."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from lemica_trt.core.values import Value


class Gpu(Value, frozen=True):
    """A GPU: product name, compute capability (`8.9`), highest CUDA version of its driver (`13.0`)."""

    name: str
    compute_capability: str
    driver: str


def find_gpu() -> Gpu | None:
    """The first GPU; None without one, or without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, version, major, minor = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    major_attribute, minor_attribute = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
    answers = (
        cuda.cuInit(0),
        cuda.cuDriverGetVersion(ctypes.byref(version)),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device),
    )
    if any(answers):
        return None
    return Gpu(
        name=name.value.decode(),
        compute_capability=f"{major.value}.{minor.value}",
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def describe_machine() -> str:
    """Processor, cores, and the first GPU with the CUDA version of its driver where there is one: one line that says
    what machine a time was measured on."""
    name = _cpu("model name") or platform.processor() or platform.machine()
    gpu = find_gpu()
    return f"{name}, {os.cpu_count()} cores" + (f", {gpu.name} (driver for CUDA {gpu.driver})" if gpu else "")


def has_vnni() -> bool:
    """Whether the CPU sums products of 8-bit integers in 32 bits at once (AVX512-VNNI or AVX-VNNI); False where the
    system does not say."""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(_cpu("flags").split())


def _cpu(field: str) -> str:
    """What Linux says of the first core; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
