"""A device and a vendor without a GPU: everything of the TensorRT executor but the vendor's own code runs on them.

    NullDevice      `Device` in host memory
    null_vendor     the part of TensorRT's Python API that the executor uses; engines compute with ONNX Runtime
    write_engine    an engine file of this vendor: a description of the graph and the path of its ONNX file

They are as unhelpful as the real ones may be. New memory is 0xFF, which is NaN; freed memory is gone. What is enqueued
runs when somebody waits, on what the memory holds then. A graph keeps the addresses and shapes of its capture; during
it nobody may wait, launch a graph or capture another. A thread must take the device before it uses it. A context that
lacks memory, a shape or an address refuses; one that shares its activations with others finds them overwritten.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lemica_trt.backends.base import NUMPY_DTYPES
from lemica_trt.backends.onnxruntime.build import open_session
from lemica_trt.backends.onnxruntime.options import OrtOptions
from lemica_trt.backends.tensorrt.device import ALIGNMENT, Host, Memory, MemoryInfo, OutOfMemory
from lemica_trt.core.errors import EngineError, LemicaError
from lemica_trt.core.values import Value, write_value
from lemica_trt.ir.graphs import GraphSpec, TensorSpec

VERSION = "1.0.0"
"""Of the vendor."""

# ---------------------------------------------------------------- device


class NullMemory:
    """Bytes at an invented address."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.array: npt.NDArray[np.uint8] = np.full(size, 0xFF, np.uint8)


class NullHost:
    """Bytes."""

    def __init__(self, size: int) -> None:
        self.array: npt.NDArray[np.uint8] = np.full(size, 0xFF, np.uint8)


class NullEvent:
    """A number of operations that were enqueued before it."""

    def __init__(self, device: NullDevice, position: int) -> None:
        self._device = device
        self._position = position

    def wait(self) -> None:
        self._device.require_no_capture("wait for an event")
        self._device.advance(self._position)


class NullGraph:
    """Captured operations."""

    def __init__(self, device: NullDevice, operations: list[Callable[[], None]]) -> None:
        self._device = device
        self._operations = operations

    def launch(self) -> None:
        self._device.check_thread()
        self._device.require_no_capture("launch a graph")
        self._device.log.append(f"launch {len(self._operations)}")
        self._device.pending += self._operations


class NullDevice:
    """`Device` in host memory.

    Args:
        compute_capability, driver: see `Device`.
        memory: bytes of device memory.

    Attributes:
        log: what was done, in order: `allocate 256`, `copy_in 256`, `execute full`, `capture 2`, `launch 2`, …
        pending: operations that were enqueued and have not run.
    """

    name = "null"
    stream = 1

    def __init__(
        self, *, compute_capability: tuple[int, int] = (8, 9), driver: tuple[int, int] = (13, 0), memory: int = 1 << 30
    ) -> None:
        self.compute_capability = compute_capability
        self.driver = driver
        self.log: list[str] = []
        self.pending: list[Callable[[], None]] = []
        self._total = memory
        self._memories: weakref.WeakValueDictionary[int, NullMemory] = weakref.WeakValueDictionary()
        self._addresses = itertools.count(ALIGNMENT, 1 << 32)
        self._threads: set[int] = set()
        self._capturing: list[Callable[[], None]] | None = None
        self._done = 0

    def use(self) -> None:
        self._threads.add(threading.get_ident())

    def check_thread(self) -> None:
        """Raise EngineError unless the thread has called `use`."""
        if threading.get_ident() not in self._threads:
            raise EngineError("no device is current in this thread")

    def allocate(self, size: int) -> NullMemory:
        self.check_thread()
        if size > self.memory_info().free:
            raise OutOfMemory(f"cannot allocate {size} bytes")
        self.log.append(f"allocate {size}")
        memory = NullMemory(next(self._addresses), size)
        self._memories[memory.address] = memory
        return memory

    def host(self, size: int) -> NullHost:
        self.check_thread()
        return NullHost(size)

    def copy_in(self, host: Host, memory: Memory, size: int) -> None:
        address, source = memory.address, host.array

        def copy() -> None:
            self.resolve(address, size)[...] = source[:size]

        self.enqueue(f"copy_in {size}", copy)

    def copy_out(self, memory: Memory, host: Host, size: int) -> None:
        address, destination = memory.address, host.array

        def copy() -> None:
            destination[:size] = self.resolve(address, size)

        self.enqueue(f"copy_out {size}", copy)

    def record(self) -> NullEvent:
        self.check_thread()
        return NullEvent(self, self._done + len(self.pending))

    def capture(self, enqueue: Callable[[], Any]) -> NullGraph:
        self.check_thread()
        self.require_no_capture("capture again")
        self._capturing = []
        try:
            enqueue()
            operations = self._capturing
        finally:
            self._capturing = None
        self.log.append(f"capture {len(operations)}")
        return NullGraph(self, operations)

    def memory_info(self) -> MemoryInfo:
        return MemoryInfo(self._total - sum(memory.size for memory in self._memories.values()), self._total)

    def synchronize(self) -> None:
        self.check_thread()
        self.require_no_capture("synchronize")
        self.log.append("synchronize")
        self.advance(self._done + len(self.pending))

    # ------------------------------------------------------------ for the vendor

    def enqueue(self, what: str, operation: Callable[[], None]) -> None:
        """Put an operation into the stream, or into the graph that is being captured."""
        self.check_thread()
        if self._capturing is None:
            self.log.append(what)
            self.pending.append(operation)
        else:
            self._capturing.append(operation)

    def require_no_capture(self, what: str) -> None:
        """Raise EngineError while the stream is captured: a driver ends the capture there."""
        if self._capturing is not None:
            raise EngineError(f"cannot {what} while the stream is captured")

    def resolve(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        """The bytes at an address; EngineError: not so many were allocated there."""
        memory = self._memories.get(address)
        if memory is None or memory.size < size:
            raise EngineError(f"illegal access to {size} bytes at {address:#x}")
        return memory.array[:size]

    def advance(self, position: int) -> None:
        """Run the stream up to a position; what fails takes everything behind it along."""
        while self._done < position and self.pending:
            operation = self.pending.pop(0)
            self._done += 1
            try:
                operation()
            except LemicaError:
                self._done += len(self.pending)
                self.pending.clear()
                raise


# ---------------------------------------------------------------- engine files


class NullPlan(Value, frozen=True):
    """What an engine file of the null vendor holds.

    Attributes:
        graph: what it computes.
        onnx: path of the ONNX file that computes it.
        profiles: optimisation profiles: smallest and largest size of each symbolic dimension.
        activations: bytes that a context needs.
        targets: compute capabilities that it is valid on; none: all.
        streamed: bytes of weights that are streamed to the device.
    """

    graph: GraphSpec
    onnx: str
    profiles: tuple[dict[str, tuple[int, int]], ...] = ({},)
    activations: int = 4096
    targets: tuple[tuple[int, int], ...] = ()
    streamed: int = 0


def write_engine(plan: NullPlan, path: Path) -> None:
    """Write an engine file."""
    write_value(plan, path)


# ---------------------------------------------------------------- vendor


class DataType(Enum):
    """Of a tensor."""

    FLOAT = "fp32"
    HALF = "fp16"
    BF16 = "bf16"
    INT32 = "int32"
    INT64 = "int64"
    UINT8 = "uint8"


class TensorIOMode(Enum):
    """Of a tensor."""

    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    """Of a tensor."""

    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(Enum):
    """Who gives a context its memory."""

    STATIC = 0
    USER_MANAGED = 2


class EngineValidity(Enum):
    """What RTX thinks of an engine file."""

    VALID = 0
    INVALID = 2


class EngineInvalidityDiagnostics(Enum):
    """Bits of the reason."""

    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class CudaGraphStrategy(Enum):
    """Whether RTX captures by itself."""

    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(Enum):
    """When RTX compiles kernels for the shapes at hand."""

    LAZY = 0
    EAGER = 1


class ILogger:
    """Base of loggers."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2

    def log(self, severity: Any, msg: str) -> None:
        """Take a message."""


class IRuntimeCache:
    """The roles of the contexts that have run with it."""

    def __init__(self) -> None:
        self.entries: set[str] = set()

    def serialize(self) -> bytes:
        return msgspec.json.encode(sorted(self.entries))

    def deserialize(self, blob: bytes) -> bool:
        try:
            self.entries |= msgspec.json.decode(blob, type=set[str])
        except msgspec.DecodeError:
            return False
        return True


class IRuntimeConfig:
    """How a context is made."""

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class IExecutionContext:
    """Shapes, addresses, and a place for activations."""

    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine = engine
        self._config = config
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {
            spec.name: tuple(n for n in spec.shape if isinstance(n, int))
            for spec in engine.plan.graph.inputs
            if not any(isinstance(n, str) for n in spec.shape)
        }
        self._addresses: dict[str, int] = {}
        self._block = (0, 0)
        self._ran = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None or any(spec.name == name for spec in self._engine.plan.graph.outputs):
            return self._refuse(f"set_input_shape {name}: no profile, or no input")
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(low) != len(shape) or not all(a <= size <= b for a, size, b in zip(low, shape, high)):
            return self._refuse(f"set_input_shape {name}: {shape} is not within {low} … {high}")
        self._shapes[name] = tuple(shape)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._block = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine.tensors or memory % ALIGNMENT:
            return self._refuse(f"set_tensor_address {name}: {memory:#x}")
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._ran and stream == self._engine.device.stream

    def execute_async_v3(self, stream_handle: int) -> bool:
        plan, device = self._engine.plan, self._engine.device
        missing = self._engine.tensors.keys() - self._addresses.keys()
        missing |= {spec.name for spec in plan.graph.inputs} - self._shapes.keys()
        if missing or stream_handle != device.stream:
            return self._refuse(f"execute_async_v3 without {', '.join(sorted(missing))}")
        if self._config.strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            return self._refuse("execute_async_v3: this device has no memory of its own for contexts")
        if self._block[1] < plan.activations:
            return self._refuse(f"execute_async_v3: {self._block[1]} of {plan.activations} bytes for activations")
        addresses, shapes, (block, _) = dict(self._addresses), dict(self._shapes), self._block
        device.enqueue(f"execute {plan.graph.role}", lambda: self._engine.compute(addresses, shapes, block))
        self._ran = True
        if self._config.cache is not None:
            self._config.cache.entries.add(plan.graph.role)
        return True

    def _refuse(self, why: str) -> bool:
        self._engine.logger.log(ILogger.ERROR, why)
        return False


class ICudaEngine:
    """A graph, computed by ONNX Runtime."""

    def __init__(self, plan: NullPlan, device: NullDevice, logger: ILogger) -> None:
        self.plan = plan
        self.device = device
        self.logger = logger
        graph = plan.graph
        self.tensors: dict[str, TensorSpec] = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}
        self._session = open_session(graph, Path(plan.onnx), OrtOptions(threads=1))
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(plan.profiles)
        self.device_memory_size_v2 = plan.activations
        self.streamable_weights_size = plan.streamed
        self.weight_streaming_budget_v2 = 0 if plan.streamed else -1  # nobody may ask where nothing is streamed

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self.tensors[name] in self.plan.graph.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.tensors[name].dtype)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(n if isinstance(n, int) else -1 for n in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        sizes = self.plan.profiles[profile_index]
        shape = self.tensors[name].shape
        low = tuple(n if isinstance(n, int) else sizes[n][0] for n in shape)
        high = tuple(n if isinstance(n, int) else sizes[n][1] for n in shape)
        return [low, high, high]

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.plan.streamed // 2

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:
        return IExecutionContext(self, runtime_config)

    def compute(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], block: int) -> None:
        """Read the inputs, overwrite the activations, write the outputs."""
        graph = self.plan.graph

        def at(spec: TensorSpec, shape: tuple[int, ...]) -> Any:
            kind = np.dtype(NUMPY_DTYPES[spec.dtype])
            size = int(np.prod(shape)) * kind.itemsize
            return self.device.resolve(addresses[spec.name], size).view(kind).reshape(shape)

        inputs = {spec.name: at(spec, shapes[spec.name]) for spec in graph.inputs}
        results = self._session.run([spec.name for spec in graph.outputs], inputs)
        self.device.resolve(block, self.plan.activations)[...] = 0xFF
        for spec, result in zip(graph.outputs, results):
            at(spec, result.shape)[...] = result


class Runtime:
    """Loads engine files; see `null_vendor`."""

    device: NullDevice

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.engine_host_code_allowed = True  # the executor must not leave it so

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        try:
            plan = msgspec.json.decode(buffer, type=NullPlan)
        except msgspec.DecodeError:
            return EngineValidity.INVALID, EngineInvalidityDiagnostics.MALFORMED_ENGINE.value
        if plan.targets and self.device.compute_capability not in plan.targets:
            return EngineValidity.INVALID, EngineInvalidityDiagnostics.UNSUPPORTED_CC.value
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if self.engine_host_code_allowed:
            raise AssertionError("code of an engine would run on the host")
        try:
            plan = msgspec.json.decode(serialized_engine, type=NullPlan)
            return ICudaEngine(plan, self.device, self._logger)
        except (msgspec.DecodeError, LemicaError) as error:
            self._logger.log(ILogger.ERROR, f"deserialize_cuda_engine: {error}")
            return None


def null_vendor(device: NullDevice) -> Any:
    """What `import tensorrt_rtx` gives, as far as the executor uses it, on this device."""
    return SimpleNamespace(
        __version__=VERSION,
        Runtime=type("Runtime", (Runtime,), {"device": device}),
        ILogger=ILogger,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        EngineValidity=EngineValidity,
        EngineInvalidityDiagnostics=EngineInvalidityDiagnostics,
        CudaGraphStrategy=CudaGraphStrategy,
        DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy,
    )
