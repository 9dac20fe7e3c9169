"""The backend interface on OpenVINO: buffers are numpy arrays that it reads and writes in place; a call waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lemica_trt.backends.base import (
    NUMPY_DTYPES,
    Array,
    Buffer,
    Call,
    InOrder,
    Settings,
    check_binding,
    check_upload,
    require_version,
)
from lemica_trt.backends.openvino.build import OLDEST, compiled_model, import_openvino, no_bf16, openvino_version
from lemica_trt.backends.openvino.options import OpenVinoOptions
from lemica_trt.backends.options import options_from_key
from lemica_trt.core.errors import EngineError, UnsupportedError
from lemica_trt.core.text import first_line
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.graphs import GraphSpec, TensorDType


def open_backend(key: EngineKey, settings: Settings) -> OpenVinoBackend:
    """See `backends.base.open_backend`."""
    if key.target != "cpu":
        raise UnsupportedError(f"expected engines for cpu, got some for {key.target!r}", fix="rebuild the bundle")
    require_version(key, openvino_version(), OLDEST)
    return OpenVinoBackend(cast(OpenVinoOptions, options_from_key(key, threads=settings.threads)))


class OpenVinoBuffer:
    """An array, and OpenVINO's view of it."""

    def __init__(self, array: Array, tensor: Any, dtype: TensorDType) -> None:
        self.array = array
        self.tensor = tensor
        self.shape: tuple[int, ...] = array.shape
        self.dtype = dtype


class OpenVinoCall:
    """Buffers that the request of an engine is given anew at each run; other calls share it."""

    def __init__(self, request: Any, graph: GraphSpec, buffers: Mapping[str, Buffer]) -> None:
        self._request = request
        self._role = graph.role
        self._buffers = dict(buffers)  # holds the arrays
        tensors = {name: cast(OpenVinoBuffer, buffer).tensor for name, buffer in buffers.items()}
        self._inputs = {index: tensors[spec.name] for index, spec in enumerate(graph.inputs)}
        self._outputs = {index: tensors[spec.name] for index, spec in enumerate(graph.outputs)}

    def run(self) -> None:
        try:
            for index, tensor in self._inputs.items():
                self._request.set_input_tensor(index, tensor)
            for index, tensor in self._outputs.items():
                self._request.set_output_tensor(index, tensor)
            self._request.infer(share_outputs=True)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed in the {self._role} graph: {first_line(error)}") from None


class OpenVinoEngine:
    """A compiled model and its one request."""

    def __init__(self, model: Any, graph: GraphSpec) -> None:
        self._request = model.create_infer_request()
        self._graph = graph

    def bind(self, buffers: Mapping[str, Buffer], *, once: bool = False) -> OpenVinoCall:
        check_binding(self._graph, buffers)
        return OpenVinoCall(self._request, self._graph, buffers)


class OpenVinoBackend:
    """OpenVINO on the CPU.

    Args:
        options: how graphs are loaded.

    Raises:
        MissingDependencyError: openvino is not installed.
    """

    def __init__(self, options: OpenVinoOptions) -> None:
        self._openvino = import_openvino()
        self._options = options

    def empty(self, shape: tuple[int, ...], dtype: TensorDType) -> OpenVinoBuffer:
        if dtype == "bf16":
            raise no_bf16()
        try:
            array = np.empty(shape, NUMPY_DTYPES[dtype])
        except (MemoryError, ValueError) as error:
            raise EngineError(f"cannot allocate {dtype} {list(shape)}: {first_line(error)}") from None
        return OpenVinoBuffer(array, self._openvino.Tensor(array, shared_memory=True), dtype)

    def upload(self, array: Array, buffer: Buffer) -> None:
        check_upload(array, buffer)
        cast(OpenVinoBuffer, buffer).array[...] = array

    def download(self, buffer: Buffer) -> Array:
        return np.array(cast(OpenVinoBuffer, buffer).array)

    def load(self, graph: GraphSpec, path: Path) -> OpenVinoEngine:
        return OpenVinoEngine(compiled_model(graph, path, self._options), graph)

    def join(self, calls: Sequence[Call]) -> Call:
        return InOrder(calls)

    def synchronize(self) -> None:
        """Nothing: every call has waited already."""

    def device_memory(self) -> None:
        return None
