"""Mutations of bytes and of JSON, as hypothesis strategies; and how many examples a tier makes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = 280
"""Examples of a target in the normal suite."""

MANY = 10_000
"""Examples of a target in the tier `fuzz`."""

STRANGE_BYTES = (b"", b"\0", b"\xff", b"\n", b"\x1b[2J", b'"', b"\\u0000", b"-1", b"1e999", b"9" * 400, b"[" * 3000)

STRANGE_VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 1e-300, 1e300, 1.5, "", "x", "../x", "/etc/passwd", "\x1b[2J"),
    *("\ud800", "x" * 5000, [], {}, [[]], {"x": 1}, ["x"], [0] * 50),
)
"""Values of a wrong type or size."""


@st.composite
def changed_bytes(draw: st.DrawFn, seed: bytes) -> bytes:
    """One to four edits: a bit, a byte, a piece removed, doubled, moved or put in."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(("bit", "byte", "cut", "double", "move", "insert", "end")))
        piece = bytes(data[at : at + length])
        if kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = piece
        elif kind == "move":
            del data[at : at + length]
            to = draw(st.integers(0, len(data)))
            data[to:to] = piece
        elif kind == "insert":
            data[at:at] = draw(st.sampled_from(STRANGE_BYTES))
        else:
            del data[at:]
    return bytes(data)


@st.composite
def changed_json(draw: st.DrawFn, seed: bytes) -> bytes:
    """One to three values of a JSON document replaced, removed, or exchanged with another one of it."""
    document = copy.deepcopy(json.loads(seed))
    for _ in range(draw(st.integers(1, 3))):
        parent, key = _somewhere(draw, document)
        kind = draw(st.sampled_from(("replace", "remove", "other", "number", "rename")))
        if parent is None:
            return json.dumps(draw(st.sampled_from(STRANGE_VALUES))).encode()
        if kind == "remove":
            del parent[key]
        elif kind == "other":
            other, place = _somewhere(draw, document)
            parent[key] = copy.deepcopy(document if other is None else other[place])
        elif kind == "number" and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            parent[key] = draw(st.one_of(st.integers(-9, 99), st.floats(allow_nan=False, allow_infinity=False)))
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(("x", "../x", "", *map(str, parent))))] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(STRANGE_VALUES)))
    return json.dumps(document).encode(errors="replace")


def _somewhere(draw: st.DrawFn, document: Any) -> tuple[Any, Any]:
    """A container and a key or index in it; None: the document itself is no container, or empty."""
    parent, key, found = None, None, document
    while isinstance(found, (dict, list)) and found and (parent is None or draw(st.integers(0, 3))):
        parent, key = found, draw(st.sampled_from(sorted(found)) if isinstance(found, dict) else _index(found))
        found = parent[key]
    return parent, key


def _index(items: list[Any]) -> st.SearchStrategy[int]:
    return st.integers(0, len(items) - 1)


def changed(seed: bytes, *, is_json: bool = False) -> st.SearchStrategy[bytes]:
    """Mutations of a file."""
    return st.one_of(changed_json(seed), changed_bytes(seed)) if is_json else changed_bytes(seed)


Target = Callable[[bytes], None]


def run(target: Target, inputs: st.SearchStrategy[Any], *, many: bool) -> None:
    """Give a target examples: the same ones each time in the normal suite, others each time in the tier `fuzz`."""
    quick = settings(
        max_examples=MANY if many else FEW,
        derandomize=not many,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    quick(given(inputs)(target))()


TIERS = pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.fuzz)], ids=["few", "many"])
