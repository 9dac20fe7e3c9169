"""Linear layers of an ONNX graph in int8 or fp8 with zero points of zero: what TensorRT multiplies in 8 bits.

QuantizeLinear and DequantizeLinear go in front of a product (ONNX opset 19 has float8e4m3fn). Activations have one
scale a tensor, from the largest absolute number that came by, weights one for each output channel (TensorRT
documentation, "Working with Quantized Types": explicit quantization). What does not fit is clipped. Results stay fp32.
Needs the package onnx.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["int8", "fp8"]
"""What linear layers are quantised to; fp8 is E4M3 without infinities (Micikevicius et al. 2022, arXiv 2209.05433)."""

LARGEST: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}
"""The largest number of each."""


def insert_qdq(model: Any, nodes: Set[str], largest: Mapping[str, float], kind: Kind) -> None:
    """Quantise both operands of products with weights.

    Args:
        model: an `onnx.ModelProto` in fp32 with its weights in it; changed in place.
        nodes: names of MatMul and Gemm nodes whose second input is an initializer [K, N], or [N, K] where `transB`.
        largest: by name of their first inputs, the largest absolute number that came by.
        kind: what to.
    """
    from onnx import numpy_helper

    graph, writer = model.graph, _Writer(largest, kind)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    before = list(graph.node)
    del graph.node[:]
    for node in before:
        if node.name in nodes:
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            weights = numpy_helper.to_array(tensors[node.input[1]])
            node.input[1] = writer.weights(node.input[1], weights, 0 if transposed else 1)
            node.input[0] = writer.activation(node.input[0])
            graph.node.extend(writer.taken())
        graph.node.append(node)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *writer.initializers])


class _Writer:
    """Makes nodes and initializers; each tensor is quantised once.

    Attributes:
        initializers: of all that was quantised.
    """

    def __init__(self, largest: Mapping[str, float], kind: Kind) -> None:
        self._largest, self._kind, self._done = largest, kind, dict[str, str]()
        self._nodes, self.initializers = list[Any](), list[Any]()

    def taken(self) -> list[Any]:
        """The nodes that were made since it was last asked."""
        found, self._nodes = self._nodes, []
        return found

    def activation(self, name: str) -> str:
        """Name of the dequantised tensor."""
        if name not in self._done:
            scale, _ = self._scales(name, np.float32(self._largest[name]))
            self._node("QuantizeLinear", name, f"{name}_quantized", scale)
            self._done[name] = self._node("DequantizeLinear", f"{name}_quantized", f"{name}_dequantized", scale)
        return self._done[name]

    def weights(self, name: str, values: npt.NDArray[np.float32], channels: int) -> str:
        """Name of the dequantised weights.

        Args:
            values: [K, N] or [N, K].
            channels: the axis N.
        """
        if name not in self._done:
            scale, found = self._scales(name, np.abs(values).max(1 - channels))
            self.initializers.append(
                self._tensor(
                    f"{name}_quantized", np.divide(values, np.expand_dims(found, 1 - channels), dtype=np.float32)
                )
            )
            self._done[name] = self._node(
                "DequantizeLinear", f"{name}_quantized", f"{name}_dequantized", scale, axis=channels
            )
        return self._done[name]

    def _scales(
        self, name: str, largest: npt.NDArray[np.float32] | np.float32
    ) -> tuple[tuple[str, str], npt.NDArray[np.float32]]:
        """Names of a tensor's scales and zero points, and the scales; what is zero everywhere has the scale 1."""
        from onnx import numpy_helper

        found = np.asarray(np.where(largest > 0, largest / LARGEST[self._kind], 1), np.float32)
        scale, zero = f"{name}_scale", f"{name}_zero_point"
        self.initializers.append(numpy_helper.from_array(found, scale))
        self.initializers.append(self._tensor(zero, np.zeros(found.shape, np.float32)))
        return (scale, zero), found

    def _tensor(self, name: str, values: npt.NDArray[np.float32]) -> Any:
        """An initializer of the kind, from multiples of the scale."""
        from onnx import TensorProto, helper, numpy_helper

        if self._kind == "int8":
            return numpy_helper.from_array(np.clip(np.rint(values), -127, 127).astype(np.int8), name)
        clipped = np.clip(values, -LARGEST["fp8"], LARGEST["fp8"])
        rounded = clipped.astype(helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN))
        return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, values.shape, rounded.tobytes(), raw=True)

    def _node(self, operator: str, source: str, result: str, scale: tuple[str, str], **attributes: int) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(operator, [source, *scale], [result], result, **attributes))
        return result
