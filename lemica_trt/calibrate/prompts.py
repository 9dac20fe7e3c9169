"""Prompt files: one prompt a line, `#` comments."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from lemica_trt.core.errors import InputError


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read a prompt file: UTF-8, one prompt a line; blank lines and lines that begin with `#` are ignored.

    Raises:
        InputError: not readable, not UTF-8, or without any prompt.
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
    return prompts


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 (hex) of prompts, one a line, in order."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode()).hexdigest()
