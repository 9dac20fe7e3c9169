"""Prompt files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lemica_trt.calibrate.prompts import prompts_digest, read_prompts
from lemica_trt.core.errors import InputError
from lemica_trt.ir.prompts import prompt_from_line

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


def test_pictures_of_prompts(tmp_path: Path) -> None:
    """They lie beside the file; their content is in the digest, where they lie is not."""
    digests = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((4, 6, 3), 9, np.uint8)).save(tmp_path / folder / "cat.png")
        (tmp_path / folder / "prompts.txt").write_text("a cat\tcat.png\na dog\t\n")
        lines = read_prompts(tmp_path / folder / "prompts.txt")
        prompts = [prompt_from_line(line) for line in lines]
        assert [prompt.text for prompt in prompts] == ["a cat", "a dog"]
        assert prompts[0].image == str(tmp_path / folder / "cat.png") and prompts[1].image is None
        assert [prompt.line for prompt in prompts] == lines
        digests.append(prompts_digest(lines))
    assert digests[0] == digests[1] != prompts_digest(["a cat", "a dog"])
    Image.fromarray(np.full((4, 6, 3), 10, np.uint8)).save(tmp_path / "other/cat.png")
    assert prompts_digest(read_prompts(tmp_path / "other/prompts.txt")) != digests[0]


def test_last_pictures_of_prompts(tmp_path: Path) -> None:
    for k, name in enumerate(("one.png", "two.png", "moved.png")):
        Image.fromarray(np.full((4, 6, 3), 9 + k % 2, np.uint8)).save(tmp_path / name)
    found = []
    for pictures in ("one.png", "one.png\ttwo.png", "moved.png\ttwo.png", "two.png\tone.png"):
        (tmp_path / "prompts.txt").write_text(f"a cat\t{pictures}\n")
        found.append(read_prompts(tmp_path / "prompts.txt"))
    first, both, moved, swapped = (prompt_from_line(line) for (line,) in found)
    assert first.last_image is None and list(first.pictures) == ["image"]
    assert both.text == "a cat" and both.line == found[1][0]
    assert {name: Path(path).name for name, (path, _) in both.pictures.items()} == {
        "image": "one.png",
        "last_image": "two.png",
    }
    assert both.content == moved.content and both.line != moved.line
    assert len({first.content, both.content, swapped.content}) == 3 and str(tmp_path) not in both.content
    assert prompts_digest(found[1]) == prompts_digest(found[2]) != prompts_digest(found[3])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat\tgone.png", r"gone\.png: expected a picture, got: No such file"),
        ("a cat\tprompts.txt", r"prompts\.txt: expected a PNG, JPEG or WebP picture, got none of them"),
        ("a cat\tone.png\ttwo.png\tx", "expected prompt<TAB>picture<TAB>last picture, got more than two tabs"),
        ("a cat\t\ttwo.png", "expected a picture before the last one, got none"),
    ],
)
def test_prompts_whose_pictures_cannot_be_read(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "prompts.txt").write_text(line)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_pictures_lie_where_a_line_can_say(tmp_path: Path) -> None:
    folder = tmp_path / "a\tb"
    folder.mkdir()
    Image.fromarray(np.full((4, 6, 3), 9, np.uint8)).save(folder / "cat.png")
    (folder / "prompts.txt").write_text("a cat\tcat.png\n")
    with pytest.raises(InputError, match="expected a picture whose path has no tabs and line breaks"):
        read_prompts(folder / "prompts.txt")


def test_prompts_digest() -> None:
    assert prompts_digest(["a", "b"]) == hashlib.sha256(b"a\nb\n").hexdigest()
    assert prompts_digest(["a", "b"]) != prompts_digest(["b", "a"])
