"""Linear layers of a graph in int8 or fp8: QuantizeLinear and DequantizeLinear in front of them, results in fp32.

For ONNX Runtime int8 is what its own quantiser writes: weights with a scale for each output channel, activations uint8
with one scale and zero point a tensor, from the smallest and largest number that came by (Jacob et al. 2018, arXiv
1712.05877). On CPUs with VNNI or AMX it runs such a layer as one integer product. fp8, and int8 for TensorRT, is
written by `backends.qdq`; ONNX Runtime rounds to fp8 as ONNX defines it, and multiplies in fp32.

Which layers: each is quantised alone, and the model's output compared with the one in fp32, on step inputs that its
ranges were not measured on. Layers stay in fp32, the worst first, until the errors of the others together, taken as
independent, are `NOISE_DB` below the output. Then all of those are quantised and measured together, and one more layer
stays in fp32 for as long as that is too much.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lemica_trt.backends.build import Observed
from lemica_trt.backends.onnxruntime.build import compute_as_written, import_onnxruntime
from lemica_trt.backends.qdq import Kind, insert_qdq
from lemica_trt.core.errors import MissingDependencyError, UnsupportedError
from lemica_trt.core.progress import Reporter, count, size
from lemica_trt.core.values import write_bytes
from lemica_trt.ir.engine import LinearLayer
from lemica_trt.ir.graphs import GraphSet, Role

NOISE_DB = 20.0
"""Signal-to-noise ratio of the output that the quantised layers shall leave, dB."""

OPERATORS = ("MatMul", "Gemm")
"""Those of linear layers."""

MAX_BYTES = 1 << 31
"""Largest graph with its weights, in bytes: what one protobuf message holds."""

OPTIONS = {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(OPERATORS)}
"""Of the quantiser: only products with weights, and nothing behind them."""

Inputs = Mapping[str, npt.NDArray[Any]]


class _Layer(NamedTuple):
    """A node that multiplies with weights, and what people call it."""

    node: str
    name: str


def write_quantized(
    kind: Kind,
    source: Path,
    target: Path,
    data: Path,
    observed: Observed,
    threads: int,
    reporter: Reporter,
    *,
    symmetric: bool,
) -> tuple[tuple[LinearLayer, ...], float]:
    """Write a graph with its linear layers quantised, except those that its output is sensitive to.

    Args:
        kind: what to.
        source: the ONNX file, fp32.
        target: where the new one goes, with all weights in it; folders are made.
        data: folder of the source's external data.
        observed: what the ranges and the errors are measured on.
        threads: CPU threads within an operator.
        reporter: told of the progress.
        symmetric: zero points are zero, as TensorRT wants them; those of fp8 always are.

    Returns:
        All linear layers, the largest error first; and the error of the graph that was written, ‖Δ‖²/‖output‖².

    Raises:
        MissingDependencyError: the package onnx is not installed.
        UnsupportedError: there are no linear layers, or all are sensitive.
    """
    with tempfile.TemporaryDirectory(prefix="quantize-") as folder, _quiet():
        quantizer = _Quantizer(kind, source, data, Path(folder), observed, threads, symmetric)
        errors: dict[_Layer, float] = {}
        reporter.stage("quantize", f"{count(len(quantizer.layers), 'linear layer')}, each alone in {kind}")
        for number, layer in enumerate(quantizer.layers):
            reporter.advance(number, len(quantizer.layers))
            errors[layer] = quantizer.error([layer])
        ordered = sorted(errors, key=lambda layer: -errors[layer])
        kept, content, error = _chosen(quantizer, ordered, len(sensitive(list(errors.values()))))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(content, target)
    layers = tuple(
        LinearLayer(name=layer.name, precision="fp32" if number < kept else kind, error=errors[layer])
        for number, layer in enumerate(ordered)
    )
    return layers, error


def _chosen(quantizer: _Quantizer, ordered: Sequence[_Layer], fewest: int) -> tuple[int, bytes, float]:
    """How many layers stay in fp32, the graph, and its error: the fewest, from `fewest` on, that leave little enough.

    Raises:
        UnsupportedError: not even the last layer may be quantised.
    """
    for kept in range(fewest, len(ordered)):
        content: bytes = quantizer.quantized(ordered[kept:]).SerializeToString(deterministic=True)
        error = quantizer.error_of(content)
        if error <= 10 ** (-NOISE_DB / 10):
            return kept, content, error
    raise UnsupportedError(
        f"--quantize {quantizer.kind}: each of {count(len(ordered), 'linear layer')} alone leaves the output less than "
        f"{NOISE_DB:g} dB",
        fix="leave it out",
    )


def sensitive(errors: Sequence[float]) -> list[float]:
    """The errors of layers that stay in fp32: the fewest, the largest, so that the sum of the others is small enough.

    Args:
        errors: ‖Δ‖²/‖output‖² of each layer.
    """
    ordered, allowed = sorted(errors, reverse=True), 10 ** (-NOISE_DB / 10)
    kept = next((number for number in range(len(ordered)) if sum(ordered[number:]) <= allowed), len(ordered))
    return ordered[:kept]


def observed_digest(observed: Mapping[Role, Observed]) -> str:
    """SHA-256 (hex) of what decides which layers are quantised and how: `EngineKey.observed`."""
    parts = [f"{role} {observed[role].digest}\n" for role in sorted(observed)]
    return hashlib.sha256("".join([f"{NOISE_DB} dB\n", *parts]).encode()).hexdigest()


def require_quantizable(graphs: GraphSet, root: Path) -> None:
    """Refuse graphs that are too large for one file; and all, where a package is missing.

    Raises:
        MissingDependencyError, UnsupportedError: so it is.
    """
    import_onnx()
    import_onnxruntime()
    for graph in graphs.graphs:
        if graph.dit == "whole":
            require_size([root / name for name in (graph.file, *graph.data_files)])


def require_size(files: Sequence[Path]) -> None:
    """Raise UnsupportedError where a graph with its weights is too large for one file.

    Args:
        files: the ONNX file and its external data.
    """
    total = sum(file.stat().st_size for file in files)
    if total >= MAX_BYTES:
        raise UnsupportedError(
            f"--quantize: expected a graph of less than {size(MAX_BYTES)} with its weights, got {size(total)}",
            fix="leave it out",
        )


def import_onnx() -> Any:
    """The onnx module.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnx
        import onnx.external_data_helper
    except ImportError as error:
        raise MissingDependencyError(
            f"--quantize needs the package onnx, got: {error}", fix="pip install onnx"
        ) from None
    return onnx


class _Quantizer:
    """One graph, and how much its output changes where layers of it are quantised.

    Attributes:
        kind: what linear layers are quantised to.
        layers: of the graph, in its order.
    """

    def __init__(
        self, kind: Kind, source: Path, data: Path, folder: Path, observed: Observed, threads: int, symmetric: bool
    ) -> None:
        self.kind, self._symmetric = kind, symmetric or kind == "fp8"
        onnx, self._ort = import_onnx(), import_onnxruntime()
        self._folder, self._observed, self._threads = folder, observed, threads
        model = onnx.load(source, load_external_data=False)
        onnx.external_data_helper.load_external_data_for_model(model, str(data))
        self.layers = list(_layers(model))
        if not self.layers:
            raise UnsupportedError(f"--quantize {kind}: the graph has no linear layers", fix="leave it out")
        plain = folder / "plain.onnx"
        onnx.save(model, plain)
        self._inferred, self._ranges = self._measured(plain)
        self._expected = self._outputs(plain)

    def _measured(self, plain: Path) -> tuple[Any, Any]:
        """The graph with all shapes, and the ranges of what goes into its linear layers."""
        from onnxruntime import quantization  # noqa: TID251
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer  # noqa: TID251

        calibrator = quantization.create_calibrator(
            str(plain), list(OPERATORS), augmented_model_path=str(self._folder / "augmented.onnx"),
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )  # fmt: skip
        calibrator.infer_session = self._session(calibrator.augmented_model_path, optimized=False)
        waiting = iter(self._observed.ranges)

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> Inputs | None:
                return next(waiting, None)

        calibrator.collect_data(Reader())
        return load_model_with_shape_infer(plain), calibrator.compute_data()

    def quantized(self, layers: Sequence[_Layer]) -> Any:
        """An `onnx.ModelProto` with some layers quantised."""
        return (self._with_qdq if self._symmetric else self._by_onnxruntime)({layer.node for layer in layers})

    def _with_qdq(self, nodes: Set[str]) -> Any:
        """The same by `backends.qdq`."""
        model = copy.deepcopy(self._inferred)
        ranges = {name: found.range_value for name, found in self._ranges.data.items()}
        insert_qdq(model, nodes, {name: float(np.abs(both).max()) for name, both in ranges.items()}, self.kind)
        del model.metadata_props[:], model.graph.value_info[:]
        return model

    def _by_onnxruntime(self, nodes: Set[str]) -> Any:
        """The same by ONNX Runtime's quantiser, in int8."""
        from onnxruntime.quantization import QuantType  # noqa: TID251
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer  # noqa: TID251

        quantizer = QDQQuantizer(
            copy.deepcopy(self._inferred), True, False, QuantType.QInt8, QuantType.QUInt8, self._ranges,
            sorted(nodes), [], list(OPERATORS), dict(OPTIONS),
        )  # fmt: skip
        quantizer.quantize_model()
        model = quantizer.model.model
        del model.metadata_props[:]
        _keep_inputs(model, nodes)
        return model

    def error(self, layers: Sequence[_Layer]) -> float:
        """‖Δ‖²/‖output‖² where some layers are quantised, the mean over inputs."""
        return self.error_of(self.quantized(layers).SerializeToString())

    def error_of(self, model: bytes) -> float:
        """The same of a graph."""
        found = self._outputs(model)
        shares = [np.square(a - b).sum() / np.square(b).sum() for a, b in zip(found, self._expected)]
        return float(np.mean(shares))

    def _outputs(self, model: Path | bytes) -> list[npt.NDArray[np.float64]]:
        """The output that is compared, of each input."""
        session, output = self._session(model), self._observed.output
        return [session.run([output], dict(given))[0].astype(np.float64) for given in self._observed.errors]

    def _session(self, model: Path | str | bytes, *, optimized: bool = True) -> Any:
        """An `onnxruntime.InferenceSession` with the threads that were asked for."""
        settings = self._ort.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = self._threads, 1
        compute_as_written(settings, self.kind)
        settings.log_severity_level = 4
        if not optimized:
            settings.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return self._ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), settings, providers=["CPUExecutionProvider"]
        )


def _layers(model: Any) -> Iterator[_Layer]:
    """Products with weights."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    behind = {name: node for node in model.graph.node if node.op_type == "Add" for name in node.input}
    for node in model.graph.node:
        if node.op_type in OPERATORS and node.input[1] in weights:
            following = behind.get(node.output[0])
            names = [*node.input[1:], *(following.input if following is not None else ())]
            yield _Layer(node.name, _readable(names, node.name))


def _keep_inputs(model: Any, quantized: Set[str]) -> None:
    """Give back its own input to each node that is not quantised: the quantiser puts the rounded tensor everywhere."""
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    dequantized = {
        node.output[0]: sources[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in sources
    }
    for node in model.graph.node:
        if node.name not in quantized:
            node.input[:] = [dequantized.get(name, name) for name in node.input]


def _readable(names: Sequence[str], otherwise: str) -> str:
    """The path of a layer in the transformer, from the name of its weights or bias."""
    for name in names:
        path, _, last = name.rpartition(".")
        if path and last in ("weight", "bias"):
            return path.removeprefix("dit.").removeprefix("transformer.")
    return otherwise


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to optimise the graph first: its own operators would hide the layers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
