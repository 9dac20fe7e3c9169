"""ONNX files that ask for more than computing: refused before ONNX Runtime, of whatever version, sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lemica_trt.backends.onnx_file import OPERATORS, require_plain
from lemica_trt.core.errors import InputError
from lemica_trt.ir.graphs import GraphSpec

pytestmark = pytest.mark.cpu

GRAPH = GraphSpec(role="full", file="onnx/full.onnx", inputs=(), outputs=(), opset=20, data_files=("onnx/full.data",))


def external(location: str | None, *, declared: bool = True) -> Any:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    if declared:
        tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), *([] if location is None else [("location", location)]), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*nodes: Any, weights: tuple[Any, ...] = (), functions: tuple[Any, ...] = ()) -> Any:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"]), *nodes], "g", [value], [], list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], functions=list(functions))


def of_opsets(*imports: tuple[str, int]) -> Any:
    made = model()
    del made.opset_import[:]
    made.opset_import.extend(helper.make_opsetid(*each) for each in imports)
    return made


def check(made: Any, folder: Path) -> None:
    path = folder / "full.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    require_plain(GRAPH, path)


def function(name: str) -> Any:
    return helper.make_function("local", name, ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [])


WHERE = [
    "/etc/passwd",
    "../secret",
    "onnx/full.data",
    "..\\secret",
    "",
    "*/_ORT_MEM_ADDR_/*",
    "other.data",
]
BODY = helper.make_graph([helper.make_node("Relu", [], [])], "body", [], [])
SPARSE = helper.make_sparse_tensor(
    numpy_helper.from_array(np.ones(1, np.float32), "v"), numpy_helper.from_array(np.zeros(1, np.int64), "i"), [2]
)
REFUSED: list[tuple[str, Callable[[], Any]]] = [
    *(("external data in", lambda where=where: model(weights=(external(where),))) for where in WHERE),
    ("external data in", lambda: model(weights=(external("/etc/passwd", declared=False),))),
    ("external data in", lambda: model(helper.make_node("Constant", [], ["c"], value=external("/etc/passwd")))),
    ("external data has no location", lambda: model(weights=(external(None),))),
    ("the operator 'Loop'", lambda: model(helper.make_node("Loop", ["", "t", "x"], ["z"]))),
    (
        "no subgraphs",
        lambda: model(helper.make_node("Relu", ["x"], ["z"], body=BODY)),
    ),
    (
        "no subgraphs",
        lambda: model(helper.make_node("Relu", ["x"], ["z"], bodies=[BODY])),
    ),
    ("the operator 'If'", lambda: model(helper.make_node("If", ["x"], ["z"]))),
    ("the operator 'local::double'", lambda: model(helper.make_node("double", ["x"], ["z"], domain="local"))),
    (
        "the operator 'com.microsoft::Relu'",
        lambda: model(helper.make_node("Relu", ["x"], ["z"], domain="com.microsoft")),
    ),
    ("the operator ''", lambda: model(helper.make_node("", ["x"], ["z"]))),
    *(
        (f"expected opset 20, within 18 … 23, got {found}", lambda imports=imports: of_opsets(*imports))
        for imports, found in (
            ((("", 21),), "21"),
            ((("", 20), ("ai.onnx", 99)), "20, 99"),
            ((("com.microsoft", 20),), "none"),
            ((), "none"),
        )
    ),
    ("no functions", lambda: model(functions=(function("double"),))),
    ("no subgraphs and no sparse", lambda: model(helper.make_node("Constant", [], ["c"], sparse_value=SPARSE))),
    ("expected an ONNX file", lambda: b"\xff" * 20),
    ("it is cut off", lambda: model().SerializeToString()[:-1]),
    ("wire type 3", lambda: b"\x3b\x3c"),
]


@pytest.mark.parametrize(("message", "make"), REFUSED)
def test_what_no_export_asks_for(message: str, make: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^onnx/full\.onnx: .*" + message):
        check(make(), tmp_path)


def test_sparse_weights(tmp_path: Path) -> None:
    made = model()
    made.graph.sparse_initializer.append(SPARSE)
    with pytest.raises(InputError, match="no sparse tensors"):
        check(made, tmp_path)


def test_values_that_protobuf_merges(tmp_path: Path) -> None:
    """A second `graph` field is part of the first; the last `op_type` counts, wherever it is."""
    loop = model(helper.make_node("Loop", [], []))
    with pytest.raises(InputError, match="the operator 'Loop'"):
        check(model().SerializeToString() + loop.SerializeToString(), tmp_path)
    late = model(helper.make_node("Relu", ["x"], ["z"])).SerializeToString()
    assert late.count(b"\x22\x04Relu") == 2
    with pytest.raises(InputError, match="the operator 'Loop'"):
        check(late.replace(b"\x22\x04Relu", b"\x22\x04Loop"), tmp_path)


def test_what_exports_are_made_of(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "v")
    cast = helper.make_node("Cast", ["w"], ["c"], to=1)
    check(model(cast, weights=(external("full.data"), weight)), tmp_path)
    check(model(helper.make_node("Add", ["x", "x"], ["z"], domain="ai.onnx")), tmp_path)
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert known >= OPERATORS - {"Swish", "RotaryEmbedding", "RMSNormalization", "Attention"}
    assert not OPERATORS & {"Loop", "If", "Scan", "SequenceMap", "Optional", "ImageDecoder", "StringConcat"}
    with pytest.raises(InputError, match="expected a readable ONNX file"):
        require_plain(GRAPH, tmp_path / "absent")


def test_opsets_beyond_what_is_exported(tmp_path: Path) -> None:
    """OpenVINO takes an opset that it does not know for the newest that it does, and computes something."""
    path = tmp_path / "full.onnx"
    for opset in (17, 24, 99):
        path.write_bytes(of_opsets(("", opset)).SerializeToString())
        with pytest.raises(InputError, match=rf"expected opset {opset}, within 18 … 23, got {opset}"):
            require_plain(msgspec.structs.replace(GRAPH, opset=opset), path)
    path.write_bytes(of_opsets(("", 23), ("com.microsoft", 1)).SerializeToString())
    require_plain(msgspec.structs.replace(GRAPH, opset=23), path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "full.onnx"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_end_in_one_line(file: Path, data: st.DataObject) -> None:
    """Cut, changed and grown anywhere: read to the end, or refused; no other exception."""
    made = bytearray(model(helper.make_node("Constant", [], ["c"], value=external("full.data"))).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(made)))
        made[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
    file.write_bytes(bytes(made))
    try:
        require_plain(GRAPH, file)
    except InputError as error:
        assert str(error).isprintable()
