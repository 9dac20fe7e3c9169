"""The backend interface on ONNX Runtime: CPU and CUDA execution providers.

Buffers are OrtValues on the device; a call is an IOBinding over them, so that nothing is copied or allocated between
rows. `run_with_iobinding` waits for its outputs, on CUDA too.
"""

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
    Change,
    InOrder,
    Settings,
    check_binding,
    check_upload,
    require_version,
)
from lemica_trt.backends.onnx_file import require_plain
from lemica_trt.backends.onnx_weights import changed_graph
from lemica_trt.backends.onnxruntime.attention import ATTENTION
from lemica_trt.backends.onnxruntime.build import OLDEST, PACKAGES, data_folder, import_onnxruntime, open_session
from lemica_trt.backends.onnxruntime.options import OrtOptions
from lemica_trt.backends.options import options_from_key
from lemica_trt.core.errors import EngineError, UnsupportedError
from lemica_trt.core.text import first_line
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.graphs import GraphSpec, TensorDType


def open_backend(key: EngineKey, settings: Settings) -> OrtBackend:
    """See `backends.base.open_backend`."""
    options = cast(OrtOptions, options_from_key(key, threads=settings.threads))
    if key.target != options.provider:
        raise UnsupportedError(
            f"expected engines for {options.provider}, which their options name, got some for {key.target!r}",
            fix="rebuild the bundle",
        )
    require_version(key, import_onnxruntime().__version__, OLDEST, PACKAGES.get(key.target))
    return OrtBackend(options, settings.device if options.provider == "cuda" else 0)


class OrtBuffer:
    """An OrtValue of fixed shape and dtype."""

    def __init__(self, value: Any, shape: tuple[int, ...], dtype: TensorDType) -> None:
        self.value = value
        self.shape = shape
        self.dtype = dtype


class OrtCall:
    """An IOBinding; holds its buffers, because ONNX Runtime does not."""

    def __init__(self, session: Any, binding: Any, role: str, buffers: Mapping[str, Buffer]) -> None:
        self._session = session
        self._binding = binding
        self._role = role
        self._buffers = dict(buffers)

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime raises many unrelated classes
            raise EngineError(f"ONNX Runtime failed in the {self._role} graph: {first_line(error)}") from None


class OrtEngine:
    """An InferenceSession; its `run` may be called by several threads.

    Args:
        weights: that it reads from the caller's memory.
    """

    def __init__(self, session: Any, graph: GraphSpec, weights: Mapping[str, Array] | None = None) -> None:
        self._session = session
        self._weights = weights
        self._graph = graph

    def bind(self, buffers: Mapping[str, Buffer], *, once: bool = False) -> OrtCall:
        check_binding(self._graph, buffers)
        binding = self._session.io_binding()
        for tensor in self._graph.inputs:
            binding.bind_ortvalue_input(tensor.name, cast(OrtBuffer, buffers[tensor.name]).value)
        for tensor in self._graph.outputs:
            binding.bind_ortvalue_output(tensor.name, cast(OrtBuffer, buffers[tensor.name]).value)
        return OrtCall(self._session, binding, self._graph.role, buffers)


class OrtBackend:
    """ONNX Runtime on one provider.

    Args:
        options: how graphs are loaded.
        device: of the provider; 0 on the CPU.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, options: OrtOptions, device: int = 0) -> None:
        self._ort = import_onnxruntime()
        self._options = options
        self._device = device

    def empty(self, shape: tuple[int, ...], dtype: TensorDType) -> OrtBuffer:
        if dtype == "bf16":
            raise UnsupportedError("ONNX Runtime does not run bf16 graphs", fix="build with dtype fp32 or fp16")
        make = self._ort.OrtValue.ortvalue_from_shape_and_type
        try:
            value = make(list(shape), NUMPY_DTYPES[dtype], self._options.provider, self._device)
        except Exception as error:  # onnxruntime raises many unrelated classes
            raise EngineError(f"cannot allocate {dtype} {list(shape)}: {first_line(error)}") from None
        return OrtBuffer(value, shape, dtype)

    def upload(self, array: Array, buffer: Buffer) -> None:
        check_upload(array, buffer)
        cast(OrtBuffer, buffer).value.update_inplace(np.ascontiguousarray(array))

    def download(self, buffer: Buffer) -> Array:
        return np.array(cast(OrtBuffer, buffer).value.numpy())

    def load(self, graph: GraphSpec, path: Path) -> OrtEngine:
        return OrtEngine(open_session(graph, path, self._options, self._device), graph)

    def load_changed(self, graph: GraphSpec, path: Path, changes: Mapping[str, Change]) -> OrtEngine:
        require_plain(graph, path, (ATTENTION,))
        changed = changed_graph(graph, path, data_folder(graph, path), changes)
        session = open_session(graph, path, self._options, self._device, changed=changed)
        return OrtEngine(session, graph, changed.external)

    def join(self, calls: Sequence[Call]) -> Call:
        return InOrder(calls)

    def synchronize(self) -> None:
        """Nothing: every call has waited already."""

    def device_memory(self) -> None:
        return None
