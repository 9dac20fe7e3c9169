"""Finished work on disk: a file of JSON lines that only ever grows.

The first line says what is measured (`Header`), every further one is a finished entry; each is a pair, its digest and
itself. A line is there as a whole or not at all: what a killed process left behind the last newline is dropped, and a
line that does not match its digest counts for nothing: what it held is measured again. The number of samples is not in
the first line, so that a later measurement with more samples goes on with the same file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from lemica_trt.core.errors import InputError
from lemica_trt.core.values import Value, require, require_finite, value_from_json
from lemica_trt.ir.calibration import Matrix, Provenance
from lemica_trt.ir.profile import CalibrationMethod
from lemica_trt.ir.sampler import probes_agree

JOURNAL_FORMAT = 5

DIGEST_DIGITS = 16
"""Of SHA-256, in hex: a line that was damaged passes with a chance of 2^-64."""


class Header(Provenance, frozen=True, kw_only=True):
    """First line of a journal."""

    format_version: int = JOURNAL_FORMAT


class Measurement(Header, frozen=True, kw_only=True):
    """Everything that decides the errors but the number of samples.

    Attributes:
        max_skip: K.
        switches: steps that are of another kind than the one before, where there are any: no segment skips one.
    """

    max_skip: int
    switches: tuple[int, ...] | UnsetType = UNSET

    def begin_of(self, step: int) -> int:
        """The first of the steps up to this one that are all of one kind."""
        return max((switch for switch in self.switches or () if switch <= step), default=0)

    def stops(self, start: int) -> range:
        """Stops j of the segments that begin at a start i."""
        end = next((switch for switch in self.switches or () if switch > start), self.num_steps)
        return range(start + 2, min(start + self.max_skip + 1, end) + 1)

    @property
    def starts(self) -> tuple[int, ...]:
        """Starts i that have a segment."""
        return tuple(i for i in range(self.num_steps - 1) if self.stops(i))

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """All (i, j), sorted."""
        return tuple((i, j) for i in self.starts for j in self.stops(i))


class CheapMeasurement(Measurement, frozen=True, kw_only=True):
    """A measurement by estimates; see `calibrate.estimate`.

    Attributes:
        method: how.
        knots, gap: of the sensitivities.
        sensitivity: digest of the `Sensitivity` of another calibration, where that is used.
    """

    method: CalibrationMethod
    knots: int
    gap: int
    sensitivity: str | None = None


class Unit(Value, frozen=True):
    """One start of one sample.

    Attributes:
        sample, start: which.
        errors: errors[k] is that of the segment (start, start + 2 + k).
        outputs: of the first start the sample's N × N raw inner products, as in `Piece`; of others empty.
    """

    sample: int
    start: int
    errors: tuple[float, ...]
    outputs: Matrix = ()

    def __post_init__(self) -> None:
        require(self.sample >= 0, f"sample must not be negative, got {self.sample}")
        _require_errors(self.errors)

    @property
    def key(self) -> tuple[int, int]:
        return self.sample, self.start

    def mismatch(self, measurement: Measurement) -> str | None:
        expected = len(measurement.stops(self.start)) if self.start in measurement.starts else 0
        if len(self.errors) != expected or expected == 0:
            return f"expected {expected} errors of start {self.start}, got {len(self.errors)}"
        n = measurement.num_steps if self.start == measurement.starts[0] else 0
        if len(self.outputs) != n or any(len(row) != n for row in self.outputs):
            return f"expected inner products of {n} steps at start {self.start}, got others"
        return None


class Piece(Value, frozen=True):
    """All that a cheap measurement takes from one sample; depends on the sample alone.

    Attributes:
        sample: its number.
        rolled_out: whether its sensitivity was measured.
        changes: ε of each segment, in the order of `Measurement.segments`; see `calibrate.estimate`.
        outputs: N × N raw inner products, see `lemica_trt.ir.calibration.gram_from_samples`.
        knots: (j, c_j) of each stop whose sensitivity was measured; none where it was not rolled out.
        full, skip: evaluations that were made, counted as in `calibrate.Cost`.
    """

    sample: int
    rolled_out: bool
    changes: tuple[float, ...]
    outputs: Matrix
    knots: tuple[tuple[int, float], ...]
    full: int
    skip: int

    def __post_init__(self) -> None:
        require(self.sample >= 0, f"sample must not be negative, got {self.sample}")
        _require_errors(self.changes)

    @property
    def key(self) -> tuple[int, bool]:
        return self.sample, self.rolled_out

    def mismatch(self, measurement: Measurement) -> str | None:
        n, expected = measurement.num_steps, len(measurement.segments)
        if len(self.changes) != expected:
            return f"expected changes of {expected} segments, got {len(self.changes)}"
        if len(self.outputs) != n or any(len(row) != n for row in self.outputs):
            return f"expected inner products of {n} steps, got others"
        return None


P = TypeVar("P", bound=Header, contravariant=True)


class Entry(Protocol[P]):
    """What a journal keeps."""

    @property
    def key(self) -> Hashable:
        """What there is one entry of."""

    def mismatch(self, measurement: P) -> str | None:
        """What is wrong with the entry as one of this measurement; None: nothing."""


E = TypeVar("E", bound=Entry[Any])


class Journal(Generic[E]):
    """An open journal.

    Args:
        path: the file; made if it is not there, with its folder. None: entries are kept in memory only.
        measurement: what is to be measured.
        kind: class of its entries.

    Raises:
        InputError: the file is of another measurement (says which fields differ), or is no journal, or its first line
            is damaged. It is left as it is.

    Attributes:
        entries: all finished ones, by key.
    """

    def __init__(self, path: Path | None, measurement: Header, kind: type[E]) -> None:
        self.entries: dict[Hashable, E] = {}
        self._path = path
        self._measurement = measurement
        self._kind = kind
        if path is None:
            return
        header = journal_line(measurement)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        if len(data) < len(header) and header.startswith(data):  # new, or killed while it was made
            path.write_bytes(b"")
            self._append(header)
            return
        *lines, torn = data.split(b"\n")
        self._check_header(lines[0] if lines else torn)
        for number, line in enumerate(lines[1:], 2):
            self._read_entry(line, number)
        if torn:
            os.truncate(path, len(data) - len(torn))

    def add(self, entries: Iterable[E]) -> None:
        """Append entries that are not there yet; when this returns they are on the disk."""
        new = [entry for entry in entries if entry.key not in self.entries]
        self._append(b"".join(map(journal_line, new)))
        self.entries.update({entry.key: entry for entry in new})

    def _append(self, data: bytes) -> None:
        if self._path is None:
            return
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _check_header(self, line: bytes) -> None:
        mine = self._measurement
        content = line_content(line)
        if content is None:
            raise InputError(
                f"{self._path}, line 1: expected a {type(mine).__name__} and its digest, got something else",
                fix="move the file away to begin anew",
            )
        found = value_from_json(type(mine), content, where=f"{self._path}, line 1")
        changed = [
            name
            for name in mine.__struct_fields__
            if name != "sampler_probe" and getattr(found, name) != getattr(mine, name)
        ]
        if not probes_agree(found.sampler_probe, mine.sampler_probe):
            changed.append("sampler_probe")
        if changed:
            details = ", ".join(f"{name} ({getattr(found, name)!r} there)" for name in changed)
            asked = ", ".join(repr(getattr(mine, name)) for name in changed)
            raise InputError(
                f"{self._path}: expected a journal of this measurement, got one with another {details}: "
                f"asked for is {asked}",
                fix="measure into another file, or move this one away to begin anew",
            )

    def _read_entry(self, line: bytes, number: int) -> None:
        where = f"{self._path}, line {number}"
        content = line_content(line)
        if content is None:
            return
        entry = value_from_json(self._kind, content, where=where)
        mismatch = entry.mismatch(self._measurement)
        if mismatch is not None:
            raise InputError(f"{where}: {mismatch}", fix="remove the line: what it holds is measured again")
        self.entries.setdefault(entry.key, entry)


def _require_errors(errors: tuple[float, ...]) -> None:
    require_finite(errors, "errors")
    require(min(errors, default=0.0) >= 0.0, "errors must not be negative")


def journal_line(value: object) -> bytes:
    """A value as a line of a journal: `["DIGEST",VALUE]`."""
    content = msgspec.json.encode(value, order="sorted")
    return b'["%b",%b]\n' % (_digest(content), content)


def line_content(line: bytes) -> bytes | None:
    """The JSON of the value in a line without its newline; None: the line is damaged."""
    content = line[DIGEST_DIGITS + 4 : -1]
    return content if line == b'["%b",%b]' % (_digest(content), content) else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS].encode()
