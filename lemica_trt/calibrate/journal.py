"""Finished work on disk: a file of JSON lines that only ever grows.

The first line says what is measured (`Measurement`), every further one is a finished `Unit`. A line is there as a
whole or not at all: what a killed process left behind the last newline is dropped. The number of samples is not in
the first line, so that a later measurement with more samples goes on with the same file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from lemica_trt.errors import InputError
from lemica_trt.spec import DType
from lemica_trt.values import Value, require, require_finite, value_from_json

FORMAT_VERSION = 1


class Measurement(Value, frozen=True):
    """Everything that decides the errors but the number of samples; fields as in `ErrorGraph` and `Profile`."""

    model: str
    revision: str
    dtype: DType
    scheduler: str
    sampler_digest: str
    num_steps: int
    max_skip: int
    guidance_scale: float
    negative_prompt: str
    text_length: int
    latent_shape: tuple[int, ...]
    seed: int
    prompts_digest: str
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    def stops(self, start: int) -> range:
        """Stops j of the segments that begin at a start i."""
        return range(start + 2, min(start + self.max_skip + 1, self.num_steps) + 1)

    @property
    def starts(self) -> range:
        """Starts i that have a segment."""
        return range(self.num_steps - 1)


class Unit(Value, frozen=True):
    """One start of one sample: errors[k] is that of the segment (start, start + 2 + k)."""

    sample: int
    start: int
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        require_finite(self.errors, "errors")
        require(min(self.errors, default=0.0) >= 0.0, "errors must not be negative")


class Journal:
    """An open journal.

    Args:
        path: the file; made if it is not there, with its folder.
        measurement: what is to be measured.

    Raises:
        InputError: the file is of another measurement (says which fields differ), or is no journal. It is left as
            it is.

    Attributes:
        errors: (sample, start) → errors, of all finished units.
    """

    def __init__(self, path: Path, measurement: Measurement) -> None:
        self.errors: dict[tuple[int, int], tuple[float, ...]] = {}
        self._path = path
        self._measurement = measurement
        header = _line(measurement)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        if len(data) < len(header) and header.startswith(data):  # new, or killed while it was made
            path.write_bytes(b"")
            self._append(header)
            return
        *lines, torn = data.split(b"\n")
        self._check_header(lines[0] if lines else torn)
        for number, line in enumerate(lines[1:], 2):
            self._read_unit(line, number)
        if torn:
            os.truncate(path, len(data) - len(torn))

    def add(self, units: Iterable[Unit]) -> None:
        """Append units that are not there yet; when this returns they are on the disk."""
        new = [unit for unit in units if (unit.sample, unit.start) not in self.errors]
        self._append(b"".join(map(_line, new)))
        self.errors.update({(unit.sample, unit.start): unit.errors for unit in new})

    def _append(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _check_header(self, line: bytes) -> None:
        found = value_from_json(Measurement, line, where=f"{self._path}, line 1")
        mine = self._measurement
        changed = [name for name in Measurement.__struct_fields__ if getattr(found, name) != getattr(mine, name)]
        if changed:
            details = ", ".join(f"{name} ({getattr(found, name)!r} there)" for name in changed)
            asked = ", ".join(repr(getattr(mine, name)) for name in changed)
            raise InputError(
                f"{self._path}: expected a journal of this measurement, got one with another {details}: "
                f"asked for is {asked}",
                fix="measure into another file, or move this one away to begin anew",
            )

    def _read_unit(self, line: bytes, number: int) -> None:
        where = f"{self._path}, line {number}"
        unit = value_from_json(Unit, line, where=where)
        expected = len(self._measurement.stops(unit.start)) if unit.start in self._measurement.starts else 0
        if len(unit.errors) != expected or expected == 0 or unit.sample < 0:
            raise InputError(
                f"{where}: expected {expected} errors of start {unit.start}, got {len(unit.errors)}",
                fix="remove the line: its unit is measured again",
            )
        self.errors.setdefault((unit.sample, unit.start), unit.errors)


def _line(value: Value) -> bytes:
    return msgspec.json.encode(value, order="sorted") + b"\n"
