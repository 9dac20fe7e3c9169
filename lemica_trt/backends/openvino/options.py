"""What OpenVINO can be told; all of it holds when a graph is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from lemica_trt.backends.options import Options, Threads


class OpenVinoOptions(Options, frozen=True):
    """Options of the backend `openvino`."""

    inference_precision: Annotated[
        Literal["fp32", "bf16"],
        Meta(description="what it computes in; bf16 is faster on CPUs that have it (AVX512-BF16, AMX), and rounds"),
    ] = "fp32"
    threads: Threads = 0
