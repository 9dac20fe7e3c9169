"""ONNX → engine, one file a vendor; and the values that say which engine it is.

A builder is a module with one function, `build(graphs, root, out, options) -> EngineEntry` (see `Builder`); the
vendor's package is imported inside it, so that listing backends costs nothing. The backend is a value that travels
in the manifest, never an environment variable: one process may hold two.

    onnxruntime     the ONNX files themselves are the engine; CPU or CUDA

Knows nothing of bundles or of how an engine is run.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from lemica_trt.errors import InputError, UsageError
from lemica_trt.spec import DType, GraphSet, Role
from lemica_trt.values import Value, json_bytes, require

Option = str | int | bool
"""Value of one builder option."""


class EngineKey(Value, frozen=True):
    """Everything that changes an engine: equal keys, equal engines; the key's digest may name a cache entry.

    Attributes:
        backend: name in `BACKENDS`.
        version: version of the backend's package that built it.
        target: what it runs on: `cpu`, `cuda`, an architecture (`sm_89`), several (`sm_86,sm_89`), or one and all
            later ones (`sm_80+`).
        dtype: precision of the DiT.
        graphs_digest: see `graphs_digest`; covers names, shapes, dtypes, batch range and every byte of the ONNX files.
        options: all of the builder's options, defaults written out.
        device: the GPU that kernels were chosen on, by its product name; None: on none.
        driver: highest CUDA version of the driver that they were chosen with (`13.0`); None: with none.
    """

    backend: str
    version: str
    target: str
    dtype: DType
    graphs_digest: str
    options: dict[str, Option] = {}
    device: str | None = None
    driver: str | None = None


class EngineEntry(Value, frozen=True):
    """One set of engines of a bundle.

    Attributes:
        key: what it is.
        files: by role, the file to load, relative to the bundle.
    """

    key: EngineKey
    files: dict[Role, str]

    def __post_init__(self) -> None:
        require("full" in self.files and "combine" in self.files, "engines need at least the roles full and combine")


class Builder(Protocol):
    """What a module in this folder offers."""

    def check(self, dtype: DType, options: Mapping[str, Option]) -> None:
        """Raise what `build` would raise for a reason that is known before any graph is there."""
        ...

    def build(self, graphs: GraphSet, root: Path, out: Path, options: Mapping[str, Option]) -> EngineEntry:
        """Build engines for all graphs; see `build`."""
        ...


BACKENDS: dict[str, str] = {"onnxruntime": "lemica_trt.builders.onnxruntime"}
"""Name → module that builds for it."""


def build(
    backend: str, graphs: GraphSet, root: Path, out: Path, options: Mapping[str, Option] | None = None
) -> EngineEntry:
    """Build engines for all graphs of a set.

    Args:
        backend: name in `BACKENDS`.
        graphs: what to build.
        root: folder that the paths in `graphs` are relative to.
        out: folder that the paths in the returned entry are relative to, where they are not ONNX files of `root`.
        options: the builder's own options; unset ones get its defaults.

    Raises:
        UsageError: unknown backend or option.
        MissingDependencyError: the backend's package or device is not here.
        UnsupportedError: the backend cannot run this dtype.
        EngineError: building failed.
    """
    return _builder(backend).build(graphs, root, out, options or {})


def check(backend: str, dtype: DType, options: Mapping[str, Option] | None = None) -> None:
    """Ask a backend before hours of work whether it could build at all.

    Raises:
        UsageError, MissingDependencyError, UnsupportedError: as `build`.
    """
    _builder(backend).check(dtype, options or {})


def _builder(backend: str) -> Builder:
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}", fix=f"use one of: {', '.join(sorted(BACKENDS))}")
    return cast(Builder, importlib.import_module(BACKENDS[backend]))


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


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from None
    return digest.hexdigest()
