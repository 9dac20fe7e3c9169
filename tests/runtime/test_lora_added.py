"""LoRA weights added to a bundle of toy graphs: inline and beside the graph, by Python and the command line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import toy
from click.testing import CliRunner
from lora_files import written
from test_runtime_pipeline import make_bundle

import lemica_trt
from lemica_trt.bundle.manifest import manifest_files
from lemica_trt.bundle.reading import Bundle
from lemica_trt.cli.main import main
from lemica_trt.core.errors import EngineError, InputError, UnsupportedError
from lemica_trt.core.files import sha256_of
from lemica_trt.ir.graphs import Weight
from lemica_trt.ir.profile import Lora

pytestmark = pytest.mark.cpu

NAMES = {"a": toy.A, "c": toy.C}
"""Module → its weight in the graphs, [in, out]."""

_draw = np.random.default_rng(5)
FACTORS = {
    name: [_draw.standard_normal(shape).astype(np.float32) * 0.3 for shape in ((2, 12), (12, 2))] for name in NAMES
}
SCALE = 0.7


def with_weights(bundle: Bundle, **changes: Any) -> Bundle:
    """The same bundle, whose manifest names the weights of its graphs."""

    def described(graph: Any) -> Any:
        tensors = onnx.load(bundle.path / graph.file).graph.initializer
        table = {
            tensor.name: Weight(part="transformer", name=f"{name}.weight", shape=(12, 12), transposed=True)
            for tensor in tensors
            for name, values in NAMES.items()
            if tuple(tensor.dims) == (12, 12)
            and np.array_equal(onnx.numpy_helper.to_array(tensor, str(bundle.path / "onnx")), values)
        }
        return msgspec.structs.replace(graph, weights=table | changes) if table else graph

    manifest = bundle.manifest
    ((name, bucket),) = manifest.buckets.items()
    graphs = msgspec.structs.replace(bucket.graphs, graphs=tuple(map(described, bucket.graphs.graphs)))
    manifest = msgspec.structs.replace(manifest, buckets={name: msgspec.structs.replace(bucket, graphs=graphs)})
    for file, data in manifest_files(manifest).items():
        (bundle.path / file).write_bytes(data)
    return Bundle.open(bundle.path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_weights(make_bundle(tmp_path_factory.mktemp("bundles") / "toy", tmp_path_factory.mktemp("work")))


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {
        f"transformer.{name}.lora_{letter}.weight": values
        for name, pair in FACTORS.items()
        for letter, values in zip("AB", pair)
    }
    return written(tmp_path_factory.mktemp("lora") / "style.safetensors", tensors)


def latents(bundle: Bundle, plan: str = "default", **options: Any) -> Any:
    with lemica_trt.load(bundle.path, threads=1, **options) as pipe:
        noise = np.random.default_rng(2).standard_normal((1, *toy.LATENT_SHAPE)).astype(np.float32)
        return pipe.latents(pipe.conditions(["a red star"], ["small"]), noise, plan=plan)


def test_added_is_as_if_built_so(
    bundle: Bundle, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In `full`, whose weights lie beside the graph, and in `skip`, whose weights are in it."""
    tables = {graph.role: set(graph.weights or ()) for graph in bundle.manifest.graphs.graphs}
    assert len(tables["full"]) == 2 and len(tables["skip"]) == 1
    assert bundle.manifest.graphs.graph("full").data_files and not bundle.manifest.graphs.graph("skip").data_files
    with caplog.at_level(logging.WARNING, "lemica_trt"):
        got = latents(bundle, loras=[f"{style}:{SCALE}"])
    assert f"{style} × 0.7, sha256 {sha256_of(style)[:16]}; plans and their quality were measured" in caplog.text
    for letter, name in (("A", "a"), ("C", "c")):
        a, b = FACTORS[name]
        monkeypatch.setattr(toy, letter, NAMES[name] + np.float32(SCALE) * (b @ a).T)
    want = latents(make_bundle(tmp_path / "fused", tmp_path / "work"))
    assert got == pytest.approx(want, abs=1e-6 * float(np.abs(want).max()))
    assert float(np.abs(latents(bundle) - want).max()) > 1e-2 * float(np.abs(want).max())


def test_several_and_none(bundle: Bundle, style: Path) -> None:
    plain = latents(bundle)
    lora = Lora(source=str(style))
    both = latents(bundle, loras=[lora, msgspec.structs.replace(lora, scale=-1.0)])
    assert both == pytest.approx(plain, abs=1e-5 * float(np.abs(plain).max()))
    assert np.array_equal(latents(bundle, loras=[msgspec.structs.replace(lora, scale=0.0)]), plain)


def test_refused_before_an_engine_loads(
    bundle: Bundle, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("an engine was loaded")

    monkeypatch.setattr("lemica_trt.backends.onnxruntime.build.import_onnxruntime", load)
    monkeypatch.setattr("lemica_trt.backends.onnxruntime.run.import_onnxruntime", load)
    strange = written(tmp_path / "strange.safetensors", {"transformer.b.lora_A.weight": FACTORS["a"][0]})
    with pytest.raises(InputError, match=r"such as transformer\.a, transformer\.c, got transformer\.b\.lora_A\.weight"):
        latents(bundle, loras=[str(strange)])
    with pytest.raises(UnsupportedError, match="expected a component transformer_2 in the bundle, it has transformer"):
        latents(bundle, loras=[Lora(source=str(style), expert="transformer_2")])
    with pytest.raises(InputError, match=r"LoRA weights in a \.safetensors file on this machine → .*hf download"):
        latents(bundle, loras=["somebody/style"])
    with pytest.raises(InputError, match="loras: expected a file of LoRA weights or a hub id"):
        latents(bundle, loras=["none.safetensors:2"])
    (engine,) = bundle.manifest.engines
    for change, message in (
        ({"backend": "tensorrt"}, "LoRA weights are added to engines of onnxruntime, these are of tensorrt"),
        ({"options": {**engine.key.options, "quantize": "int8"}}, "engines that are not quantised, these are"),
    ):
        changed = msgspec.structs.replace(engine, key=msgspec.structs.replace(engine.key, **change))
        monkeypatch.setattr(Bundle, "engine", lambda self, backend=None, changed=changed: changed)
        with pytest.raises(UnsupportedError, match=message):
            latents(bundle, loras=[str(style)])


def test_bundles_without_names_and_with_wrong_ones(style: Path, tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "old", tmp_path / "work")
    with pytest.raises(UnsupportedError, match="built by an older lemica-trt → build it again"):
        latents(old, loras=[str(style)])
    wrong = with_weights(old, c0=Weight(part="transformer", name="a.weight", shape=(12, 12)))
    with pytest.raises(EngineError, match=r"is not the graph described: expected an initializer c0 \[12, 12\]"):
        latents(wrong, loras=[str(style)])


def test_weights_that_overflow(bundle: Bundle, tmp_path: Path) -> None:
    huge = {
        f"transformer.a.lora_{letter}.weight": values * np.float32(1e30) for letter, values in zip("AB", FACTORS["a"])
    }
    with pytest.raises(InputError, match=r"transformer\.a\.weight: expected finite weights in fp32"):
        latents(bundle, loras=[str(written(tmp_path / "huge.safetensors", huge))])


def test_the_command(bundle: Bundle, style: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(main, ["run", str(bundle.path), "a red star", *map(str, arguments)])

    for name, flags in (("plain.npy", ()), ("added.npy", ("--lora", f"{style}:5"))):
        done = run("-o", tmp_path / name, *flags)
        assert done.exit_code == 0, done.output
    assert not np.array_equal(np.load(tmp_path / "plain.npy"), np.load(tmp_path / "added.npy"))
    done = run("-o", tmp_path / "x.npy", "--lora", f"{style}:much")
    assert done.exit_code == 2 and "--lora: expected FILE_OR_HUB_ID[:SCALE] with a number as scale" in done.output
    done = run("-o", tmp_path / "x.npy", "--lora-2", style)
    assert done.exit_code == 5 and done.output.count("\n") == 1 and not (tmp_path / "x.npy").exists()
