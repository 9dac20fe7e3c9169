"""An exported ONNX model → the same computation under our names, with nothing of the machine that exported it.

The exporter writes a stack trace with source paths to every node, and the traced program to the graph; symbolic
dimensions get its own names. Two exports of one model are the same bytes only without all that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

PRODUCER = "lemica-trt"


def clean_model(model: Any, symbols: Mapping[str, str]) -> None:
    """Clean an `onnx_ir.Model` in place: metadata, doc strings, producer, unused inputs, names of dimensions.

    Args:
        model: as `torch.onnx.export` gives it.
        symbols: the exporter's name of a dimension → ours.
    """
    model.producer_name, model.producer_version = PRODUCER, None
    model.domain = model.model_version = model.doc_string = None
    model.graph.name = "graph"
    for part in (model, *model.functions.values(), *_graphs(model)):
        _strip(part)
    for graph in _graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            _strip_value(value, symbols)
        for node in graph:
            _strip(node)
            for value in node.outputs:
                _strip_value(value, symbols)
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)


def rewrite_bool_where(model: Any) -> int:
    """Where(c, x, y) of truth values → (c ∧ x) ∨ (¬c ∧ y): ONNX Runtime's CPU provider has no such kernel.

    HunyuanVideo's mask of keys has one. Works in place; the number of nodes that were rewritten.
    """
    import onnx_ir

    count = 0
    for graph in _graphs(model):
        for node in list(graph):
            if node.op_type != "Where" or node.outputs[0].dtype != onnx_ir.DataType.BOOL:
                continue
            choice, one, other = node.inputs
            both = onnx_ir.node("And", [choice, one])
            negated = onnx_ir.node("Not", [choice])
            rest = onnx_ir.node("And", [negated.outputs[0], other])
            either = onnx_ir.node("Or", [both.outputs[0], rest.outputs[0]])
            made = [both, negated, rest, either]
            for k, part in enumerate(made):
                part.outputs[0].name = f"{node.outputs[0].name}_where_{k}"
                part.outputs[0].dtype = onnx_ir.DataType.BOOL
            either.outputs[0].shape = node.outputs[0].shape
            onnx_ir.convenience.replace_nodes_and_values(
                graph, node, [node], made, list(node.outputs), [either.outputs[0]]
            )
            count += 1
    return count


def remove_idle_squeeze(model: Any) -> int:
    """Squeeze of an axis whose size is not 1: nothing in PyTorch, an error in ONNX. PixArt and Allegro have some.

    Works in place; the number of nodes that were removed.
    """
    import onnx_ir

    count = 0
    for graph in _graphs(model):
        for node in list(graph):
            axes = node.inputs[1].const_value if node.op_type == "Squeeze" and len(node.inputs) > 1 else None
            shape = node.inputs[0].shape if axes is not None else None
            if axes is None or shape is None:
                continue
            sizes = [shape[int(axis)] for axis in axes.numpy().reshape(-1)]
            if sizes and all(isinstance(size, int) and size != 1 for size in sizes):
                (result,) = node.outputs
                onnx_ir.convenience.replace_all_uses_with(result, node.inputs[0], replace_graph_outputs=True)
                graph.remove(node, safe=True)
                count += 1
    return count


def _graphs(model: Any) -> Iterator[Any]:
    yield model.graph
    yield from model.graph.subgraphs()


def _strip(part: Any) -> None:
    part.metadata_props.clear()
    part.doc_string = None


def _strip_value(value: Any, symbols: Mapping[str, str]) -> None:
    _strip(value)
    if value.const_value is not None:
        _strip(value.const_value)
    if value.shape is None:
        return
    for axis, dim in enumerate(value.shape):
        if not isinstance(dim, int) and dim.value is not None:
            value.shape[axis] = re.sub(r"\w+", lambda name: symbols.get(name[0], name[0]), dim.value)
