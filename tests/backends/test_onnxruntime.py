"""The loop on ONNX Runtime, with toy graphs."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import pytest
import toy
from test_loop import inputs_of

from lemica_trt.backends.base import Settings, open_backend
from lemica_trt.backends.build import build
from lemica_trt.core.errors import EngineError, InputError, MissingDependencyError, UnsupportedError, UsageError
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.graphs import GraphSet
from lemica_trt.runtime.denoise import Denoiser, RowDone

pytestmark = pytest.mark.cpu


def denoiser_of(graphs: GraphSet, folder: Path, **options: Any) -> tuple[Denoiser, EngineEntry]:
    toy.write_onnx(graphs, folder)
    entry = build("onnxruntime", graphs, folder, folder, {"threads": 1, **options})
    backend = open_backend(entry.key)
    engines = {graph.role: backend.load(graph, folder / graph.file) for graph in graphs.graphs}
    return Denoiser(backend, graphs, engines), entry


def test_every_call_repeats_to_the_bit(tmp_path: Path) -> None:
    layout = toy.layout_of(2, 2, 2)
    denoiser, _ = denoiser_of(toy.graphs_of(layout), tmp_path)
    plan = toy.euler_plan("fsfsrfss")
    inputs = inputs_of(layout, 3)
    first = denoiser.run(plan, **inputs)
    denoiser.run(toy.euler_plan("frfr", name="other"), **inputs_of(layout, 3, seed=8))
    np.testing.assert_array_equal(denoiser.run(plan, **inputs), first)


@pytest.mark.benchmark
def test_the_host_adds_little(tmp_path: Path) -> None:
    """Python between two rows costs microseconds; the toy graphs themselves are most of a row."""
    layout = toy.layout_of()
    denoiser, _ = denoiser_of(toy.graphs_of(layout), tmp_path)
    plan = toy.euler_plan("fsss" * 12 + "fs")
    inputs = inputs_of(layout, 1)
    denoiser.run(plan, **inputs)
    best = float("inf")
    for _ in range(5):
        start = perf_counter()
        denoiser.run(plan, **inputs)
        best = min(best, (perf_counter() - start) / len(plan.rows))
    assert best < 2e-3  # about 0.1 ms alone on one core
    rows: list[RowDone] = []
    denoiser.run(plan, **inputs, on_step=rows.append)
    assert len(rows) == 51


def too_new(*_: object, **__: object) -> None:
    """What ONNX Runtime 1.20 says of opset 22."""
    raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : model_load_utils.h:46 ValidateOpsetForDomain(…) Opset 22 is …")


def test_engine_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = toy.graphs_of(toy.layout_of())
    _, entry = denoiser_of(graphs, tmp_path)
    backend = open_backend(entry.key, Settings(threads=2))
    with pytest.raises(EngineError, match=r"onnx/skip\.onnx is not the graph described"):
        backend.load(graphs.graph("skip"), tmp_path / "onnx/full.onnx")
    full = graphs.graph("full")
    wider = msgspec.structs.replace(full.inputs[0], shape=("batch", 99))
    with pytest.raises(EngineError, match=rf"expected {wider.name} \('fp32', 'batch', 99\), got \('fp32', 'batch', "):
        described = msgspec.structs.replace(full, inputs=(wider, *full.inputs[1:]))
        backend.load(described, tmp_path / "onnx/full.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"onnx/full\.onnx: expected an ONNX file"):
        backend.load(graphs.graph("full"), tmp_path / "broken.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x42\x02\x10\x14")  # opset 20, and no graph
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load onnx/full\.onnx"):
        backend.load(graphs.graph("full"), tmp_path / "broken.onnx")
    with pytest.raises(UnsupportedError, match=r"does not know the operators of onnx/full\.onnx, ONNX opset 20 → pip"):
        monkeypatch.setattr(backend._ort, "InferenceSession", too_new)
        backend.load(full, tmp_path / full.file)
    with pytest.raises(UnsupportedError, match="bf16"):
        backend.empty((1,), "bf16")
    with pytest.raises(EngineError, match="expected fp32"):
        backend.upload(np.zeros(3), backend.empty((3,), "fp32"))
    with pytest.raises(EngineError, match="cannot allocate"):
        backend.empty((1 << 60,), "fp32")
    if "CUDAExecutionProvider" not in __import__("onnxruntime").get_available_providers():
        with pytest.raises(MissingDependencyError, match="CUDAExecutionProvider → pip uninstall onnxruntime && pip"):
            build("onnxruntime", graphs, tmp_path, tmp_path, {"provider": "cuda"})
    with pytest.raises(UsageError, match="--provider must be one of cpu, cuda, got 'tpu'"):
        build("onnxruntime", graphs, tmp_path, tmp_path, {"provider": "tpu"})
    with pytest.raises(UsageError, match="--threads must be an integer, 0 … 1024, got -1"):
        build("onnxruntime", graphs, tmp_path, tmp_path, {"threads": -1})
