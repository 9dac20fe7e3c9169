"""The run half: the thin interface to an engine library.

    Backend     makes buffers, moves arrays in and out of them, loads engines
    Buffer      memory on the device, of one shape and dtype, for as long as it is referred to
    Engine      a loaded graph
    Call        an engine with all its inputs and outputs bound to buffers, made once and run many times

The loop binds every row of a plan once for each batch size (`Engine.bind`). Where nobody looks between two rows, it
runs them as one call (`Backend.join`). A library that must prepare a call – TensorRT: set addresses, capture a CUDA
graph, of one row or of the whole plan – does so in `bind`, `join` or at the first runs, and replays from then on:
addresses and shapes of a call never change.

Order: `upload`, `Call.run` and `download` take effect in the order in which one thread calls them. `Call.run` and
`upload` may return before that; `synchronize` and `download` wait.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lemica_trt.backends.options import backend_names, vendor_module
from lemica_trt.core.errors import EngineError, UnsupportedError
from lemica_trt.core.text import printable
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.graphs import GraphSpec, TensorDType

LOGGER = logging.getLogger("lemica_trt")

Array = npt.NDArray[Any]

NUMPY_DTYPES: dict[TensorDType, type[np.generic]] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "uint8": np.uint8,
}
"""How a tensor lies in a numpy array; numpy has no bfloat16: its bits, as uint16 (see `encode`, `decode`)."""


class Buffer(Protocol):
    """Memory on the device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> TensorDType: ...


class Call(Protocol):
    """An engine bound to buffers, or several such calls joined."""

    def run(self) -> None:
        """Enqueue it.

        Raises:
            EngineError: it failed.
        """
        ...


class InOrder:
    """Calls joined by running one after the other."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = tuple(calls)

    def run(self) -> None:
        for call in self._calls:
            call.run()


class Engine(Protocol):
    """A loaded graph."""

    def bind(self, buffers: Mapping[str, Buffer], *, once: bool = False) -> Call:
        """Bind all inputs and outputs, by name; see `check_binding` for what is required.

        Args:
            once: the call is run one time: nothing is prepared for more.

        Raises:
            EngineError: the buffers do not fit the graph.
        """
        ...


class Backend(Protocol):
    """An engine library on one device, used by one thread at a time, together with the engines that it loaded."""

    def empty(self, shape: tuple[int, ...], dtype: TensorDType) -> Buffer:
        """A buffer with undefined content.

        Raises:
            EngineError: out of memory.
        """
        ...

    def upload(self, array: Array, buffer: Buffer) -> None:
        """Copy an array of the buffer's shape and `NUMPY_DTYPES` dtype into it; the array may change afterwards."""
        ...

    def download(self, buffer: Buffer) -> Array:
        """A copy of a buffer, once everything before has run."""
        ...

    def load(self, graph: GraphSpec, path: Path) -> Engine:
        """Load an engine from a file whose digest was checked.

        Raises:
            EngineError: it does not load, or is not the graph described.
        """
        ...

    def join(self, calls: Sequence[Call]) -> Call:
        """One call that runs calls of this backend in this order; `InOrder`, unless the library does better."""
        ...

    def synchronize(self) -> None:
        """Wait until everything before has run.

        Raises:
            EngineError: something of it failed.
        """
        ...

    def device_memory(self) -> int | None:
        """Bytes that all processes hold on the device; None: engines run in host memory, or the library hides it."""
        ...


Change = Callable[[Array], Array]
"""float32 of the shape of an initializer → the same, changed."""


@runtime_checkable
class ChangesWeights(Protocol):
    """A backend that loads a graph with other weights; `Options.changes_weights` says which are."""

    def load_changed(self, graph: GraphSpec, path: Path, changes: Mapping[str, Change]) -> Engine:
        """As `Backend.load`, with weights changed, each in float32 and rounded to its dtype once.

        Args:
            changes: by initializer, of `graph.weights`.

        Raises:
            EngineError: it does not load, is not the graph described, or has no such initializer.
            InputError: a changed weight is not finite in its dtype.
        """
        ...


Capture = Literal["plan", "step", "none"]
"""What becomes a CUDA graph: joined calls as one, each call, or nothing."""


@dataclass(frozen=True)
class Settings:
    """How a backend is opened; each reads what concerns it.

    Attributes:
        device: which GPU, as CUDA counts those that it sees.
        threads: ONNX Runtime: CPU threads within an operator, in place of the number in the key.
        capture: TensorRT, PyTorch on CUDA: see `Capture`.
        cache: TensorRT for RTX: folder of what it compiles for this GPU; None: it compiles again each time.
        rebuild: TensorRT: gives the command that builds the engines on this machine; called where they do not fit.
        modules: PyTorch: by graph name, what takes and returns a dict of tensors by the names in the `GraphSpec`.
    """

    device: int = 0
    threads: int | None = None
    capture: Capture = "plan"
    cache: Path | None = None
    rebuild: Callable[[], str] = lambda: "rebuild the bundle on this machine"
    modules: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)


def open_backend(key: EngineKey, settings: Settings | None = None) -> Backend:
    """The backend that runs engines of this key.

    Args:
        key: from the manifest.
        settings: None: the defaults.

    Raises:
        UnsupportedError: this version of lemica-trt does not know the backend, or engines of this key are not for
            this machine: another version of the vendor's package, another GPU, an older driver.
        MissingDependencyError: the backend's package, driver or device is not here.
    """
    if key.backend not in backend_names():
        raise UnsupportedError(
            f"engines for {key.backend!r} cannot be run, only {', '.join(backend_names())}",
            fix="pip install --upgrade lemica-trt, or rebuild the bundle with --backend",
        )
    backend: Backend = vendor_module(key.backend, "run").open_backend(key, settings or Settings())
    return backend


def require_version(key: EngineKey, here: str, oldest: str, package: str | None = None) -> None:
    """Compare the version of a library whose engines are ONNX graphs with the one that they were built with.

    Such a graph names the versions of the operators that it uses, the standard ones and the library's own. Any release
    that knows them computes it, with other last bits; one that does not know them refuses it when it is loaded. So
    another release is no reason to refuse, but to say it; one that nobody has tried with these graphs is.

    Args:
        key: from the manifest.
        here: version of the library, without the number of its build.
        oldest: the lowest version that pyproject.toml allows.
        package: what to install; None: it is called as the backend.

    Raises:
        UnsupportedError: the library is older than `oldest`.
    """
    package = package or key.backend
    if _numbers(here) < _numbers(oldest):
        raise UnsupportedError(
            f"{key.backend} graphs need {key.backend} {oldest} or newer, here is {here}",
            fix=f"pip install '{package}>={oldest}'",
        )
    if key.version != here:
        LOGGER.warning(
            "the bundle was built and verified with %s %s, here is %s: its numbers may differ → pip install %s==%s",
            *(key.backend, printable(key.version), here, package, printable(key.version)),
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a release."""
    numbers = [int(number) for number in re.findall(r"[0-9]+", re.split("[a-z+]", version)[0])]
    return (*numbers, 0, 0, 0)[:3]


def check_binding(graph: GraphSpec, buffers: Mapping[str, Buffer]) -> None:
    """Raise EngineError unless there is one buffer for each tensor of the graph, of its dtype and shape, and no
    output's buffer is also bound to anything else. Symbolic dimensions of one name must be equal."""
    tensors = (*graph.inputs, *graph.outputs)
    names = {tensor.name for tensor in tensors}
    if names != set(buffers):
        raise EngineError(f"{graph.role}: expected buffers for {sorted(names)}, got {sorted(buffers)}")
    sizes: dict[str, int] = {}
    for tensor in tensors:
        buffer = buffers[tensor.name]
        fits = buffer.dtype == tensor.dtype and len(buffer.shape) == len(tensor.shape)
        for declared, size in zip(tensor.shape, buffer.shape):
            expected = sizes.setdefault(declared, size) if isinstance(declared, str) else declared
            fits = fits and size == expected
        if not fits:
            raise EngineError(
                f"{graph.role}: {tensor.name} must be {tensor.dtype} {list(tensor.shape)}, "
                f"got {buffer.dtype} {list(buffer.shape)}"
            )
    for output in graph.outputs:
        if sum(buffer is buffers[output.name] for buffer in buffers.values()) > 1:
            raise EngineError(f"{graph.role}: the buffer of output {output.name} is bound twice")


def check_upload(array: Array, buffer: Buffer) -> None:
    """Raise EngineError unless `Backend.upload` takes this array for this buffer."""
    if array.shape != buffer.shape or array.dtype != NUMPY_DTYPES[buffer.dtype]:
        raise EngineError(f"expected {buffer.dtype} {list(buffer.shape)}, got {array.dtype} {list(array.shape)}")


def encode(array: Array, dtype: TensorDType) -> Array:
    """Numbers → the array that `Backend.upload` takes. bf16: rounded to nearest even."""
    if dtype != "bf16":
        return np.ascontiguousarray(array, NUMPY_DTYPES[dtype])
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def decode(array: Array, dtype: TensorDType) -> Array:
    """Inverse of `encode`; bf16 becomes float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else array
