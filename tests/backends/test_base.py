"""What all backends share."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from lemica_trt.backends.base import check_binding, decode, encode, open_backend, require_version
from lemica_trt.backends.build import build
from lemica_trt.backends.options import options_from, vendor_module
from lemica_trt.core.errors import EngineError, UnsupportedError
from lemica_trt.ir.engine import EngineKey


@pytest.mark.null
@given(st.lists(st.floats(width=32), min_size=1))
def test_bf16_is_the_nearest(numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    bits = encode(array, "bf16")
    assert bits.dtype == np.uint16
    found = decode(bits, "bf16")
    np.testing.assert_array_equal(encode(found, "bf16")[~np.isnan(found)], bits[~np.isnan(found)])
    finite = np.isfinite(array) & np.isfinite(found)
    for step in (-1, 1):  # no neighbour is nearer
        other = decode((bits[finite].astype(np.int32) + step).astype(np.uint16), "bf16").astype(np.float64)
        ok = np.abs(found[finite] - array[finite].astype(np.float64)) <= np.abs(other - array[finite])
        assert ok[np.isfinite(other)].all()
    assert np.isnan(found[np.isnan(array)]).all()


@pytest.mark.cpu
def test_bf16_is_that_of_torch() -> None:
    import torch

    array = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    expected = torch.from_numpy(array).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(encode(array, "bf16"), expected)


@pytest.mark.null
def test_unknown_backend() -> None:
    key = EngineKey(backend="new", version="1", target="x", dtype="fp16", graphs_digest="0" * 64)
    with pytest.raises(
        UnsupportedError,
        match="engines for 'new' cannot be run, only onnxruntime, openvino, tensorrt, tensorrt-rtx, torch",
    ):
        open_backend(key)


@pytest.mark.null
def test_bindings_are_checked() -> None:
    graphs = toy.graphs_of(toy.layout_of())
    graph = graphs.graph("combine")
    backend = toy.NullBackend(graphs)

    def buffers() -> dict[str, Any]:
        return {
            tensor.name: backend.empty(tuple(2 if isinstance(n, str) else n for n in tensor.shape), tensor.dtype)
            for tensor in (*graph.inputs, *graph.outputs)
        }

    check_binding(graph, buffers())
    good = buffers()
    check_binding(graph, {**good, "latents_0": good["outputs_0"]})  # two inputs may share
    bad = [
        ("expected buffers for", {name: buffer for name, buffer in buffers().items() if name != "output"}),
        ("latents must be fp32", {**buffers(), "latents": backend.empty((2, *toy.LATENT_SHAPE), "fp16")}),
        ("must be fp32", {**buffers(), "latents": backend.empty((3, *toy.LATENT_SHAPE), "fp32")}),
        ("coefficients must be", {**buffers(), "coefficients": backend.empty((1,), "fp32")}),
        ("output latents is bound twice", {**good, "latents": good["latents_0"]}),
        ("output latents is bound twice", {**good, "latents": good["output"]}),
    ]
    for message, binding in bad:
        with pytest.raises(EngineError, match=message):
            check_binding(graph, binding)


@pytest.mark.null
def test_engines_of_another_release_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    key = EngineKey(backend="onnxruntime", version="1.24.1", target="cpu", dtype="fp32", graphs_digest="0" * 64)
    require_version(key, "1.24.1", "1.20")
    assert not caplog.records
    require_version(msgspec.structs.replace(key, version="1\x1b[2J"), "1.31.1", "1.20")
    assert caplog.messages == [
        "the bundle was built and verified with onnxruntime 1\\x1b[2J, here is 1.31.1: its numbers may differ → "
        "pip install onnxruntime==1\\x1b[2J"
    ]
    caplog.clear()
    require_version(msgspec.structs.replace(key, target="cuda"), "1.31.1", "1.20", "onnxruntime-gpu")
    assert caplog.messages[0].endswith(
        "with onnxruntime 1.24.1, here is 1.31.1: its numbers may differ → pip install onnxruntime-gpu==1.24.1"
    )


@pytest.mark.null
def test_releases_that_nobody_has_tried_are_refused() -> None:
    key = EngineKey(backend="onnxruntime", version="1.24.1", target="cpu", dtype="fp32", graphs_digest="0" * 64)
    for here in ("1.20", "1.20.0", "1.20.1+cu12", "1.100.0", "2.0", "2.0.0.dev1"):
        require_version(key, here, "1.20")
    for here in ("1.19.9", "1.2.21", "0.99", "1.19.0rc1"):
        with pytest.raises(UnsupportedError, match=rf"need onnxruntime 1\.20 or newer, here is {here} → pip install '"):
            require_version(key, here, "1.20")
    with pytest.raises(
        UnsupportedError, match=r"need onnxruntime 1\.24\.1 or newer, here is 1\.24\.0 → pip install 'x>"
    ):
        require_version(key, "1.24.0", "1.24.1", "x")


@pytest.mark.null
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_oldest_releases_are_those_of_pyproject(name: str) -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(rf'"{name}>=([\d.]+)(?:; python_version (<|>=) \'3\.11\')?"', text)
    here = ("", ">=" if sys.version_info >= (3, 11) else "<")
    assert {floor for floor, python in found if python in here} == {vendor_module(name, "build").OLDEST}


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_older_library_loads_no_engines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip(name)
    key = EngineKey(backend=name, version="9999.1", target="cpu", dtype="fp32", graphs_digest="0" * 64)
    key = msgspec.structs.replace(key, options=options_from(name, {}).as_dict())
    monkeypatch.setattr(library, "__version__", "1.19.2-17000-abc")
    with pytest.raises(UnsupportedError, match=rf"{name} graphs need {name} [\d.]+ or newer, here is 1\.19\.2"):
        open_backend(key)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_releases_are_compared_when_engines_are_loaded(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(name)
    graphs = toy.graphs_of(toy.layout_of())
    toy.write_onnx(graphs, tmp_path)
    key = build(name, graphs, tmp_path, tmp_path).key
    open_backend(key)
    assert not caplog.records
    open_backend(msgspec.structs.replace(key, version="0.1"))
    assert [message.partition(",")[0] for message in caplog.messages] == [
        f"the bundle was built and verified with {name} 0.1"
    ]
