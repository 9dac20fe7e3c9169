"""Values and files from somewhere else: what a terminal would obey, what never ends, what a killed writer left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lemica_trt.core.errors import InputError
from lemica_trt.core.text import MAX_LINE, first_line
from lemica_trt.core.values import Value, json_bytes, value_from_json, write_bytes

pytestmark = pytest.mark.null


class Named(Value, frozen=True):
    name: str


@pytest.mark.parametrize(
    "text",
    [rb"\u001b[2J", rb"\u0007", rb"\u009b", rb"\b", rb"\r", rb"\\\u001B", b"\x7f", "\x9b31m".encode(), b"\x1b[2J"],
)
def test_strings_that_a_terminal_would_obey_are_refused(text: bytes) -> None:
    with pytest.raises(InputError, match="f: expected a valid Named, got: a control character in line 2") as caught:
        value_from_json(Named, b'{\n"name": "x' + text + b'"}', where="f")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["two\nlines\tand a tab", "\\u001b", "\\\\", "…éЯ中🙂", '"'])
def test_other_strings_are_not(text: str) -> None:
    assert value_from_json(Named, json_bytes(Named(name=text)), where="f").name == text


def test_messages_are_one_printable_line() -> None:
    error = InputError("bad \x1b]0;title\x07\nname \u202e", fix="rm '\x9b'")
    assert str(error) == r"bad \x1b]0;title\x07\nname \u202e → rm '\x9b'"


def test_another_library_is_quoted_in_a_line_of_bounded_length() -> None:
    assert first_line(ValueError("\nfirst\nsecond")) == "first"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(OSError("x" * 600)) == "x" * (MAX_LINE - 1) + "…"


def test_values_nested_too_deep() -> None:
    with pytest.raises(InputError, match="f: expected a valid Named, got: "):
        value_from_json(Named, b'{"name":' * 100_000, where="f")
    with pytest.raises(InputError, match="f: expected a valid object, got: values nested too deep"):
        value_from_json(object, b"[" * 100_000, where="f")


def test_a_file_is_written_whole_and_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".f.json.tmp-{dead.pid}-00000000"
    others = [
        tmp_path / f".f.json.tmp-{os.getppid()}-00000000",
        tmp_path / f".f.json.tmp-{os.getpid()}-00000000",  # another thread of this process may be writing
        tmp_path / f".g.json.tmp-{dead.pid}-00000000",
        tmp_path / ".f.json.old",
    ]
    for path in (left, *others):
        path.touch()
    write_bytes(b"new", tmp_path / "f.json")
    assert (tmp_path / "f.json").read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "f.json", *others])
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_bytes(b"new", tmp_path / "folder")
    assert not list(tmp_path.glob(".folder.*"))
