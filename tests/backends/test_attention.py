"""Attention as one operator of ONNX Runtime: the same numbers, in memory that does not grow with the scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest
from attention_memory import IN_PARTS, in_a_process
from onnx import TensorProto, helper, numpy_helper

from lemica_trt.backends.base import open_backend
from lemica_trt.backends.build import build
from lemica_trt.backends.onnx_file import require_plain
from lemica_trt.backends.onnxruntime.attention import ATTENTION, write_fused
from lemica_trt.core.errors import InputError, MissingDependencyError
from lemica_trt.ir.engine import EngineBuild, EngineEntry
from lemica_trt.ir.graphs import GraphSet, GraphSpec, TensorSpec, step_layout

pytestmark = pytest.mark.cpu

BATCH, HEADS, ROWS, COLUMNS, WIDTH = 2, 3, 5, 7, 4
LOWEST = float(np.finfo(np.float32).min)
node = helper.make_node


class Written:
    """One attention as a graph `full`, with what it computes in numpy.

    Args:
        layout: how keys are transposed: `plain`, `flat` (through three dimensions), or `tokens first`.
        scaling: of `both` sides, the `scores`, the `queries` by a vector, or `none`.
        bias: its shape; None: there is none.
        lowest: what a masked key has in a bias.
        guarded: NaN of a row without keys is replaced by 0.
    """

    def __init__(
        self,
        *,
        layout: str = "plain",
        scaling: str = "both",
        bias: tuple[int, ...] | None = None,
        lowest: float = LOWEST,
        guarded: bool = False,
        data: bool = False,
    ) -> None:
        self.random, self.data = np.random.default_rng(0), data
        self.weights: dict[str, Any] = {"half": np.float32([0.5]), "vector": np.float32([1, 2, 3, 4])}
        self.inputs = {
            "q": self._normal(BATCH, HEADS, ROWS, WIDTH),
            "k": self._normal(BATCH, HEADS, COLUMNS, WIDTH),
            "v": self._normal(BATCH, HEADS, COLUMNS, WIDTH + 2),
        }
        q, k, v = (self.inputs[name].astype(np.float64) for name in "qkv")
        if layout == "tokens first":
            self.inputs["k"] = np.ascontiguousarray(self.inputs["k"].transpose(0, 2, 1, 3))
        self.nodes = list(self._keys(layout))
        scale = {"both": 0.25, "scores": 0.5, "queries": self.weights["vector"], "none": 1.0}[scaling]
        scores = self._scores(scaling)
        expected = q * scale @ k.swapaxes(2, 3)
        if bias is not None:
            self.inputs["bias"] = self._bias(bias, lowest)
            self.nodes.append(node("Add", [scores, "bias"], ["biased"]))
            scores, expected = "biased", expected + self.inputs["bias"]
        self.nodes.append(node("Softmax", [scores], ["weights"], axis=-1))
        self.weights["zero"] = np.float32(0)
        if guarded:
            self.nodes += [node("IsNaN", ["weights"], ["nan"]), node("Where", ["nan", "zero", "weights"], ["clean"])]
        self.nodes.append(node("MatMul", ["clean" if guarded else "weights", "v"], ["y"]))
        self.weights = {name: self.weights[name] for name in {name for made in self.nodes for name in made.input}
                        if name in self.weights}  # fmt: skip
        with np.errstate(invalid="ignore"):
            exponents = np.exp(expected - expected.max(axis=-1, keepdims=True))
            self.expected = np.nan_to_num(exponents / exponents.sum(axis=-1, keepdims=True)) @ v

    def _normal(self, *shape: int) -> Any:
        return self.random.standard_normal(shape).astype(np.float32)

    def _keys(self, layout: str) -> Any:
        if layout == "flat":
            self.weights |= {"three": np.int64([-1, COLUMNS, WIDTH]), "four": np.int64([-1, HEADS, WIDTH, COLUMNS])}
            yield node("Reshape", ["k", "three"], ["k_flat"])
            yield node("Transpose", ["k_flat"], ["k_turned"], perm=[0, 2, 1])
            yield node("Reshape", ["k_turned", "four"], ["columns"])
        else:
            yield node("Transpose", ["k"], ["columns"], perm=[0, 1, 3, 2] if layout == "plain" else [0, 2, 3, 1])

    def _scores(self, scaling: str) -> str:
        q, k = "q", "columns"
        if scaling in ("both", "queries"):
            self.nodes.append(node("Mul", ["q", "half" if scaling == "both" else "vector"], ["rows"]))
            q = "rows"
        if scaling == "both":
            self.nodes.append(node("Mul", ["columns", "half"], ["scaled"]))
            k = "scaled"
        self.nodes.append(node("MatMul", [q, k], ["scores"]))
        if scaling == "scores":
            self.nodes.append(node("Mul", ["scores", "half"], ["scaled_scores"]))
        return "scaled_scores" if scaling == "scores" else "scores"

    def _bias(self, shape: tuple[int, ...], lowest: float) -> Any:
        made = self._normal(*shape)
        made[..., -2:] = lowest
        return made

    def write(self, folder: Path) -> GraphSet:
        """The ONNX file below a folder, and its description; the batch is free."""

        def spec(name: str, array: Any) -> TensorSpec:
            free = ("batch",) if len(array) == BATCH else (len(array),)
            return TensorSpec(name=name, dtype="fp32", shape=(*free, *array.shape[1:]))

        inputs = tuple(spec(name, array) for name, array in self.inputs.items())
        output = spec("y", self.expected)
        infos = [
            helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.shape) for tensor in (*inputs, output)
        ]
        weights = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        body = helper.make_graph(self.nodes, "g", infos[:-1], infos[-1:], weights)
        model = onnx.shape_inference.infer_shapes(
            helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        )
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        data = {"save_as_external_data": True, "location": "full.data", "size_threshold": 0} if self.data else {}
        onnx.save_model(model, str(folder / "onnx/full.onnx"), **data)
        graph = GraphSpec(
            role="full", file="onnx/full.onnx", inputs=inputs, outputs=(output,), opset=20,
            data_files=("onnx/full.data",) if self.data else (),
        )  # fmt: skip
        layout = step_layout(latent_shape=(1,), latent_history=1, output_history=1)
        return GraphSet(dtype="fp32", layout=layout, max_batch=BATCH, graphs=(graph,))


def result_of(entry: EngineEntry, graphs: GraphSet, folder: Path, inputs: dict[str, Any]) -> Any:
    backend, (graph,) = open_backend(entry.key), graphs.graphs
    engine = backend.load(graph, folder / entry.files["full"])
    buffers = {}
    for spec in (*graph.inputs, *graph.outputs):
        buffers[spec.name] = backend.empty(spec.at(BATCH), spec.dtype)
        if spec.name in inputs:
            backend.upload(inputs[spec.name], buffers[spec.name])
    engine.bind(buffers, once=True).run()
    return backend.download(buffers["y"])


KEYS, EVERY = (BATCH, 1, 1, COLUMNS), (1, HEADS, ROWS, COLUMNS)
FUSED: dict[str, dict[str, Any]] = {
    "scaled on both sides": {},
    "scaled scores": {"scaling": "scores", "layout": "tokens first"},
    "unscaled": {"scaling": "none", "layout": "flat"},
    "scaled by a vector": {"scaling": "queries"},
    "mask of keys": {"bias": KEYS, "layout": "flat"},
    "mask of keys with -inf": {"bias": KEYS, "lowest": -np.inf, "guarded": True},
    "one mask of keys": {"bias": (1, 1, 1, COLUMNS)},
    "bias of heads": {"bias": EVERY},
    "bias of keys and heads": {"bias": (1, HEADS, 1, COLUMNS)},
    "bias of batches": {"bias": (BATCH, 1, ROWS, COLUMNS), "scaling": "scores"},
    "guarded bias": {"bias": EVERY, "guarded": True},
    "weights in another file": {"bias": EVERY, "data": True, "layout": "flat"},
}


@pytest.mark.parametrize("name", FUSED)
def test_it_is_the_same_attention(name: str, tmp_path: Path) -> None:
    case, told = Written(**FUSED[name]), MagicMock()
    graphs = case.write(tmp_path)
    entry = build("onnxruntime", graphs, tmp_path, tmp_path, {"threads": 1}, told)
    assert entry.files == {"full": f"engines/onnxruntime-{entry.key.digest[:16]}/full.onnx"}
    assert entry.builds == {"full": EngineBuild(attentions=1, fused_attention=1)}
    told.note.assert_called_once_with("full: 1 of 1 attentions fused")
    model = onnx.load(tmp_path / entry.files["full"], load_external_data=False)
    operators = [made.op_type for made in model.graph.node]
    assert operators.count("MultiHeadAttention") == 1 and not {"Softmax", "MatMul"} & set(operators)
    found = result_of(entry, graphs, tmp_path, case.inputs)
    np.testing.assert_allclose(found, case.expected, rtol=1e-4, atol=1e-5)
    before = (tmp_path / entry.files["full"]).read_bytes()
    assert build("onnxruntime", graphs, tmp_path, tmp_path, {"threads": 1}) == entry
    assert (tmp_path / entry.files["full"]).read_bytes() == before


def test_a_mask_of_keys_is_in_the_product(tmp_path: Path) -> None:
    """Where the CPU kernel would hold all scores for it; on CUDA it is an input of the operator."""
    Written(bias=KEYS).write(tmp_path)
    inputs = {}
    for provider in ("cpu", "cuda"):
        write_fused(tmp_path / "onnx/full.onnx", tmp_path / f"{provider}.onnx", provider)
        nodes = onnx.load(tmp_path / f"{provider}.onnx").graph.node
        inputs[provider] = next(len(made.input) for made in nodes if made.op_type == "MultiHeadAttention")
    assert inputs == {"cpu": 3, "cuda": 6}


@pytest.mark.parametrize("bias", [(BATCH, HEADS, ROWS, 1), (1, 1, COLUMNS)])
def test_what_is_not_recognised_is_built_as_it_was(bias: tuple[int, ...], tmp_path: Path) -> None:
    case = Written(bias=bias)
    graphs = case.write(tmp_path)
    entry = build("onnxruntime", graphs, tmp_path, tmp_path, {"threads": 1})
    assert entry.files == {"full": "onnx/full.onnx"} and not (tmp_path / "engines").exists()
    assert entry.builds == {"full": EngineBuild(attentions=1, fused_attention=0)}
    np.testing.assert_allclose(result_of(entry, graphs, tmp_path, case.inputs), case.expected, rtol=1e-4, atol=1e-5)


def test_without_onnxscript_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the decomposed graph: equal keys are equal engines."""
    graphs = Written().write(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript.rewriter", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package onnxscript, got: .* → pip install onnxscript"):
        build("onnxruntime", graphs, tmp_path, tmp_path)
    assert not (tmp_path / "engines").exists()


def test_its_operator_is_for_this_backend_alone(tmp_path: Path) -> None:
    graphs = Written().write(tmp_path)
    entry = build("onnxruntime", graphs, tmp_path, tmp_path, {"threads": 1})
    path, (graph,) = tmp_path / entry.files["full"], graphs.graphs
    require_plain(graph, path, (ATTENTION,))
    with pytest.raises(InputError, match=r"'com\.microsoft::MultiHeadAttention' is not one that lemica-trt exports"):
        require_plain(graph, path)  # as TensorRT's build half does
    model = onnx.load(path)
    next(made for made in model.graph.node if made.op_type == "MultiHeadAttention").op_type = "Attention"
    onnx.save_model(model, str(path))
    with pytest.raises(InputError, match=r"'com\.microsoft::Attention' is not one"):
        open_backend(entry.key).load(graph, path)


@pytest.mark.parametrize("masked", [False, True])
def test_memory_does_not_grow_with_the_scores(masked: bool) -> None:
    """16 heads × 6000 tokens: the scores alone are 2.3 GB. Each in a process of its own."""
    assert in_a_process("onnxruntime", 6000, masked=masked).memory < 250e6
    if not masked:
        assert in_a_process(IN_PARTS, 6000).memory > 2.3e9
