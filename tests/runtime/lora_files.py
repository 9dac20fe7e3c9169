"""Files of LoRA weights, written without a library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"float32": "F32", "float16": "F16", "float64": "F64", "uint16": "BF16", "int64": "I64"}
"""numpy's name of a dtype → safetensors'; uint16: the bits of bfloat16."""


def content(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """A .safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, values in tensors.items():
        array = np.ascontiguousarray(values)
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(np.shape(values)), "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def written(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Path:
    path.write_bytes(content(tensors, metadata))
    return path
