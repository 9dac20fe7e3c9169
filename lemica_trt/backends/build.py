"""The build half: ONNX files → engines, and the key that says which engines they are.

A vendor's package is imported when something is built, so that listing backends costs nothing. Knows nothing of
bundles or of how an engine is run.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
from msgspec import UNSET

from lemica_trt.backends.options import builder_names, options_class, options_from, vendor_module
from lemica_trt.core.errors import UsageError
from lemica_trt.core.files import sha256_of
from lemica_trt.core.values import json_bytes
from lemica_trt.ir.engine import EngineEntry, Option
from lemica_trt.ir.graphs import GraphSet, Role
from lemica_trt.ir.profile import DType

if TYPE_CHECKING:
    from lemica_trt.core.progress import Reporter

ENGINES_FOLDER = "engines"
"""Where builders that write engines put them, each key in a folder of its own: `engines/BACKEND-KEY/ROLE.engine`."""


class Estimate(NamedTuple):
    """What building will take: seconds (None: nobody knows) and peak host memory in bytes."""

    seconds: float | None
    memory: int


class Observed(NamedTuple):
    """Step inputs of one graph: arrays as `backends.base.Backend.upload` takes them, by name.

    Attributes:
        ranges: that ranges of activations are measured on.
        errors: that errors are measured on; others.
        output: name of the output whose error that is.
    """

    ranges: Sequence[Mapping[str, Any]]
    errors: Sequence[Mapping[str, Any]]
    output: str

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        found = hashlib.sha256(self.output.encode())
        for inputs in (*self.ranges, None, *self.errors):
            for name in sorted(inputs or {}):
                array = (inputs or {})[name]
                found.update(f"{name} {array.dtype} {array.shape}".encode())
                found.update(array.tobytes())
            found.update(b";")
        return found.hexdigest()


class Builder(Protocol):
    """What the build half of a backend offers. `options` are of the class that the backend declares, checked."""

    def check(self, dtype: DType, options: Any) -> None:
        """Raise what `build` would raise for a reason that is known before any graph is there."""
        ...

    def estimate(self, weights: int) -> Estimate:
        """What building a graph with so many bytes of weights takes."""
        ...

    def build(self, graphs: GraphSet, root: Path, out: Path, options: Any, reporter: Reporter) -> EngineEntry:
        """Build engines for all graphs; see `build`."""
        ...


class Quantizer(Protocol):
    """A builder whose options have `ir.engine.QUANTIZE`."""

    def require_quantizable(self, graphs: GraphSet, root: Path) -> None:
        """Refuse what could not be done, before anything runs; see `require_quantizable`."""
        ...

    def quantize(
        self,
        entry: EngineEntry,
        graphs: GraphSet,
        root: Path,
        out: Path,
        options: Any,
        observed: Mapping[Role, Observed],
        reporter: Reporter,
    ) -> EngineEntry:
        """Quantise engines; see `quantize`."""
        ...


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
        backend: one of `options.builder_names`.
        graphs: what to build.
        root: folder that the paths in `graphs` are relative to.
        out: folder that the paths in the returned entry are relative to, where they are not ONNX files of `root`.
            Engines in it that an earlier call finished from the same key are taken as they are.
        options: of the backend; the others get their defaults.
        reporter: is told estimates, progress and costs; None: no progress is reported.

    Raises:
        UsageError: unknown backend or option, or one that builds nothing.
        MissingDependencyError: the backend's package or device is not here.
        UnsupportedError: the backend cannot run this dtype.
        EngineError: building failed.
    """
    if reporter is None:
        from lemica_trt.core.progress import Quiet

        reporter = Quiet()
    return _builder(backend).build(graphs, root, out, options_from(backend, options or {}), reporter)


def quantize(
    entry: EngineEntry,
    graphs: GraphSet,
    root: Path,
    out: Path,
    options: Mapping[str, Option],
    observed: Mapping[Role, Observed],
    reporter: Reporter,
) -> EngineEntry:
    """Engines with quantised linear layers, of engines that were built.

    Args:
        entry: as `build` gives it, of the same graphs.
        graphs, root, out: as in `build`.
        options: with the option `ir.engine.QUANTIZE`, checked as by `check`.
        observed: of each graph that is quantised, step inputs.
        reporter: told of the progress.

    Raises:
        UsageError: the backend has no such option.
        MissingDependencyError: a package is not here.
        UnsupportedError: a graph cannot be quantised.
    """
    complete = options_from(entry.key.backend, options)
    quantizer: Quantizer = vendor_module(entry.key.backend, "build").BUILDERS[entry.key.backend]
    return quantizer.quantize(entry, graphs, root, out, complete, observed, reporter)


def require_quantizable(backend: str, graphs: GraphSet, root: Path) -> None:
    """Refuse what `quantize` could not do, before anything is measured.

    Args:
        backend: with the option `ir.engine.QUANTIZE`.
        graphs, root: as in `build`.

    Raises:
        MissingDependencyError: a package is not here.
        UnsupportedError: a graph cannot be quantised.
    """
    quantizer: Quantizer = vendor_module(backend, "build").BUILDERS[backend]
    quantizer.require_quantizable(graphs, root)


def quantiser() -> ModuleType:
    """What measures which layers to quantise, and writes graphs: `backends.onnxruntime.quantize`, on the CPU.

    Raises:
        MissingDependencyError: it cannot be loaded.
    """
    return vendor_module("onnxruntime", "quantize")


def prune(entries: Sequence[EngineEntry], out: Path) -> None:
    """Remove engines of other keys than these: what a folder keeps for the next build is what the last one used."""
    used = {out / file for entry in entries for file in entry.paths}
    for folder in (out / ENGINES_FOLDER).glob("*/"):
        if folder.is_dir() and not any(file.parent == folder for file in used):
            shutil.rmtree(folder)


def check(backend: str, dtype: DType, options: Mapping[str, Option] | None = None) -> None:
    """Ask a backend before hours of work whether it could build at all.

    Raises:
        UsageError, MissingDependencyError, UnsupportedError: as `build`.
    """
    _builder(backend).check(dtype, options_from(backend, options or {}))


def estimate(backend: str, weights: int) -> Estimate:
    """What building a graph with so many bytes of weights will take.

    Raises:
        UsageError: unknown backend.
    """
    return _builder(backend).estimate(weights)


def _builder(backend: str) -> Builder:
    """The build half of a backend.

    Raises:
        UsageError: unknown backend, or one that builds nothing.
    """
    options_class(backend)
    if backend not in builder_names():
        raise UsageError(
            f"the {backend} backend runs the modules of its own process and builds no engines",
            fix=f"use --backend {' or '.join(builder_names())}",
        )
    builder: Builder = vendor_module(backend, "build").BUILDERS[backend]
    return builder


def graphs_digest(graphs: GraphSet, root: Path) -> str:
    """SHA-256 (hex) over the description of all graphs and the content of all their files; what their weights are
    called in the model is no part of it.

    Raises:
        InputError: a file cannot be read.
    """
    names = sorted({name for graph in graphs.graphs for name in (graph.file, *graph.data_files)})
    unnamed = tuple(msgspec.structs.replace(graph, weights=UNSET) for graph in graphs.graphs)
    graphs = msgspec.structs.replace(graphs, graphs=unnamed)
    return hashlib.sha256(json_bytes([graphs, {name: sha256_of(root / name) for name in names}])).hexdigest()
