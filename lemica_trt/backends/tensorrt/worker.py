"""The process that builds one TensorRT engine: ONNX file → engine file, then a look at what came out.

    python -m lemica_trt.backends.tensorrt.worker      `BuildJob` or `Probe` as one line of JSON on standard input,
                                                       events as lines of JSON on standard output

A process of its own, because a build may run out of memory or crash, because only so its peak memory is its own, and
because it must be possible to end it at any moment. It ends when standard input is closed: no build outlives the
process that asked for it. Imports one vendor's module, no torch and no ONNX.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import msgspec

from lemica_trt.backends.machine import find_gpu
from lemica_trt.backends.tensorrt.inspect import (
    Log,
    NetworkStats,
    check_interface,
    check_layers,
    check_precisions,
    inspect_engine,
    network_interface,
    network_stats,
)
from lemica_trt.backends.tensorrt.options import MEMORY_POOLS, TensorRTOptions, pool_sizes
from lemica_trt.backends.tensorrt.program import program_layers
from lemica_trt.backends.tensorrt.protocol import (
    BuildJob,
    Built,
    Event,
    Failed,
    Note,
    Probe,
    ProbeResult,
    Progress,
    WorkerError,
)
from lemica_trt.backends.tensorrt.vendor import Module
from lemica_trt.core.values import write_bytes
from lemica_trt.ir.engine import EngineBuild

if TYPE_CHECKING:
    # The names of types: which vendor's module it is, `load_vendor` decides.
    import tensorrt
    import tensorrt_rtx

# What the dynamic loader says at the end of its line where memory is short.
USUAL_TOKENS = 128
"""Length of text axes that engines are tuned for, unless they are shorter; others run too."""

_NO_ROOM = ("failed to map segment from shared object", "Cannot allocate memory")


def load_vendor(name: Module) -> Any:
    """The vendor's module.

    Raises:
        WorkerError: it is not installed, or its libraries do not load.
        MemoryError: its libraries do not fit into memory.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # a missing shared library is either
        reason = str(error).strip().splitlines()[0]
        if reason.endswith(_NO_ROOM):
            raise MemoryError(reason) from None
        raise WorkerError("import", reason) from None


# ---------------------------------------------------------------- building


def build_engine(job: BuildJob, send: Callable[[Event], None]) -> EngineBuild:
    """Build `job.engine`.

    Raises:
        WorkerError: it cannot be built, or is not what was asked for.
    """
    start = perf_counter()
    trt = load_vendor(job.module)
    log = Log(trt)
    with HostMemory() as memory:
        stats = write_engine(trt, log, job, send)
    build = EngineBuild(
        seconds=round(perf_counter() - start, 3),
        host_memory=memory.peak,
        device_memory=log.device_peak,
        precisions=stats.precisions,
        attentions=stats.attentions,
    )
    layers = inspect_engine(trt, log, job) if job.module == "tensorrt" else program_layers(Path(job.engine))
    if layers is None:
        send(Note(text=f"{job.graph.role}: the finished engine could not be looked into, only its network was checked"))
        return build
    check_layers(job, stats.precisions, layers)
    return msgspec.structs.replace(build, engine_precisions=layers.precisions, fused_attention=layers.fused_attention)


def write_engine(trt: Any, log: Log, job: BuildJob, send: Callable[[Event], None]) -> NetworkStats:
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
    stats = network_stats(trt, network)
    check_precisions(job, stats.precisions)
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
    return stats


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


def configure(trt: Any, builder: tensorrt.Builder, job: BuildJob) -> tensorrt.IBuilderConfig:
    """A builder configuration: the job's options and one optimisation profile."""
    options = job.options
    config: tensorrt.IBuilderConfig = builder.create_builder_config()
    config.builder_optimization_level = options.builder_optimization_level
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, options.profiling_verbosity.upper())
    for pool, size in pool_sizes(options.mem_pool_size).items():
        config.set_memory_pool_limit(getattr(trt.MemoryPoolType, MEMORY_POOLS[pool]), size)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if isinstance(options, TensorRTOptions):
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
            config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # else the engine carries code, which we do not run
        level = options.hardware_compatibility_level.upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    elif options.capabilities:
        rtx_config: tensorrt_rtx.IBuilderConfig = config
        rtx_config.num_compute_capabilities = len(options.capabilities)
        for index, capability in enumerate(options.capabilities):
            rtx_config.set_compute_capability(getattr(trt.ComputeCapability, capability_member(capability)), index)
    if any(isinstance(dim, str) for spec in job.graph.inputs for dim in spec.shape):
        profile: tensorrt.IOptimizationProfile = builder.create_optimization_profile()
        for spec in job.graph.inputs:
            largest = spec.at(job.max_batch)
            usual = spec.at(job.max_batch, tokens=USUAL_TOKENS)
            profile.set_shape(spec.name, spec.at(1, tokens=1), usual, largest)
        config.add_optimization_profile(profile)
    return config


def use_timing_cache(config: tensorrt.IBuilderConfig, path: Path) -> None:
    """Timings from a file; the library refuses those of another GPU or version, and damaged ones: then begin anew."""
    for data in (path.read_bytes() if path.is_file() else b"", b""):
        timings: tensorrt.ITimingCache | None = config.create_timing_cache(data)
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return


def capability_member(text: str) -> str:
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
        try:
            self._thread.start()
        except RuntimeError as error:  # no room for its stack
            raise MemoryError(str(error)) from None
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


# ---------------------------------------------------------------- the process


def main() -> None:
    """Answer one request."""
    # A vendor's library may print: what it says goes to standard error, events have the descriptor to themselves.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # at once: what it says comes before what ends the process
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Probe | BuildJob)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def send(event: Event) -> None:
        with lock:
            _write(events, event)

    send(_answer(request, send))


def _answer(request: Probe | BuildJob, send: Callable[[Event], None]) -> Event:
    try:
        if isinstance(request, Probe):
            return ProbeResult(version=load_vendor(request.module).__version__, gpu=find_gpu())
        return Built(build=build_engine(request, send))
    except WorkerError as error:
        return error.answer
    except MemoryError as error:
        return Failed(kind="memory", what=f"memory ran out ({error})" if str(error) else "memory ran out")


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
