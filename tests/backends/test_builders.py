"""The build half: what all backends share, and ONNX Runtime's."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from lemica_trt.backends.build import build, graphs_digest, prune
from lemica_trt.core.errors import EngineError, InputError, MissingDependencyError, UnsupportedError, UsageError
from lemica_trt.core.files import sha256_of
from lemica_trt.ir.engine import EngineBuild, EngineEntry, EngineKey
from lemica_trt.ir.graphs import GraphSet, GraphSpec, TensorSpec, step_layout


def graphs_of(folder: Path) -> GraphSet:
    """Graphs that add 1, all in one file."""
    tensor = TensorSpec(name="x", dtype="fp32", shape=("batch", 2))
    roles = ("combine", "full")
    graphs = tuple(
        GraphSpec(
            role=role,  # type: ignore[arg-type]
            file="onnx/add.onnx",
            inputs=(tensor,),
            outputs=(msgspec.structs.replace(tensor, name="y"),),
            opset=20,
            data_files=("onnx/weights.data",),
        )
        for role in roles
    )
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx/add.onnx").write_bytes(b"graph")
    (folder / "onnx/weights.data").write_bytes(b"weights")
    layout = step_layout(latent_shape=(2,), latent_history=1, output_history=1)
    return GraphSet(dtype="fp32", layout=layout, max_batch=1, graphs=graphs)


@pytest.mark.null
def test_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown backend 'trt' → use one of: onnxruntime, openvino, tensorrt"):
        build("trt", graphs_of(tmp_path), tmp_path, tmp_path)


@pytest.mark.null
def test_the_digest_covers_description_and_content(tmp_path: Path) -> None:
    graphs = graphs_of(tmp_path)
    digest = graphs_digest(graphs, tmp_path)
    assert digest == graphs_digest(graphs, tmp_path)
    assert digest != graphs_digest(msgspec.structs.replace(graphs, max_batch=2), tmp_path)
    for name in ("onnx/add.onnx", "onnx/weights.data"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before + b"!")
        assert graphs_digest(graphs, tmp_path) != digest
        (tmp_path / name).write_bytes(before)
    assert graphs_digest(graphs, tmp_path) == digest
    with pytest.raises(InputError, match="expected a readable file"):
        sha256_of(tmp_path / "absent")


@pytest.mark.null
def test_keys_differ_where_engines_do() -> None:
    key = EngineKey(backend="b", version="1", target="cpu", dtype="fp32", graphs_digest="0", options={"threads": 1})
    changes = {
        "backend": "c",
        "version": "2",
        "target": "cuda",
        "dtype": "fp16",
        "graphs_digest": "1",
        "options": {"threads": 2},
        "device": "NVIDIA H200",
        "driver": "13.0",
        "observed": "2",
    }
    assert set(changes) == set(key.__struct_fields__)
    digests = {msgspec.structs.replace(key, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {key.digest}) == len(changes) + 1
    with pytest.raises(ValueError, match="at least one engine"):
        EngineEntry(key=key, files={})
    with pytest.raises(ValueError, match="builds must be of roles in files"):
        EngineEntry(
            key=key,
            files={"full": "a", "combine": "b"},
            builds={"skip": EngineBuild(seconds=1.0, host_memory=1)},
        )


@pytest.mark.null
def test_engines_of_other_keys_are_removed(tmp_path: Path) -> None:
    """Those that were used stay, whatever backend made them, and so do timings."""
    key = EngineKey(backend="b", version="1", target="cpu", dtype="fp32", graphs_digest="0")
    entries = [
        EngineEntry(key=key, files={"full": f"engines/{name}/full.engine", "combine": f"engines/{name}/combine.engine"})
        for name in ("tensorrt-1", "tensorrt-rtx-2")
    ]
    entries.append(EngineEntry(key=key, files={"full": "onnx/full.onnx", "combine": "onnx/combine.onnx"}))
    prune(entries, tmp_path)
    for file in (
        *(file for entry in entries for file in entry.files.values()),
        "engines/tensorrt-0/full.engine",
        "engines/tensorrt.timing_cache",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    prune(entries, tmp_path)
    assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == [
        "tensorrt-1", "tensorrt-rtx-2", "tensorrt.timing_cache",
    ]  # fmt: skip
    assert (tmp_path / "onnx/full.onnx").is_file() and (tmp_path / "engines/tensorrt-1/full.engine").is_file()


@pytest.mark.null
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lemica-trt\[onnxruntime\]'"):
        build("onnxruntime", graphs_of(tmp_path), tmp_path, tmp_path)


@pytest.mark.cpu
def test_onnxruntime(tmp_path: Path) -> None:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    graphs = graphs_of(tmp_path)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy")
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, str(tmp_path / "onnx/add.onnx"))
    entry = build("onnxruntime", graphs, tmp_path, tmp_path / "out", {"optimization": "basic"})
    assert entry.files == {"combine": "onnx/add.onnx", "full": "onnx/add.onnx"}
    assert entry.key == EngineKey(
        backend="onnxruntime",
        version=onnxruntime.__version__,
        target="cpu",
        dtype="fp32",
        graphs_digest=graphs_digest(graphs, tmp_path),
        options={"provider": "cpu", "optimization": "basic", "threads": 0},
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedError, match=r"bf16 graphs → build with .*--backend tensorrt-rtx"):
        build("onnxruntime", msgspec.structs.replace(graphs, dtype="bf16"), tmp_path, tmp_path)
    (tmp_path / "onnx/add.onnx").write_bytes(b"broken")
    with pytest.raises((EngineError, InputError), match=r"onnx/add\.onnx"):
        build("onnxruntime", graphs, tmp_path, tmp_path)
