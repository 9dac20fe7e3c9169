"""An ONNX file whose weights are changed when it is loaded, without the onnx package.

What lies in the file is changed in a copy of its bytes: shapes and dtypes stay, so that nothing moves. What lies beside
it, as external data, is read there, changed and given to the library apart: the file would not fit into one message.

The file has been checked (`onnx_file.require_plain`). Messages are those of onnx.proto of ONNX 1.17: `ModelProto`,
`GraphProto`, `TensorProto`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lemica_trt.backends.base import NUMPY_DTYPES, Array, Change, decode, encode
from lemica_trt.backends.onnx_file import Messages
from lemica_trt.core.errors import EngineError, InputError
from lemica_trt.ir.graphs import GraphSpec, TensorDType

FLOATS: dict[int, TensorDType] = {1: "fp32", 10: "fp16", 16: "bf16"}
"""`TensorProto.DataType` of weights."""


class ChangedGraph(NamedTuple):
    """A graph with other weights.

    Attributes:
        content: of the ONNX file.
        external: initializers whose external data are replaced, in the graph's dtype.
    """

    content: bytes
    external: dict[str, Array]


class Place(NamedTuple):
    """Where an initializer's values lie.

    Attributes:
        file: name of the file of external data; "": in the ONNX file itself.
        start, size: bytes in the file.
    """

    shape: tuple[int, ...]
    dtype: TensorDType
    file: str
    start: int
    size: int


def changed_graph(graph: GraphSpec, path: Path, data: Path, changes: Mapping[str, Change]) -> ChangedGraph:
    """Read a graph and change weights in it.

    Args:
        graph: its description.
        path: the ONNX file.
        data: folder of its external data.
        changes: by initializer.

    Raises:
        EngineError: an initializer is not there, or not as `graph.weights` describes it.
        InputError: a file cannot be read; or a changed weight is not finite in its dtype.
    """
    content, external = bytearray(_read(path)), {}
    try:
        places = _Initializers(bytes(content)).all()
    except (ValueError, UnicodeDecodeError) as error:
        raise EngineError(f"{graph.file}: {error}", fix="rebuild the bundle") from None
    for name, change in sorted(changes.items()):
        place = places.get(name)
        if place is None or place.shape != _described(graph, name):
            raise EngineError(
                f"{graph.file} is not the graph described: expected an initializer {name} "
                f"{list(_described(graph, name))}, got {'none' if place is None else list(place.shape)}",
                fix="rebuild the bundle",
            )
        raw = _read(data / place.file, place) if place.file else bytes(content[place.start : place.start + place.size])
        if len(raw) != place.size:
            raise EngineError(f"{graph.file}: the data of {name} are cut off", fix="rebuild the bundle")
        values = decode(np.frombuffer(raw, NUMPY_DTYPES[place.dtype]).reshape(place.shape), place.dtype)
        with np.errstate(over="ignore"):
            changed = encode(change(values.astype(np.float32)), place.dtype)
        if not np.isfinite(decode(changed, place.dtype)).all():
            weight = (graph.weights or {})[name]
            raise InputError(
                f"{weight.part}.{weight.name}: expected finite weights in {place.dtype}, LoRA weights make it overflow",
                fix="give a smaller scale, or LoRA weights of this model",
            )
        if place.file:
            external[name] = changed
        else:
            content[place.start : place.start + place.size] = changed.tobytes()
    return ChangedGraph(bytes(content), external)


def _described(graph: GraphSpec, name: str) -> tuple[int, ...]:
    weight = (graph.weights or {})[name]
    return weight.shape[::-1] if weight.transposed else weight.shape


def _read(path: Path, place: Place | None = None) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(0 if place is None else place.start)
            return file.read(-1 if place is None else place.size)
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from None


class _Initializers(Messages):
    """Where the floats of a model lie."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._end = len(data)

    def all(self) -> dict[str, Place]:
        """By name."""
        found = {}
        for number, first, last in self.messages(0, self._end):
            for inner, start, end in self.messages(first, last) if number == 7 else ():
                if inner == 5 and (its := self._tensor(start, end)) is not None:
                    found[its[0]] = its[1]
        return found

    def _tensor(self, start: int, end: int) -> tuple[str, Place] | None:
        """Name and place; None: no floats, or not as bytes."""
        shape, kind, name, raw = list[int](), 0, "", None
        external: dict[str, str] = {}
        for number, wire, first, last in self.fields(start, end):
            if number == 1:
                shape += [first] if wire == 0 else self._packed(first, last)
            elif number == 2 and wire == 0:
                kind = first
            elif number == 8 and wire == 2:
                name = self.text(first, last)
            elif number == 9 and wire == 2:
                raw = first, last - first
            elif number == 13 and wire == 2:
                entry = {n: self.text(a, b) for n, a, b in self.messages(first, last)}
                external[entry.get(1, "")] = entry.get(2, "")
        if kind not in FLOATS or (raw is None and "location" not in external):
            return None
        dtype = FLOATS[kind]
        size = math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
        if raw is not None:
            if raw[1] != size:
                raise ValueError(f"expected {size} bytes of {name}, got {raw[1]}")
            return name, Place(tuple(shape), dtype, "", *raw)
        return name, Place(tuple(shape), dtype, external["location"], int(external.get("offset", "0")), size)

    def _packed(self, start: int, end: int) -> list[int]:
        found = []
        while start < end:
            value, start = self.varint(start, end)
            found.append(value)
        return found
