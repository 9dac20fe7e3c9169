"""The build half: one process an engine (`worker`), with one optimisation profile: static where the graphs are, else
batch 1 … max_batch with kernels chosen for max_batch.

TensorRT for RTX needs no GPU to build, keeps no timing cache (its operations on one do nothing) and picks kernels where
the engine is first loaded.

Finished engines lie in `engines/BACKEND-KEY/` with a record beside each, KEY being the digest of the `EngineKey`: a
second build takes what is there, and something built from another key is never found (`backends.build.prune` removes
it).
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from lemica_trt.backends.build import ENGINES_FOLDER, Estimate, Observed, graphs_digest, quantiser
from lemica_trt.backends.onnx_file import require_plain
from lemica_trt.backends.tensorrt.options import RTX_CAPABILITIES, RtxOptions, TensorRTOptions
from lemica_trt.backends.tensorrt.protocol import (
    BuildJob,
    Built,
    Event,
    Failed,
    Note,
    Probe,
    ProbeResult,
    Progress,
)
from lemica_trt.backends.tensorrt.vendor import VENDORS, Vendor
from lemica_trt.core.errors import (
    EngineError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
    install_command,
)
from lemica_trt.core.files import sha256_of
from lemica_trt.core.progress import Reporter, duration, size
from lemica_trt.core.threads import usable_threads
from lemica_trt.core.values import Value, read_value, write_value
from lemica_trt.ir.engine import NONE, EngineBuild, EngineEntry, EngineKey
from lemica_trt.ir.graphs import GraphSet, GraphSpec, Role
from lemica_trt.ir.profile import DType

PROCESS_BYTES = 300_000_000
HOST_BYTES_PER_GRAPH_BYTE = 1.5
SECONDS_PER_GRAPH_BYTE = 14e-9
"""Host memory and time of a build by bytes of graph, measured with TensorRT for RTX 1.7 on bf16 blocks of a
CogVideoX-5B: six, 1.6 GB, take 2.4 GB and 16 s on an idle machine; 42 of repeating weights, 4.4 GB in the engine, take
7.7 GB."""


LOWEST = {"int8": 75, "fp8": 89}
"""Lowest compute capability, times ten, whose tensor cores multiply such numbers (TensorRT support matrix)."""


class Record(Value, frozen=True):
    """Lies beside a finished engine.

    Attributes:
        sha256: hex digest of the engine.
        build: what building it took.
    """

    sha256: str
    build: EngineBuild


class TensorRTBuilder:
    """See `backends.build.Builder`."""

    def __init__(self, vendor: Vendor) -> None:
        self.vendor = vendor

    def check(self, dtype: DType, options: TensorRTOptions | RtxOptions) -> None:
        """Refuse where the vendor's library is not here, nor its GPU where it needs one; quantised layers of what is
        not fp32, and those that a GPU of the target cannot multiply."""
        if options.quantize != NONE and dtype != "fp32":
            raise UnsupportedError(
                f"--quantize {options.quantize} is of fp32 graphs, got {dtype}",
                fix="build the bundle with --dtype fp32; or leave it out",
            )
        _require_kernels(options, self._target(options, self._probe()))

    def estimate(self, weights: int) -> Estimate:
        """Time is unknown where kernels are timed."""
        seconds = None if self.vendor.builds_on_gpu else 1 + SECONDS_PER_GRAPH_BYTE * weights
        return Estimate(seconds=seconds, memory=PROCESS_BYTES + round(HOST_BYTES_PER_GRAPH_BYTE * weights))

    def build(
        self, graphs: GraphSet, root: Path, out: Path, options: TensorRTOptions | RtxOptions, reporter: Reporter
    ) -> EngineEntry:
        """Build what is not there yet.

        Raises:
            UsageError: quantised engines are asked for, which `quantize` makes of what is built here.
            InputError: a graph asks for what no export does, see `onnx_file`.
        """
        if options.quantize != NONE:
            raise UsageError("--quantize: engines are quantised once they are built", fix="use backends.build.quantize")
        key = self._key(graphs, root, options)
        folder = f"{ENGINES_FOLDER}/{key.backend}-{key.digest[:16]}"
        (out / folder).mkdir(parents=True, exist_ok=True)
        for unfinished in (out / ENGINES_FOLDER).glob("*/*.tmp"):  # of a process that was killed
            unfinished.unlink()
        cache = self._timing_cache(out)
        files: dict[Role, str] = {}
        builds: dict[Role, EngineBuild] = {}
        for graph in graphs.graphs:
            files[graph.role] = f"{folder}/{graph.role}.engine"
            path = out / files[graph.role]
            record = _finished(path)
            if record is None:
                require_plain(graph, root / graph.file)  # before the vendor's parser reads it
                job = self._job(graph, graphs, options, root / graph.file, path, cache)
                record = self._build_one(job, path, _weights(graph, root), reporter)
                reporter.note(f"{graph.role}: {_summary(record.build, path.stat().st_size)}")
            else:
                reporter.note(f"{graph.role}: unchanged")
            builds[graph.role] = record.build
        return EngineEntry(key=key, files=files, builds=builds)

    def require_quantizable(self, graphs: GraphSet, root: Path) -> None:
        """See `backends.build.require_quantizable`."""
        quantiser().require_quantizable(graphs, root)

    def quantize(
        self,
        entry: EngineEntry,
        graphs: GraphSet,
        root: Path,
        out: Path,
        options: TensorRTOptions | RtxOptions,
        observed: Mapping[Role, Observed],
        reporter: Reporter,
    ) -> EngineEntry:
        """See `backends.build.quantize`: of each graph one with its layers quantised is written, and built."""
        if options.quantize == "none":
            raise UsageError("expected options with --quantize", fix="use backends.build.build")
        digest = quantiser().observed_digest(observed)
        key = msgspec.structs.replace(entry.key, options=options.as_dict(), observed=digest)
        folder = f"{ENGINES_FOLDER}/{key.backend}-{key.digest[:16]}"
        cache = self._timing_cache(out)
        files, builds, sources = dict(entry.files), dict(entry.builds), dict[Role, str]()
        for role, found in sorted(observed.items()):
            graph, path = graphs.graph(role), out / f"{folder}/{role}.engine"
            source, onnx = root / graph.file, path.with_suffix(".onnx")
            try:
                layers, error = quantiser().write_quantized(
                    options.quantize, source, onnx, source.parent, found, usable_threads(), reporter, symmetric=True
                )
                graph = msgspec.structs.replace(graph, file=onnx.name, data_files=())
                require_plain(graph, onnx)
                job = self._job(graph, graphs, options, onnx, path, cache)
                record = self._build_one(job, path, onnx.stat().st_size, reporter)
            finally:
                onnx.unlink(missing_ok=True)
            reporter.note(f"{role}: {_summary(record.build, path.stat().st_size)}")
            files[role], sources[role] = f"{folder}/{path.name}", entry.files[role]
            builds[role] = msgspec.structs.replace(record.build, layers=layers, error=error)
        return EngineEntry(key=key, files=files, builds=builds, sources=sources)

    def _job(
        self,
        graph: GraphSpec,
        graphs: GraphSet,
        options: TensorRTOptions | RtxOptions,
        onnx: Path,
        path: Path,
        cache: Path | None,
    ) -> BuildJob:
        """What the worker is asked for: an engine of `onnx`, for `path`."""
        return BuildJob(
            module=self.vendor.module,
            graph=graph,
            dtype=graphs.dtype,
            max_batch=graphs.max_batch,
            options=options,
            onnx=str(onnx),
            engine=f"{path}.tmp",
            timing_cache=None if cache is None else str(cache),
        )

    def _timing_cache(self, out: Path) -> Path | None:
        """Timings hold for one GPU and one version; the library itself refuses others."""
        return out / ENGINES_FOLDER / f"{self.vendor.backend}.timing_cache" if self.vendor.builds_on_gpu else None

    def _key(self, graphs: GraphSet, root: Path, options: TensorRTOptions | RtxOptions) -> EngineKey:
        found = self._probe()
        gpu = found.gpu if self.vendor.builds_on_gpu else None
        return EngineKey(
            backend=self.vendor.backend,
            version=found.version,
            target=self._target(options, found),
            dtype=graphs.dtype,
            graphs_digest=graphs_digest(graphs, root),
            options=options.as_dict(),
            device=gpu.name if gpu else None,
            driver=gpu.driver if gpu else None,
        )

    def _build_one(self, job: BuildJob, path: Path, weights: int, reporter: Reporter) -> Record:
        """One engine and its record; nothing of either where it fails or is interrupted."""
        role, expected = job.graph.role, self.estimate(weights)
        took = "some minutes" if expected.seconds is None else f"about {duration(expected.seconds)}"
        reporter.note(f"{role}: {size(weights)} of graph, {took} and {size(expected.memory)} of memory")
        free = _free_memory()
        if free is not None and free < expected.memory:
            reporter.note(f"{role}: only {size(free)} of memory are free; if the build is killed, that is why")
        staged = Path(job.engine)
        try:
            answer = self._ask(job, role, reporter)
            if isinstance(answer, Failed):
                raise EngineError(
                    f"{self.vendor.title} cannot build the {role} engine: {answer.what}",
                    fix=self._more_memory(expected.memory) if answer.kind == "memory" else None,
                )
            if not isinstance(answer, Built):
                raise EngineError(f"{self.vendor.title} gave no {role} engine: {answer}")
            reporter.advance(100, 100)
            record = Record(sha256=sha256_of(staged), build=answer.build)
            _record_path(path).unlink(missing_ok=True)
            staged.replace(path)
            write_value(record, _record_path(path))
        finally:
            staged.unlink(missing_ok=True)
        return record

    def _ask(self, request: Probe | BuildJob, what: str, reporter: Reporter | None = None) -> Event:
        """The worker's answer; progress and notes on the way there go to the reporter.

        Raises:
            EngineError: it ended without one.
        """
        last: Event | None = None
        with tempfile.TemporaryFile() as errors, _worker(request, errors.fileno()) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = msgspec.json.decode(line, type=Event)
                if reporter is not None and isinstance(last, Progress):
                    reporter.advance(last.percent, 100)
                elif reporter is not None and isinstance(last, Note):
                    reporter.note(last.text)
            code = process.wait()
            errors.seek(0)
            printed = errors.read().decode(errors="replace").strip().splitlines()
        if last is not None and not isinstance(last, (Progress, Note)):
            return last
        if code == -9 or any("bad_alloc" in line or "out of memory" in line for line in printed):
            expected = "" if isinstance(request, Probe) else self._more_memory(None)
            raise EngineError(f"{self.vendor.title} ran out of memory ({what})", fix=expected or None)
        reason = printed[-1] if printed else "it printed nothing"
        raise EngineError(f"{self.vendor.title} ended with code {code} ({what}): {reason}")

    def _probe(self) -> ProbeResult:
        """What is here.

        Raises:
            MissingDependencyError: the vendor's library is not.
        """
        answer = self._ask(Probe(module=self.vendor.module), "import")
        if isinstance(answer, ProbeResult):
            return answer
        reason = answer.what if isinstance(answer, Failed) else str(answer)
        raise MissingDependencyError(
            f"the {self.vendor.backend} backend needs {self.vendor.title}, got: {reason}",
            fix=install_command(self.vendor.extra),
        )

    def _target(self, options: TensorRTOptions | RtxOptions, found: ProbeResult) -> str:
        """`EngineKey.target`.

        Raises:
            MissingDependencyError: it is the GPU of this machine, and there is none.
        """
        if isinstance(options, RtxOptions) and options.compute_capabilities != "current":
            return ",".join(f"sm_{text.replace('.', '')}" for text in options.capabilities) or "sm_80+"
        if found.gpu is None:
            raise MissingDependencyError(
                f"{self.vendor.title} builds for the GPU of this machine, no CUDA driver or device was found",
                fix="build there, or use --backend tensorrt-rtx"
                if self.vendor.builds_on_gpu
                else "build there, or name --compute-capabilities",
            )
        if isinstance(options, TensorRTOptions) and options.hardware_compatibility_level == "ampere_plus":
            return "sm_80+"
        return f"sm_{found.gpu.compute_capability.replace('.', '')}"

    def _more_memory(self, expected: int | None) -> str:
        needs = "more memory" if expected is None else f"about {size(expected)} of free memory"
        return (
            f"build on a machine with {needs} (and GPU memory), end what else uses it, "
            "limit the builder with --mem-pool-size workspace:1G, or build fewer --frames or a smaller --max-batch"
        )


def _require_kernels(options: TensorRTOptions | RtxOptions, target: str) -> None:
    """Refuse a precision that a GPU of the target cannot multiply.

    Args:
        target: `EngineKey.target`.

    Raises:
        UnsupportedError: it cannot.
    """
    lowest = min((int(digits) for digits in re.findall(r"sm_(\d+)", target)), default=0)
    needed = LOWEST.get(options.quantize, 0)
    if lowest < needed:
        fitting = [text for text in RTX_CAPABILITIES if int(text.replace(".", "")) >= needed]
        named = f"--compute-capabilities {','.join(fitting)}, or " if isinstance(options, RtxOptions) else ""
        other = "--quantize int8" if LOWEST["int8"] <= lowest else "leave --quantize out"
        raise UnsupportedError(
            f"--quantize {options.quantize} needs compute capability {needed // 10}.{needed % 10} or later, these "
            f"engines are for {target}",
            fix=f"{named}{other}",
        )


BUILDERS = {name: TensorRTBuilder(vendor) for name, vendor in VENDORS.items()}


@contextlib.contextmanager
def _worker(request: Probe | BuildJob, errors: int) -> Iterator[subprocess.Popen[bytes]]:
    """The worker, asked; killed where the caller is interrupted. A session of its own, so that Ctrl-C comes here only.

    Its standard input stays open as long as it shall live.
    """
    command = [sys.executable, "-m", "lemica_trt.backends.tensorrt.worker"]
    # Where this package was found, whatever the working directory is there.
    path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already: what it said tells why
            process.stdin.write(msgspec.json.encode(request) + b"\n")
            process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()


def _record_path(engine: Path) -> Path:
    return engine.with_suffix(".json")


def _finished(engine: Path) -> Record | None:
    """The record of an engine that is whole; None where there is none such."""
    try:
        record = read_value(Record, _record_path(engine))
        return record if sha256_of(engine) == record.sha256 else None
    except InputError:
        return None


def _weights(graph: GraphSpec, root: Path) -> int:
    """Bytes of a graph's files."""
    return sum((root / name).stat().st_size for name in (graph.file, *graph.data_files))


def _summary(build: EngineBuild, engine_size: int) -> str:
    """What building took, in one line."""
    took, memory = build.seconds or 0.0, build.host_memory or 0
    parts = [f"{size(engine_size)} in {duration(took)}, peak {size(memory)} of memory"]
    if build.device_memory is not None:
        parts.append(f"{size(build.device_memory)} of GPU memory")
    counts = build.engine_precisions if build.engine_precisions is not None else build.precisions
    if counts:
        parts.append("computes in " + ", ".join(f"{dtype} ({count})" for dtype, count in sorted(counts.items())))
    if build.fused_attention is not None:
        parts.append(f"{build.fused_attention} of {build.attentions} attentions fused")
    return ", ".join(parts)


def _free_memory() -> int | None:
    """Bytes that a process may still take; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else None
