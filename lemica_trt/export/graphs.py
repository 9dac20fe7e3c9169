"""The graphs of a bundle: what each is called with, its export, and the check of what the exporter made of it.

torch → `torch.export` → `torch.onnx.export(dynamo=True)`. The text encoder takes one prompt and the VAE decoder one
request: both run once where the steps run N times, and a video decoded alone is large enough. The step graphs of a
build for one request a call have static shapes too (best for engines); otherwise their batch is a symbol, and an
exporter that specialises it silently is found out here.

Precision: the DiT and the text encoder have the profile's dtype, except the modules that their classes keep in
fp32 (in T5 the `wo` of each block: what lets it run in fp16 at all, here as in every fp16 pipeline); the VAE has
what users of the family run it in. Combination, guidance and the mix of residuals are fp32. ONNX Runtime's CPU
provider runs fp32 and fp16 graphs; bf16 ones it cannot load.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
import onnx_ir
import torch
from msgspec import UNSET
from torch import Tensor, nn

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.values import require, write_bytes
from lemica_trt.export.passes import clean_model, remove_idle_squeeze, rewrite_bool_where
from lemica_trt.export.real import RealProgram, is_complex, symbolic_int, with_heads, with_plain_sorts
from lemica_trt.export.weights import Constants, Parameter, constants_of, named_weights, weight_table, without
from lemica_trt.ir.graphs import COMBINE, GraphSet, GraphSpec, Role, StepLayout, TensorDType, TensorSpec
from lemica_trt.models import Model
from lemica_trt.models.graph_specs import (
    cache_specs,
    example_inputs,
    input_specs,
    output_names,
)
from lemica_trt.models.steps import step_modules

INLINE_BYTES = 64 << 20
"""Weights beyond this go to an external-data file beside the graph."""

ONNX_DTYPES: dict[Any, TensorDType] = {
    onnx_ir.DataType.FLOAT: "fp32",
    onnx_ir.DataType.FLOAT16: "fp16",
    onnx_ir.DataType.BFLOAT16: "bf16",
    onnx_ir.DataType.INT64: "int64",
    onnx_ir.DataType.INT32: "int32",
    onnx_ir.DataType.UINT8: "uint8",
}


def export_graphs(model: Model, layout: StepLayout, folder: Path, *, roles: Sequence[Role] | None = None) -> GraphSet:
    """Export a model's graphs to `onnx/<role>.onnx` (and `.onnx.data` where they are large) below a folder.

    dtype, opset and largest batch are those of the model's profile. The same model gives the same bytes.

    Args:
        model: what to export.
        layout: interface of the step graphs.
        folder: the bundle's root, or a temporary folder that will become it.
        roles: which graphs; None: all that the layout needs.

    Raises:
        ValueError: the layout is not one of this model.
        UnsupportedError: the exporter cannot export the model, or not without fixing a dimension that must be free.
    """
    require(layout.latent_shape == model.latent_shape, f"layout for {layout.latent_shape}, not {model.latent_shape}")
    require(layout.guided == model.guided, f"layout.guided is {layout.guided}, the profile's guidance {model.guided}")
    require(layout.conditions == model.conditions, f"layout for conditions {layout.conditions}, not {model.conditions}")
    widths = cache_specs(model, layout)
    roles = needed_roles(model, layout) if roles is None else roles
    fixed: set[Parameter] = set()
    graphs = [_export_graph(role, model, layout, widths, folder, fixed) for role in sorted(roles)]
    return GraphSet(
        dtype=model.profile.dtype,
        layout=layout,
        max_batch=model.profile.shape.max_batch,
        graphs=tuple(
            msgspec.structs.replace(graph, weights=without(graph.weights, fixed)) if graph.weights else graph
            for graph in graphs
        ),
        image=model.image,
    )


def needed_roles(model: Model, layout: StepLayout) -> tuple[Role, ...]:
    """The graphs of a layout: its step graphs, and those before and behind them."""
    return (*layout.step_graphs, *model.ends)


def _module(role: Role, model: Model, layout: StepLayout) -> nn.Module:
    if role in model.ends:
        return model.ends[role].module
    return step_modules(model, layout)[role]


def _export_graph(
    role: Role,
    model: Model,
    layout: StepLayout,
    hidden: dict[str, TensorSpec],
    folder: Path,
    fixed: set[Parameter],
) -> GraphSpec:
    """Export one graph.

    Args:
        fixed: gets the parameters that cannot be changed in it.
    """
    profile = model.profile
    specs = input_specs(role, model, layout, hidden)
    batches = profile.shape.max_batch > 1 and any("batch" in spec.shape for spec in specs)
    inputs = example_inputs(specs, 2 if batches else 1, model.device)
    # What may stay a symbol: an input has its batch where there are several requests, and its text axes.
    expected = specs if batches else [msgspec.structs.replace(spec, shape=spec.at_batch(1)) for spec in specs]
    shapes = _dynamic_shapes(expected, profile.shape.max_batch)
    where = f"{profile.source}: {role}"
    graph, constants = _translated(role, model, layout, inputs, shapes if any(shapes.values()) else None)
    remove_idle_squeeze(graph)
    rewrite_bool_where(graph)
    clean_model(graph, _symbols(graph, expected))
    file = f"onnx/{role}.onnx"
    table, unchangeable = weight_table(graph.graph, constants)
    fixed |= unchangeable
    data_files = _write(graph, folder / file)
    found = GraphSpec(
        role=role,
        file=file,
        inputs=tuple(_tensor_spec(value) for value in graph.graph.inputs),
        outputs=tuple(_tensor_spec(value) for value in graph.graph.outputs),
        opset=graph.opset_imports[""],
        dit=_dit(role, layout),
        data_files=tuple(f"onnx/{name}" for name in data_files),
        weights=table or UNSET,
    )
    _check(where, found, expected, output_names(role, model, layout), batches)
    if found.opset != profile.opset:
        raise UnsupportedError(f"{where}: expected opset {profile.opset}, the exporter made {found.opset}")
    try:
        onnx.checker.check_model(str(folder / file))
    except onnx.checker.ValidationError as error:
        line = next(iter(str(error).splitlines()), "no more was said")
        raise UnsupportedError(f"{where}: expected a valid graph, the exporter made one that is not: {line}") from error
    return found


def _translated(
    role: Role,
    model: Model,
    layout: StepLayout,
    inputs: dict[str, Tensor],
    shapes: dict[str, dict[int, Any]] | None,
) -> tuple[Any, Constants]:
    """What the exporter makes of a graph, as an `onnx_ir.Model`, and the constants that it had before the exporter's
    optimizer ran.

    Args:
        inputs: examples, by name.
        shapes: which dimensions are free; None: none is.

    Raises:
        UnsupportedError: the exporter cannot export it.
    """
    with torch.no_grad(), _quiet():
        try:
            module = _module(role, model, layout).eval()
            program = _exported(module, inputs, shapes)
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=model.profile.opset,
                input_names=list(inputs),
                output_names=list(output_names(role, model, layout)),
                verbose=False,
                optimize=False,
            )
            assert exported is not None
            constants = constants_of(exported.model.graph, _weights(role, model, layout))
            exported.optimize()
        except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError, RuntimeError, ValueError) as error:
            where = f"{model.profile.source}: {role}"
            raise UnsupportedError(f"{where}: expected a graph that torch can export, got: {_reason(error)}") from error
    return exported.model, constants


def _weights(role: Role, model: Model, layout: StepLayout) -> dict[int, tuple[Parameter, Tensor]]:
    """Weights of the transformer that a step graph runs, by address; none of other graphs."""
    if _dit(role, layout) is None:
        return {}
    expert = layout.variant(role).expert
    network = model.pipeline.components.get(expert)
    return named_weights({expert: network}) if isinstance(network, nn.Module) else {}


def _dit(role: str, layout: StepLayout) -> Literal["whole", "part"] | None:
    """How much of the DiT a graph computes."""
    if role not in layout.step_graphs or role == COMBINE:
        return None
    return "part" if layout.variant(role).reads else "whole"


def _dynamic_shapes(specs: Sequence[TensorSpec], max_batch: int) -> dict[str, dict[int, Any]]:
    """Which dimensions of the inputs are free, as `torch.export` takes it: input → axis → dimension."""
    # An example of 2 with a maximum of 2 leaves equal dimensions apart (torch 2.13).
    batch = torch.export.Dim("batch", min=1, max=max(max_batch, 3))
    dims = {"batch": batch, "2*batch": 2 * batch}
    for spec in specs:
        dims |= {axis: torch.export.Dim(axis, min=1, max=most) for axis, most in spec.text_axes.items()}
    return {
        spec.name: {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in specs
    }


def _exported(module: nn.Module, inputs: dict[str, Tensor], shapes: dict[str, dict[int, Any]] | None) -> Any:
    """A program of a module, on real numbers."""
    dynamic = None if shapes is None else (shapes,)
    with symbolic_int(module):
        program = torch.export.export(module, (inputs,), dynamic_shapes=dynamic, strict=False)
    if is_complex(program):
        program = torch.export.export(RealProgram(program), (inputs,), dynamic_shapes=dynamic, strict=False)
    with_heads(program)
    with_plain_sorts(program)
    return program


def _reason(error: Exception) -> str:
    """The first line of the innermost error: those around it say which step of an export it was, and what to report."""
    inner: BaseException = error
    while isinstance(error, torch.onnx.OnnxExporterError) and inner.__cause__ is not None:
        inner = inner.__cause__
    return next((line for line in str(inner).splitlines() if line.strip()), type(inner).__name__)


def _symbols(graph: Any, specs: Sequence[TensorSpec]) -> dict[str, str]:
    """The exporter's names of free dimensions → ours."""
    ours, found = {spec.name: spec.shape for spec in specs}, {}
    for value in graph.graph.inputs:
        for dim, own in zip(value.shape, ours.get(value.name, ())):
            if not isinstance(dim, int) and dim.value.isidentifier():
                found[dim.value] = "batch" if "batch" in str(own) else str(own)
    return found


def _tensor_spec(value: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else dim.value.replace(" ", "") for dim in value.shape)
    return TensorSpec(name=value.name, dtype=ONNX_DTYPES[value.dtype], shape=shape)


def _check(
    where: str, graph: GraphSpec, expected: Sequence[TensorSpec], outputs: tuple[str, ...], batches: bool
) -> None:
    """Compare what the exporter declared with what was asked for: names, dtypes, and which dimensions are free."""
    wanted = {spec.name: spec for spec in expected}
    for spec in graph.inputs:
        if spec != wanted.get(spec.name):
            raise UnsupportedError(f"{where}: expected input {wanted.get(spec.name)}, the exporter made {spec}")
    for spec in graph.outputs:
        first, *others = spec.shape
        if isinstance(first, str) is not batches or any(isinstance(dim, str) for dim in others):
            raise UnsupportedError(
                f"{where}: expected only the batch to be free in output {spec.name}, got {spec.shape}"
            )
    if tuple(spec.name for spec in graph.outputs) != outputs:
        raise UnsupportedError(f"{where}: expected outputs {outputs}, got {graph.outputs}")


def _write(graph: Any, path: Path) -> list[str]:
    """Write a model; the names of its external-data files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    if weights <= INLINE_BYTES:
        write_bytes(onnx_ir.to_proto(graph).SerializeToString(deterministic=True), path)
        return []
    data = f"{path.name}.data"
    onnx_ir.save(graph, path, external_data=data)
    return [data]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on libraries that are not installed and on folding they leave undone."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # T5's bucket of distance 0 is log(0), thrown away behind a `where`; folding it computes it in numpy.
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.filterwarnings("ignore", category=FutureWarning, message=r".*treespec, LeafSpec")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
