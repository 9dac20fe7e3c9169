"""The two libraries that share an interface, and what they are called."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lemica_trt.ir.graphs import TensorDType

Module = Literal["tensorrt", "tensorrt_rtx"]
"""A library's Python module; its package on the index is called the same, with dashes."""

LEAN_MODULE = "tensorrt_lean"
"""TensorRT's lean runtime: loads and runs version-compatible engines, has no builder."""

RTX = "tensorrt-rtx"

DTYPES: dict[str, TensorDType] = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
}
"""Member of the library's `DataType` → our name."""

QUANTIZED = {"INT8": "int8", "FP8": "fp8"}
"""The same of what no graph takes or gives, but its products multiply."""


class Vendor(NamedTuple):
    """One of the two.

    Attributes:
        backend: its name as a backend.
        title: its name in prose.
        module: its Python module.
        extra: the extra of lemica-trt that installs it.
        builds_on_gpu: whether kernels are timed on the GPU that the engine is for.
    """

    backend: str
    title: str
    module: Module
    extra: str
    builds_on_gpu: bool


VENDORS = {
    vendor.backend: vendor
    for vendor in (
        Vendor("tensorrt", "TensorRT", "tensorrt", "tensorrt", builds_on_gpu=True),
        Vendor(RTX, "TensorRT for RTX", "tensorrt_rtx", "rtx", builds_on_gpu=False),
    )
}
