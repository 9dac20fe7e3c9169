"""The deployed loop on a model's PyTorch modules: a plan runs as in a bundle, without export and without engines.

For previews, and for machines without TensorRT. It gives what `models.denoise.denoise` gives; on CUDA faster, because
a plan becomes one CUDA graph.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from lemica_trt.backends.base import Capture, Settings, open_backend
from lemica_trt.backends.torch.options import TorchOptions
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.graphs import GraphSet, GraphSpec, Role, StepLayout, TensorSpec
from lemica_trt.models.graph_specs import cache_specs, input_specs, output_names
from lemica_trt.models.model import Model
from lemica_trt.models.steps import Branch, step_modules
from lemica_trt.runtime.denoise import Denoiser


def torch_denoiser(
    model: Model,
    layout: StepLayout,
    *,
    max_batch: int | None = None,
    capture: Capture = "plan",
    options: TorchOptions | None = None,
    branch: Branch | None = None,
) -> Denoiser:
    """A denoiser on the model's own device.

    With `branch` there are two, in a process each: both are given the same requests in the same order, each runs its
    own branch of the guidance, and every row that runs the DiT has one collective. Both return the same latents.

    Args:
        model: its DiT runs the steps.
        layout: of the plans to run; see `ir.plan.layout_from_plans`.
        max_batch: largest number of requests in a call; None: the profile's.
        capture: what becomes a CUDA graph; ignored on a CPU.
        options: None: the defaults.
        branch: the one that runs here, see `backends.torch.branches`; None: both.

    Raises:
        UsageError, UnsupportedError: as `models.steps.step_modules`.
        MissingDependencyError: as `backends.base.open_backend`.
    """
    modules = {name: module.eval() for name, module in step_modules(model, layout, branch).items()}
    most = max_batch or model.profile.shape.max_batch
    graphs = _step_graphs(model, layout, tuple(modules), most, split=branch is not None)
    key = EngineKey(
        backend="torch",
        version=torch.__version__,
        target=model.device.type,
        dtype=graphs.dtype,
        graphs_digest=graphs.digest,
        options=(options or TorchOptions()).as_dict(),
    )
    settings = Settings(
        device=model.device.index or 0, capture=capture, modules={role: module for role, module in modules.items()}
    )
    backend = open_backend(key, settings)
    return Denoiser(backend, graphs, {graph.role: backend.load(graph, Path(graph.file)) for graph in graphs.graphs})


def _step_graphs(model: Model, layout: StepLayout, roles: tuple[Role, ...], max_batch: int, *, split: bool) -> GraphSet:
    """The description of step graphs that no file holds."""
    hidden = cache_specs(model, layout, split=split)
    sample = TensorSpec(name="latents", dtype="fp32", shape=("batch", *layout.latent_shape))
    outputs = {**hidden, **{name: msgspec.structs.replace(sample, name=name) for name in ("latents", "output")}}
    return GraphSet(
        dtype=model.profile.dtype,
        layout=layout,
        max_batch=max_batch,
        graphs=tuple(
            GraphSpec(
                role=role,
                file="",
                inputs=tuple(input_specs(role, model, layout, hidden)),
                outputs=tuple(outputs[name] for name in output_names(role, model, layout)),
                opset=model.profile.opset,
            )
            for role in sorted(roles)
        ),
    )
