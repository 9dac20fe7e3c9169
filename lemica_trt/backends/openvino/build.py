"""OpenVINO: the ONNX files are the engine; it fuses attention itself. What is built is the certainty that they load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemica_trt.backends.build import Estimate, graphs_digest
from lemica_trt.backends.onnx_file import require_plain
from lemica_trt.backends.openvino.options import OpenVinoOptions
from lemica_trt.core.errors import EngineError, MissingDependencyError, UnsupportedError, install_command
from lemica_trt.core.text import first_line
from lemica_trt.core.threads import usable_threads
from lemica_trt.ir.engine import EngineEntry, EngineKey
from lemica_trt.ir.graphs import GraphSet, GraphSpec, TensorDType
from lemica_trt.ir.profile import DType

if TYPE_CHECKING:
    from lemica_trt.core.progress import Reporter

TYPES: dict[TensorDType, str] = {
    "fp32": "f32", "fp16": "f16", "int64": "i64", "int32": "i32", "uint8": "u8",
}  # fmt: skip
"""dtype → OpenVINO's name."""

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}

OLDEST = "2026.4"
"""The lowest version that pyproject.toml allows."""

PROCESS_BYTES = 110_000_000
"""Memory of a process that has imported OpenVINO; measured on Linux."""


def no_bf16() -> UnsupportedError:
    """What asking for bf16 graphs or buffers is answered with."""
    return UnsupportedError(
        "the openvino backend does not run bf16 graphs", fix="build with --dtype fp32 and --inference-precision bf16"
    )


class OpenVinoBuilder:
    """See `backends.build.Builder`."""

    def check(self, dtype: DType, options: OpenVinoOptions) -> None:
        """Refuse bf16 graphs, and where OpenVINO is not here."""
        if dtype == "bf16":
            raise no_bf16()
        import_openvino()

    def estimate(self, weights: int) -> Estimate:
        """A graph is loaded once: its file and OpenVINO's own copy."""
        return Estimate(seconds=None, memory=PROCESS_BYTES + 2 * weights)

    def build(
        self, graphs: GraphSet, root: Path, out: Path, options: OpenVinoOptions, reporter: Reporter
    ) -> EngineEntry:
        """Load every graph once, so that one that does not load is found now; writes nothing."""
        self.check(graphs.dtype, options)
        for graph in graphs.graphs:
            compiled_model(graph, root / graph.file, options)
        key = EngineKey(
            backend="openvino",
            version=openvino_version(),
            target="cpu",
            dtype=graphs.dtype,
            graphs_digest=graphs_digest(graphs, root),
            options=options.as_dict(),
        )
        return EngineEntry(key=key, files={graph.role: graph.file for graph in graphs.graphs})


BUILDERS = {"openvino": OpenVinoBuilder()}


def openvino_version() -> str:
    """Its release, without the number of the build.

    Raises:
        MissingDependencyError: as `import_openvino`.
    """
    return str(import_openvino().__version__.partition("-")[0])


def import_openvino() -> Any:
    """The openvino module.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import openvino  # noqa: TID251
    except ImportError as error:
        raise MissingDependencyError(
            f"the openvino backend needs the package openvino, got: {error}",
            fix=install_command("openvino"),
        ) from None
    return openvino


def compiled_model(graph: GraphSpec, path: Path, options: OpenVinoOptions) -> Any:
    """An `openvino.CompiledModel` of one graph on the CPU.

    Args:
        graph: what the file must declare.
        path: the ONNX file; its external data lies beside it.
        options: how it is loaded.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        InputError: the file asks for what no export does, see `onnx_file`.
        EngineError: the file does not load, or is not the graph described.
    """
    require_plain(graph, path)
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[options.inference_precision],
        "INFERENCE_NUM_THREADS": options.threads or usable_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    try:
        core = import_openvino().Core()
        model = core.compile_model(core.read_model(path), "CPU", settings)
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot load {graph.file}: {first_line(error)}") from None
    for described, found in ((graph.inputs, model.inputs), (graph.outputs, model.outputs)):
        declared = [(sorted(port.get_names()), port.element_type.get_type_name(), _shape(port)) for port in found]
        fits = len(described) == len(declared) and all(
            tensor.name in names and TYPES.get(tensor.dtype) == kind
            and shape == tuple(size if isinstance(size, int) else None for size in tensor.shape)
            for tensor, (names, kind, shape) in zip(described, declared)
        )  # fmt: skip
        if not fits:
            raise EngineError(
                f"{graph.file} is not the graph described: expected {described}, got {declared}",
                fix="rebuild the bundle",
            )
    return model


def _shape(port: Any) -> tuple[int | None, ...]:
    """Dimensions; None: free."""
    return tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape)
