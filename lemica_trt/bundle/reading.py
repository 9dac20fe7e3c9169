"""A bundle on disk, read: files are checked against the manifest when they are first used."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lemica_trt.core.errors import IntegrityError, UsageError
from lemica_trt.core.files import sha256_of
from lemica_trt.core.values import value_from_json
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.plan import StepPlan

if TYPE_CHECKING:
    pass
from lemica_trt.bundle.manifest import MANIFEST, REBUILD, UNLISTED, FileEntry, Manifest, manifest_from_json, plan_path
from lemica_trt.core.atomic_folder import SWAP_PAUSE, SWAP_RETRIES, restore
from lemica_trt.ir.plan import check_plan


class Bundle:
    """A bundle on disk, read. Files are checked when they are first used. May be shared by threads.

    Attributes:
        path: the folder.
        manifest: see there.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a bundle: read and check its manifest.

        Raises:
            IntegrityError: no manifest, a damaged one, or one of a newer format.
        """
        folder = Path(os.path.realpath(path))
        try:
            data = read_manifest(folder)
        except OSError as error:
            raise IntegrityError(
                f"{path}: expected a bundle with a {MANIFEST}, got: {error.strerror}",
                fix="give the folder that 'lemica-trt build' wrote",
            ) from None
        return cls(folder, manifest_from_json(data, where=f"{path}/{MANIFEST}"))

    @property
    def plans(self) -> tuple[str, ...]:
        """Names of the plans, sorted."""
        return self.manifest.plans

    @property
    def listed(self) -> dict[str, FileEntry]:
        """The files of the manifest, by path."""
        return self.manifest.files

    def plan(self, name: str | None = None) -> StepPlan:
        """A plan by name; None or `default`: the default one.

        Raises:
            UsageError: there is no such plan.
            IntegrityError: its file is missing or altered.
            InputError: it does not fit the bundle's graphs.
        """
        if name is None or (name == "default" and name not in self.plans):
            name = self.manifest.default_plan
        if name not in self.plans:
            raise UsageError(f"the bundle has no plan {name!r}", fix=f"use one of: {', '.join(self.plans)}")
        plan = value_from_json(StepPlan, self.read_bytes(plan_path(name)), where=plan_path(name))
        if plan.name != name:
            raise IntegrityError(f"{plan_path(name)}: expected a plan named {name!r}, got {plan.name!r}", fix=REBUILD)
        check_plan(plan, self.manifest.graphs)
        return plan

    def engine(self, backend: str | None = None) -> EngineEntry:
        """The preferred set of engines, of one backend if given.

        Raises:
            UsageError: there is none.
        """
        for entry in self.manifest.engines:
            if backend is None or entry.key.backend == backend:
                return entry
        names = sorted({entry.key.backend for entry in self.manifest.engines})
        raise UsageError(f"the bundle has no engines for {backend!r}", fix=f"use one of: {', '.join(names)}")

    def file(self, relative: str) -> Path:
        """The path of a listed file, after its size and digest were checked (once for each `Bundle`).

        Raises:
            IntegrityError: not listed, missing, altered, or a link out of the bundle.
        """
        entry, path = self._locate(relative)
        if relative not in self._checked:
            require_equal(relative, entry, FileEntry(sha256=sha256_of(path), size=path.stat().st_size))
            self._checked.add(relative)
        return path

    def read_bytes(self, relative: str) -> bytes:
        """The content of a listed file; the very bytes that are returned were checked.

        Raises:
            IntegrityError: as `file`.
        """
        entry, path = self._locate(relative)
        data = path.read_bytes()
        require_equal(relative, entry, FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data)))
        return data

    def check(self) -> None:
        """Check everything: every listed file, every plan against the graphs, and that nothing else lies there.

        Raises:
            IntegrityError: a file is missing, altered, not listed, or a link out of the bundle.
            InputError: a plan does not fit the graphs.
        """
        for relative in sorted(self.manifest.files):
            entry, path = self._locate(relative)
            require_equal(relative, entry, FileEntry(sha256=sha256_of(path), size=path.stat().st_size))
        for relative in sorted(files_below(self.path)):
            known = relative in self.manifest.files or relative == MANIFEST
            if not known and PurePosixPath(relative).parts[0] not in UNLISTED:
                raise IntegrityError(f"{relative}: not listed in the manifest", fix="remove it, or rebuild the bundle")
        for name in self.plans:
            self.plan(name)

    def _locate(self, relative: str) -> tuple[FileEntry, Path]:
        entry = self.manifest.files.get(relative)
        if entry is None:
            raise IntegrityError(f"{relative}: not listed in the manifest", fix=REBUILD)
        path = self.path / relative
        if not path.is_file():
            raise IntegrityError(f"{relative}: expected a file of {entry.size} bytes, it is missing", fix=REBUILD)
        if not path.resolve().is_relative_to(self.path):
            raise IntegrityError(f"{relative}: expected a file in the bundle, got a link out of it", fix=REBUILD)
        return entry, path


def read_manifest(folder: Path) -> bytes:
    """The manifest's bytes; a writer may be between its two renames just now, for microseconds: then once more."""
    for _ in range(SWAP_RETRIES):
        restore(folder)
        try:
            return (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            if not any(folder.parent.glob(f".{folder.name}.*")):  # nobody is writing
                raise
            time.sleep(SWAP_PAUSE)
    return (folder / MANIFEST).read_bytes()


def files_below(folder: Path) -> Iterator[str]:
    """Relative paths of all files, and of all links."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def require_equal(relative: str, listed: FileEntry, found: FileEntry) -> None:
    if found.size != listed.size:
        raise IntegrityError(f"{relative}: expected {listed.size} bytes, got {found.size}", fix=REBUILD)
    if found.sha256 != listed.sha256:
        raise IntegrityError(
            f"{relative}: expected SHA-256 {listed.sha256[:12]}…, got {found.sha256[:12]}…: altered", fix=REBUILD
        )
