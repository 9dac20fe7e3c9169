"""What a pipeline folder says of itself: its class, and the class of each part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lemica_trt.core.errors import InputError

NAMES = ("model_index.json", "modular_model_index.json")
"""The file in a folder of a pipeline, and of a modular one."""


def index_file(folder: Path) -> Path:
    """The file that a folder has, or should have."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), folder / NAMES[0])


def read_index(path: Path, *, where: str) -> dict[str, Any]:
    """Content of an `index_file`: `_class_name`, and [library, class] of each part.

    Raises:
        InputError: it cannot be read.
    """
    try:
        index = json.loads(path.read_bytes())
        if isinstance(index, dict) and isinstance(index.get("_class_name"), str):
            return {name: value[:2] if isinstance(value, list) else value for name, value in index.items()}
    except (OSError, ValueError, RecursionError):
        pass
    raise InputError(
        f"{where}: expected a diffusers pipeline folder, got no readable model_index.json",
        fix="give the folder that has it, or a hub id",
    )
