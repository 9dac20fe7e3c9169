"""What the conformance suite does not ask of OpenVINO."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import toy
from attention_memory import in_a_process, write_attention

from lemica_trt.backends.base import Settings, open_backend
from lemica_trt.backends.build import build, check
from lemica_trt.core.errors import EngineError, InputError, MissingDependencyError, UnsupportedError
from lemica_trt.ir.graphs import GraphSet

pytestmark = pytest.mark.cpu
pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install openvino")


def graphs_in(folder: Path) -> GraphSet:
    graphs = toy.graphs_of(toy.layout_of())
    toy.write_onnx(graphs, folder)
    return graphs


def test_the_onnx_files_are_the_engine(tmp_path: Path) -> None:
    graphs = graphs_in(tmp_path)
    entry = build("openvino", graphs, tmp_path, tmp_path / "out")
    assert entry.files == {graph.role: graph.file for graph in graphs.graphs} and not (tmp_path / "out").exists()
    assert entry.key.target == "cpu" and entry.key.options == {"inference_precision": "fp32", "threads": 0}
    assert entry.key.version.count(".") == 2


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_in(tmp_path)
    key = build("openvino", graphs, tmp_path, tmp_path).key
    backend, full = open_backend(key, Settings(threads=2)), graphs.graph("full")
    with pytest.raises(EngineError, match=r"onnx/skip\.onnx is not the graph described"):
        backend.load(graphs.graph("skip"), tmp_path / "onnx/full.onnx")
    wider = msgspec.structs.replace(full.inputs[0], shape=("batch", 99))
    with pytest.raises(EngineError, match=r"onnx/full\.onnx is not the graph described"):
        backend.load(msgspec.structs.replace(full, inputs=(wider, *full.inputs[1:])), tmp_path / full.file)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"onnx/full\.onnx: expected an ONNX file"):
        backend.load(full, tmp_path / "broken.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x42\x02\x10\x14")  # opset 20, and no graph
    with pytest.raises(EngineError, match=r"OpenVINO cannot load onnx/full\.onnx") as caught:
        backend.load(full, tmp_path / "broken.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="cannot allocate"):
        backend.empty((1 << 60,), "fp32")
    with pytest.raises(UnsupportedError, match="bf16 graphs → build with --dtype fp32 and --inference-precision bf16"):
        check("openvino", "bf16")
    with pytest.raises(UnsupportedError, match="expected engines for cpu, got some for 'gpu'"):
        open_backend(msgspec.structs.replace(key, target="gpu"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[openvino\]'"):
        check("openvino", "fp32")


def test_bf16_rounds_and_no_more(tmp_path: Path) -> None:
    """A CPU without bf16 computes in fp32."""

    def result(precision: str) -> Any:
        graphs = write_attention(tmp_path, 64)
        entry, (graph,) = (
            build("openvino", graphs, tmp_path, tmp_path, {"inference_precision": precision}),
            graphs.graphs,
        )
        backend, random = open_backend(entry.key), np.random.default_rng(0)
        buffers = {spec.name: backend.empty(spec.at(1), spec.dtype) for spec in (*graph.inputs, *graph.outputs)}
        for spec in graph.inputs:
            backend.upload(random.standard_normal(spec.at(1), np.float32), buffers[spec.name])
        backend.load(graph, tmp_path / graph.file).bind(buffers).run()
        return backend.download(buffers["y"])

    exact, rounded = result("fp32"), result("bf16")
    assert np.abs(rounded - exact).max() < 2e-2 * np.abs(exact).max()


@pytest.mark.parametrize("masked", [False, True])
def test_memory_does_not_grow_with_the_scores(masked: bool) -> None:
    assert in_a_process("openvino", 6000, masked=masked).memory < 250e6
