"""Each backend with the toy graphs loaded, as far as it runs without a GPU: TensorRT on the null device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import toy

from lemica_trt.backends.base import Backend, Settings, open_backend
from lemica_trt.backends.build import build
from lemica_trt.backends.tensorrt.run import TensorRTBackend
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.graphs import GraphSet, StepLayout
from lemica_trt.ir.plan import PlanRow, StepPlan, trunk_reads
from lemica_trt.testing import null


class Opened(NamedTuple):
    """A backend, and by role the file that it loads."""

    backend: Backend
    files: Mapping[str, Path]


def onnxruntime(graphs: GraphSet, folder: Path, settings: Settings) -> Opened:
    toy.write_onnx(graphs, folder)
    entry = build("onnxruntime", graphs, folder, folder, {"threads": 1})
    return Opened(open_backend(entry.key, settings), {role: folder / file for role, file in entry.files.items()})


def openvino(graphs: GraphSet, folder: Path, settings: Settings) -> Opened:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install openvino")
    toy.write_onnx(graphs, folder)
    entry = build("openvino", graphs, folder, folder, {"threads": 1})
    return Opened(open_backend(entry.key, settings), {role: folder / file for role, file in entry.files.items()})


def tensorrt(graphs: GraphSet, folder: Path, settings: Settings, *, backend: str) -> Opened:
    toy.write_onnx(graphs, folder)
    files = {graph.role: folder / f"{graph.role}.engine" for graph in graphs.graphs}
    for graph in graphs.graphs:
        profiles = ({"batch": (1, 3), "2*batch": (1, 6)},)
        null.write_engine(
            null.NullPlan(graph=graph, onnx=str(folder / graph.file), profiles=profiles), files[graph.role]
        )
    key = EngineKey(backend=backend, version=null.VERSION, target="sm_89", dtype="fp32", graphs_digest="0" * 64)
    device = null.NullDevice()
    return Opened(TensorRTBackend(null.null_vendor(device), device, key, settings), files)


def torch(graphs: GraphSet, folder: Path, settings: Settings) -> Opened:
    import torch

    def run(role: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = toy.step(role, graphs.layout, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in results.items()}

    modules = {graph.role: partial(run, graph.role) for graph in graphs.graphs}
    key = EngineKey(backend="torch", version="1", target="cpu", dtype="fp32", graphs_digest="0" * 64)
    backend = open_backend(key, Settings(capture=settings.capture, modules=modules))
    return Opened(backend, {graph.role: folder / "no file" for graph in graphs.graphs})


OPENERS: dict[str, Callable[[GraphSet, Path, Settings], Opened]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "tensorrt": partial(tensorrt, backend="tensorrt"),
    "tensorrt-rtx": partial(tensorrt, backend="tensorrt-rtx"),
    "torch": torch,
}
"""Backend → what opens it; a new backend needs a line here to be run by the conformance suite."""


def load_steps(opened: Opened, graphs: GraphSet) -> dict[Any, Any]:
    """The engines of the step graphs."""
    roles = ("combine", "full", "skip")
    return {
        graph.role: opened.backend.load(graph, opened.files[graph.role])
        for graph in graphs.graphs
        if graph.role in roles
    }


def full_plan(*, guided: bool = True) -> StepPlan:
    """All that a plan can hold: histories of 3, folded rows, reuse, fresh noise, guidance of each request."""
    return toy.plan_of(
        PlanRow(variant="full", step=0, latents=(1.0,), timestep=0.9, in_scale=0.5),
        PlanRow(variant="full", step=1, latents=(0.9, 0.1), outputs=(-0.2,), timestep=0.7, guidance=(1.0, 0.5)),
        PlanRow(variant="skip", step=2, latents=(1.0,), outputs=(-0.3, 0.1), timestep=0.6,
                caches=trunk_reads(1.5, -0.5), guidance_terms=(0.2, -0.1) if guided else ()),
        PlanRow(
            step=4, latents=(1.0, 0.0, 0.1), outputs=(-0.1,), draws=2, noise=(0.3, -0.4),
            reuse=(1.5, -0.5),
        ),
        PlanRow(variant="full", step=7, latents=(), outputs=(0.5, 0.2, 0.1), timestep=0.3,
                guidance_terms=(0.1, -0.3, 0.2) if guided else ()),
        PlanRow(
            variant="skip", step=8, latents=(1.0,), outputs=(-0.1,), timestep=0.2, draws=1,
            caches=trunk_reads(0.5, 0.3, 0.2),
            noise=(1.0, 0.5),
        ),
        PlanRow(step=9, latents=(1.0, 0.2), outputs=(-0.1, 0.1, -0.2)),
    )  # fmt: skip


def full_layout(*, guided: bool = True) -> StepLayout:
    """The layout of `full_plan`."""
    return toy.layout_of(3, 3, 3, stochastic=True, guided=guided, terms=3 if guided else 0)
