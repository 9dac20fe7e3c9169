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
from msgspec import UNSET

from lemica_trt.core.errors import InputError
from lemica_trt.core.values import require
from lemica_trt.ir.graphs import (
    DRAW,
    IMAGE_ENCODER,
    TERM,
    EncoderSpec,
    GraphSet,
    GraphSpec,
    ImageSpec,
    StepLayout,
    TensorDType,
    TensorSpec,
    longest_text,
)
from lemica_trt.ir.plan import StepPlan, check_plan
from lemica_trt.ir.profile import Sampling, Shape

MAX_DIMENSION = 1 << 20
"""Frames, pixels, tokens, channels: one dimension of a tensor."""

MAX_PICTURES = 4
"""Inputs of an image encoder that are made of one picture."""

MAX_PICTURE = 1 << 13
"""Pixels a side of what an image encoder takes."""

MIN_DRAW = 16
"""Fewest numbers of a draw: fewer are drawn in another way (`runtime.random`)."""

MAX_LATENT_ELEMENTS = 1 << 32
MAX_BATCH = 1 << 12
MAX_TEXT_LENGTH = 1 << 16
MAX_TOKEN_ID = (1 << 31) - 1
MAX_STEPS = 100_000

MAX_HISTORY = 64
"""Latents, outputs, residuals and noise draws that a row reads or makes."""

MAX_COEFFICIENT = float(np.finfo(np.float32).max)

_SYMBOL = re.compile(r"(?:[1-9]\d?\*)?batch")
"""A dimension that grows with the batch."""

VAE_DECODER = "vae_decoder"
"""Name of the graph that makes frames."""

_LATENT_TENSOR = re.compile(r"latents|output|noise|guidance_term|(latents|outputs|guidance_terms)_\d+")
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
        if graph.role in layout.step_graphs:
            _require_interface(graph, layout, graphs.max_batch)
        elif graph.role == VAE_DECODER:
            frames = TensorSpec(name="frames", dtype="uint8", shape=(1, shape.frames, shape.height, shape.width, 3))
            _require_tensor(graph, graph.outputs, frames)
    for role in dict.fromkeys(encoder.graph for encoder in encoders):
        _require_encoder([encoder for encoder in encoders if encoder.graph == role], graphs)
    if graphs.image is not UNSET:
        _require_image_encoder(graphs.image, graphs)


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


def _require_interface(graph: GraphSpec, layout: StepLayout, max_batch: int) -> None:
    """The tensors of a step graph are those of the layout (see the table at `StepLayout`), each as it is there; where
    only one request fits, its batch is 1 instead of a symbol."""
    latents = [f"latents_{j}" for j in range(layout.latent_history)] + ["latents", "output"]
    latents += [f"outputs_{k}" for k in range(layout.output_history)] + ["noise"] * layout.stochastic
    latents += [f"guidance_terms_{k}" for k in range(layout.guidance_history)] + [TERM] * bool(layout.guidance_history)
    known: dict[str, tuple[TensorDType, tuple[int | str, ...]]] = {
        name: ("fp32", ("batch", *layout.latent_shape)) for name in latents
    }
    known["coefficients"] = ("fp32", (max(part.stop for part in layout.offsets.values()),))
    if layout.guided:
        known["guidance"] = ("fp32", ("batch",))
    known.update({spec.name: (spec.dtype, spec.shape) for spec in layout.conditions})
    slots = {name for slot in layout.caches for name in (slot.name, *(f"{slot.name}_{k}" for k in range(slot.depth)))}
    for tensor in (*graph.inputs, *graph.outputs):
        where = f"graph {graph.role}, {tensor.name}"
        require(tensor.name in known or tensor.name in slots, f"{where}: the step layout has no such tensor")
        if tensor.name in known:
            dtype, shape = known[tensor.name]
            expected = TensorSpec(name=tensor.name, dtype=dtype, shape=shape)
            shapes = (shape, expected.at_batch(1)) if max_batch == 1 else (shape,)
            got = f"got {tensor.dtype} {list(tensor.shape)}"
            fits = tensor.dtype == dtype and tensor.shape in shapes
            require(fits, f"{where}: expected {dtype} {list(shape)}, {got}")


def _require_encoder(encoders: Sequence[EncoderSpec], graphs: GraphSet) -> None:
    """The graph of a text encoder, where there is one, takes what its tokenizers make, and gives conditions."""
    graph = next((graph for graph in graphs.graphs if graph.role == encoders[0].graph), None)
    if graph is None:
        return
    names = [name for encoder in encoders for name in encoder.inputs]
    found = [tensor.name for tensor in graph.inputs]
    require(found == names, f"graph {graph.role}: expected inputs {', '.join(names)}, got {', '.join(found)}")
    for encoder in encoders:
        for name in encoder.inputs:
            _require_tensor(graph, graph.inputs, TensorSpec(name=name, dtype="int64", shape=(1, encoder.length)))
    _require_conditions(graph, graphs)


def _require_image_encoder(image: ImageSpec, graphs: GraphSet) -> None:
    """The image encoder graph, where there is one, takes what is made of pictures, and gives conditions."""
    _require_within(f"pictures of {IMAGE_ENCODER}", len(image.pictures), 1, MAX_PICTURES)
    for picture in image.pictures:
        require(picture.name != DRAW, f"{IMAGE_ENCODER}: a picture must not be called {DRAW}")
        for size in (picture.height, picture.width):
            _require_within(f"{IMAGE_ENCODER}, {picture.name}", size, 1, MAX_PICTURE)
    specs = [TensorSpec(name=its.name, dtype="fp32", shape=(1, 3, its.height, its.width)) for its in image.pictures]
    if image.draw is not UNSET:
        for size in image.draw:
            _require_within(f"{IMAGE_ENCODER}, {DRAW}", size, 1, MAX_DIMENSION)
        _require_within(f"elements of {DRAW}", math.prod(image.draw), MIN_DRAW, MAX_LATENT_ELEMENTS)
        specs.append(TensorSpec(name=DRAW, dtype="fp32", shape=image.draw))
    graph = next((graph for graph in graphs.graphs if graph.role == IMAGE_ENCODER), None)
    if graph is None:
        return
    found, names = [tensor.name for tensor in graph.inputs], [spec.name for spec in specs]
    require(found == names, f"graph {graph.role}: expected inputs {', '.join(names)}, got {', '.join(found)}")
    for spec in specs:
        _require_tensor(graph, graph.inputs, spec)
    _require_conditions(graph, graphs)


def _require_conditions(graph: GraphSpec, graphs: GraphSet) -> None:
    """The outputs of an encoder's graph are conditions of the step layout, of one request."""
    conditions = {spec.name: spec for spec in graphs.layout.conditions}
    for tensor in graph.outputs:
        where = f"graph {graph.role}, {tensor.name}"
        require(tensor.name in conditions, f"{where}: the step layout has no such condition")
        expected = msgspec.structs.replace(conditions[tensor.name], shape=(1, *conditions[tensor.name].at(1)[1:]))
        _require_tensor(graph, graph.outputs, expected)


def _require_tensor(graph: GraphSpec, among: Sequence[TensorSpec], expected: TensorSpec) -> None:
    found = next((tensor for tensor in among if tensor.name == expected.name), None)
    require(
        found is not None and found.dtype == expected.dtype and found.shape[1:] == expected.shape[1:],
        f"graph {graph.role}, {expected.name}: expected {expected.dtype} [rows, {str(list(expected.shape[1:]))[1:]}, "
        f"got {'none' if found is None else f'{found.dtype} {list(found.shape)}'}",
    )


def _require_tensors(graph: GraphSpec, latent_shape: tuple[int, ...]) -> None:
    """Dimensions are within bounds, symbols of outputs are known from inputs, latents have the layout's shape."""
    symbols = {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}
    for tensor in (*graph.inputs, *graph.outputs):
        where = f"graph {graph.role}, {tensor.name}"
        for size in tensor.shape:
            if isinstance(size, int):
                _require_within(where, size, 1, MAX_DIMENSION)
            elif (longest := longest_text(size)) is not None:
                _require_within(where, longest, 1, MAX_TEXT_LENGTH)
                require(size in symbols, f"{where}: no input has the dimension {size!r}")
            else:
                require(bool(_SYMBOL.fullmatch(size)), f"{where}: expected a multiple of batch, got {size!r}")
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
