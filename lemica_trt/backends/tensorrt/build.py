"""TensorRT and TensorRT for RTX: one builder for both, the vendor a value.

Networks are strongly typed: precision is in the graph, and no option changes it. Each engine is built by a process of
its own (`tensorrt_worker`), with one optimisation profile: static where the graphs are, else batch 1 … max_batch with
kernels chosen for max_batch.

Options, named as in trtexec and Polygraphy:

| name | default | vendor | |
|---|---|---|---|
| `builder_optimization_level` | 3 | both | 0 … 5: how long the builder looks for better kernels |
| `mem_pool_size` | `` | both | `workspace:4G,tacticSharedMem:48K`; suffix B, K, M or G, none: MiB; empty: no limit |
| `weight_streaming` | false | both | weights may stay in host memory when the engine runs |
| `profiling_verbosity` | `detailed` | both | `layer_names_only`, `detailed` (the engine's gate needs it) or `none` |
| `version_compatible` | false | tensorrt | also runs on the lean runtime (`tensorrt_lean`) of the same version |
| `hardware_compatibility_level` | `none` | tensorrt | `none`, `ampere_plus` or `same_compute_capability` |
| `compute_capabilities` | `` | tensorrt-rtx | `8.6,8.9,12.0`, or `current`; empty: 8.0 and later |

TensorRT for RTX needs no GPU to build, keeps no timing cache (its operations on one do nothing) and picks kernels where
the engine is first loaded.

Finished engines lie in `engines/BACKEND-KEY/` with a record beside each, KEY being the digest of the `EngineKey`: a
second build takes what is there, and something built from another key is never found (`builders.prune` removes it).
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

from lemica_trt.backends.builders import ENGINES, Estimate, graphs_digest, options_from
from lemica_trt.backends.tensorrt.worker import (
    Built,
    Event,
    Failed,
    Found,
    Job,
    Module,
    Note,
    Probe,
    Progress,
    pool_sizes,
)
from lemica_trt.core.errors import EngineError, InputError, MissingDependencyError, UsageError
from lemica_trt.core.files import sha256_of
from lemica_trt.core.progress import Reporter, duration, size
from lemica_trt.core.values import Value, read_value, write_value
from lemica_trt.ir.engine import EngineBuild, EngineEntry, EngineKey, Option
from lemica_trt.ir.graphs import GraphSet, GraphSpec, Role
from lemica_trt.ir.profile import DType

LEVELS = ("none", "ampere_plus", "same_compute_capability")
VERBOSITIES = ("layer_names_only", "detailed", "none")
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT for RTX 1.7 builds for (`ComputeCapability`)."""

PROCESS_MEMORY = 300_000_000
MEMORY_PER_BYTE = 1.5
SECONDS_PER_BYTE = 14e-9
"""Host memory and time by bytes of graph, measured with TensorRT for RTX 1.7 on blocks of a CogVideoX-5B in bf16: six,
1.6 GB, take 2.4 GB and 16 s on an idle machine; 42 of repeating weights, 4.4 GB in the engine, take 7.7 GB."""

_COMMON: dict[str, Option] = {
    "builder_optimization_level": 3,
    "mem_pool_size": "",
    "weight_streaming": False,
    "profiling_verbosity": "detailed",
}


class Vendor(Value, frozen=True):
    """One of the two libraries that share an interface.

    Attributes:
        backend: its name in `builders.BACKENDS`.
        title: its name.
        module: its Python module.
        builds_on_gpu: whether kernels are timed on the GPU that the engine is for.
        options: with their defaults.
    """

    backend: str
    title: str
    module: Module
    builds_on_gpu: bool
    options: dict[str, Option]


class Record(Value, frozen=True):
    """Lies beside a finished engine.

    Attributes:
        sha256: hex digest of the engine.
        build: what building it took.
    """

    sha256: str
    build: EngineBuild


class TensorRT:
    """A `builders.Builder`."""

    def __init__(self, vendor: Vendor) -> None:
        self.vendor = vendor

    def defaults(self) -> Mapping[str, Option]:
        """See `builders.Builder`."""
        return self.vendor.options

    def check(self, dtype: DType, options: Mapping[str, Option]) -> None:
        """Options, the vendor's library, and its GPU where it needs one. See `builders.check`."""
        chosen = self._chosen(options)
        self._target(chosen, self._probe())

    def estimate(self, weights: int) -> Estimate:
        """See `builders.estimate`. Time is unknown where kernels are timed."""
        seconds = None if self.vendor.builds_on_gpu else 1 + SECONDS_PER_BYTE * weights
        return Estimate(seconds=seconds, memory=PROCESS_MEMORY + round(MEMORY_PER_BYTE * weights))

    def build(
        self, graphs: GraphSet, root: Path, out: Path, options: Mapping[str, Option], reporter: Reporter
    ) -> EngineEntry:
        """Build what is not there yet. See `builders.build`."""
        chosen, found = self._chosen(options), self._probe()
        on_gpu = found.device if self.vendor.builds_on_gpu else None
        key = EngineKey(
            backend=self.vendor.backend,
            version=found.version,
            target=self._target(chosen, found),
            dtype=graphs.dtype,
            graphs_digest=graphs_digest(graphs, root),
            options=chosen,
            device=on_gpu.name if on_gpu else None,
            driver=on_gpu.driver if on_gpu else None,
        )
        folder = f"{ENGINES}/{key.backend}-{key.digest[:16]}"
        (out / folder).mkdir(parents=True, exist_ok=True)
        for unfinished in (out / ENGINES).glob("*/*.tmp"):  # of a process that was killed
            unfinished.unlink()
        files: dict[Role, str] = {}
        builds: dict[Role, EngineBuild] = {}
        for graph in graphs.graphs:
            files[graph.role] = f"{folder}/{graph.role}.engine"
            path = out / files[graph.role]
            record = _finished(path)
            if record is None:
                # Timings hold for one GPU and one version; the library itself refuses others.
                cache = path.parent.with_name(f"{key.backend}.timing_cache") if self.vendor.builds_on_gpu else None
                job = Job(
                    module=self.vendor.module,
                    graph=graph,
                    dtype=graphs.dtype,
                    max_batch=graphs.max_batch,
                    options=chosen,
                    onnx=str(root / graph.file),
                    engine=f"{path}.tmp",
                    timing_cache=None if cache is None else str(cache),
                )
                record = self._build_one(job, path, _weights(graph, root), reporter)
                reporter.note(f"{graph.role}: {_summary(record.build, path.stat().st_size)}")
            else:
                reporter.note(f"{graph.role}: unchanged")
            builds[graph.role] = record.build
        return EngineEntry(key=key, files=files, builds=builds)

    def _build_one(self, job: Job, path: Path, weights: int, reporter: Reporter) -> Record:
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

    def _ask(self, request: Probe | Job, what: str, reporter: Reporter | None = None) -> Event:
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
            said = errors.read().decode(errors="replace").strip().splitlines()
        if last is not None and not isinstance(last, (Progress, Note)):
            return last
        if code == -9 or any("bad_alloc" in line for line in said):
            expected = "" if isinstance(request, Probe) else self._more_memory(None)
            raise EngineError(f"{self.vendor.title} ran out of memory ({what})", fix=expected or None)
        reason = said[-1] if said else "it said nothing"
        raise EngineError(f"{self.vendor.title} ended with code {code} ({what}): {reason}")

    def _probe(self) -> Found:
        """What is here.

        Raises:
            MissingDependencyError: the vendor's library is not.
        """
        answer = self._ask(Probe(module=self.vendor.module), "import")
        if isinstance(answer, Found):
            return answer
        reason = answer.what if isinstance(answer, Failed) else str(answer)
        raise MissingDependencyError(
            f"the {self.vendor.backend} backend needs {self.vendor.title}, got: {reason}",
            fix=f"pip install 'lemica-trt[{self.vendor.backend.removeprefix('tensorrt-')}]'",
        )

    def _chosen(self, options: Mapping[str, Option]) -> dict[str, Option]:
        """All options, checked.

        Raises:
            UsageError: there is no such option, or no such value of it.
        """
        chosen = options_from(options, self.vendor.options, backend=self.vendor.backend)
        level = int(chosen["builder_optimization_level"])
        if not 0 <= level <= 5:
            raise UsageError(f"--builder-optimization-level must be 0 … 5, got {level}")
        for name, known in (("profiling_verbosity", VERBOSITIES), ("hardware_compatibility_level", LEVELS)):
            if name in chosen and chosen[name] not in known:
                raise UsageError(f"--{name.replace('_', '-')} must be one of {', '.join(known)}, got {chosen[name]!r}")
        try:
            pool_sizes(str(chosen["mem_pool_size"]))
        except ValueError as error:
            raise UsageError(f"--mem-pool-size: {error}") from None
        targets = str(chosen.get("compute_capabilities", ""))
        if targets and targets != "current" and not set(targets.split(",")) <= set(CAPABILITIES):
            raise UsageError(
                f"--compute-capabilities must be current, or some of {', '.join(CAPABILITIES)}, got {targets!r}",
                fix="leave it out for an engine that runs on 8.0 and later",
            )
        return chosen

    def _target(self, chosen: Mapping[str, Option], found: Found) -> str:
        """`EngineKey.target`.

        Raises:
            MissingDependencyError: it is the GPU of this machine, and there is none.
        """
        targets = str(chosen.get("compute_capabilities", ""))
        if not self.vendor.builds_on_gpu and targets != "current":
            return ",".join(f"sm_{text.replace('.', '')}" for text in targets.split(",")) if targets else "sm_80+"
        if found.device is None:
            raise MissingDependencyError(
                f"{self.vendor.title} builds for the GPU of this machine, no CUDA driver or device was found",
                fix="build there, or use --backend tensorrt-rtx"
                if self.vendor.builds_on_gpu
                else "build there, or name --compute-capabilities",
            )
        if chosen.get("hardware_compatibility_level") == "ampere_plus":
            return "sm_80+"
        return f"sm_{found.device.compute_capability.replace('.', '')}"

    def _more_memory(self, expected: int | None) -> str:
        needs = "more memory" if expected is None else f"about {size(expected)} of free memory"
        return (
            f"build on a machine with {needs} (and GPU memory), end what else uses it, "
            "limit the builder with --mem-pool-size workspace:1G, or build fewer --frames or a smaller --max-batch"
        )


TENSORRT = TensorRT(
    Vendor(
        backend="tensorrt",
        title="TensorRT",
        module="tensorrt",
        builds_on_gpu=True,
        options={**_COMMON, "version_compatible": False, "hardware_compatibility_level": "none"},
    )
)
TENSORRT_RTX = TensorRT(
    Vendor(
        backend="tensorrt-rtx",
        title="TensorRT for RTX",
        module="tensorrt_rtx",
        builds_on_gpu=False,
        options={**_COMMON, "compute_capabilities": ""},
    )
)


@contextlib.contextmanager
def _worker(request: Probe | Job, errors: int) -> Iterator[subprocess.Popen[bytes]]:
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
    parts = [f"{size(engine_size)} in {duration(build.seconds)}, peak {size(build.host_memory)} of memory"]
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
