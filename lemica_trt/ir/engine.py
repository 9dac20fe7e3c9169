"""Which engine it is, what it was built from, and what building it took."""

from __future__ import annotations

from lemica_trt.core.values import Value, require
from lemica_trt.ir.graphs import Role
from lemica_trt.ir.profile import DType

Option = str | int | bool
"""Value of one option of a backend."""


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
    """

    backend: str
    version: str
    target: str
    dtype: DType
    graphs_digest: str
    options: dict[str, Option] = {}
    device: str | None = None
    driver: str | None = None


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
    """

    seconds: float | None = None
    host_memory: int | None = None
    device_memory: int | None = None
    precisions: dict[str, int] = {}
    engine_precisions: dict[str, int] | None = None
    attentions: int = 0
    fused_attention: int | None = None


class EngineEntry(Value, frozen=True):
    """One set of engines of a bundle.

    Attributes:
        key: what it is.
        files: by role, the file to load, relative to the bundle.
        builds: by role, what building it took; nothing for graphs that are loaded as they are.
    """

    key: EngineKey
    files: dict[Role, str]
    builds: dict[Role, EngineBuild] = {}

    def __post_init__(self) -> None:
        require(bool(self.files), "an entry needs at least one engine")
        require(set(self.builds) <= set(self.files), "builds must be of roles in files")
