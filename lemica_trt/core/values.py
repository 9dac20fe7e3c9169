"""Base of the values that flow between stages: frozen, strict, JSON in and out.

A value is a `msgspec.Struct`: immutable, typed, refusing unknown keys; its invariants live in
`__post_init__` (raise ValueError, saying where). JSON is canonical – sorted keys, two-space indent, shortest
round-trip floats, newline at the end – so that equal values are equal bytes and a digest means something.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from lemica_trt.core.atomic_folder import remove_leftovers, temporary_beside
from lemica_trt.core.errors import InputError


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A frozen value; subclasses add fields and check them in `__post_init__`."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(json_bytes(self)).hexdigest()


V = TypeVar("V")


def json_bytes(value: object) -> bytes:
    """Canonical JSON of any value: sorted keys, indent 2, trailing newline. UTF-8."""
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n"


def value_from_json(cls: type[V], data: bytes, *, where: str) -> V:
    """Decode strictly. `where` names the source (a path) in the error.

    Raises:
        InputError: not JSON, nested too deep, wrong type, unknown or missing key, NaN, a control character other than
            line break and tab, or an invariant of `cls` broken; the message carries the JSON path
            (`$.rows[3].timestep`).
    """
    control = _CONTROL_CHARACTER.search(data)
    if control:
        at = data.count(b"\n", 0, control.start()) + 1
        raise InputError(f"{where}: expected a valid {cls.__name__}, got: a control character in line {at}")
    try:
        return msgspec.json.decode(data, type=cls, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: expected a valid {cls.__name__}, got: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: expected a valid {cls.__name__}, got: values nested too deep") from None


_CONTROL_CHARACTER = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]"
    rb"|(?<!\\)(?:\\\\)*\\(?:[bfr]|u00(?:0[0-8b-fB-F]|1[0-9a-fA-F]|7[fF]|[89][0-9a-fA-F]))"
)
"""What a terminal might obey, as it lies in JSON: raw, or escaped (except `\\n` and `\\t`)."""


def read_value(cls: type[V], path: str | os.PathLike[str]) -> V:
    """Read a value from a JSON file.

    Raises:
        InputError: the file cannot be read, or `value_from_json` refuses it.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: expected a readable {cls.__name__} file, got: {error.strerror}", fix="check the path"
        ) from None
    return value_from_json(cls, data, where=str(path))


def write_value(value: object, path: str | os.PathLike[str]) -> None:
    """Write canonical JSON atomically (temporary file beside it, fsync, rename)."""
    write_bytes(json_bytes(value), path)


def write_bytes(data: bytes, path: str | os.PathLike[str]) -> None:
    """Write a file atomically: a killed process leaves the old file or the new one, never half of one."""
    with written({Path(path): data}):
        pass


@contextmanager
def written(contents: Mapping[Path, bytes]) -> Iterator[None]:
    """Write files, each atomically, and put them in their places after the block; none of them if anything fails."""
    temporaries: dict[Path, Path] = {}
    try:
        for target, data in contents.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target)
            temporaries[target] = temporary_beside(target)
            with temporaries[target].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporaries[target].chmod(0o644)
        yield
        for target, temporary in temporaries.items():
            temporary.replace(target)
    except BaseException:  # Ctrl-C, too: no temporary file stays
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`; for `__post_init__`."""
    if not condition:
        raise ValueError(message)


def require_finite(values: Iterable[float], name: str) -> None:
    """Raise ValueError unless every number is finite."""
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"{name}[{index}] must be finite, got {value}")
