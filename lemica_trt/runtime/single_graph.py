"""One graph, run once: what is before and behind the loop, and steps one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lemica_trt.backends.base import Array, Backend, Buffer, Engine, decode, encode
from lemica_trt.core.errors import InputError
from lemica_trt.ir.graphs import GraphSpec


def run_graph(
    backend: Backend,
    graph: GraphSpec,
    engine: Engine,
    inputs: Mapping[str, Array | Buffer],
    *,
    keep: Collection[str] = (),
) -> dict[str, Any]:
    """Run a graph once.

    Args:
        engine: of the graph.
        inputs: by the names and of the shapes that the graph declares: numbers, or what an earlier run of this
            backend kept.
        keep: outputs that stay on the device.

    Returns:
        The outputs by name: numbers in their own dtype, bf16 as float32; a `Buffer` of those that are kept.

    Raises:
        InputError: inputs are missing, superfluous or of another shape.
        EngineError: it failed.
    """
    names = [tensor.name for tensor in graph.inputs]
    if sorted(names) != sorted(inputs):
        raise InputError(f"the {graph.role} graph takes {', '.join(names)}, got {', '.join(inputs)}")
    sizes: dict[int | str, int] = {}
    for tensor in graph.inputs:
        shape = inputs[tensor.name].shape
        for name, size in zip(tensor.shape, shape):
            sizes.setdefault(name, size if isinstance(name, str) else name)
        if shape != tuple(sizes.get(name) for name in tensor.shape):
            raise InputError(f"{tensor.name} must have shape {list(tensor.shape)}, got {list(shape)}")
    buffers: dict[str, Buffer] = {}
    for tensor in graph.inputs:
        given = inputs[tensor.name]
        if isinstance(given, np.ndarray):
            buffers[tensor.name] = backend.empty(given.shape, tensor.dtype)
            backend.upload(encode(given, tensor.dtype), buffers[tensor.name])
        else:
            buffers[tensor.name] = given
    for tensor in graph.outputs:
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape)
        buffers[tensor.name] = backend.empty(shape, tensor.dtype)
    engine.bind(buffers, once=True).run()
    return {
        tensor.name: buffers[tensor.name]
        if tensor.name in keep
        else decode(backend.download(buffers[tensor.name]), tensor.dtype)
        for tensor in graph.outputs
    }
