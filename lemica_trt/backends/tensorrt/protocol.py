"""What a build process is sent and what it answers: one line of JSON each. See `worker`."""

from __future__ import annotations

import re
from typing import Literal

from lemica_trt.backends.machine import Gpu
from lemica_trt.backends.tensorrt.options import RtxOptions, TensorRTOptions
from lemica_trt.backends.tensorrt.vendor import Module
from lemica_trt.core.values import Value
from lemica_trt.ir.engine import EngineBuild
from lemica_trt.ir.graphs import GraphSpec
from lemica_trt.ir.profile import DType

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|insufficient memory|cannot allocate", re.IGNORECASE)


def is_out_of_memory(text: str) -> bool:
    """Whether a library's message says that memory ran out."""
    return _OUT_OF_MEMORY.search(text) is not None


class Probe(Value, frozen=True, tag=True):
    """Asks what is here."""

    module: Module


class BuildJob(Value, frozen=True, tag=True):
    """Asks for one engine.

    Attributes:
        module: the vendor's.
        graph: what the ONNX file holds.
        dtype: of the DiT.
        max_batch: largest batch.
        options: of the vendor.
        onnx: the ONNX file.
        engine: the file to write.
        timing_cache: file to read and to write again; None: none.
    """

    module: Module
    graph: GraphSpec
    dtype: DType
    max_batch: int
    options: TensorRTOptions | RtxOptions
    onnx: str
    engine: str
    timing_cache: str | None


class ProbeResult(Value, frozen=True, tag=True):
    """Answer to `Probe`: the vendor's version, and the first GPU of this machine."""

    version: str
    gpu: Gpu | None


class Progress(Value, frozen=True, tag=True):
    """How much of the build is done, in percent."""

    percent: int


class Note(Value, frozen=True, tag=True):
    """Something worth a line."""

    text: str


class Built(Value, frozen=True, tag=True):
    """Answer to `BuildJob`: the file is written, and this is what it took."""

    build: EngineBuild


class Failed(Value, frozen=True, tag=True):
    """Answer to either: what went wrong, and of what kind it is.

    Attributes:
        kind: `import`: the module does not load. `memory`: there is not enough. `build`: anything else.
        what: one line.
    """

    kind: Literal["import", "memory", "build"]
    what: str


Event = ProbeResult | Progress | Note | Built | Failed


class WorkerError(Exception):
    """Ends the work with this answer; of kind `memory` if it says so."""

    def __init__(self, kind: Literal["import", "memory", "build"], what: str) -> None:
        self.answer = Failed(kind="memory" if is_out_of_memory(what) else kind, what=what)
