"""A bundle on disk, read: files are compared with the manifest before they are used."""

from __future__ import annotations

import hashlib
import html
import os
import shlex
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

import msgspec
from msgspec import UNSET

from lemica_trt.bundle.limits import require_runnable
from lemica_trt.bundle.manifest import (
    MANIFEST,
    MANIFEST_DIGEST,
    MANIFEST_SIGNATURE,
    OF_MANIFEST,
    REBUILD,
    REPORTS,
    FileEntry,
    Manifest,
    manifest_digest_line,
    manifest_from_json,
    plan_path,
)
from lemica_trt.bundle.signing import MAX_SIGNATURE_BYTES, TrustedKey, environment_keys, require_signed
from lemica_trt.core.atomic_folder import SWAP_PAUSE_SECONDS, SWAP_RETRIES, finish_swap, is_being_written
from lemica_trt.core.errors import InputError, IntegrityError, UsageError
from lemica_trt.core.files import PartedDigest, parted_digests
from lemica_trt.core.values import value_from_json
from lemica_trt.ir.engine import NONE, EngineEntry, EngineKey
from lemica_trt.ir.plan import UNCACHED, StepPlan
from lemica_trt.ir.profile import Shape, sizes_from_name
from lemica_trt.ir.timeline import timeline_svg

MANIFEST_MAX_BYTES = 64 << 20

SETTLED_NANOSECONDS = 100_000_000
"""A file that changed less than this before its digest was taken may change again without its times showing it: file
systems count in ticks of up to 10 ms."""

UNLINK = "copy it with its content in place of links: cp -rL, or snapshot_download(local_dir=…)"

Version = tuple[int, int, int, int, int]
"""What changes when a file is replaced or written: device, inode, size, times of change (ns)."""


class Bundle:
    """A bundle on disk, read. May be shared by threads.

    Attributes:
        path: the folder, without links.
        manifest: see there.
        digest: SHA-256 (hex) of `manifest.json`, and so of everything in the bundle.
        signed_by: id of the trusted key that signed it; None: no key was asked for.

    Args:
        whole: the bundle that this one is a look at, see `at`; None: it is none.
    """

    def __init__(
        self, path: Path, manifest: Manifest, digest: str, signed_by: str | None = None, *, whole: Bundle | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest
        self.signed_by = signed_by
        self._whole = whole or self
        self._checked: dict[str, Version] = {} if whole is None else whole._checked

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, trusted: Sequence[TrustedKey] | None = None) -> Bundle:
        """Open a bundle: read its manifest, compare it with its digest, and see that a trusted key signed it.

        Args:
            path: the folder.
            trusted: keys one of which must have signed it; none: nobody has to. None: those of the environment
                (`signing.TRUSTED_KEYS`), so that a process can be told once for all that it opens.

        Raises:
            InputError: no bundle: there is no manifest.
            IntegrityError: a damaged manifest, one of a newer format, or one that none of the keys signed; or links in
                `reports`.
            LemicaError: as `signing.environment_keys`.
        """
        folder = Path(os.path.realpath(path))
        keys = environment_keys() if trusted is None else trusted
        try:
            data, line = _read_manifest(folder)
        except OSError as error:
            name = Path(error.filename or MANIFEST).name
            if name == MANIFEST_DIGEST:  # bundles of older formats had none: say so
                manifest_from_json((folder / MANIFEST).read_bytes(), where=f"{path}/{MANIFEST}")
            what = f"{path}: expected a bundle with a {name}, got: {error.strerror}"
            if name == MANIFEST_DIGEST:
                raise IntegrityError(what, fix=REBUILD) from None
            raise InputError(what, fix="give the folder that 'lemica-trt build' wrote") from None
        if line != manifest_digest_line(data):
            raise IntegrityError(f"{path}/{MANIFEST}: does not match {MANIFEST_DIGEST}: altered", fix=REBUILD)
        try:
            signer = require_signed(data, read_signatures(folder), keys, str(path)) if keys else None
        except IntegrityError:
            if _read_manifest(folder)[0] == data:
                raise
            return cls.open(path, trusted=keys)  # another bundle took its place between the two readings
        manifest = manifest_from_json(data, where=f"{path}/{MANIFEST}")
        with suppress(FileNotFoundError):  # a writer may be putting another bundle in its place
            _require_plain(folder, REPORTS)
        return cls(folder, manifest, hashlib.sha256(data).hexdigest(), signer)

    def __repr__(self) -> str:
        manifest = self.manifest
        plans = ", ".join(f"{name} (default)" if name == manifest.default_plan else name for name in manifest.plans)
        engines = ", ".join(f"{entry.key.backend} for {entry.key.target}" for entry in manifest.engines)
        return f"<Bundle {str(self.path)!r}: {manifest.profile.name}; plans {plans}; engines {engines}>"

    def _repr_html_(self) -> str:
        rows = []
        for name in self.plans:
            plan = self.plan(name)
            cells = html.escape(name), f"{plan.budget} of {plan.num_steps}", html.escape(plan.method)
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in (*cells, timeline_svg(plan))) + "</tr>")
        return f"<div>{html.escape(repr(self))}<table>{''.join(rows)}</table></div>"

    @property
    def plans(self) -> tuple[str, ...]:
        """Names of the plans, sorted."""
        return self.manifest.plans

    @property
    def listed(self) -> dict[str, FileEntry]:
        """The files of the manifest, by path."""
        return self.manifest.files

    @property
    def shapes(self) -> tuple[str, ...]:
        """Names of the shapes, that of the profile first."""
        own = self._whole.manifest.default_bucket
        buckets = self.manifest.buckets
        others = sorted(buckets, key=lambda name: (buckets[name].shape.frames, buckets[name].shape.height, name))
        return (own, *(name for name in others if name != own))

    def at(self, shape: str | None) -> Bundle:
        """The bundle looked at as one of another of its shapes: graphs, engines and plans are those that it has there.

        Plans that do not hold there are not among its plans; where the default one is not, the uncached plan is.

        Args:
            shape: `FRAMESxHEIGHTxWIDTH`; None: as it is.

        Raises:
            UsageError: it has no such shape, or it is not written like that; says which there are.
            IntegrityError: as `plan`.
        """
        if shape is None:
            return self
        name, whole = Shape(**sizes_from_name(shape)).name, self._whole
        bucket = whole.manifest.buckets.get(name)
        if bucket is None:
            raise UsageError(
                f"the bundle has no shape {name} (frames x height x width)",
                fix=f"use {' or '.join(self.shapes)}, or add it: lemica-trt shape BUNDLE --shape {name}",
            )
        if name == whole.manifest.default_bucket:
            return whole
        plans = whole.plans
        if bucket.plans is not UNSET:
            plans = tuple(n for n in plans if n == UNCACHED or whole.plan(n).rows_digest in bucket.held)
        default = whole.manifest.default_plan
        manifest = msgspec.structs.replace(
            whole.manifest,
            profile=msgspec.structs.replace(whole.manifest.profile, shape=bucket.shape),
            plans=plans,
            default_plan=default if default in plans else UNCACHED,
        )
        return Bundle(self.path, manifest, self.digest, self.signed_by, whole=whole)

    def shape_named(self, frames: int | None = None, height: int | None = None, width: int | None = None) -> str:
        """The shape of these sizes; what is None may be anything, and that of the profile comes first.

        Raises:
            UsageError: no shape has them, or several do; says which there are.
        """
        wanted = {"frames": frames, "height": height, "width": width}
        given = {name: value for name, value in wanted.items() if value is not None}
        buckets = self.manifest.buckets
        fit = [n for n in self.shapes if all(getattr(buckets[n].shape, key) == given[key] for key in given)]
        if not fit or (len(fit) > 1 and fit[0] != self.shapes[0]):
            asked = ", ".join(f"{name} {value}" for name, value in given.items())
            raise UsageError(
                f"the bundle has {'several shapes' if fit else 'no shape'} of {asked}",
                fix=f"use one of: {', '.join(fit or self.shapes)} (frames x height x width)",
            )
        return fit[0]

    def plan(self, name: str | None = None) -> StepPlan:
        """A plan by name; None or `default`: the default one.

        Raises:
            UsageError: there is no such plan, or it does not hold at this shape; says which do.
            IntegrityError: its file is missing or altered.
            InputError: it does not fit the bundle's graphs.
        """
        if name is None or (name == "default" and name not in self._whole.plans):
            name = self.manifest.default_plan
        if name not in self.plans:
            raise self._refused(name)
        own = self.manifest.buckets[self.manifest.default_bucket].uncached
        where = own if own and name == UNCACHED else plan_path(name)
        plan = value_from_json(StepPlan, self.read_bytes(where), where=where)
        if plan.name != name:
            raise IntegrityError(f"{where}: expected a plan named {name!r}, got {plan.name!r}", fix=REBUILD)
        require_runnable(plan, self.manifest.graphs)
        return plan

    def _refused(self, name: str) -> UsageError:
        """Why there is no plan of a name: none at all, or none at this shape."""
        known, shape = f"use one of: {', '.join(self.plans)}", self.manifest.default_bucket
        if name not in self._whole.plans:
            return UsageError(f"the bundle has no plan {name!r}", fix=known)
        bucket, digest = self.manifest.buckets[shape], self._whole.plan(name).rows_digest
        if bucket.uncached:
            return UsageError(
                f"plan {name} is of another sampler than the model has at {shape}: its noise levels follow the size",
                fix=f"{known}, or build a bundle for that shape",
            )
        found = next((found for found in bucket.plans or () if found.rows_digest == digest), None)
        if found is None:
            return UsageError(
                f"plan {name} was not measured at {shape}",
                fix=f"{known}, or measure it: lemica-trt shape BUNDLE --shape {shape}",
            )
        return UsageError(
            f"plan {name} does not hold at {shape}: {found.text}", fix=f"{known}, or build a bundle for that shape"
        )

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

    def rebuild_command(self, key: EngineKey) -> str:
        """The command that builds engines from the bundle's own graphs, on the machine where it is typed.

        Plans and graphs stay as they are, the old bundle too; neither the model nor PyTorch is needed. Options of the
        builder that are not its defaults are for who built the bundle to repeat, except `--quantize`: plans are made
        for engines of one precision.
        """
        command = ["lemica-trt", "engine", str(self.path), "--backend", key.backend]
        if key.quantization != NONE:
            command += ["--quantize", key.quantization]
        return shlex.join([*command, "--output", f"{self.path}-here"])

    def file(self, relative: str) -> Path:
        """The path of a listed file, after `check_files`.

        Raises:
            IntegrityError: as `check_files`.
        """
        self.check_files([relative])
        return self.path / relative

    def read_bytes(self, relative: str) -> bytes:
        """The content of a listed file; the very bytes that are returned were checked.

        Raises:
            IntegrityError: as `check_files`.
        """
        self._version(relative)
        data = (self.path / relative).read_bytes()
        digest = PartedDigest()
        digest.update(data)
        self._require_digest(relative, digest.hexdigest())
        return data

    def check_files(self, names: Iterable[str]) -> None:
        """Compare listed files with the manifest, in threads; those that changed since they were last compared.

        Raises:
            IntegrityError: not listed, missing, altered, a link to elsewhere or not a regular file.
        """
        versions = {name: self._version(name) for name in names}
        changed = [name for name, version in versions.items() if self._checked.get(name) != version]
        now = time.time_ns()
        for name, digest in zip(changed, parted_digests([self.path / name for name in changed])):
            self._require_digest(name, digest)
            if self._version(name) != versions[name]:
                raise IntegrityError(f"{name}: changed while it was read", fix="load it again")
            if now - max(versions[name][3:]) > SETTLED_NANOSECONDS:
                self._checked[name] = versions[name]

    def check(self) -> None:
        """Check everything: every listed file, every plan against the graphs, and that nothing else lies there.

        Raises:
            IntegrityError: a file is missing, altered, not listed, or a link.
            InputError: a plan does not fit the graphs.
        """
        self.check_listed()
        known = {*OF_MANIFEST, *self.manifest.files}
        for relative in sorted(files_below(self.path)):
            if relative not in known and PurePosixPath(relative).parts[0] != REPORTS:
                raise IntegrityError(f"{relative}: not listed in the manifest", fix="remove it, or rebuild the bundle")

    def check_listed(self) -> None:
        """Check every listed file, and every plan against the graphs of all shapes that it holds at.

        Raises:
            as `check`.
        """
        self.check_files(sorted(self.manifest.files))
        for shape in self.shapes:
            there = self.at(shape)
            for name in there.plans:
                there.plan(name)

    def _version(self, relative: str) -> Version:
        """The version of a listed file that has the listed size, and is a file of this folder.

        Raises:
            IntegrityError: as `check_files`.
        """
        listed = self.manifest.files.get(relative)
        if listed is None:
            raise IntegrityError(f"{relative}: not listed in the manifest", fix=REBUILD)
        path = self.path / relative
        try:
            content = real_file(self.path, path)
            found = path.lstat() if content is None else content.lstat()
        except OSError:
            raise self._broken(f"{relative}: expected a file of {listed.size} bytes, it is missing") from None
        if content is None:
            raise self._broken(f"{relative}: expected a file in the bundle, got a link", fix=UNLINK)
        if not stat.S_ISREG(found.st_mode):
            raise self._broken(f"{relative}: expected a file, got a folder, pipe or device")
        if found.st_size != listed.size:
            raise self._broken(f"{relative}: expected {listed.size} bytes, got {found.st_size}")
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _require_digest(self, relative: str, digest: str) -> None:
        listed = self.manifest.files[relative].sha256
        if digest != listed:
            raise self._broken(f"{relative}: expected SHA-256 {listed[:12]}…, got {digest[:12]}…: altered")

    def _broken(self, what: str, *, fix: str = REBUILD) -> IntegrityError:
        """The error that says what is wrong with a file, unless another bundle lies there by now."""
        with suppress(OSError, IntegrityError):
            if hashlib.sha256(_read_small(self.path, MANIFEST)).hexdigest() != self.digest:
                return IntegrityError(f"{self.path}: replaced after it was opened", fix="open the bundle again")
        return IntegrityError(what, fix=fix)


def hub_blobs(folder: Path) -> Path | None:
    """The only folder that links of a bundle may point into: `blobs` of a hub's cache, if the bundle is a snapshot
    there (`models--OWNER--NAME/snapshots/REVISION`) or below one; None: it is not, and no link may be in it."""
    for snapshots in folder.parents:
        if snapshots.name == "snapshots":
            blobs = snapshots.parent / "blobs"
            return blobs if blobs.is_dir() and not blobs.is_symlink() else None
    return None


def real_file(folder: Path, path: Path) -> Path | None:
    """Where the content of a file of the bundle lies: there, or in `hub_blobs`; None: it is a link to elsewhere.

    Args:
        folder: of the bundle, without links.
        path: below it.
    """
    real = Path(os.path.realpath(path))
    if real == path:
        return path
    in_cache = real.parent == hub_blobs(folder) and os.path.realpath(path.parent) == str(path.parent)
    return real if in_cache else None


def files_below(folder: Path) -> Iterator[str]:
    """Relative paths of everything in a folder that is not a folder."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _require_plain(folder: Path, name: str) -> None:
    """Raise IntegrityError unless a folder of the bundle holds files and folders only."""
    for path in (folder / name, *(folder / name).rglob("*")):
        mode = path.lstat().st_mode  # one look: in two, a writer may come between
        if stat.S_ISLNK(mode) and (content := real_file(folder, path)) is not None:
            mode = content.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            where = path.relative_to(folder).as_posix()
            raise IntegrityError(f"{where}: expected a file or folder, got a link or device", fix="remove it")


def _read_manifest(folder: Path) -> tuple[bytes, bytes]:
    """Content of `manifest.json` and `manifest.sha256`; once more where a writer was between two renames.

    Raises:
        OSError: one of them cannot be read.
    """
    previous, missed = None, 0
    for attempt in range(SWAP_RETRIES):
        with suppress(OSError):  # who may not write here waits for the writer, or finds the manifest missing
            finish_swap(folder)
        try:
            found = _read_small(folder, MANIFEST), _read_small(folder, MANIFEST_DIGEST)
        except FileNotFoundError:
            # A writer may have come between, and be gone by now: a second miss without one is no accident.
            missed += not is_being_written(folder)
            if attempt == SWAP_RETRIES - 1 or missed > 1:
                raise
        else:
            if found[1] == manifest_digest_line(found[0]) or found == previous:
                return found
            previous = found  # they are of two bundles if a writer came between, damaged if they stay like this
        time.sleep(SWAP_PAUSE_SECONDS)
    return _read_small(folder, MANIFEST), _read_small(folder, MANIFEST_DIGEST)


def read_signatures(folder: Path) -> bytes | None:
    """Content of `manifest.sig`; None: there is none."""
    try:
        return _read_small(folder, MANIFEST_SIGNATURE, MAX_SIGNATURE_BYTES)
    except FileNotFoundError:
        return None


def _read_small(folder: Path, name: str, most: int = MANIFEST_MAX_BYTES) -> bytes:
    """The content of a regular file of the bundle of at most so many bytes.

    Raises:
        OSError: it cannot be read.
        IntegrityError: it is something else.
    """
    path = folder / name
    path = real_file(folder, path) or path
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        raise IntegrityError(f"{path}: expected a file of at most {most} bytes, no link", fix=UNLINK)
    return path.read_bytes()
