"""What ONNX Runtime can be told; all of it holds when a graph is loaded."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lemica_trt.backends.options import Options, Threads
from lemica_trt.ir.engine import NONE, QUANTIZE, Option


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
    quantize: Annotated[
        Literal["none", "int8"],
        Meta(
            description="what linear layers of the whole DiT compute in, except those that its output is sensitive to; "
            "of a finished bundle, on the CPU"
        ),
    ] = "none"

    def as_dict(self) -> dict[str, Option]:
        """All options by name; `quantize` only where something is, so that keys of other engines stay as they were."""
        found = super().as_dict()
        return found if self.quantize != NONE else {name: found[name] for name in found if name != QUANTIZE}
