"""ONNX → engine, one file a vendor; and the values that say which engine it is.

A builder is a module or an object with the functions of `Builder`; the vendor's package is imported inside them, so
that listing backends costs nothing. The backend is a value that travels in the manifest, never an environment
variable: one process may hold two.

    onnxruntime     the ONNX files themselves are the engine; CPU or CUDA
    tensorrt        TensorRT, on the GPU that the engine will run on
    tensorrt-rtx    TensorRT for RTX, on any machine; the engine is finished for the GPU where it is first loaded

Knows nothing of bundles or of how an engine is run.
"""

from __future__ import annotations

import hashlib
import pkgutil
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from lemica_trt.core.errors import UsageError
from lemica_trt.core.values import json_bytes
from lemica_trt.ir.graphs import GraphSet
from lemica_trt.ir.profile import DType

if TYPE_CHECKING:
    from lemica_trt.core.progress import Reporter
from lemica_trt.core.files import sha256_of
from lemica_trt.ir.engine import EngineEntry, Option

ENGINES = "engines"
"""Where builders that write engines put them, each key in a folder of its own: `engines/BACKEND-KEY/ROLE.engine`."""


class Estimate(NamedTuple):
    """What building will take: seconds (None: nobody knows) and peak host memory in bytes."""

    seconds: float | None
    memory: int


class Builder(Protocol):
    """What a builder offers."""

    def defaults(self) -> Mapping[str, Option]:
        """All options that it has, with their defaults."""
        ...

    def check(self, dtype: DType, options: Mapping[str, Option]) -> None:
        """Raise what `build` would raise for a reason that is known before any graph is there."""
        ...

    def estimate(self, weights: int) -> Estimate:
        """What building a graph with so many bytes of weights will take."""
        ...

    def build(
        self, graphs: GraphSet, root: Path, out: Path, options: Mapping[str, Option], reporter: Reporter
    ) -> EngineEntry:
        """Build engines for all graphs; see `build`."""
        ...


BACKENDS: dict[str, str] = {
    "onnxruntime": "lemica_trt.backends.onnxruntime.build",
    "tensorrt": "lemica_trt.backends.tensorrt.build:TENSORRT",
    "tensorrt-rtx": "lemica_trt.backends.tensorrt.build:TENSORRT_RTX",
}
"""Name → module, or object in a module, that builds for it."""


def build(
    backend: str,
    graphs: GraphSet,
    root: Path,
    out: Path,
    options: Mapping[str, Option] | None = None,
    reporter: Reporter | None = None,
) -> EngineEntry:
    """Build engines for all graphs of a set.

    Args:
        backend: name in `BACKENDS`.
        graphs: what to build.
        root: folder that the paths in `graphs` are relative to.
        out: folder that the paths in the returned entry are relative to, where they are not ONNX files of `root`.
            Engines in it that an earlier call finished from the same key are taken as they are.
        options: the builder's own options; unset ones get its defaults.
        reporter: is told estimates, progress and costs; None: nobody is.

    Raises:
        UsageError: unknown backend or option.
        MissingDependencyError: the backend's package or device is not here.
        UnsupportedError: the backend cannot run this dtype.
        EngineError: building failed.
    """
    if reporter is None:
        from lemica_trt.core.progress import Quiet

        reporter = Quiet()
    return _builder(backend).build(graphs, root, out, options or {}, reporter)


def prune(entries: Sequence[EngineEntry], out: Path) -> None:
    """Remove engines of other keys than these: what a folder keeps for the next build is what the last one used."""
    used = {out / file for entry in entries for file in entry.files.values()}
    for folder in (out / ENGINES).glob("*/"):
        if folder.is_dir() and not any(file.parent == folder for file in used):
            shutil.rmtree(folder)


def check(backend: str, dtype: DType, options: Mapping[str, Option] | None = None) -> None:
    """Ask a backend before hours of work whether it could build at all.

    Raises:
        UsageError, MissingDependencyError, UnsupportedError: as `build`.
    """
    _builder(backend).check(dtype, options or {})


def estimate(backend: str, weights: int) -> Estimate:
    """What building a graph with so many bytes of weights will take.

    Raises:
        UsageError: unknown backend.
    """
    return _builder(backend).estimate(weights)


def options_by_backend(backends: Sequence[str], options: Mapping[str, Option]) -> dict[str, dict[str, Option]]:
    """Backend → those of the given options that it has.

    Raises:
        UsageError: unknown backend, or an option that none of these has.
    """
    offered = {backend: _builder(backend).defaults() for backend in backends}
    for name in options:
        if not any(name in known for known in offered.values()):
            others = [backend for backend in BACKENDS if name in _builder(backend).defaults()]
            raise UsageError(
                f"{' and '.join(backends)} has no option --{name.replace('_', '-')}",
                fix=f"leave it out, or use --backend {' or '.join(others)}" if others else "leave it out",
            )
    return {
        backend: {name: value for name, value in options.items() if name in known} for backend, known in offered.items()
    }


def _builder(backend: str) -> Builder:
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}", fix=f"use one of: {', '.join(sorted(BACKENDS))}")
    return cast(Builder, pkgutil.resolve_name(BACKENDS[backend]))


def options_from(given: Mapping[str, Option], defaults: Mapping[str, Option], *, backend: str) -> dict[str, Option]:
    """All options, defaults written out.

    Raises:
        UsageError: an unknown name, or a value of another type than its default.
    """
    for name, value in given.items():
        if name not in defaults:
            raise UsageError(f"{backend} has no option {name!r}", fix=f"use one of: {', '.join(sorted(defaults))}")
        if type(value) is not type(defaults[name]):
            kind = type(defaults[name]).__name__
            raise UsageError(f"{backend} option {name} must be {kind}, got {value!r}")
    return {**defaults, **given}


def graphs_digest(graphs: GraphSet, root: Path) -> str:
    """SHA-256 (hex) over the description of all graphs and the content of all their files.

    Raises:
        InputError: a file cannot be read.
    """
    names = sorted({name for graph in graphs.graphs for name in (graph.file, *graph.data_files)})
    return hashlib.sha256(json_bytes([graphs, {name: sha256_of(root / name) for name in names}])).hexdigest()
