"""Bounds on the numbers of a bundle from somewhere else, far above what any model needs.

With them, a manifest or plan that no build made ends in one line when it is read, and not in an error deep inside a
library, an endless loop or a machine out of memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from lemica_trt.core.errors import InputError
from lemica_trt.core.values import require
from lemica_trt.ir.graphs import EncoderSpec, GraphSet, GraphSpec
from lemica_trt.ir.plan import StepPlan, check_plan
from lemica_trt.ir.profile import Sampling, Shape

MAX_DIMENSION = 1 << 20
"""Frames, pixels, tokens, channels: one dimension of a tensor."""

MAX_LATENT_ELEMENTS = 1 << 32
MAX_BATCH = 1 << 12
MAX_TEXT_LENGTH = 1 << 16
MAX_TOKEN_ID = (1 << 31) - 1
MAX_STEPS = 100_000

MAX_HISTORY = 64
"""Latents, outputs, residuals and noise draws that a row reads or makes."""

MAX_COEFFICIENT = float(np.finfo(np.float32).max)

_LATENT_TENSOR = re.compile(r"latents|output|noise|latents_\d+|outputs_\d+")
"""Tensors of a graph that have the shape of the latents."""


def require_bounded(shape: Shape, sampling: Sampling, graphs: GraphSet, encoders: Sequence[EncoderSpec]) -> None:
    """Raise ValueError unless the numbers of a manifest are within bounds and agree with each other."""
    for name in ("frames", "height", "width", "fps", "max_batch"):
        _require_within(f"shape.{name}", getattr(shape, name), 1, MAX_DIMENSION)
    _require_within("profile.sampling.steps", sampling.steps, 1, MAX_STEPS)
    for encoder in encoders:
        _require_within(f"{encoder.graph}: length", encoder.length, 1, MAX_TEXT_LENGTH)
        _require_within(f"{encoder.graph}: pad_id", encoder.pad_id, 0, MAX_TOKEN_ID)
        _require_within(f"{encoder.graph}: end_id", encoder.end_id or 0, 0, MAX_TOKEN_ID)
    _require_within("graphs.max_batch", graphs.max_batch, 1, MAX_BATCH)
    layout = graphs.layout
    depths = {"latent_history": layout.latent_history, "output_history": layout.output_history}
    for name, depth in (depths | {slot.name: slot.depth for slot in layout.caches}).items():
        _require_within(f"layout.{name}", depth, 1, MAX_HISTORY)
    for size in layout.latent_shape:
        _require_within("layout.latent_shape", size, 1, MAX_DIMENSION)
    _require_within("elements of layout.latent_shape", math.prod(layout.latent_shape), 1, MAX_LATENT_ELEMENTS)
    for graph in graphs.graphs:
        _require_tensors(graph, layout.latent_shape)


def require_runnable(plan: StepPlan, graphs: GraphSet) -> None:
    """Raise InputError unless the numbers of a plan are within bounds, and these graphs can run it."""
    try:
        _require_within("num_steps", plan.num_steps, 1, MAX_STEPS)
        for i, row in enumerate(plan.rows):
            _require_within(f"rows[{i}].draws", row.draws, 0, MAX_HISTORY)
            largest = max(map(abs, _numbers_in(msgspec.to_builtins(row))))
            _require_within(f"rows[{i}]: largest coefficient", largest, 0, MAX_COEFFICIENT)
    except ValueError as error:
        raise InputError(f"plan {plan.name}: {error}") from None
    check_plan(plan, graphs)


def _require_tensors(graph: GraphSpec, latent_shape: tuple[int, ...]) -> None:
    """Dimensions are within bounds, symbols of outputs are known from inputs, latents have the layout's shape."""
    symbols = {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}
    for tensor in (*graph.inputs, *graph.outputs):
        where = f"graph {graph.role}, {tensor.name}"
        for size in tensor.shape:
            if isinstance(size, int):
                _require_within(where, size, 1, MAX_DIMENSION)
            else:
                require(size in symbols, f"{where}: no input has the dimension {size!r}")
        if _LATENT_TENSOR.fullmatch(tensor.name):
            found = tensor.shape[1:]
            require(found == latent_shape, f"{where}: expected latents {list(latent_shape)}, got {list(found)}")


def _numbers_in(value: object) -> Iterator[float]:
    """All numbers of nested lists and dictionaries."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers_in(item)


def _require_within(name: str, value: float, least: float, most: float) -> None:
    require(least <= value <= most, f"{name} must be {least:g} … {most:g}, got {value!r}")
