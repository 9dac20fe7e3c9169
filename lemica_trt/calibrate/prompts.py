"""Prompt files: one prompt a line, behind tabs the pictures that belong to it; `#` comments."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from lemica_trt.core.errors import InputError
from lemica_trt.core.pictures import digest_of_picture
from lemica_trt.ir.prompts import Prompt, prompt_from_line


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read a prompt file: UTF-8, one prompt a line; blank lines and lines that begin with `#` are ignored.

    A line may be `prompt<TAB>picture`, a PNG, JPEG or WebP file, relative to the folder of the prompt file, or
    `prompt<TAB>picture<TAB>last picture`.

    Returns:
        `ir.prompts.Prompt.line` of each.

    Raises:
        InputError: not readable, not UTF-8, or without any prompt; or a picture cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: expected a readable prompt file, got: {error.strerror}", fix="name a file with one prompt a line"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text, got: {error.reason} at byte {error.start}", fix="save it as UTF-8"
        ) from None
    lines = (line.strip() for line in text.removeprefix("\ufeff").splitlines())
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"{path}: expected one prompt a line, got none", fix="write a prompt into it")
    return [_with_picture(line, Path(path)) for line in prompts]


def _with_picture(line: str, file: Path) -> str:
    text, *pictures = (part.strip() for part in line.split("\t"))
    if len(pictures) > 2:
        raise InputError(
            f"{file}: expected prompt<TAB>picture<TAB>last picture, got more than two tabs", fix="leave out the others"
        )
    if len(pictures) == 2 and pictures[1] and not pictures[0]:
        raise InputError(f"{file}: expected a picture before the last one, got none", fix="name one")
    found = []
    for picture in filter(None, pictures):
        path = file.parent.absolute() / picture
        if "\t" in str(path) or len(str(path).splitlines()) > 1:
            raise InputError(f"{file}: expected a picture whose path has no tabs and line breaks", fix="move it")
        found += [str(path), digest_of_picture(path)]
    return Prompt(text, *found).line


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 (hex) of prompts, one a line, in order; of pictures their digests, wherever they lie."""
    lines = (prompt_from_line(prompt).content for prompt in prompts)
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
