"""What ONNX Runtime can be told; all of it holds when a graph is loaded."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lemica_trt.backends.options import Options, Quantize, Threads


class OrtOptions(Options, frozen=True):
    """Options of the backend `onnxruntime`."""

    changes_weights: ClassVar[bool] = True

    provider: Annotated[
        Literal["cpu", "cuda"], Meta(description="execution provider; cuda needs the package onnxruntime-gpu")
    ] = "cpu"
    optimization: Annotated[
        Literal["disabled", "basic", "extended", "all"], Meta(description="graph optimizations, done at each load")
    ] = "all"
    threads: Threads = 0
    quantize: Quantize = "none"
