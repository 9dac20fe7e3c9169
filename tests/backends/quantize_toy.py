"""A model of three linear layers, and inputs that it is quantised on."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lemica_trt.backends.build import Observed
from lemica_trt.ir.graphs import GraphSet, GraphSpec, TensorSpec, step_layout

WIDTH, ROWS = 64, 8


def write(folder: Path, *, outlier: float = 1.0, part: float = 0.1, data: bool = False) -> GraphSet:
    """y = part·W₃(W₁x + b₁) + W₂x: two products share an input; the input of W₃ has a column that is `outlier` times
    the others, and counts for as little."""
    random = np.random.default_rng(0)
    weights = {
        "dit.transformer.first.weight": random.standard_normal((WIDTH, WIDTH)) / 8,
        "dit.transformer.first.bias": random.standard_normal(WIDTH),
        "val_2": random.standard_normal((WIDTH, WIDTH)) / 8,
        "val_3": part * random.standard_normal((WIDTH, WIDTH)) / 8,
        "dit.transformer.third.bias": random.standard_normal(WIDTH),
    }
    weights["dit.transformer.first.weight"][0] *= outlier
    weights["val_3"][0] /= outlier
    nodes = [
        helper.make_node("Gemm", ["x", *list(weights)[:2]], ["first"], "gemm", transB=1),
        helper.make_node("MatMul", ["x", "val_2"], ["second"], "second"),
        helper.make_node("MatMul", ["first", "val_3"], ["third"], "third"),
        helper.make_node("Add", ["third", "dit.transformer.third.bias"], ["biased"], "bias"),
        helper.make_node("Add", ["biased", "second"], ["output"], "sum"),
    ]
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    shape = ["batch", WIDTH]
    graph = helper.make_graph(
        nodes, "toy", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)], tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "onnx").mkdir(parents=True)
    onnx.save(model, folder / "onnx/full.onnx", save_as_external_data=data, location="full.data", size_threshold=0)
    tensor = TensorSpec(name="x", dtype="fp32", shape=("batch", WIDTH))
    spec = GraphSpec(
        role="full", file="onnx/full.onnx", inputs=(tensor,), opset=20, dit="whole",
        outputs=(msgspec.structs.replace(tensor, name="output"),), data_files=("onnx/full.data",) if data else (),
    )  # fmt: skip
    layout = step_layout(latent_shape=(WIDTH,), latent_history=1, output_history=1, trunk_depth=0, guided=False)
    return GraphSet(dtype="fp32", layout=layout, max_batch=ROWS, graphs=(spec,))


def observed() -> dict[str, Observed]:
    random = np.random.default_rng(1)
    inputs = [{"x": random.standard_normal((ROWS, WIDTH)).astype(np.float32)} for _ in range(12)]
    return {"full": Observed(ranges=inputs[:8], errors=inputs[8:], output="output")}
