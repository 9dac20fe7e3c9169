"""`Device` on CUDA, by cuda-core (github.com/NVIDIA/cuda-python): streams, memory, graphs; imported when one is opened.

Importing cuda-core needs no driver; opening a device does.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from lemica_trt.backends.tensorrt.device import Host, Memory, MemoryInfo, OutOfMemory
from lemica_trt.core.errors import EngineError, MissingDependencyError
from lemica_trt.core.text import first_line

_NO_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"


class CudaMemory:
    """A cuda-core Buffer on the device."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.address = int(buffer.handle)
        self.size = int(buffer.size)


class CudaHost:
    """A cuda-core Buffer in page-locked host memory."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        pointer = ctypes.cast(int(buffer.handle), ctypes.POINTER(ctypes.c_uint8))
        self.array: npt.NDArray[np.uint8] = np.ctypeslib.as_array(pointer, (int(buffer.size),))


class CudaEvent:
    """A cuda-core Event."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        with _failing("the GPU failed"):
            self._event.sync()


class CudaGraph:
    """A cuda-core Graph."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._graph = graph
        self._stream = stream

    def launch(self) -> None:
        with _failing("a CUDA graph cannot be launched"):
            self._graph.launch(self._stream)


class CudaDevice:
    """One GPU and a stream of its own on it; see `device.Device`.

    Memory comes from the device's pool, ordered by a second stream, so that giving some back never becomes part of a
    graph that is being captured.

    Args:
        index: of the device, as CUDA counts the visible ones.

    Raises:
        MissingDependencyError: no cuda-core, no driver, or no such device.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            core = importlib.import_module("cuda.core")
            self._driver = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise MissingDependencyError(
                f"running TensorRT engines needs cuda-core and cuda-bindings, got: {error}",
                fix="pip install cuda-core cuda-bindings",
            ) from None
        try:
            self._device = core.Device(index)
            self._device.set_current()
            self._stream = self._device.create_stream()
            self._memory_stream = self._device.create_stream()
            self._pinned = core.LegacyPinnedMemoryResource()
            version = _result(self._driver.cuDriverGetVersion())
        except Exception as error:  # cuda-core raises unrelated classes: no driver, too old a driver, no device
            raise MissingDependencyError(
                f"expected an NVIDIA GPU {index} and its driver, got: {first_line(error)}",
                fix="check nvidia-smi; on a machine without a GPU run the bundle with --backend onnxruntime",
            ) from None
        self.name = str(self._device.name)
        capability = self._device.compute_capability
        self.compute_capability = (int(capability.major), int(capability.minor))
        self.driver = (version // 1000, version % 1000 // 10)
        self.stream = int(self._stream.handle)

    def use(self) -> None:
        self._device.set_current()

    def allocate(self, size: int) -> CudaMemory:
        with _failing(f"cannot allocate {size} bytes"):
            buffer = self._device.allocate(size, stream=self._memory_stream)
            self._memory_stream.sync()
        return CudaMemory(buffer)

    def host(self, size: int) -> CudaHost:
        with _failing(f"cannot allocate {size} bytes of page-locked host memory"):
            return CudaHost(self._pinned.allocate(size))

    def copy_in(self, host: Host, memory: Memory, size: int) -> None:
        self._copy(memory.address, host.array.ctypes.data, size)

    def copy_out(self, memory: Memory, host: Host, size: int) -> None:
        self._copy(host.array.ctypes.data, memory.address, size)

    def record(self) -> CudaEvent:
        with _failing("the GPU failed"):
            return CudaEvent(self._stream.record())

    def capture(self, enqueue: Callable[[], Any]) -> CudaGraph:
        with _failing("the work cannot be captured as a CUDA graph"):
            builder = self._stream.create_graph_builder().begin_building("relaxed")
            try:
                enqueue()
            except BaseException:  # Ctrl-C, too: a stream that goes on capturing takes no other work
                with suppress(Exception):  # cuda-core raises unrelated classes; the failure may have ended the capture
                    builder.end_building()
                raise
            graph = builder.end_building().complete()
            builder.close()
            graph.upload(self._stream)
        return CudaGraph(graph, self._stream)

    def memory_info(self) -> MemoryInfo:
        free, total = _result(self._driver.cuMemGetInfo())
        return MemoryInfo(int(free), int(total))

    def synchronize(self) -> None:
        with _failing("the GPU failed"):
            self._stream.sync()

    def _copy(self, destination: int, source: int, size: int) -> None:
        with _failing("a copy failed"):
            _result(self._driver.cuMemcpyAsync(destination, source, size, self._stream.handle))


def _result(answer: tuple[Any, ...]) -> Any:
    """What a function of cuda-bindings returned behind its error code: nothing, one value, or a tuple."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(error.name)
    return values[0] if len(values) == 1 else tuple(values)


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turn CUDA's errors into one line."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # cuda-core raises unrelated classes
        line = first_line(error)
        kind = OutOfMemory if _NO_MEMORY in line else EngineError
        raise kind(f"{what}: {line}") from None
