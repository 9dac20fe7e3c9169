"""Attention in parts → `com.microsoft.MultiHeadAttention`, which need not hold all scores (FlashAttention, Dao et al.,
arXiv 2205.14135, algorithm 1).

Graphs are exported with attention as MatMul, Softmax, MatMul, which TensorRT fuses and ONNX Runtime does not: its
scores are H·S·T numbers. The operator's CPU kernel goes through them in blocks only where no mask is among its inputs.
So a mask of keys goes into the product: with a column of ones beside the queries, and the mask, divided by the scale,
beside the keys, scale·q·k becomes scale·q·k + mask. A bias of queries and keys stays an input, its scores are held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lemica_trt.core.errors import MissingDependencyError
from lemica_trt.core.values import write_bytes

DOMAIN = "com.microsoft"
ATTENTION = f"{DOMAIN}::MultiHeadAttention"
"""As `onnx_file` names it."""


class Attentions(NamedTuple):
    """How many attentions a graph has, and how many of them are one operator."""

    total: int
    fused: int


def write_fused(source: Path, target: Path, provider: str) -> Attentions:
    """Write a graph with its attentions as one operator each; nothing is written where none was recognised.

    External data stay where they are: the new file names them as the old one does.

    Args:
        source: the ONNX file.
        target: where the new one goes; folders are made.
        provider: where it will run: `cpu` or `cuda`.

    Raises:
        MissingDependencyError: onnxscript is not installed.
    """
    try:
        import onnx_ir
        import onnx_ir.passes.common
        import onnxscript.rewriter  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"building for ONNX Runtime needs the package onnxscript, got: {error}", fix="pip install onnxscript"
        ) from None
    model = onnx_ir.load(source)
    total = sum(node.op_type == "Softmax" for node in model.graph)
    if not total:
        return Attentions(0, 0)
    fused = _rule(provider).apply_to_model(model)
    if fused:
        onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
        model.opset_imports[DOMAIN] = 1
        for node in model.graph:
            node.metadata_props.clear()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(onnx_ir.to_proto(model).SerializeToString(deterministic=True), target)
    return Attentions(total, fused)


def _rule(provider: str) -> Any:
    """The rewrite of onnxscript; a class made here, because only a build needs the library."""
    from onnxscript.rewriter import pattern

    either = pattern.OrValue

    class Attention(pattern.RewriteRuleClassBase):  # type: ignore[misc]
        def pattern(self, op: Any, q: Any, k: Any, v: Any, bias: Any, k_factor: Any, factor: Any, zero: Any) -> Any:
            flat = op.Transpose(op.Reshape(k, pattern.ANY_VALUE), perm=[0, 2, 1])
            columns = either(
                [
                    op.Transpose(k, perm=[0, 1, 3, 2]),
                    op.Reshape(flat, pattern.ANY_VALUE),
                    op.Transpose(k, perm=[0, 2, 3, 1]),
                ],
                tag_var="layout",
                tag_values=["BHSD", "BHSD", "BSHD"],
            )
            scores = op.MatMul(q, either([op.Mul(columns, k_factor), columns]))
            scores = either([op.Mul(scores, factor), scores])
            scores = either([op.Add(scores, bias), scores])
            weights = op.Softmax(scores, axis=-1)
            guarded = op.Where(op.IsNaN(weights), zero, weights)  # rows without a key, of masks with −∞
            return op.MatMul(either([guarded, weights]), v)

        def check(self, context: Any, q: Any, k: Any, v: Any, layout: str, **found: Any) -> bool:
            q_shape, k_shape, v_shape = _shape(q), _shape(k), _shape(v)
            if q_shape is None or k_shape is None or v_shape is None or _scale(found) is None:
                return False
            if found.get("zero") is not None and _number(found["zero"]) != 0.0:
                return False
            (batch, heads, rows, width), columns = q_shape, v_shape[2]
            fits = k_shape == (
                (batch, heads, columns, width) if layout == "BHSD" else (batch, columns, heads, width)
            ) and v_shape[:2] == (batch, heads)
            mask = found.get("bias")
            return fits and isinstance(heads, int) and (mask is None or _is_bias(mask, (batch, heads, rows, columns)))

        def rewrite(self, op: Any, q: Any, k: Any, v: Any, layout: str, **found: Any) -> Any:
            q, factor = _unscaled(q)
            keys = k if layout == "BSHD" else op.Transpose(k, perm=[0, 2, 1, 3])
            parts = [op.Transpose(q, perm=[0, 2, 1, 3]), keys, op.Transpose(v, perm=[0, 2, 1, 3])]
            scale = factor * (_scale(found) or 1.0)
            result = _fused(op, parts, found.get("bias"), q.shape[1], scale, provider)
            zero = found.get("zero")
            return result if zero is None else op.Where(op.IsNaN(result), zero, result)

    return Attention.rule()


def _fused(op: Any, parts: list[Any], bias: Any, heads: int, scale: float, provider: str) -> Any:
    """The operator on [B, S, H, D] each: its inputs are [B, S, H·D]; the result is brought back to [B, H, S, D]."""
    biases: list[Any] = []
    if bias is not None and provider == "cpu" and _shape(bias)[1:3] == (1, 1):  # type: ignore[index]
        parts[:2] = _with_mask(op, parts[0], parts[1], bias, scale)
    elif bias is not None:
        biases = [None, None, _to_rows(op, bias, parts[0])]
    inputs = [op.Reshape(part, op.Constant(value_ints=[0, 0, -1])) for part in parts]
    result = op.MultiHeadAttention(*inputs, *biases, num_heads=heads, scale=scale, _domain=DOMAIN)
    return op.Transpose(op.Reshape(result, op.Constant(value_ints=[0, 0, heads, -1])), perm=[0, 2, 1, 3])


def _with_mask(op: Any, rows: Any, keys: Any, mask: Any, scale: float) -> list[Any]:
    """Ones beside the queries, a mask [B, 1, 1, T] / scale beside the keys."""
    import onnx_ir

    kind = mask.dtype.numpy()
    lowest = -1e30 if kind.itemsize > 2 else -6e4  # −∞ in a product would be NaN where it meets a 0

    def number(value: float) -> Any:
        return op.Constant(value=onnx_ir.tensor(np.array(value, kind)))

    def beside(column: Any, part: Any) -> Any:
        shape = op.Concat(op.Shape(part, start=0, end=3), op.Constant(value_ints=[1]), axis=0)
        return op.Concat(part, op.Expand(column, shape), axis=-1)

    column = op.Transpose(op.Clip(op.Div(mask, number(scale)), number(lowest)), perm=[0, 3, 1, 2])
    return [beside(number(1.0), rows), beside(column, keys)]


def _to_rows(op: Any, bias: Any, rows: Any) -> Any:
    """A bias for every row of scores: the operator repeats it over batch and heads only."""
    if _shape(bias)[2] != 1:  # type: ignore[index]
        return bias
    one = op.Constant(value_ints=[1])
    return op.Expand(bias, op.Concat(one, one, op.Shape(rows, start=1, end=2), one, axis=0))


def _is_bias(value: Any, scores: Shape) -> bool:
    """Whether a value is added to scores of this shape by repeating it, along other axes than the last."""
    shape = _shape(value)
    return shape is not None and shape[3] == scores[3] and all(size in (1, whole) for size, whole in zip(shape, scores))


def _unscaled(value: Any) -> tuple[Any, float]:
    """What a value is a multiple of, and the factor."""
    node = value.producer()
    if node is not None and node.op_type == "Mul":
        factor = _number(node.inputs[1])
        if factor is not None and _shape(node.inputs[0]) == _shape(value):
            return node.inputs[0], factor
    return value, 1.0


def _scale(found: Mapping[str, Any]) -> float | None:
    """The product of what keys and scores are multiplied by; None where that is no number."""
    factors = [1.0 if value is None else _number(value) for value in map(found.get, ("k_factor", "factor"))]
    return None if None in factors else math.prod(factors)  # type: ignore[arg-type]


def _number(value: Any) -> float | None:
    """A constant of one element."""
    constant = value.const_value
    return float(constant.numpy().item()) if constant is not None and constant.size == 1 else None


Shape = tuple[int | str, int | str, int | str, int | str]


def _shape(value: Any) -> Shape | None:
    """Four known dimensions, symbols by their names."""
    if value.shape is None or len(value.shape) != 4:
        return None
    sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return None if None in sizes else sizes  # type: ignore[return-value]
