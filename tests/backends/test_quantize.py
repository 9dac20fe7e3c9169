"""Linear layers in int8 on ONNX Runtime: which, what they cost, and that nothing else changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from quantize_toy import observed, write

from lemica_trt.backends.build import build, check, quantize, require_quantizable
from lemica_trt.backends.machine import has_vnni
from lemica_trt.backends.onnxruntime.build import open_session
from lemica_trt.backends.onnxruntime.options import OrtOptions
from lemica_trt.backends.onnxruntime.quantize import NOISE_DB, sensitive
from lemica_trt.backends.options import options_from_key
from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.ir.engine import EngineBuild, EngineEntry, LinearLayer
from lemica_trt.ir.graphs import GraphSet

pytestmark = pytest.mark.cpu

ALLOWED = 10 ** (-NOISE_DB / 10)
INT8 = {"quantize": "int8", "threads": 1}


def quantized(folder: Path, **toy: Any) -> tuple[GraphSet, EngineEntry, onnx.ModelProto]:
    graphs = write(folder, **toy)
    plain = build("onnxruntime", graphs, folder, folder, {"threads": 1})
    entry = quantize(plain, graphs, folder, folder, INT8, observed(), Quiet())
    return graphs, entry, onnx.load(folder / entry.files["full"])


def outputs(graphs: GraphSet, path: Path, root: Path) -> list[Any]:
    session = open_session(graphs.graph("full"), path, OrtOptions(threads=1, quantize="int8"), data=root / "onnx")
    return [session.run(["output"], given)[0].astype(np.float64) for given in observed()["full"].errors]


def share(found: list[Any], expected: list[Any]) -> float:
    return float(np.mean([np.square(a - b).sum() / np.square(b).sum() for a, b in zip(found, expected)]))


@pytest.mark.parametrize("data", [False, True])
def test_layers_are_in_int8_and_their_error_is_what_was_measured(data: bool, tmp_path: Path) -> None:
    graphs, entry, model = quantized(tmp_path, data=data)
    layers = entry.builds["full"].layers
    assert isinstance(layers, tuple) and {layer.name for layer in layers} == {"first", "second", "third"}
    assert [layer.precision for layer in layers] == ["int8"] * 3
    assert [layer.error for layer in layers] == sorted((layer.error for layer in layers), reverse=True)
    weights = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    assert [tensor.data_type for tensor in weights.values()] == [TensorProto.INT8] * 3
    assert not any(tensor.external_data for tensor in model.graph.initializer), "the exported file's data stay its own"
    found = outputs(graphs, tmp_path / entry.files["full"], tmp_path)
    error = share(found, outputs(graphs, tmp_path / graphs.graph("full").file, tmp_path))
    assert error == pytest.approx(sum(layer.error for layer in layers), rel=0.5) and 0 < error < ALLOWED
    assert entry.builds["full"].error == pytest.approx(error, rel=0.05), "what is written was measured"
    assert entry.quantized == ("full",) and entry.precision == "int8"
    assert entry.sources == {"full": graphs.graph("full").file} and set(entry.paths) == {
        graphs.graph("full").file, entry.files["full"],
    }  # fmt: skip
    assert (entry.key.options["quantize"], entry.key.options["threads"]) == ("int8", 1)


def test_the_layer_that_costs_most_stays_as_it_was(tmp_path: Path) -> None:
    """The outlier takes most levels of the range: that product alone would be above what is allowed."""
    graphs, entry, model = quantized(tmp_path, outlier=3000.0, part=1.0)
    layers = entry.builds["full"].layers
    assert isinstance(layers, tuple)
    assert (layers[0].name, layers[0].precision) == ("third", "fp32")
    assert layers[0].error > ALLOWED > sum(layer.error for layer in layers[1:])
    (third,) = [node for node in model.graph.node if node.name == "third"]
    assert list(third.input) == ["first", "val_3"], "its input is not rounded, and so are not its weights"
    found = outputs(graphs, tmp_path / entry.files["full"], tmp_path)
    assert share(found, outputs(graphs, tmp_path / graphs.graph("full").file, tmp_path)) < ALLOWED


def test_a_layer_that_stays_reads_what_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers share an input, one of them stays in fp32: the rounded input is not its own."""
    keep = "lemica_trt.backends.onnxruntime.quantize.sensitive"
    monkeypatch.setattr(keep, lambda errors: sorted(errors, reverse=True)[:1])
    _, entry, model = quantized(tmp_path)
    (layer,) = [layer for layer in entry.builds["full"].layers or () if layer.precision == "fp32"]
    assert layer.name == "second", "of the largest part of the output"
    (node,) = [node for node in model.graph.node if node.name == "second"]
    (other,) = [node for node in model.graph.node if node.name == "gemm"]
    assert list(node.input) == ["x", "val_2"] and other.input[0] != "x"


def test_one_more_layer_stays_while_all_others_together_are_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of single layers need not add up: here they are taken to be nothing at all."""
    monkeypatch.setattr("lemica_trt.backends.onnxruntime.quantize.sensitive", lambda errors: [])
    _, entry, model = quantized(tmp_path, outlier=3000.0, part=1.0)
    layers, error = entry.builds["full"].layers, entry.builds["full"].error
    assert isinstance(layers, tuple) and isinstance(error, float)
    assert [layer.precision for layer in layers] == ["fp32", "int8", "int8"]
    assert error < ALLOWED < layers[0].error
    (third,) = [node for node in model.graph.node if node.name == "third"]
    assert list(third.input) == ["first", "val_3"]


def test_products_are_exact_on_cpus_without_vnni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session option of ONNX Runtime, which takes time: without it sums of products are held in 16 bits there."""
    graphs = write(tmp_path)
    for quantize_to, vnni, expected in (("int8", False, "1"), ("int8", True, None), ("none", False, None)):
        monkeypatch.setattr("lemica_trt.backends.onnxruntime.build.has_vnni", lambda vnni=vnni: vnni)
        options = OrtOptions(threads=1, quantize=quantize_to)  # type: ignore[arg-type]
        session = open_session(graphs.graph("full"), tmp_path / "onnx/full.onnx", options, data=tmp_path / "onnx")
        try:
            found = session.get_session_options().get_session_config_entry("session.x64quantprecision")
        except RuntimeError:  # it is not set
            found = None
        assert found == expected


def test_the_weights_of_a_cpu_without_vnni_give_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, entry, _ = quantized(tmp_path)
    found = []
    for vnni in (False, True):
        monkeypatch.setattr("lemica_trt.backends.onnxruntime.build.has_vnni", lambda vnni=vnni: vnni)
        session = open_session(
            graphs.graph("full"), tmp_path / entry.files["full"], OrtOptions(threads=1, quantize="int8"),
            data=tmp_path / "onnx",
        )  # fmt: skip
        found.append([session.run(["output"], given)[0] for given in observed()["full"].errors])
    if has_vnni():  # else the second one is wrong
        assert all(np.array_equal(a, b) for a, b in zip(*found))
    assert share(found[0], outputs(graphs, tmp_path / graphs.graph("full").file, tmp_path)) < ALLOWED


def test_the_same_inputs_give_the_same_bytes_and_others_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, _ = quantized(tmp_path / "a")
    graphs, second, _ = quantized(tmp_path / "b")
    assert first == second
    assert (tmp_path / "a" / first.files["full"]).read_bytes() == (tmp_path / "b" / second.files["full"]).read_bytes()
    others = {"full": observed()["full"]._replace(ranges=observed()["full"].errors)}
    plain = build("onnxruntime", graphs, tmp_path / "b", tmp_path / "b", {"threads": 1})
    third = quantize(plain, graphs, tmp_path / "b", tmp_path / "b", INT8, others, Quiet())
    assert third.key.digest != second.key.digest and third.files != second.files
    assert plain.key.digest not in (second.key.digest, third.key.digest) and plain.quantized == ()
    monkeypatch.setattr("lemica_trt.backends.onnxruntime.quantize.NOISE_DB", 10.0)
    fourth = quantize(plain, graphs, tmp_path / "b", tmp_path / "b", INT8, observed(), Quiet())
    assert fourth.key.digest != second.key.digest, "another bound, other layers"


@given(st.lists(st.floats(0, 0.03, allow_subnormal=False), min_size=1, max_size=7))
def test_the_fewest_layers_stay_that_leave_little_enough(errors: list[float]) -> None:
    kept = sensitive(errors)
    fewest = next(
        count
        for count in range(len(errors) + 1)
        for rest in itertools.combinations(sorted(errors, reverse=True), len(errors) - count)
        if sum(rest) <= ALLOWED
    )
    assert len(kept) == fewest and kept == sorted(errors, reverse=True)[:fewest]


def test_keys_of_engines_that_are_not_quantised_do_not_know_the_option(tmp_path: Path) -> None:
    plain = build("onnxruntime", write(tmp_path), tmp_path, tmp_path, {"quantize": "none", "threads": 1})
    assert set(plain.key.options) == {"optimization", "provider", "threads"}
    assert options_from_key(plain.key) == OrtOptions(threads=1)
    assert b"observed" not in msgspec.json.encode(plain.key) and b"layers" not in msgspec.json.encode(plain)
    assert plain.precision == "fp32"


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = write(tmp_path)
    with pytest.raises(UnsupportedError, match="--quantize int8 is of fp32 graphs on the CPU, got fp16 on cpu"):
        check("onnxruntime", "fp16", INT8)
    with pytest.raises(UsageError, match="openvino has no option --quantize"):
        check("openvino", "fp32", {"quantize": "int8"})
    with pytest.raises(UsageError, match="--quantize must be one of none, int8, fp8, got 'fp4'"):
        check("onnxruntime", "fp32", {"quantize": "fp4"})
    with pytest.raises(UsageError, match="engines are quantised once they are built"):
        build("onnxruntime", graphs, tmp_path, tmp_path, INT8)
    with pytest.raises(ValueError, match="layer x: error must be finite"):
        LinearLayer(name="x", precision="int8", error=float("nan"))
    plain = build("onnxruntime", graphs, tmp_path, tmp_path, {"threads": 1})
    layer = LinearLayer(name="x", precision="int8", error=0.0)
    with pytest.raises(ValueError, match="need the option quantize in their key"):
        msgspec.structs.replace(plain, builds={"full": EngineBuild(layers=(layer,))})
    with pytest.raises(ValueError, match="error must be finite"):
        EngineBuild(error=float("inf"))
    monkeypatch.setattr("lemica_trt.backends.onnxruntime.quantize.NOISE_DB", 200.0)
    with pytest.raises(UnsupportedError, match="each of 3 linear layers alone leaves the output less than 200 dB"):
        quantize(plain, graphs, tmp_path, tmp_path, INT8, observed(), Quiet())
    monkeypatch.setattr("lemica_trt.backends.onnxruntime.quantize.MAX_BYTES", 1000)
    with pytest.raises(UnsupportedError, match=r"expected a graph of less than 1\.0 kB with its weights"):
        require_quantizable("onnxruntime", graphs, tmp_path)
