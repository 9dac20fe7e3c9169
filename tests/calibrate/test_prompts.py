"""Prompt files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lemica_trt.calibrate.prompts import prompts_digest, read_prompts
from lemica_trt.core.errors import InputError

pytestmark = pytest.mark.cpu


def test_read_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# a comment\n\n a cat \r\nein Käfer # no comment\n  # one more\nlast".encode())
    assert read_prompts(path) == ["a cat", "ein Käfer # no comment", "last"]


@pytest.mark.parametrize("text", ["", "\n \n", "# only comments\n"])
def test_empty_prompt_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"prompts\.txt: expected one prompt a line, got none"):
        read_prompts(path)


def test_unreadable_prompt_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt: expected a readable prompt file, got: No such file"):
        read_prompts(tmp_path / "gone.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=r"latin\.txt: expected UTF-8 text, got: .* at byte 3"):
        read_prompts(tmp_path / "latin.txt")


def test_prompts_digest() -> None:
    assert prompts_digest(["a", "b"]) == hashlib.sha256(b"a\nb\n").hexdigest()
    assert prompts_digest(["a", "b"]) != prompts_digest(["b", "a"])
