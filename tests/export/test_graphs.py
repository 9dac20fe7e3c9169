"""Exported graphs on ONNX Runtime against the torch modules that they were exported from."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import CASES, Exported, layout_of

from lemica_trt.backends.base import open_backend
from lemica_trt.backends.build import build
from lemica_trt.core.errors import UnsupportedError
from lemica_trt.export import export_graphs, graphs
from lemica_trt.export import passes as clean
from lemica_trt.ir.graphs import GraphSpec, TensorSpec
from lemica_trt.models import load_model
from lemica_trt.models.steps import CombineStep, FullStep, SkipStep

pytestmark = pytest.mark.cpu

ALL = [(case, role) for case, (_, _, _, roles) in CASES.items() for role in roles]
NUMPY = {"fp32": "float32", "fp16": "float16", "int64": "int64", "uint8": "uint8"}


def _session(exported: Exported, role: str) -> tuple[GraphSpec, onnxruntime.InferenceSession]:
    spec = exported.graphs.graph(role)
    return spec, onnxruntime.InferenceSession(exported.folder / spec.file, providers=["CPUExecutionProvider"])


def _module(exported: Exported, role: str) -> torch.nn.Module:
    if role in ("text_encoder", "vae_decoder"):
        return getattr(exported.model, role)
    if role == "combine":
        return CombineStep(exported.layout)
    return (FullStep if role == "full" else SkipStep)(exported.model, exported.layout)


def _inputs(exported: Exported, spec: GraphSpec, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    inputs = {}
    for tensor in spec.inputs:
        if tensor.name in ("input_ids", "attention_mask"):
            inputs[tensor.name] = exported.model.tokens(["a cat"])[tensor.name]
            continue
        shape = [{"batch": batch, "2*batch": 2 * batch}.get(dim, dim) for dim in tensor.shape]
        random = torch.randn(shape, generator=generator)
        if tensor.name == "coefficients":
            random[exported.layout.offsets["timestep"]] = 321.5
        inputs[tensor.name] = random.to(torch.float16 if tensor.dtype == "fp16" else torch.float32)
    return inputs


@pytest.mark.parametrize(("case", "role"), ALL)
@torch.no_grad()
def test_onnx_runtime_agrees_with_torch(exported_case, case: str, role: str) -> None:
    exported = exported_case(case)
    spec, session = _session(exported, role)
    free = any(isinstance(dim, str) for tensor in spec.inputs for dim in tensor.shape)
    assert free == (CASES[case][2] > 1 and role in ("full", "skip", "combine"))
    for batch in (1, 2) if free else (1,):
        inputs = _inputs(exported, spec, batch)
        got = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        complete = {"prompt_embeds": torch.zeros(2 * batch, 8, 32, dtype=exported.model.dtype), **inputs}
        expected = _module(exported, role)(complete)
        assert [tensor.name for tensor in spec.outputs] == list(expected)
        for tensor, array in zip(spec.outputs, got):
            reference = expected[tensor.name].numpy()
            assert array.dtype == reference.dtype == NUMPY[tensor.dtype]
            assert array.shape == reference.shape
            difference = np.abs(array.astype(np.float64) - reference).max()
            scale = max(1.0, np.abs(reference.astype(np.float64)).max())
            limit = {"uint8": 1, "fp16": 1e-2 * scale}.get(tensor.dtype, (1e-5 if "fp16" not in case else 1e-2) * scale)
            assert difference <= limit, f"{tensor.name} at batch {batch}"
            assert difference == 0 or array.dtype != np.uint8 or (array != reference).mean() < 1e-3


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", CASES)
def test_engines_are_the_graphs(exported_case, case: str, backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    exported, (_, _, max_batch, roles) = exported_case(case), CASES[case]
    entry = build(backend, exported.graphs, exported.folder, tmp_path, {"threads": 1})
    with_attention = {"full", "text_encoder", *(["vae_decoder"] if "wan" in case else [])} & set(roles)
    assert set(entry.builds) == (with_attention if backend == "onnxruntime" else set())
    assert all(made.fused_attention == made.attentions > 0 for made in entry.builds.values())
    device = open_backend(entry.key)
    for role in roles:
        spec, session = _session(exported, role)
        batch = max_batch if role in ("full", "skip", "combine") else 1
        inputs = {name: tensor.numpy() for name, tensor in _inputs(exported, spec, batch).items()}
        buffers = {
            tensor.name: device.empty(tensor.at(batch), tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)
        }
        for name, array in inputs.items():
            device.upload(array, buffers[name])
        file = entry.files[role]
        device.load(spec, (exported.folder if file == spec.file else tmp_path) / file).bind(buffers).run()
        for tensor, expected in zip(spec.outputs, session.run(None, inputs)):
            got, size = device.download(buffers[tensor.name]), np.abs(expected.astype(np.float64)).max()
            limit = {"uint8": 1, "fp16": 1e-2 * size}.get(tensor.dtype, (1e-4 if "fp16" not in case else 1e-2) * size)
            assert np.abs(got.astype(np.float64) - expected).max() <= limit, (role, tensor.name)


@pytest.mark.parametrize(("case", "role"), ALL)
def test_files_say_what_the_specs_say(exported_case, case: str, role: str) -> None:
    exported = exported_case(case)
    spec = exported.graphs.graph(role)
    model = onnx.load(exported.folder / spec.file)
    onnx.checker.check_model(model, full_check=True)
    names = {1: "fp32", 10: "fp16", 7: "int64", 2: "uint8"}

    def declared(values) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=value.name,
                dtype=names[value.type.tensor_type.elem_type],
                shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    assert declared(model.graph.input) == spec.inputs
    assert declared(model.graph.output) == spec.outputs
    assert [entry.version for entry in model.opset_import if not entry.domain] == [spec.opset] == [20]
    assert not model.functions
    read = {name for node in model.graph.node for name in node.input}
    assert {value.name for value in model.graph.input} <= read, "unused inputs are to be pruned"
    assert {value.name for value in model.graph.initializer} <= read, "unused weights are to be pruned"


@pytest.mark.parametrize(("case", "role"), ALL)
def test_files_know_nothing_of_this_machine(exported_case, case: str, role: str) -> None:
    exported = exported_case(case)
    path = exported.folder / exported.graphs.graph(role).file
    data = path.read_bytes()
    places = [
        str(Path.cwd()),
        str(Path.home()),
        tempfile.gettempdir(),
        sys.prefix,
        "site-packages",
        "/home",
        ".py",
        "File ",
    ]
    for place in places:
        assert place.encode() not in data, place
    model = onnx.load(path)
    assert (model.producer_name, model.producer_version, model.doc_string) == ("lemica-trt", "", "")
    parts = [
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.value_info,
        *model.graph.initializer,
    ]
    assert not any(part.metadata_props or part.doc_string for part in parts)
    assert not model.graph.name.startswith("main")


def test_full_keeps_weights_where_refit_can_find_them(exported_case) -> None:
    exported = exported_case("sincos")
    names = {tensor.name for tensor in onnx.load(exported.folder / "onnx/full.onnx").graph.initializer}
    assert any("transformer_blocks.0" in name for name in names)


def test_graph_set(exported_case) -> None:
    exported = exported_case("sincos")
    names = ("combine", "full", "skip", "text_encoder", "vae_decoder")
    assert tuple(graph.role for graph in exported.graphs.graphs) == names
    assert (exported.graphs.dtype, exported.graphs.max_batch) == ("fp32", 2)
    assert exported.graphs.layout == exported.layout
    assert all(not graph.data_files for graph in exported.graphs.graphs)


def test_half_precision_keeps_the_steps_interface_in_fp32(exported_case) -> None:
    spec = exported_case("wan-fp16").graphs.graph("skip")
    dtypes = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
    assert dtypes["trunk_0"] == "fp16"
    assert {dtypes[name] for name in ("latents_0", "coefficients", "guidance", "latents", "output")} == {"fp32"}


def test_the_same_model_gives_the_same_bytes(exported_case, tmp_path) -> None:
    """In this process, and in another that loads the model from its files."""
    exported = exported_case("sincos")
    roles = ("skip",)
    export_graphs(exported.model, exported.layout, tmp_path / "again", roles=roles)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(exported.model.profile))
    code = f"""
import msgspec, pathlib, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from conftest import layout_of
from lemica_trt.export import export_graphs
from lemica_trt.models import load_model
from lemica_trt.ir.profile import Profile
folder = pathlib.Path({str(tmp_path)!r})
model = load_model(msgspec.json.decode((folder / "profile.json").read_bytes(), type=Profile))
export_graphs(model, layout_of(model), folder / "other", roles={roles!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    for role in roles:
        digests = {
            hashlib.sha256((folder / f"onnx/{role}.onnx").read_bytes()).hexdigest()
            for folder in (exported.folder, tmp_path / "again", tmp_path / "other")
        }
        assert len(digests) == 1, role


def test_large_weights_go_beside_the_graph(exported_case, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "INLINE_BYTES", 100)
    exported = exported_case("sincos")
    beside = export_graphs(exported.model, exported.layout, tmp_path, roles=("skip",)).graph("skip")
    assert beside.data_files == ("onnx/skip.onnx.data",)
    assert (tmp_path / beside.data_files[0]).stat().st_size > 8_000
    session = onnxruntime.InferenceSession(tmp_path / beside.file)
    inputs = {name: tensor.numpy() for name, tensor in _inputs(exported, beside, 2).items()}
    for got, expected in zip(session.run(None, inputs), _session(exported, "skip")[1].run(None, inputs)):
        assert np.array_equal(got, expected)


def test_a_layout_of_another_model_is_refused(exported_case, tmp_path) -> None:
    exported = exported_case("sincos")
    for change in ({"latent_shape": (1, 2, 3)}, {"guided": False}):
        with pytest.raises(ValueError, match="layout"):
            export_graphs(exported.model, msgspec.structs.replace(exported.layout, **change), tmp_path)


def test_a_dimension_that_the_exporter_fixed_is_found(exported_case, monkeypatch, tmp_path) -> None:
    exported = exported_case("sincos")
    monkeypatch.setattr(graphs, "_symbols", lambda graph, specs: {"s": "batch"})
    with pytest.raises(UnsupportedError, match=r"combine: expected input .*'batch'"):
        export_graphs(exported.model, exported.layout, tmp_path, roles=("combine",))


def test_without_guidance_there_is_one_branch(exported_case, tmp_path) -> None:
    guided = exported_case("sincos").model
    sampling = msgspec.structs.replace(guided.profile.sampling, guidance_scale=1.0)
    model = load_model(msgspec.structs.replace(guided.profile, sampling=sampling))
    spec = export_graphs(model, layout_of(model), tmp_path, roles=("skip",)).graph("skip")
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
    assert "guidance" not in shapes
    assert shapes["trunk_0"] == ("batch", 12, 32)


def test_clean_renames_whole_symbols_only() -> None:
    class Value:
        metadata_props, doc_string, const_value = {"a": "b"}, "text", None

        class Dim:
            value = "2*s1 + s11"

        shape = [Dim(), 3]

    value = Value()
    clean._strip_value(value, {"s1": "batch"})
    assert value.shape == ["2*batch + s11", 3]
    assert (value.metadata_props, value.doc_string) == ({}, None)
