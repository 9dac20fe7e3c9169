"""The process that builds one TensorRT engine: ONNX file → engine file, then a look at what came out.

    python -m lemica_trt.backends.tensorrt.worker      `Job` or `Probe` as one line of JSON on standard input,
                                                       events as lines of JSON on standard output

A process of its own, because a build may run out of memory or crash, because only so its peak memory is its own, and
because it must be possible to end it at any moment. It ends when standard input is closed: no build outlives the
process that asked for it. Imports one vendor's module, no torch and no ONNX.

The look, in two parts. Before the build: inputs and outputs of the parsed network are those of the `GraphSpec`, and
the layers that compute (matrix products, convolutions, attention) of the DiT are mostly in the dtype asked for. After
it the same of the finished engine, and it computes in no dtype that its network does not: TensorRT's is loaded and
inspected on the GPU that it is for; that of TensorRT for RTX need not be for this machine, its file is read (see
`tensorrt_program`). A failure of either is an error, and the engine is not kept.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TextIO

import msgspec

from lemica_trt.backends.tensorrt.program import Layers, program_layers
from lemica_trt.core.files import mapped
from lemica_trt.core.values import Value, write_bytes
from lemica_trt.ir.engine import EngineBuild, Option
from lemica_trt.ir.graphs import GraphSpec, TensorSpec
from lemica_trt.ir.profile import DType

if TYPE_CHECKING:
    # The names of types: which vendor's module it is, `load_vendor` decides.
    import tensorrt
    import tensorrt_rtx

Module = Literal["tensorrt", "tensorrt_rtx"]

DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}
"""`DataType` member → our name."""

COMPUTING = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "ATTENTION_OUTPUT")
"""`LayerType`s that do a network's work."""

ATTENTION = ("SOFTMAX", "ATTENTION_OUTPUT")
"""`LayerType`s of which every attention has one: in parts (ONNX opset 20), or whole (opset 23)."""

POOLS = {"workspace": "WORKSPACE", "tacticSharedMem": "TACTIC_SHARED_MEMORY"}
"""trtexec's name of a memory pool → `MemoryPoolType` member."""

UNITS = {"": 1 << 20, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
"""Suffix of a size → bytes, as in trtexec; none: MiB."""

_ENGINE_DTYPES = {"Float": "fp32", "FP32": "fp32", "Half": "fp16", "FP16": "fp16", "BFloat16": "bf16", "BF16": "bf16"}
_ENGINE_COMPUTING = re.compile(r"gemm|gemv|matmul|matrixmultiply|conv|mha|attention", re.IGNORECASE)
_FUSED_ATTENTION = re.compile(r"_f?mha|flash_?att", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|insufficient memory|cannot allocate", re.IGNORECASE)
_PEAK = re.compile(r"Peak memory usage of TRT CPU/GPU memory allocators: CPU \d+ MiB, GPU (\d+) MiB")


class Probe(Value, frozen=True, tag=True):
    """Asks what is here."""

    module: Module


class Job(Value, frozen=True, tag=True):
    """Asks for one engine.

    Attributes:
        module: the vendor's.
        graph: what the ONNX file holds.
        dtype: of the DiT.
        max_batch: largest batch.
        options: all of the vendor's options.
        onnx: the ONNX file.
        engine: the file to write.
        timing_cache: file to read and to write again; None: none.
    """

    module: Module
    graph: GraphSpec
    dtype: DType
    max_batch: int
    options: dict[str, Option]
    onnx: str
    engine: str
    timing_cache: str | None


class Device(Value, frozen=True):
    """A GPU: product name, compute capability (`8.9`), highest CUDA version of its driver (`13.0`)."""

    name: str
    compute_capability: str
    driver: str


class Found(Value, frozen=True, tag=True):
    """Answer to `Probe`: the vendor's version, and the first GPU."""

    version: str
    device: Device | None


class Progress(Value, frozen=True, tag=True):
    """How much of the build is done, in percent."""

    percent: int


class Note(Value, frozen=True, tag=True):
    """Something worth a line."""

    text: str


class Built(Value, frozen=True, tag=True):
    """Answer to `Job`: the file is written, and this is what it took."""

    build: EngineBuild


class Failed(Value, frozen=True, tag=True):
    """Answer to either: what went wrong, and of what kind it is.

    Attributes:
        kind: `import`: the module does not load. `memory`: there is not enough. `build`: anything else.
        what: one line.
    """

    kind: Literal["import", "memory", "build"]
    what: str


Event = Found | Progress | Note | Built | Failed


class WorkerError(Exception):
    """Ends the work with this answer; of kind `memory` if it says so."""

    def __init__(self, kind: Literal["import", "memory", "build"], what: str) -> None:
        self.answer = Failed(kind="memory" if _OUT_OF_MEMORY.search(what) else kind, what=what)


def load_vendor(name: Module) -> Any:
    """The vendor's module.

    Raises:
        WorkerError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # a missing shared library is either
        raise WorkerError("import", str(error).strip().splitlines()[0]) from None


def cuda_device() -> Device | None:
    """The first GPU, asked of the driver itself; None without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, version, major, minor = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    major_attribute, minor_attribute = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
    answers = (
        cuda.cuInit(0),
        cuda.cuDriverGetVersion(ctypes.byref(version)),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device),
    )
    if any(answers):
        return None
    return Device(
        name=name.value.decode(),
        compute_capability=f"{major.value}.{minor.value}",
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def pool_sizes(text: str) -> dict[str, int]:
    """`workspace:4G,tacticSharedMem:48K` → bytes by pool; nothing for an empty text. Sizes as in trtexec.

    Raises:
        ValueError: it is not of this form.
    """
    sizes = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)([BKMG]?)", part)
        if match is None or match[1] not in POOLS:
            raise ValueError(f"expected POOL:SIZE[B|K|M|G] with POOL one of {', '.join(POOLS)}, got {part!r}")
        sizes[match[1]] = int(float(match[2]) * UNITS[match[3]])
    return sizes


# ---------------------------------------------------------------- building


def build_engine(job: Job, send: Callable[[Event], None]) -> EngineBuild:
    """Build `job.engine`.

    Raises:
        WorkerError: it cannot be built, or is not what was asked for.
    """
    start = perf_counter()
    trt = load_vendor(job.module)
    log = Log(trt)
    with HostMemory() as memory:
        work = write_engine(trt, log, job, send)
    build = EngineBuild(
        seconds=round(perf_counter() - start, 3),
        host_memory=memory.peak,
        device_memory=log.device_peak,
        precisions=work.precisions,
        attentions=work.attentions,
    )
    layers = inspect_engine(trt, log, job) if job.module == "tensorrt" else program_layers(Path(job.engine))
    if layers is None:
        send(Note(text=f"{job.graph.role}: the finished engine could not be looked into, only its network was checked"))
        return build
    check_layers(job, work.precisions, layers)
    return msgspec.structs.replace(build, engine_precisions=layers.precisions, fused_attention=layers.fused_attention)


def write_engine(trt: Any, log: Log, job: Job, send: Callable[[Event], None]) -> Work:
    """Parse, check the network, build, and write `job.engine` while it is serialized; what the network does.

    Weights beside the graph are mapped by the parser, and no copy of the whole engine is made: what stays in memory is
    one copy of the weights, the builder's own.

    Raises:
        WorkerError: see `build_engine`.
    """
    logger: tensorrt.ILogger = log.logger
    builder: tensorrt.Builder | None = trt.Builder(logger)
    if builder is None:
        raise log.failure("no builder could be made")
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network: tensorrt.INetworkDefinition = builder.create_network(flags)
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):  # a path, so that external data is found beside it
        raise log.failure("the graph does not parse")
    check_interface(job.graph, *network_interface(network))
    work = network_work(trt, network)
    check_precisions(job, work.precisions)
    config: tensorrt.IBuilderConfig = configure(trt, builder, job)
    config.progress_monitor = monitor = progress_monitor(trt, lambda percent: send(Progress(percent=percent)))
    cache = Path(job.timing_cache) if job.timing_cache else None
    if cache is not None:
        use_timing_cache(config, cache)
    with Path(job.engine).open("wb") as file:
        writer = stream_writer(trt, file)
        if not builder.build_serialized_network_to_stream(network, config, writer):
            raise log.failure("the build gave no engine")
        if writer.error is not None:
            raise WorkerError("build", f"the engine cannot be written: {writer.error.strerror}")
        file.flush()
        os.fsync(file.fileno())
    del monitor
    if cache is not None:
        changed: tensorrt.ITimingCache = config.get_timing_cache()
        write_bytes(bytes(changed.serialize()), cache)
    return work


def stream_writer(trt: Any, file: BinaryIO) -> Any:
    """An `IStreamWriter` into a file. Its `error` is what ended it: the library does not look at what was written."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is None:
                try:
                    return file.write(data)
                except OSError as error:
                    self.error = error
            return 0

    return Writer()


def configure(trt: Any, builder: tensorrt.Builder, job: Job) -> tensorrt.IBuilderConfig:
    """A builder configuration: the job's options and one optimisation profile."""
    options = job.options
    config: tensorrt.IBuilderConfig = builder.create_builder_config()
    config.builder_optimization_level = int(options["builder_optimization_level"])
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, str(options["profiling_verbosity"]).upper())
    for pool, size in pool_sizes(str(options["mem_pool_size"])).items():
        config.set_memory_pool_limit(getattr(trt.MemoryPoolType, POOLS[pool]), size)
    if options["weight_streaming"]:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.get("version_compatible"):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # else the engine carries code, which we do not run
    if "hardware_compatibility_level" in options:
        level = str(options["hardware_compatibility_level"]).upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.get("compute_capabilities"):
        targets = [member_of_capability(text) for text in str(options["compute_capabilities"]).split(",")]
        rtx_config: tensorrt_rtx.IBuilderConfig = config
        rtx_config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            rtx_config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
    if any(isinstance(dim, str) for spec in job.graph.inputs for dim in spec.shape):
        profile: tensorrt.IOptimizationProfile = builder.create_optimization_profile()
        for spec in job.graph.inputs:
            largest = spec.at(job.max_batch)
            profile.set_shape(spec.name, spec.at(1), largest, largest)
        config.add_optimization_profile(profile)
    return config


def use_timing_cache(config: tensorrt.IBuilderConfig, path: Path) -> None:
    """Timings from a file; the library refuses those of another GPU or version, and damaged ones: then begin anew."""
    for data in (path.read_bytes() if path.is_file() else b"", b""):
        timings: tensorrt.ITimingCache | None = config.create_timing_cache(data)
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return


def member_of_capability(text: str) -> str:
    """`8.9` → `SM89`, `current` → `CURRENT`: a `ComputeCapability` member."""
    return "CURRENT" if text == "current" else f"SM{text.replace('.', '')}"


def progress_monitor(trt: Any, tell: Callable[[int], None]) -> tensorrt.IProgressMonitor:
    """An `IProgressMonitor` that tells whenever another percent is done."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases are nested, and a step of a phase may be a phase: the share done is that of the whole tree."""

        def __init__(self) -> None:
            super().__init__()
            self._phases: dict[str, list[int]] = {}
            """Running phases, outermost first: steps done, steps in all."""
            self._told = -1
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = [0, num_steps]

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._phases:
                    self._phases[phase_name][0] = step + 1
                self._tell()
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _tell(self) -> None:
            share, weight = 0.0, 1.0
            for done, steps in self._phases.values():
                weight /= max(steps, 1)
                share += weight * min(done, steps)
            percent = min(int(100 * share), 100)
            if percent > self._told:
                self._told = percent
                tell(percent)

    return Monitor()


class Log:
    """Keeps of a vendor's log what is needed when something goes wrong, and the peak of GPU memory.

    Attributes:
        logger: the vendor's object.
        device_peak: bytes; None until told, and where it is nothing.
    """

    def __init__(self, trt: Any) -> None:
        self.device_peak: int | None = None
        self._errors: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(logger, severity: Any, msg: str) -> None:
                self._take(severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR), msg)

        self.logger = Logger()

    def failure(self, otherwise: str) -> WorkerError:
        """What to raise: the first error, which the others follow from, or `otherwise` where there was none."""
        memory = any(_OUT_OF_MEMORY.search(error) for error in self._errors)
        return WorkerError("memory" if memory else "build", one_line(self._errors[0]) if self._errors else otherwise)

    def _take(self, is_error: bool, message: str) -> None:
        if is_error:
            self._errors.append(message)
        elif (match := _PEAK.search(message)) and int(match[1]):
            self.device_peak = int(match[1]) << 20


def one_line(text: str) -> str:
    """A vendor's message without line breaks and without where in its sources it came from."""
    return " ".join(re.sub(r"\s*\(?In \S+ at \S+:\d+\)?|\[\w+\.cpp::\w+::\d+\]", "", text).split())


# ---------------------------------------------------------------- looking


Interface = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name → dtype, shape; −1 for a dimension that is free."""


def check_interface(graph: GraphSpec, inputs: Interface, outputs: Interface) -> None:
    """Raise WorkerError unless these are the inputs and outputs of the graph."""
    for side, specs, got in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
        expected = {spec.name: (spec.dtype, _free(spec)) for spec in specs}
        if expected != got:
            name = next(name for name in {**expected, **got} if expected.get(name) != got.get(name))
            raise WorkerError(
                "build", f"expected {side} {name} {_said(expected.get(name))}, it is {_said(got.get(name))}"
            )


def check_precisions(job: Job, precisions: Mapping[str, int]) -> None:
    """Raise WorkerError unless the DiT computes mostly in the dtype asked for.

    What is around the trunk may be mostly fp32 (`_keep_in_fp32_modules` of Wan): where part of it runs, some is enough.
    """
    total, asked = sum(precisions.values()), precisions.get(job.dtype, 0)
    if total and ((job.graph.dit == "whole" and 2 * asked <= total) or (job.graph.dit == "part" and not asked)):
        raise WorkerError("build", f"{job.dtype} was asked for, its layers compute in {_counts(precisions)}")


def network_interface(network: tensorrt.INetworkDefinition) -> tuple[Interface, Interface]:
    """Inputs and outputs of a parsed network."""
    inputs: list[tensorrt.ITensor] = [network.get_input(index) for index in range(network.num_inputs)]
    outputs: list[tensorrt.ITensor] = [network.get_output(index) for index in range(network.num_outputs)]
    sides = [
        {tensor.name: (_dtype(tensor.dtype), tuple(tensor.shape)) for tensor in side} for side in (inputs, outputs)
    ]
    return sides[0], sides[1]


class Work(NamedTuple):
    """What a network computes.

    Attributes:
        precisions: dtype → computing layers whose result has it. In a strongly typed network that is what they
            compute in.
        attentions: how many attentions there are, whole or in parts: each has one softmax.
    """

    precisions: dict[str, int]
    attentions: int


def network_work(trt: Any, network: tensorrt.INetworkDefinition) -> Work:
    """What a parsed network computes."""
    computing = {getattr(trt.LayerType, name) for name in COMPUTING}
    attention = {getattr(trt.LayerType, name) for name in ATTENTION}
    found: Counter[str] = Counter()
    attentions = 0
    for index in range(network.num_layers):
        layer: tensorrt.ILayer = network.get_layer(index)
        attentions += layer.type in attention
        if layer.type in computing:
            result: tensorrt.ITensor = layer.get_output(0)
            found[_dtype(result.dtype)] += 1
    return Work(dict(found), attentions)


def check_layers(job: Job, network: Mapping[str, int], engine: Layers) -> None:
    """Raise WorkerError unless the engine computes in what its network does, and the DiT in what was asked for.

    A tenth may be otherwise: a matrix product with the cast behind it in one kernel counts by the dtype of the cast.
    """
    strange = sum(count for dtype, count in engine.precisions.items() if dtype not in network)
    if 10 * strange > sum(engine.precisions.values()):
        raise WorkerError(
            "build", f"the network computes in {_counts(network)}, its engine in {_counts(engine.precisions)}"
        )
    check_precisions(job, engine.precisions)


def inspect_engine(trt: Any, log: Log, job: Job) -> Layers | None:
    """Load the engine, compare its inputs and outputs with the graph's, and count what it runs.

    Returns:
        None where the engine was built to tell nothing of its layers.

    Raises:
        WorkerError: it does not load, or is something else.
    """
    runtime: tensorrt.Runtime = trt.Runtime(log.logger)
    runtime.engine_host_code_allowed = False
    with mapped(Path(job.engine)) as data:
        engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise log.failure("the new engine does not load")
    names: list[str] = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    sides: dict[bool, dict[str, tuple[str, tuple[int, ...]]]] = {True: {}, False: {}}
    for name in names:
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        sides[is_input][name] = (_dtype(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
    check_interface(job.graph, sides[True], sides[False])
    if job.options["profiling_verbosity"] != "detailed":
        return None
    inspector: tensorrt.EngineInspector = engine.create_engine_inspector()
    return engine_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def engine_layers(information: str) -> Layers | None:
    """What the engine inspector's JSON says; None where it names no layer with its outputs.

    A layer's dtype is that of its first output. Kernels of fused attention have `mha` in their names
    (github.com/NVIDIA/TensorRT/issues/3243).
    """
    found: Counter[str] = Counter()
    fused = told = 0
    for layer in json.loads(information).get("Layers", ()):
        if not isinstance(layer, dict) or not layer.get("Outputs"):
            continue
        told += 1
        names = " ".join(str(layer.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
        fused += bool(_FUSED_ATTENTION.search(names))
        words = re.findall(r"\w+", str(layer["Outputs"][0].get("Format/Datatype", "")))
        dtype = next((_ENGINE_DTYPES[word] for word in words if word in _ENGINE_DTYPES), None)
        if dtype is not None and _ENGINE_COMPUTING.search(names):
            found[dtype] += 1
    return Layers(dict(found), fused) if told else None


class HostMemory:
    """The peak of this process's own memory while the block runs, looked at fifty times a second.

    Pages of mapped files – weights, libraries – are not counted: the kernel takes them back where memory is short.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HostMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._look()

    def _look(self) -> None:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        kilobytes = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE)
        self.peak = max(self.peak, sum(map(int, kilobytes)) << 10)


def _free(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape)


def _dtype(member: tensorrt.DataType) -> str:
    return DTYPES.get(member.name, str(member.name))


def _said(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _counts(precisions: Mapping[str, int]) -> str:
    return ", ".join(f"{dtype} ({count})" for dtype, count in sorted(precisions.items())) or "nothing"


# ---------------------------------------------------------------- the process


def main() -> None:
    """Answer one request."""
    # A vendor's library may print: what it says goes to standard error, events have the descriptor to themselves.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # at once: what it says comes before what ends the process
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Probe | Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def send(event: Event) -> None:
        with lock:
            _write(events, event)

    send(_answer(request, send))


def _answer(request: Probe | Job, send: Callable[[Event], None]) -> Event:
    try:
        if isinstance(request, Probe):
            return Found(version=load_vendor(request.module).__version__, device=cuda_device())
        return Built(build=build_engine(request, send))
    except WorkerError as error:
        return error.answer
    except MemoryError:
        return Failed(kind="memory", what="memory ran out")


def _write(events: TextIO, event: Event) -> None:
    events.write(msgspec.json.encode(event).decode() + "\n")
    events.flush()


def _end_with_parent() -> None:
    """Standard input is closed when the parent ends, however it ends. A read of `sys.stdin` would lock it."""
    while os.read(0, 4096):
        pass
    os._exit(130)


if __name__ == "__main__":
    main()
