"""Linear layers in fp8: what is written, what it computes, and engines of TensorRT for RTX that multiply so."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from quantize_toy import ROWS, WIDTH, observed, write

from lemica_trt.backends.build import build, check, quantize
from lemica_trt.backends.machine import Gpu
from lemica_trt.backends.onnxruntime.build import open_session
from lemica_trt.backends.onnxruntime.options import OrtOptions
from lemica_trt.backends.onnxruntime.quantize import NOISE_DB
from lemica_trt.backends.qdq import LARGEST, Kind, insert_qdq
from lemica_trt.backends.tensorrt.build import BUILDERS, TensorRTBuilder
from lemica_trt.backends.tensorrt.inspect import check_layers
from lemica_trt.backends.tensorrt.options import RtxOptions, TensorRTOptions
from lemica_trt.backends.tensorrt.program import Layers
from lemica_trt.backends.tensorrt.protocol import BuildJob, ProbeResult, WorkerError
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.ir.graphs import GraphSet

pytestmark = pytest.mark.cpu

FP8 = {"quantize": "fp8", "threads": 1}
RTX = {"builder_optimization_level": 0, "compute_capabilities": "8.9"}
OBSERVED = observed()["full"]

real = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed: pip install tensorrt-rtx"
)

Array = npt.NDArray[Any]


def rounded(values: Array, largest: Array, kind: Kind) -> Array:
    """The nearest multiples of a scale that the kind has."""
    scale = (largest / LARGEST[kind]).astype(np.float32)
    shares = np.clip(values / scale, -LARGEST[kind], LARGEST[kind])
    whole = np.rint(shares) if kind == "int8" else shares.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (whole * scale).astype(np.float32)


def expected(model: onnx.ModelProto, x: Array, kind: Kind) -> Array:
    """The toy with all its layers quantised, in numpy."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    w1, b1, w2, w3, b3 = tensors.values()
    firsts = [given["x"] @ w1.T + b1 for given in OBSERVED.ranges]
    most_x = np.abs([given["x"] for given in OBSERVED.ranges]).max()
    input_x = rounded(x, most_x, kind)
    first = input_x @ rounded(w1, np.abs(w1).max(1, keepdims=True), kind).T + b1
    second = input_x @ rounded(w2, np.abs(w2).max(0, keepdims=True), kind)
    third = rounded(first, np.abs(firsts).max(), kind) @ rounded(w3, np.abs(w3).max(0, keepdims=True), kind)
    found: Array = third + b3 + second
    return found


def run(model: bytes, x: Array) -> Array:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    found: Array = onnxruntime.InferenceSession(model, settings).run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_graph_computes_what_rounding_both_operands_gives(kind: Kind, tmp_path: Path) -> None:
    graphs = write(tmp_path)
    plain = onnx.load(tmp_path / graphs.graph("full").file)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph.initializer}
    w1, b1, *_ = tensors.values()
    largest = {
        "x": float(np.abs([given["x"] for given in OBSERVED.ranges]).max()),
        "first": float(np.abs([given["x"] @ w1.T + b1 for given in OBSERVED.ranges]).max()),
    }
    model = onnx.ModelProto.FromString(plain.SerializeToString())
    insert_qdq(model, {"gemm", "second", "third"}, largest, kind)
    onnx.checker.check_model(model)
    x = np.random.default_rng(7).standard_normal((ROWS, WIDTH)).astype(np.float32) * 2
    x[0, 0] = 1000.0  # beyond the range: clipped
    found, exact = run(model.SerializeToString(), x), expected(plain, x, kind)
    assert np.abs(found - run(plain.SerializeToString(), x)).max() > 0.01
    # A sum in another order may round an operand of the next product to its neighbour.
    assert np.square(found - exact).sum() < 1e-4 * np.square(exact).sum()
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    wanted = TensorProto.FLOAT8E4M3FN if kind == "fp8" else TensorProto.INT8
    assert {kinds[f"{name}_quantized"] for name in ("dit.transformer.first.weight", "val_2", "val_3")} == {wanted}
    assert "val_2" not in kinds, "weights are in the graph once"
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 2, "x once, for two products"


def test_what_is_zero_everywhere_stays_zero(tmp_path: Path) -> None:
    graphs = write(tmp_path)
    model = onnx.load(tmp_path / graphs.graph("full").file)
    for tensor in model.graph.initializer:
        if tensor.name == "val_2":
            tensor.raw_data = bytes(len(tensor.raw_data))
    before = run(model.SerializeToString(), OBSERVED.errors[0]["x"])
    insert_qdq(model, {"second"}, {"x": 0.0}, "fp8")
    assert np.array_equal(run(model.SerializeToString(), OBSERVED.errors[0]["x"]), before)


def quantized(folder: Path, **toy: Any) -> tuple[GraphSet, Any]:
    graphs = write(folder, **toy)
    plain = build("onnxruntime", graphs, folder, folder, {"threads": 1})
    return graphs, quantize(plain, graphs, folder, folder, FP8, observed(), Quiet())


def test_the_graph_that_onnxruntime_runs_is_what_was_measured(tmp_path: Path) -> None:
    """Its error, and the same bytes where the same is quantised again."""
    graphs, entry = quantized(tmp_path, data=True)
    build_of = entry.builds["full"]
    assert [layer.precision for layer in build_of.layers] == ["fp8"] * 3 and entry.precision == "fp8"
    graph = graphs.graph("full")
    sessions = [
        open_session(graph, tmp_path / file, OrtOptions(threads=1, quantize=kind), data=tmp_path / "onnx")
        for file, kind in ((entry.files["full"], "fp8"), (graph.file, "none"))
    ]
    outputs = [[s.run(["output"], dict(g))[0].astype(np.float64) for g in OBSERVED.errors] for s in sessions]
    error = np.mean([np.square(a - b).sum() / np.square(b).sum() for a, b in zip(*outputs)])
    assert build_of.error == pytest.approx(error, rel=1e-6) and 0 < error < 10 ** (-NOISE_DB / 10)
    (tmp_path / "again").mkdir()
    again = quantized(tmp_path / "again", data=True)[1]
    assert again == entry
    assert (tmp_path / "again" / again.files["full"]).read_bytes() == (tmp_path / entry.files["full"]).read_bytes()


@real
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_an_engine_multiplies_in_what_was_asked_for(kind: Kind, tmp_path: Path) -> None:
    """Built for real; the file itself says what its products multiply."""
    graphs = write(tmp_path)
    plain = build("tensorrt-rtx", graphs, tmp_path, tmp_path, RTX)
    entry = quantize(plain, graphs, tmp_path, tmp_path, {**RTX, "quantize": kind}, observed(), Quiet())
    found = entry.builds["full"]
    assert found.precisions == {kind: 3} and plain.builds["full"].precisions == {"fp32": 3}
    assert found.engine_precisions is not None and found.engine_precisions.get(kind, 0) >= 2, "two may be one product"
    assert "fp32" not in found.engine_precisions
    assert (plain.builds["full"].engine_precisions or {}).keys() == {"fp32"}
    assert entry.sources == plain.files and entry.key.digest != plain.key.digest
    assert {path.suffix for path in (tmp_path / entry.files["full"]).parent.iterdir()} == {".engine", ".json"}
    assert isinstance(found.layers, tuple) and {layer.precision for layer in found.layers} == {kind}


def test_an_engine_that_lost_its_precision_is_refused(tmp_path: Path) -> None:
    graph = write(tmp_path).graph("full")
    job = BuildJob(
        module="tensorrt_rtx", graph=graph, dtype="fp32", max_batch=1, options=RtxOptions(quantize="fp8"),
        onnx="", engine="", timing_cache=None,
    )  # fmt: skip
    check_layers(job, {"fp8": 3}, Layers({"fp8": 2}, 0))
    with pytest.raises(WorkerError) as lost:
        check_layers(job, {"fp8": 3}, Layers({"fp32": 3}, 0))
    assert lost.value.answer.what == "no layer of the engine is in fp8: fp32 (3)"
    check_layers(msgspec.structs.replace(job, module="tensorrt"), {"fp8": 3}, Layers({"fp32": 3}, 0))


def test_what_a_gpu_cannot_multiply_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    here: dict[str, ProbeResult] = {}
    monkeypatch.setattr(TensorRTBuilder, "_probe", lambda self: here["now"])

    def refused(backend: str, gpu: str | None, **options: Any) -> str | None:
        found = None if gpu is None else Gpu(name="GPU", compute_capability=gpu, driver="13.0")
        here["now"] = ProbeResult(version="1", gpu=found)
        try:
            check(backend, "fp32", options)
        except UnsupportedError as error:
            return f"{error.what} → {error.fix}"
        return None

    fitting = "--compute-capabilities 8.9,12.0,12.1, or --quantize int8"
    needs = "--quantize fp8 needs compute capability 8.9 or later, these engines are for"
    assert refused("tensorrt-rtx", None, quantize="fp8") == f"{needs} sm_80+ → {fitting}"
    named = {"quantize": "fp8", "compute_capabilities": "8.6,12.0"}
    assert refused("tensorrt-rtx", None, **named) == f"{needs} sm_86,sm_120 → {fitting}"
    assert refused("tensorrt-rtx", None, quantize="fp8", compute_capabilities="8.9,12.1") is None
    assert refused("tensorrt-rtx", "8.6", quantize="fp8", compute_capabilities="current") is not None
    assert refused("tensorrt-rtx", None, quantize="int8") is None
    assert refused("tensorrt", "8.6", quantize="fp8") == f"{needs} sm_86 → --quantize int8"
    assert refused("tensorrt", "9.0", quantize="fp8") is None and refused("tensorrt", "10.0", quantize="fp8") is None
    ampere = {"quantize": "fp8", "hardware_compatibility_level": "ampere_plus"}
    assert "sm_80+" in str(refused("tensorrt", "9.0", **ampere))
    for options in (RtxOptions(quantize="fp8", compute_capabilities="8.9"), TensorRTOptions(quantize="fp8")):
        backend = "tensorrt-rtx" if isinstance(options, RtxOptions) else "tensorrt"
        with pytest.raises(UnsupportedError, match="--quantize fp8 is of fp32 graphs, got bf16"):
            BUILDERS[backend].check("bf16", options)
        with pytest.raises(UsageError, match="engines are quantised once they are built"):
            BUILDERS[backend].build(None, Path(), Path(), options, Quiet())  # type: ignore[arg-type]


def test_engines_of_several_backends_are_of_one_rounding() -> None:
    """Plans are of the engines of one precision: fp8 is rounded alike everywhere, int8 is not."""

    def request(kind: str, *backends: str) -> BuildRequest:
        return BuildRequest(backends=backends, options={"quantize": kind})

    request("fp8", "onnxruntime", "tensorrt-rtx").check(None, finished=True)
    for kind, other in (("int8", "tensorrt-rtx"), ("fp8", "openvino")):
        with pytest.raises(UsageError, match=f"expected one backend.* got {kind} and onnxruntime, {other}"):
            request(kind, "onnxruntime", other).check(None, finished=True)
