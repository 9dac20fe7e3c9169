"""The backend interface on TensorRT and TensorRT for RTX: no torch, numpy in and out.

All engines of a backend work on one stream and take turns in one block of activations: every execution context is
`USER_MANAGED` and gets the same address. A context belongs to the shapes that it runs – it never changes them, because
graphs that were captured from it would break – and to the first optimisation profile that holds them.

How a plan is launched is `Capture`:

    plan    calls that `join` puts in a row are captured as one CUDA graph: one launch, nothing between
    step    each call is a graph of its own, so that the host may look and stop between two
    none    each call is enqueued kernel by kernel

A context's first run is never captured: then kernels are loaded, with RTX also compiled. What RTX compiled is kept in
a folder and read the next time.

An engine is executable code. It is loaded only if its key fits this machine – vendor, version, compute capability,
driver –, with RTX also only if `get_engine_validity` does not refuse it, and code for the host in it is never run.
"""

from __future__ import annotations

import hashlib
import importlib
import mmap
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

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
)
from lemica_trt.backends.options import options_from_key
from lemica_trt.backends.tensorrt.device import ALIGNMENT, Device, Graph, Host, Memory, OutOfMemory, capability_text
from lemica_trt.backends.tensorrt.options import TensorRTOptions
from lemica_trt.backends.tensorrt.vendor import DTYPES, LEAN_MODULE, RTX, VENDORS
from lemica_trt.core.errors import EngineError, MissingDependencyError, UnsupportedError
from lemica_trt.core.files import mapped
from lemica_trt.core.text import first_line
from lemica_trt.core.values import write_bytes
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.graphs import GraphSpec, TensorDType

if TYPE_CHECKING:
    import tensorrt
    import tensorrt_rtx

DIGEST_BYTES = 32
"""Of the SHA-256 before a runtime cache."""

Shapes = tuple[tuple[int, ...], ...]
"""Of an engine's inputs, in graph order."""


def open_backend(key: EngineKey, settings: Settings) -> TensorRTBackend:
    """See `backends.base.open_backend`."""
    from lemica_trt.backends.tensorrt.cuda import CudaDevice

    trt = import_vendor(key, settings)  # before the device: this much is known without one
    return TensorRTBackend(trt, CudaDevice(settings.device), key, settings)


def import_vendor(key: EngineKey, settings: Settings) -> Any:
    """The vendor's module, at the version that built the engines.

    Version-compatible engines also run on TensorRT's lean runtime, which is small and lies beside a TensorRT of any
    version. It must be the builder's too: later ones would run by code that an engine carries along, ours carry none
    (`IRuntime::loadRuntime` in NvInferRuntime.h).

    Raises:
        MissingDependencyError: it is not installed, or its libraries do not load.
        UnsupportedError: only other versions are here; with what to install, or the command that rebuilds.
    """
    options = options_from_key(key)
    compatible = isinstance(options, TensorRTOptions) and options.version_compatible
    packages = [VENDORS[key.backend].module, *([LEAN_MODULE] if compatible else [])]
    here, failed = [], []
    for package in packages:
        try:
            trt = importlib.import_module(package)
        except (ImportError, OSError) as error:
            failed.append(first_line(error))
            continue
        if trt.__version__ == key.version:
            return trt
        here.append(f"{package} {trt.__version__}")
    install = f"pip install {packages[-1].replace('_', '-')}=={key.version}"
    if here:
        fix = f"{install}, or {settings.rebuild()}" if compatible else settings.rebuild()
        raise _built_for(f"{key.backend} {key.version}", " and ".join(here), fix)
    raise MissingDependencyError(
        f"engines for {key.backend} need the package {' or '.join(packages)}, got: {'; '.join(failed)}", fix=install
    )


def require_machine(device: Device, key: EngineKey, settings: Settings) -> None:
    """Raise UnsupportedError, with the command that rebuilds, unless the engines are meant for this GPU and driver.

    What RTX engines run on is not compared: `get_engine_validity` knows it of each.
    """
    if key.backend != RTX and not _meant_for(key.target, device.compute_capability):
        here = f"{capability_text(device.compute_capability)} ({device.name})"
        raise _built_for(key.target, here, settings.rebuild())
    if key.driver is not None and device.driver < tuple(int(part) for part in key.driver.split(".")):
        here = f"one for CUDA {_dotted(device.driver)}"
        raise _built_for(f"a driver for CUDA {key.driver} or newer", here, settings.rebuild())


def _built_for(expected: str, got: str, fix: str) -> UnsupportedError:
    return UnsupportedError(f"the engines were built for {expected}, here is {got}", fix=fix)


def _meant_for(target: str, capability: tuple[int, int]) -> bool:
    """Whether `sm_89`, a list of such, or `sm_80+` (this one and later) names a device."""
    names = target.split(",")
    here = capability_text(capability)
    later = [name.removesuffix("+") for name in names if name.endswith("+")]
    return here in names or any(int(here.removeprefix("sm_")) >= int(name.removeprefix("sm_")) for name in later)


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(str(number) for number in numbers)


class DeviceBuffer:
    """Memory on the device; other libraries see it through `__cuda_array_interface__`, version 3, without a copy.

    There bf16 is uint16, as in `NUMPY_DTYPES`: no such type string exists for it.
    """

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: TensorDType, stream: int) -> None:
        self.memory = memory
        self.shape = shape
        self.dtype = dtype
        self._stream = stream

    @property
    def address(self) -> int:
        """On the device."""
        return self.memory.address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": np.dtype(NUMPY_DTYPES[self.dtype]).str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": self._stream,
        }


class Context:
    """An execution context for inputs of fixed shapes.

    Attributes:
        cache: where what it compiles is kept; None: nowhere.
        warm: it has run once.
    """

    def __init__(
        self, context: tensorrt.IExecutionContext, engine: tensorrt.ICudaEngine, role: str, cache: RuntimeCache | None
    ) -> None:
        self.context: tensorrt.IExecutionContext = context
        self.engine: tensorrt.ICudaEngine = engine
        self.role = role
        self.cache = cache
        self.warm = False


class TensorRTEngine:
    """A deserialized engine; its calls run on the backend that loaded it."""

    def __init__(
        self, backend: TensorRTBackend, graph: GraphSpec, engine: tensorrt.ICudaEngine, cache: RuntimeCache | None
    ) -> None:
        self._backend = backend
        self._graph = graph
        self._engine = engine
        self._cache = cache
        self._contexts: dict[Shapes, Context] = {}

    def bind(self, buffers: Mapping[str, Buffer], *, once: bool = False) -> TensorRTCall:
        check_binding(self._graph, buffers)
        shapes = tuple(buffers[tensor.name].shape for tensor in self._graph.inputs)
        if shapes not in self._contexts:
            self._contexts[shapes] = self._backend.make_context(self._engine, self._graph, shapes, self._cache)
        bound = {name: cast(DeviceBuffer, buffer) for name, buffer in buffers.items()}
        return TensorRTCall(self._backend, (Binding(self._contexts[shapes], bound),), capture=not once)


class Binding(NamedTuple):
    """A context, and a buffer for each of its tensors; no vendor holds them."""

    context: Context
    buffers: Mapping[str, DeviceBuffer]


class TensorRTCall:
    """Bindings that run one after the other: enqueued at first, captured as one graph when their contexts have run,
    and launched from then on; captured again when the block of activations has moved."""

    def __init__(self, backend: TensorRTBackend, bindings: Sequence[Binding], *, capture: bool = True) -> None:
        self.bindings = tuple(bindings)
        self._backend = backend
        self._capture = capture and backend.capture != "none"
        self._graph: Graph | None = None
        self._moves = 0
        """Of the activations, when the graph was captured."""

    def run(self) -> None:
        backend = self._backend
        backend.device.use()
        if self._capture and (self._graph is None or self._moves != backend.moves):
            self._graph = None
            if all(backend.capturable(binding.context) for binding in self.bindings):
                self._graph = backend.device.capture(self._enqueue)
                self._moves = backend.moves
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch()

    def _enqueue(self) -> None:
        for binding in self.bindings:
            self._backend.enqueue(binding)


class RuntimeCache:
    """What RTX compiled for this GPU from one engine: read when the engine is loaded, written when there is more.

    It is an aid: one that is missing, damaged (a digest lies before it) or of another machine (RTX says so) is made
    anew, and a folder that cannot be written is none.
    """

    def __init__(self, config: tensorrt_rtx.IRuntimeConfig, file: Path) -> None:
        self.config: tensorrt_rtx.IRuntimeConfig = config
        self._file = file
        self._cache: tensorrt_rtx.IRuntimeCache = self.config.create_runtime_cache()
        self._written = b""
        with suppress(OSError):
            content = file.read_bytes()
            digest, blob = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
            if hashlib.sha256(blob).digest() == digest and self._cache.deserialize(blob):
                self._written = digest
        self.config.set_runtime_cache(self._cache)

    def write(self) -> None:
        """Write it, if it has changed."""
        serialized: tensorrt_rtx.IHostMemory | None = self._cache.serialize()
        if serialized is None:
            return
        blob = bytes(serialized)
        digest = hashlib.sha256(blob).digest()
        if digest != self._written:
            with suppress(OSError):
                write_bytes(digest + blob, self._file)
                self._written = digest


class TensorRTBackend:
    """TensorRT or TensorRT for RTX on one device.

    Args:
        trt: the vendor's module.
        device: where it runs.
        key: of the engines that will be loaded.
        settings: see there.

    Raises:
        UnsupportedError: engines of this key are not for this machine.
    """

    def __init__(self, trt: Any, device: Device, key: EngineKey, settings: Settings) -> None:
        device.use()
        require_machine(device, key, settings)
        self._trt = trt
        self.device = device
        self.capture = settings.capture
        self._key = key
        self._settings = settings
        self._errors: list[str] = []
        self._logger = _logger(trt, self._errors)
        self._runtime: tensorrt.Runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = False
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._activations: Memory | None = None
        self.moves = 0
        """How often the block of activations has been replaced: graphs captured before hold the old address."""
        self._staging: Host | None = None
        self._staged: Any = None  # the event behind the last copy from `_staging`

    def empty(self, shape: tuple[int, ...], dtype: TensorDType) -> DeviceBuffer:
        self.device.use()
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
        memory = self._allocate(max(size, 1), f"{dtype} {list(shape)}")
        return DeviceBuffer(memory, shape, dtype, self.device.stream)

    def upload(self, array: Array, buffer: Buffer) -> None:
        check_upload(array, buffer)
        self.device.use()
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        staging = self._host(data.size)
        staging.array[: data.size] = data
        self.device.copy_in(staging, cast(DeviceBuffer, buffer).memory, data.size)
        self._staged = self.device.record()

    def download(self, buffer: Buffer) -> Array:
        self.device.use()
        memory = cast(DeviceBuffer, buffer).memory
        array = np.empty(buffer.shape, NUMPY_DTYPES[buffer.dtype])
        staging = self._host(array.nbytes)
        self.device.copy_out(memory, staging, array.nbytes)
        self.device.synchronize()
        array.reshape(-1).view(np.uint8)[...] = staging.array[: array.nbytes]
        return array

    def load(self, graph: GraphSpec, path: Path) -> TensorRTEngine:
        self.device.use()
        with mapped(path) as data:
            self._require_valid(data, path)
            self._errors.clear()
            engine: tensorrt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self.failure(f"{path.name} does not load", fix=self._settings.rebuild())
        self._require_interface(engine, graph, path)
        if engine.streamable_weights_size:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return TensorRTEngine(self, graph, engine, self._runtime_cache(engine, path))

    def join(self, calls: Sequence[Call]) -> Call:
        if self.capture != "plan":
            return InOrder(calls)
        return TensorRTCall(self, [binding for call in calls for binding in cast(TensorRTCall, call).bindings])

    def synchronize(self) -> None:
        self.device.use()
        self.device.synchronize()

    def device_memory(self) -> int:
        self.device.use()
        free, total = self.device.memory_info()
        return total - free

    def make_context(
        self, engine: tensorrt.ICudaEngine, graph: GraphSpec, shapes: Shapes, cache: RuntimeCache | None
    ) -> Context:
        """A context for these shapes, in the block of activations.

        Raises:
            EngineError: no optimisation profile has them, or there is no memory.
        """
        self.device.use()
        self._errors.clear()
        profile = _profile(engine, graph, shapes, self._settings.rebuild)
        self._reserve(engine.device_memory_size_v2)
        config = cache.config if cache is not None else self._config(engine)
        context: tensorrt.IExecutionContext | None = engine.create_execution_context(config)
        if context is None:
            raise self.failure(f"no execution context for the {graph.role} engine")
        if not context.set_optimization_profile_async(profile, self.device.stream):
            raise self.failure(f"the {graph.role} engine does not take its optimisation profile {profile}")
        for tensor, shape in zip(graph.inputs, shapes):
            if not context.set_input_shape(tensor.name, shape):
                raise self.failure(f"the {graph.role} engine does not take {tensor.name} {list(shape)}")
        made = Context(context, engine, graph.role, cache)
        self._contexts.add(made)
        self._place(made)
        return made

    def enqueue(self, binding: Binding) -> None:
        """Set the addresses and enqueue the engine's kernels.

        Raises:
            EngineError: the vendor refuses.
        """
        made = binding.context
        context: tensorrt.IExecutionContext = made.context
        self._errors.clear()
        for name, buffer in binding.buffers.items():
            if not context.set_tensor_address(name, buffer.address):
                raise self.failure(f"the {made.role} engine takes no address for {name}")
        if not context.execute_async_v3(self.device.stream):
            raise self.failure(f"the {made.role} engine failed")
        if not made.warm:
            made.warm = True
            if made.cache is not None:
                made.cache.write()

    def capturable(self, made: Context) -> bool:
        """Whether what a context does can be captured: it has run, its weights are not streamed, and RTX agrees."""
        engine = made.engine
        # Engines that were not built for streaming have nothing to stream, and are not asked for a budget.
        streamed = engine.streamable_weights_size
        if not made.warm or (streamed and engine.weight_streaming_budget_v2 < streamed):
            return False
        if self._key.backend != RTX:
            return True
        context: tensorrt_rtx.IExecutionContext = made.context
        return bool(context.is_stream_capturable(self.device.stream))

    def failure(self, what: str, *, fix: str | None = None) -> EngineError:
        """An error with the first line that the vendor has logged since the last one."""
        reason = self._errors[0] if self._errors else "no reason was given"
        self._errors.clear()
        return EngineError(f"{self._key.backend}: {what}: {reason}", fix=fix)

    # ------------------------------------------------------------ loading

    def _require_valid(self, data: mmap.mmap | bytes, path: Path) -> None:
        """Ask RTX whether an engine is for this machine; the other vendor cannot be asked."""
        if self._key.backend != RTX:
            return
        trt = self._trt
        runtime: tensorrt_rtx.Runtime = self._runtime
        validity, diagnostics = runtime.get_engine_validity(data)
        if validity == trt.EngineValidity.INVALID:
            reasons = [
                name for name, member in trt.EngineInvalidityDiagnostics.__members__.items()
                if int(diagnostics) & member.value
            ]  # fmt: skip
            device = f"{self.device.name}, {capability_text(self.device.compute_capability)}"
            kind = EngineError if "MALFORMED_ENGINE" in reasons else UnsupportedError
            raise kind(
                f"{path.name} is not valid here ({device}, CUDA {_dotted(self.device.driver)}): "
                f"{', '.join(reasons) or 'no reason was given'}",
                fix=self._settings.rebuild(),
            )

    def _require_interface(self, engine: tensorrt.ICudaEngine, graph: GraphSpec, path: Path) -> None:
        """Raise EngineError unless the engine has the graph's tensors, in device memory."""
        trt = self._trt
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            found[name] = (
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                DTYPES.get(engine.get_tensor_dtype(name).name),
                tuple(engine.get_tensor_shape(name)),
            )
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise EngineError(f"{path.name} takes {name} in host memory", fix=self._settings.rebuild())
        expected = {
            tensor.name: (is_input, tensor.dtype, tuple(-1 if isinstance(n, str) else n for n in tensor.shape))
            for is_input, tensors in ((True, graph.inputs), (False, graph.outputs))
            for tensor in tensors
        }
        different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if different:
            raise EngineError(
                f"{path.name} is not the {graph.role} graph described: expected {different[0]} to be "
                f"{_describe(expected.get(different[0]))}, got {_describe(found.get(different[0]))}",
                fix=self._settings.rebuild(),
            )

    def _runtime_cache(self, engine: tensorrt.ICudaEngine, path: Path) -> RuntimeCache | None:
        if self._key.backend != RTX or self._settings.cache is None:
            return None
        name = f"{path.stem}-{capability_text(self.device.compute_capability)}.bin"
        return RuntimeCache(self._config(engine), self._settings.cache / path.parent.name / name)

    def _config(self, engine: tensorrt.ICudaEngine) -> Any:
        """How contexts of an engine are made: we give the memory, we capture, kernels are for the shapes at hand."""
        trt = self._trt
        config: tensorrt.IRuntimeConfig = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._key.backend == RTX:
            rtx_config: tensorrt_rtx.IRuntimeConfig = config
            rtx_config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            rtx_config.dynamic_shapes_kernel_specialization_strategy = eager
        return config

    # ------------------------------------------------------------ memory

    def _reserve(self, size: int) -> None:
        """Make the block of activations at least so large, and tell the contexts where it is now."""
        if self._activations is None or self._activations.size < size:
            block = self._allocate(max(size, ALIGNMENT), "activations")
            self.device.synchronize()  # the old one may be in use
            self._activations = block
            self.moves += 1
            for made in self._contexts:
                self._place(made)

    def _place(self, made: Context) -> None:
        context: tensorrt.IExecutionContext = made.context
        block = cast(Memory, self._activations)
        context.set_device_memory(block.address, block.size)

    def _allocate(self, size: int, what: str) -> Memory:
        try:
            return self.device.allocate(size)
        except OutOfMemory:
            free, total = self.device.memory_info()
            raise EngineError(
                f"not enough device memory: expected {_gib(size)} for {what}, got {_gib(free)} free of {_gib(total)}",
                fix="end other programs on the GPU, or rebuild with a smaller --max-batch or with --weight-streaming",
            ) from None

    def _host(self, size: int) -> Host:
        """The staging memory, at least so large and not in use."""
        if self._staged is not None:
            self._staged.wait()
            self._staged = None
        if self._staging is None or self._staging.array.size < size:
            self._staging = self.device.host(max(size, ALIGNMENT))
        return self._staging


def _profile(engine: tensorrt.ICudaEngine, graph: GraphSpec, shapes: Shapes, rebuild: Callable[[], str]) -> int:
    """The first optimisation profile that holds the shapes; 0 for a graph without free dimensions."""
    free = {
        tensor.name: shape
        for tensor, shape in zip(graph.inputs, shapes)
        if any(isinstance(size, str) for size in tensor.shape)
    }
    offered = []
    for profile in range(engine.num_optimization_profiles):
        limits = {name: engine.get_tensor_profile_shape(name, profile) for name in free}
        if all(
            low <= size <= high
            for name, shape in free.items()
            for low, size, high in zip(limits[name][0], shape, limits[name][2])
        ):
            return profile
        offered += [f"{list(low)} … {list(high)}" for low, _, high in list(limits.values())[:1]]
    name, shape = next(iter(free.items()))
    raise EngineError(
        f"the {graph.role} engine was built for {name} {' or '.join(offered)}, got {list(shape)}", fix=rebuild()
    )


def _logger(trt: Any, errors: list[str]) -> Any:
    """A vendor's logger that keeps errors, each in one line, and drops the rest."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(" ".join(msg.split()))

    return Logger()


def _describe(tensor: tuple[bool, TensorDType | None, tuple[int, ...]] | None) -> str:
    """Whether it is an input, dtype, shape; −1 for a free dimension."""
    if tensor is None:
        return "absent"
    is_input, dtype, shape = tensor
    return f"{'input' if is_input else 'output'} {dtype} {list(shape)}"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
