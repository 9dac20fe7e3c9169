"""Writing bundles: a new one, one with more plans, a copy. Each is whole or not there, even if a process is killed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import msgspec

from lemica_trt.bundle.limits import require_runnable
from lemica_trt.bundle.manifest import (
    MANIFEST,
    MANIFEST_DIGEST,
    MANIFEST_SIGNATURE,
    REPORTS,
    Bucket,
    FileEntry,
    Manifest,
    bucket_folder,
    manifest_digest_line,
    manifest_files,
    plan_path,
    portable_profile,
    require_relative,
    shape_report,
)
from lemica_trt.bundle.reading import Bundle, files_below, hub_blobs, read_signatures
from lemica_trt.bundle.signing import signature_bytes
from lemica_trt.core.atomic_folder import held, remove_leftovers, replacing, temporary_beside
from lemica_trt.core.errors import InputError, IntegrityError, MissingDependencyError, UsageError
from lemica_trt.core.files import PIECE_BYTES, PartedDigest, parted_digests
from lemica_trt.core.progress import size
from lemica_trt.core.values import json_bytes
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.graphs import EncoderSpec, GraphSet
from lemica_trt.ir.plan import DEFAULT, UNCACHED, StepPlan
from lemica_trt.ir.profile import Profile


def write_bundle(
    target: str | os.PathLike[str],
    *,
    profile: Profile,
    graphs: GraphSet,
    plans: Iterable[StepPlan],
    default_plan: str,
    encoders: Iterable[EncoderSpec],
    engines: Iterable[EngineEntry],
    files: Mapping[str, Path | bytes],
    reports: Mapping[str, Path | bytes] | None = None,
    revision: str | None = None,
    versions: Mapping[str, str] | None = None,
    further: Mapping[str, Bucket] | None = None,
) -> Bundle:
    """Write a bundle, replacing an older one at `target` at the very end.

    Args:
        target: the folder; made with its parents. One writer at a time.
        files: path in the bundle → a file to copy, or its content. Plans are not among them.
        reports: the same, below `reports/`.
        profile, graphs, default_plan, encoders, engines, revision, versions: see `Manifest`; an absolute
            source in `profile` is shortened. `further`: buckets of other shapes, by name.
        plans: at least one; names must differ.

    Returns:
        The new bundle, opened.

    Raises:
        UsageError: `target` is something else than a bundle or an empty folder.
        InputError: a file cannot be read, a plan does not fit the graphs, or the values do not make a manifest.
        MissingDependencyError: there is not enough disk space.
    """
    by_name = {plan.name: plan for plan in plans}
    for plan in by_name.values():
        require_runnable(plan, graphs)
    buckets = {profile.shape.name: Bucket(shape=profile.shape, graphs=graphs, engines=tuple(engines))}
    contents = {**files, **{plan_path(plan.name): json_bytes(plan) for plan in by_name.values()}}
    with replacing(Path(target), require_replaceable) as (folder, staged):
        reports = reports or {}
        _require_space(staged, [*contents.values(), *reports.values()])
        try:
            entries = _store_all(contents, reports, staged)
            manifest = Manifest(
                profile=portable_profile(profile),
                revision=revision,
                buckets={**buckets, **(further or {})},
                plans=tuple(sorted(by_name)),
                default_plan=default_plan,
                encoders=tuple(encoders),
                files=entries,
                versions=dict(versions or {}),
            )
        except ValueError as error:
            raise InputError(f"{target}: cannot make a bundle: {error}") from None
        for path, data in manifest_files(manifest).items():
            _store(data, staged / path)
    return Bundle.open(folder, trusted=())


def _store_all(
    files: Mapping[str, Path | bytes], reports: Mapping[str, Path | bytes], staged: Path
) -> dict[str, FileEntry]:
    """Copy or write all files and reports of a staged bundle; the entries of the files."""
    for path in (*files, *reports):
        require_relative(path)
    for path, content in reports.items():
        _store(content, staged / REPORTS / path)
    return {path: _store(content, staged / path) for path, content in sorted(files.items())}


def add_plan(bundle: Bundle, *plans: StepPlan, default: str | None = None) -> Bundle:
    """Add plans to a bundle, replacing those of the same name: `change_plans`."""
    return change_plans(bundle, plans, default=default)


def change_plans(
    bundle: Bundle,
    plans: Sequence[StepPlan] = (),
    *,
    remove: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    default: str | None = None,
    profile: Profile | None = None,
    files: Mapping[str, bytes | None] | None = None,
) -> Bundle:
    """Add, remove and rename plans of a bundle; as atomic as `write_bundle`.

    Files that stay are linked, not copied, where the file system can. Signatures do not stay: they are of the manifest
    as it was.

    Args:
        bundle: stays as it was read; use the returned one. Plans that others have added since are kept.
        plans: what to add, replacing plans of the same name.
        remove: names.
        rename: old name → new name; the default plan stays the default one.
        default: the new default plan; None: as before.
        profile: with other calibration settings; None: as before.
        files: path → its new content, None: it goes; of what the plans were made from.

    Raises:
        UsageError: no such plan; the uncached plan, against which others are measured, or the default one would go;
            a name is taken. Or another process writes the bundle.
        InputError: a plan does not fit the graphs, or is for another sampler.
        IntegrityError: the bundle is not whole.
    """
    rename = dict(rename or {})
    with replacing(bundle.path, require_replaceable) as (folder, staged):
        bundle = Bundle.open(folder, trusted=())  # others may have added plans since
        _require_changes(bundle, plans, remove, rename, default)
        _require_plans(bundle, plans)
        bundle.check()
        gone = {*remove, *rename}
        renamed = [_renamed(bundle.plan(old), new) for old, new in rename.items()]
        changed = {**(files or {}), **{plan_path(plan.name): json_bytes(plan) for plan in (*renamed, *plans)}}
        dropped = {*map(plan_path, gone), *changed}
        kept = {path: entry for path, entry in bundle.manifest.files.items() if path not in dropped}
        reports = [path for path in files_below(folder) if PurePosixPath(path).parts[0] == REPORTS]
        for path in (*kept, *reports):
            _link(folder / path, staged / path)
        entries = {path: _store(data, staged / path) for path, data in changed.items() if data is not None}
        manifest = _changed(
            bundle,
            "plans",
            profile=bundle.manifest.profile
            if profile is None
            else msgspec.structs.replace(profile, source=bundle.manifest.profile.source),
            plans=tuple(sorted({*bundle.plans, *(plan.name for plan in (*renamed, *plans))} - gone)),
            default_plan=default or rename.get(bundle.manifest.default_plan, bundle.manifest.default_plan),
            files={**kept, **entries},
        )
        for path, data in manifest_files(manifest).items():
            _store(data, staged / path)
    return Bundle.open(folder, trusted=())


def change_buckets(
    bundle: Bundle,
    bucket: Bucket | None = None,
    files: Mapping[str, Path | bytes] | None = None,
    *,
    remove: Collection[str] = (),
    target: Path | None = None,
) -> Bundle:
    """Add or replace a further shape of a bundle, or remove some; as atomic as `write_bundle`.

    Files that stay are linked, where the file system can; so is a new file that one of them is the same as: a text
    encoder, say, which knows no size.

    Args:
        bundle: stays as it was read; use the returned one. Plans that others have added since are kept.
        bucket: what to add.
        files: path in the bundle, below `bucket_folder`, → a file to link, which nobody will write to, or its content.
        remove: names of further shapes.
        target: where the changed bundle is written; None: in the place of the old one.

    Raises:
        UsageError: no such further shape; or another process writes the bundle.
        InputError: the bucket does not fit the bundle, or no plan of it the bucket's graphs.
        IntegrityError: the bundle is not whole.
        MissingDependencyError: there is not enough disk space.
    """
    with replacing(target or bundle.path, require_replaceable) as (folder, staged):
        if target is None:
            bundle = Bundle.open(folder, trusted=())
        gone = [bucket_folder(name) for name in (*remove, *([] if bucket is None else [bucket.shape.name]))]
        require_further(bundle, remove, added=() if bucket is None else (bucket.shape.name,))
        bundle.check()
        _require_space(staged, (files or {}).values())
        kept = {
            path: entry for path, entry in bundle.listed.items() if not path.startswith(tuple(f"{g}/" for g in gone))
        }
        others = [path for path in files_below(bundle.path) if PurePosixPath(path).parts[0] == REPORTS]
        dropped = {shape_report(folder.rpartition("/")[2]) for folder in gone}
        for path in (*kept, *(path for path in others if target is None and path not in dropped)):
            _link(bundle.path / path, staged / path)
        known = {entry: path for path, entry in kept.items()}
        entries = {path: _adopted(content, staged, path, known) for path, content in (files or {}).items()}
        buckets = {name: found for name, found in bundle.manifest.buckets.items() if name not in remove}
        if bucket is not None:
            buckets[bucket.shape.name] = bucket
        manifest = _changed(bundle, "shapes", buckets=buckets, files={**kept, **entries})
        for path, data in manifest_files(manifest).items():
            _store(data, staged / path)
    return Bundle.open(folder, trusted=())


def require_further(bundle: Bundle, remove: Collection[str], *, added: Collection[str] = ()) -> None:
    """Raise UsageError unless these are names of further shapes, and those to remove are there."""
    own, there = bundle.shapes[0], bundle.shapes[1:]
    for name in (*remove, *added):
        if name == own:
            raise UsageError(f"{own} is the shape that the bundle was built for", fix="name another, or build again")
    for name in remove:
        if name not in there:
            raise UsageError(
                f"the bundle has no further shape {name}",
                fix=f"use one of: {', '.join(there)}" if there else "it has one shape only",
            )


def _adopted(content: Path | bytes, staged: Path, path: str, known: Mapping[FileEntry, str]) -> FileEntry:
    """Link or write one file of a staged bundle; where it already has the same content by another path, that is linked.

    Args:
        known: files of the bundle → their path.
    """
    if isinstance(content, bytes):
        return _store(content, staged / path)
    entry = FileEntry(sha256=parted_digests([content])[0], size=content.stat().st_size)
    _link(staged / known[entry] if entry in known else content, staged / path)
    return entry


def _changed(bundle: Bundle, what: str, **changes: Any) -> Manifest:
    """The manifest of a bundle with some fields changed.

    Args:
        what: is changed, in words.

    Raises:
        InputError: they do not fit together.
    """
    try:
        return msgspec.structs.replace(bundle.manifest, **changes)
    except ValueError as error:
        raise InputError(
            f"{bundle.path.name}: cannot change its {what}: {error}", fix="lemica-trt inspect BUNDLE shows them"
        ) from None


def _require_changes(
    bundle: Bundle,
    plans: Iterable[StepPlan],
    remove: Collection[str],
    rename: Mapping[str, str],
    default: str | None,
) -> None:
    """Raise UsageError unless plans can be added, removed and renamed like that."""
    known = f"use one of: {', '.join(bundle.plans)}"
    for name in (*remove, *rename):
        if name not in bundle.plans:
            raise UsageError(f"the bundle has no plan {name!r}", fix=known)
        if name == UNCACHED:
            raise UsageError(f"plan {name} must stay: others are measured against it", fix="leave it out")
    if both := sorted({*remove} & {*rename}):
        raise UsageError(f"plan {both[0]} cannot be removed and renamed", fix="leave out one of the two")
    added = [plan.name for plan in plans]
    left = {*bundle.plans, *added} - {*remove, *rename}
    for old, new in rename.items():
        if new in left or new in (UNCACHED, DEFAULT) or [*rename.values()].count(new) > 1:
            raise UsageError(f"plan {old}: the name {new!r} is taken", fix="choose another name")
    left |= {*rename.values()}
    if default is not None and default not in left:
        raise UsageError(f"the bundle has no plan {default!r}", fix=f"use one of: {', '.join(sorted(left))}")
    if default is None and bundle.manifest.default_plan in remove and bundle.manifest.default_plan not in added:
        raise UsageError(
            f"plan {bundle.manifest.default_plan} is the default one",
            fix=f"name another: --default {' or '.join(sorted(left))}",
        )


def _renamed(plan: StepPlan, name: str) -> StepPlan:
    """The same plan by another name.

    Raises:
        UsageError: no plan can have it.
    """
    try:
        return msgspec.structs.replace(plan, name=name)
    except ValueError as error:
        raise UsageError(f"plan {plan.name}: {error}", fix="choose another name") from None


def _require_plans(bundle: Bundle, plans: Iterable[StepPlan]) -> None:
    """Raise InputError unless these plans fit the graphs and the sampler of a bundle."""
    sampler = bundle.plan().sampler_digest
    for plan in plans:
        require_runnable(plan, bundle.manifest.graphs)
        if plan.sampler_digest != sampler:
            raise InputError(
                f"plan {plan.name}: expected a plan for the sampler {sampler[:12]}, got one for "
                f"{plan.sampler_digest[:12]} ({plan.scheduler}, {plan.num_steps} steps)",
                fix="build another bundle for it; `--calibration-from` saves most of the calibration",
            )


def copy_bundle(bundle: Bundle, target: str | os.PathLike[str]) -> Bundle:
    """A second folder with the same bundle and its signatures, without `reports`; as atomic as `write_bundle`.

    Files are linked, not copied, where the file system can; what somebody may edit – plans, the manifest – is copied.
    What else lies in the folder is left there.

    Raises:
        IntegrityError, InputError: the bundle is not whole.
        UsageError: `target` is something else than a bundle or an empty folder.
    """
    bundle.check_listed()
    with replacing(Path(target), require_replaceable) as (folder, staged):
        edited = {plan_path(name) for name in bundle.plans}
        for path in sorted(bundle.manifest.files):
            (_store if path in edited else _link)(bundle.path / path, staged / path)
        manifest = (bundle.path / MANIFEST).read_bytes()  # the very bytes: a digest and signatures are of them
        if hashlib.sha256(manifest).hexdigest() != bundle.digest:
            raise IntegrityError(f"{bundle.path}: replaced after it was opened", fix="open the bundle again")
        _store(manifest, staged / MANIFEST)
        _store(manifest_digest_line(manifest), staged / MANIFEST_DIGEST)
        if (signatures := read_signatures(bundle.path)) is not None:
            _store(signatures, staged / MANIFEST_SIGNATURE)
    return Bundle.open(folder, trusted=())


def move_bundle(bundle: Bundle, target: str | os.PathLike[str]) -> Bundle:
    """Rename a bundle's folder, with whatever is in it, replacing an older bundle; as atomic as `write_bundle`.

    Args:
        bundle: not to be used any more.
        target: on the same file system.

    Raises:
        UsageError: `target` is something else than a bundle or an empty folder.
    """
    with replacing(Path(target), require_replaceable) as (folder, staged):
        staged.rmdir()
        bundle.path.rename(staged)
    return Bundle.open(folder, trusted=())


def sign_bundle(bundle: Bundle, key: str | os.PathLike[str]) -> Bundle:
    """Sign a bundle, beside the signatures of other keys; a process that is killed leaves it as it was, or signed.

    Args:
        bundle: checked whole before it is signed.
        key: PEM file of an Ed25519 private key.

    Raises:
        IntegrityError: the bundle is not whole, or another one lies there by now.
        InputError: no such key.
        UsageError: another process writes the bundle, or it cannot be written there.
        MissingDependencyError: cryptography is not installed.
    """
    require_replaceable(bundle.path)
    with held(bundle.path):
        found = Bundle.open(bundle.path, trusted=())
        if found.digest != bundle.digest:
            raise IntegrityError(f"{bundle.path}: replaced after it was opened", fix="look at it, and sign it again")
        found.check()
        target, manifest = found.path / MANIFEST_SIGNATURE, (found.path / MANIFEST).read_bytes()
        if hashlib.sha256(manifest).hexdigest() != found.digest:
            raise IntegrityError(f"{bundle.path}: replaced after it was opened", fix="look at it, and sign it again")
        data = signature_bytes(manifest, key, read_signatures(found.path))
        remove_leftovers(found.path)
        temporary = temporary_beside(found.path)  # a leftover inside the bundle would be a file that is not listed
        try:
            _store(data, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return found


def require_replaceable(target: Path) -> None:
    """Ask before the work is done whether a bundle can be written there.

    Raises:
        UsageError: `target` is something else than a bundle, an empty folder, or nothing; or it is a mount point, or
            in the cache of a hub.
    """
    if hub_blobs(Path(os.path.realpath(target))) is not None:
        raise UsageError(
            f"{target}: expected a folder of your own, got a snapshot in the cache of a hub",
            fix="copy it with its content in place of links: cp -rL",
        )
    if os.path.ismount(target):
        raise UsageError(
            f"{target}: expected a folder that can be renamed, got a mount point",
            fix=f"give a folder inside it: {target / 'bundle'}",
        )
    if target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir())):
        return
    if target.exists():
        raise UsageError(
            f"{target}: expected a bundle to replace, an empty folder or nothing, got something else",
            fix="give another output folder",
        )


def _store(content: Path | bytes, path: Path) -> FileEntry:
    """Write one file of a staged bundle, synced; its digest and size.

    Raises:
        InputError: the source cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, count = PartedDigest(), 0
    with path.open("wb") as file, _opened(content) as source:
        while piece := source.read(PIECE_BYTES):
            file.write(piece)
            digest.update(piece)
            count += len(piece)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)
    return FileEntry(sha256=digest.hexdigest(), size=count)


def _opened(content: Path | bytes) -> BinaryIO:
    if isinstance(content, bytes):
        return io.BytesIO(content)
    try:
        return content.open("rb")
    except OSError as error:
        raise InputError(f"{content}: expected a readable file for the bundle, got: {error.strerror}") from None


def _link(source: Path, path: Path) -> None:
    """A hard link to a file's content, or a copy where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), path)  # of a link itself there is no use in another folder
    except OSError:
        _store(source, path)


def _require_space(folder: Path, contents: Iterable[Path | bytes]) -> None:
    """Raise MissingDependencyError unless the contents fit on the disk."""
    sizes = (
        len(content) if isinstance(content, bytes) else content.stat().st_size
        for content in contents
        if isinstance(content, bytes) or content.is_file()
    )
    needed, free = sum(sizes), shutil.disk_usage(folder).free
    if needed > free:
        raise MissingDependencyError(
            f"the bundle needs {size(needed)} beside {folder.parent}, {size(free)} are free",
            fix="free disk space, or give another output folder",
        )
