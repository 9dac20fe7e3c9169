"""The work folder: an unfinished bundle.

    inputs/…                        what was asked for: profile, prompts, request
    calibration/, onnx/, plans/ …   what stages have made, by the paths that it has in the bundle
    *.json                          what stages have made for other stages only
    records/STAGE.json              what a stage read and wrote, with digests
    journals/                       work that is finished within a stage that is not
    engines/                        engines, each in a folder named by what it was built from

A stage writes into a temporary folder; `commit` moves its files to their place and writes the record last. A file
counts only while it is what the record says: a killed process leaves a stage without a record, and a file that was
altered or damaged makes its stage run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lemica_trt.bundle.manifest import FileEntry
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.files import PartedDigest, parted_digests
from lemica_trt.core.values import Value, json_bytes, read_value, write_value

INPUTS = "inputs"
"""Name of the record, and the folder, of what was asked for."""

HASHED_ALWAYS_BYTES = 64 << 20
"""Files up to this size are hashed whenever their stage is looked at, larger ones before they are used."""


class Files(Protocol):
    """Files by their path in a bundle: a bundle itself, or a work folder."""

    @property
    def listed(self) -> Mapping[str, FileEntry]:
        """The files that there are."""
        ...

    def read_bytes(self, relative: str) -> bytes:
        """The content of a file, after its digest was checked."""
        ...


class Record(Value, frozen=True):
    """What a stage did.

    Attributes:
        stage: its name.
        key: digest of everything that decides what it makes; see `compiler.stage`.
        reads: what it read → digest.
        writes: artifact → path below the work folder → file.
    """

    stage: str
    key: str
    reads: dict[str, str]
    writes: dict[str, dict[str, FileEntry]]

    @property
    def files(self) -> dict[str, FileEntry]:
        """All files, whatever artifact they are of."""
        return {path: entry for files in self.writes.values() for path, entry in files.items()}


class Workspace:
    """The work folder of one build; at most one process uses it at a time.

    Attributes:
        root: the folder; made when first used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashed: set[str] = set()

    @property
    def is_there(self) -> bool:
        """Whether the folder is a work folder."""
        return self.record(INPUTS) is not None

    @property
    def journals(self) -> Path:
        """Folder of journals; each is named by what it holds measurements of."""
        return self.root / "journals"

    @property
    def trajectories(self) -> Path:
        """Folder of uncached runs; absolute, because workers may run elsewhere."""
        return (self.journals / "trajectories").resolve()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder.

        Raises:
            UsageError: another process holds it.
        """
        import fcntl

        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"{self.root}: expected a free work folder, another lemica-trt is using it",
                    fix="wait for it, or choose another --output",
                ) from None
            for leftover in (self.root / "records").glob(".*"):  # of a process that was killed while it wrote a record
                leftover.unlink()
            yield

    # ------------------------------------------------------------ records

    def record(self, stage: str) -> Record | None:
        """What a stage did last; None: it has not run, was interrupted, or its record is damaged."""
        try:
            found = read_value(Record, self._record_path(stage))
        except InputError:
            return None
        return found if found.stage == stage else None

    def damaged(self, record: Record, *, every: bool = False) -> list[str]:
        """Files of a record that are missing or altered.

        Args:
            every: hash files of every size; otherwise of those above `HASHED_ALWAYS_BYTES` only the size is compared.
        """
        return [path for path, entry in record.files.items() if not self._is_intact(path, entry, every)]

    def _is_intact(self, path: str, entry: FileEntry, every: bool) -> bool:
        file = self.root / path
        if not file.is_file() or file.stat().st_size != entry.size:
            return False
        if path in self._hashed or (entry.size > HASHED_ALWAYS_BYTES and not every):
            return True
        if parted_digests([file])[0] != entry.sha256:
            return False
        self._hashed.add(path)
        return True

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty folder for what a stage writes; `commit` takes files out of it, the rest is removed."""
        folder = self.root / "unfinished"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    def commit(
        self, stage: str, key: str, reads: Mapping[str, str], writes: Mapping[str, Iterable[str]], staged: Path
    ) -> Record:
        """Put what a stage wrote in its place, and record it.

        Args:
            writes: artifact → paths of its files: below `staged`, or already in their place.
            staged: folder that the stage wrote into.
        """
        found = {
            artifact: {path: self._entry(staged / path if (staged / path).is_file() else self.root / path)
                       for path in sorted(paths)}
            for artifact, paths in writes.items()
        }  # fmt: skip
        record = Record(stage=stage, key=key, reads=dict(reads), writes=found)
        before = self.record(stage)
        self._record_path(stage).unlink(missing_ok=True)
        for path in record.files:
            self._hashed.discard(path)
            if (staged / path).is_file():
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                (staged / path).replace(self.root / path)
        for path in sorted({} if before is None else before.files.keys() - record.files.keys()):
            (self.root / path).unlink(missing_ok=True)
        write_value(record, self._record_path(stage))
        return record

    @staticmethod
    def _entry(file: Path) -> FileEntry:
        return FileEntry(sha256=parted_digests([file])[0], size=file.stat().st_size)

    def _record_path(self, stage: str) -> Path:
        return self.root / "records" / f"{stage}.json"


class View:
    """The artifacts of some stages of a work folder, and nothing else that lies there. `Files`.

    Args:
        work: the folder.
        stages: their names.

    Attributes:
        stages: as given.
    """

    def __init__(self, work: Workspace, stages: Sequence[str]) -> None:
        self._work, self.stages = work, tuple(stages)

    def artifact(self, name: str) -> dict[str, FileEntry]:
        """The files of an artifact; none where no stage has written it."""
        for stage in self.stages:
            record = self._work.record(stage)
            if record is not None and name in record.writes:
                return record.writes[name]
        return {}

    def digest(self, artifact: str) -> str:
        """Digest of an artifact's paths and contents."""
        return digest_of(self.artifact(artifact))

    @property
    def listed(self) -> dict[str, FileEntry]:
        """All files of all artifacts."""
        records = [self._work.record(stage) for stage in self.stages]
        return {path: entry for record in records if record is not None for path, entry in record.files.items()}

    def read_bytes(self, relative: str) -> bytes:
        """The content of a file, checked.

        Raises:
            InputError: no stage has written it, or it was altered since.
        """
        entry = self.listed.get(relative)
        file = self._work.root / relative
        data = file.read_bytes() if entry is not None and file.is_file() else b""
        digest = PartedDigest()
        digest.update(data)
        if entry is None or digest.hexdigest() != entry.sha256:
            what = "it is not there" if entry is None else "it was altered"
            raise InputError(f"{file}: expected what a stage of the build wrote, {what}", fix="build again")
        return data


def digest_of(value: object) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(json_bytes(value)).hexdigest()


def work_folder(output: Path) -> Path:
    """The work folder that belongs to a bundle: beside it."""
    folder = output.resolve()
    return folder.with_name(f"{folder.name}.work")


def candidate_folder(output: Path) -> Path:
    """Where a bundle lies until it is verified: beside the one that it will replace."""
    folder = output.resolve()
    return folder.with_name(f"{folder.name}.unverified")
