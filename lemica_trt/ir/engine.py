"""Which engine it is, what it was built from, and what building it took."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import UNSET, UnsetType

from lemica_trt.core.values import Value, require
from lemica_trt.ir.graphs import Role
from lemica_trt.ir.profile import DType

Option = str | int | bool
"""Value of one option of a backend."""


QUANTIZE = "quantize"
"""The option of backends that quantise linear layers; engines whose options lack it have none."""

NONE = "none"
"""Its value where nothing is quantised."""


class EngineKey(Value, frozen=True):
    """Everything that changes an engine: equal keys, equal engines; the key's digest may name a cache entry.

    Attributes:
        backend: its name; see `backends.options.backend_names`.
        version: version of the backend's package that built it.
        target: what it runs on: `cpu`, `cuda`, an architecture (`sm_89`), several (`sm_86,sm_89`), or one and all
            later ones (`sm_80+`).
        dtype: precision of the DiT.
        graphs_digest: see `backends.build.graphs_digest`; covers names, shapes, dtypes, batch range and
            every byte of the ONNX files.
        options: all that the backend has, defaults written out; see `backends.options.Options`.
        device: the GPU that kernels were chosen on, by its product name; None: on none.
        driver: highest CUDA version of the driver that they were chosen with (`13.0`); None: with none.
        observed: of quantised engines SHA-256 (hex) of the step inputs that activations were measured on.
    """

    backend: str
    version: str
    target: str
    dtype: DType
    graphs_digest: str
    options: dict[str, Option] = {}
    device: str | None = None
    driver: str | None = None
    observed: str | UnsetType = UNSET

    @property
    def quantization(self) -> str:
        """What linear layers are quantised to; `NONE`: they are not."""
        return str(self.options.get(QUANTIZE, NONE))

    @property
    def precision(self) -> str:
        """What the DiT's linear layers compute in: `int8`, `fp8`, or the dtype of the graphs."""
        return self.dtype if self.quantization == NONE else self.quantization

    @property
    def title(self) -> str:
        """Backend and version, and the precision of quantised engines: what people read."""
        parts = [self.backend, self.version, *([] if self.quantization == NONE else [self.quantization])]
        return " ".join(parts)


class LinearLayer(Value, frozen=True):
    """A linear layer of a quantised graph.

    Attributes:
        name: its path in the transformer where weights or bias have one, else the node of the graph.
        precision: of its product: `int8` or `fp8` (E4M3), or `fp32` where it was kept.
        error: what it does to the model's output where it alone is quantised: ‖Δ‖²/‖output‖², the mean over steps of
            a sample that its ranges were not measured on.
    """

    name: str
    precision: Literal["int8", "fp8", "fp32"]
    error: float

    def __post_init__(self) -> None:
        require(0 <= self.error < math.inf, f"layer {self.name}: error must be finite, not negative, got {self.error}")

    @property
    def decibels(self) -> float:
        """The output's signal-to-noise ratio where this layer alone is quantised, dB; at most 120."""
        return decibels(self.error)


def decibels(error: float) -> float:
    """‖Δ‖²/‖output‖² as a signal-to-noise ratio, dB; at most 120."""
    return -10 * math.log10(max(error, 1e-12))


class EngineBuild(Value, frozen=True):
    """What building one engine took, and what is in it.

    Attributes:
        seconds: wall-clock time; None: not measured, it only rewrites a graph.
        host_memory: peak of the building process's own memory, bytes; pages of mapped files are not counted. None: not
            measured.
        device_memory: peak that the builder allocated on the GPU, bytes; None: it does not say.
        precisions: dtype → computing layers of the network (matrix products, convolutions, attention) with that result.
        engine_precisions: the same of the finished engine, after fusion; None where it could not be looked into.
        attentions: of the network.
        fused_attention: attentions that the engine runs as one kernel, or that its graph has as one operator; None
            where it could not be looked into.
        layers: of a quantised graph its linear layers, those that change the output most first.
        error: what all its quantised layers together do to the model's output, measured as that of each layer.
    """

    seconds: float | None = None
    host_memory: int | None = None
    device_memory: int | None = None
    precisions: dict[str, int] = {}
    engine_precisions: dict[str, int] | None = None
    attentions: int = 0
    fused_attention: int | None = None
    layers: tuple[LinearLayer, ...] | UnsetType = UNSET
    error: float | UnsetType = UNSET

    def __post_init__(self) -> None:
        found = 0.0 if self.error is UNSET else self.error
        require(0 <= found < math.inf, f"error must be finite, not negative, got {found}")

    @property
    def quantized(self) -> bool:
        """Whether some of its layers are."""
        return self.layers is not UNSET

    @property
    def decibels(self) -> float | None:
        """The output's signal-to-noise ratio with all its quantised layers, dB; at most 120. None: not measured."""
        return None if self.error is UNSET else decibels(self.error)


class EngineEntry(Value, frozen=True):
    """One set of engines of a bundle.

    Attributes:
        key: what it is.
        files: by role, the file to load, relative to the bundle.
        builds: by role, what building it took; nothing for graphs that are loaded as they are.
        sources: by role, the file that a quantised graph was made from, which still computes what it replaces.
    """

    key: EngineKey
    files: dict[Role, str]
    builds: dict[Role, EngineBuild] = {}
    sources: dict[Role, str] | UnsetType = UNSET

    def __post_init__(self) -> None:
        require(bool(self.files), "an entry needs at least one engine")
        require(set(self.builds) <= set(self.files), "builds must be of roles in files")
        require(set(self.sources or ()) <= set(self.files), "sources must be of roles in files")
        require(
            not self.quantized or self.key.quantization != NONE,
            f"engines with quantised layers need the option {QUANTIZE} in their key",
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """All files, each once: those that run, and those that quantised ones were made from."""
        return tuple(dict.fromkeys((*self.files.values(), *(self.sources or {}).values())))

    @property
    def quantized(self) -> tuple[Role, ...]:
        """Graphs with quantised layers, sorted."""
        return tuple(sorted(role for role, build in self.builds.items() if build.quantized))

    @property
    def precision(self) -> str:
        """As `EngineKey.precision`."""
        return self.key.precision
