"""The bundle: the folder that is deployed. Its manifest, its digests, and writing it so that it is whole or not there.

    bundle/
      manifest.json         the `Manifest`: every file's SHA-256 and size, graphs, engines, plans, versions
      plans/<name>.json     `StepPlan`s, one or many; a request chooses one
      onnx/  engines/  tokenizer/  …   at the paths that the manifest gives
      reports/              what a person looks at
      cache/                what TensorRT for RTX compiled for the GPU of one machine

Promises:

- Nothing is loaded that the manifest does not list with the right size and digest; no path leaves the folder. JSON,
  ONNX and engines only. (Digests find damage and mix-ups; who may write a bundle is for file permissions to say.)
- The same input gives the same bytes: no times, no timings, no machine paths. `reports/` and `cache/` are outside of
  this promise and of the digests. The runtime never reads `reports/`, where timings live; it writes `cache/`, and reads
  it with a digest of its own. TensorRT does not build the same bytes twice; with its engines goes what building them
  took (`EngineBuild`).
- It may be moved to another folder or machine.
- A writer that is killed leaves the old bundle or the new one. It works in a folder beside the target,
  `.NAME.tmp-PID-…`; the next writer removes those of dead processes.

Knows nothing of how an engine is built or run.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from lemica_trt.builders import EngineEntry, sha256_of
from lemica_trt.errors import InputError, IntegrityError, MissingDependencyError, UsageError
from lemica_trt.plan import StepPlan, coefficient_vector
from lemica_trt.spec import GraphSet, Profile, Role, TextSpec
from lemica_trt.values import Value, json_bytes, require, value_from_json

if TYPE_CHECKING:
    from lemica_trt.runtime.backend import Capture
    from lemica_trt.runtime.pipeline import Pipeline

FORMAT_VERSION = 1

MANIFEST = "manifest.json"
REPORTS = "reports"
CACHE = "cache"
UNLISTED = (REPORTS, CACHE)
"""Folders that no manifest lists files of."""

SAMPLER_FILE = "calibration/sampler.json"
ERROR_GRAPH_FILE = "calibration/error_graph.json"
GRAMS_FILE = "calibration/grams.json"
SENSITIVITY_FILE = "calibration/sensitivity.json"
SELECTION_FILE = "calibration/selection.json"
REFERENCE_FILE = "calibration/reference.json"
FRONT_FILE = "calibration/front.json"
"""Where a bundle keeps what its plans were made from, so that `plan BUNDLE` can make others without PyTorch, and
other builds can be calibrated from it."""

VERIFY_REPORT = f"{REPORTS}/verify.json"
STEP_TIMES = f"{REPORTS}/step_times.json"

SWAP_RETRIES, SWAP_PAUSE = 40, 0.005
"""How often, and how many seconds apart, a reader looks again while a writer swaps bundles."""

_REBUILD = "copy the bundle again, or rebuild it"


class FileEntry(Value, frozen=True):
    """A listed file: SHA-256 (hex) and size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        require(bool(re.fullmatch("[0-9a-f]{64}", self.sha256)), f"sha256 must be 64 hex digits, got {self.sha256!r}")
        require(self.size >= 0, f"size must be at least 0, got {self.size}")


class Manifest(Value, frozen=True):
    """All about a bundle that is not in its files.

    Attributes:
        profile: what it was built as; family, dtype, shape and sampling are read from here at run time. `source` is
            what the user gave, or only its last part where that was a path of one machine (`portable_source`).
        revision: revision of the model; None where it has none.
        graphs: all graphs that were exported.
        plans: names, sorted; plan NAME lies in `plans/NAME.json`.
        default_plan: the plan of a request that names none.
        text: how a prompt becomes ids.
        engines: sets of engines, in order of preference.
        files: path relative to the bundle, with `/` → digest and size. `manifest.json` and `UNLISTED` are not listed.
        versions: library → version, as built.
        format_version: 1.
    """

    profile: Profile
    graphs: GraphSet
    plans: tuple[str, ...]
    default_plan: str
    text: TextSpec
    engines: tuple[EngineEntry, ...]
    files: dict[str, FileEntry]
    revision: str | None = None
    versions: dict[str, str] = {}
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        require(
            self.format_version == FORMAT_VERSION, f"format_version must be {FORMAT_VERSION}, got {self.format_version}"
        )
        source = self.profile.source
        require(source == portable_source(source), f"profile.source must not be an absolute path, got {source!r}")
        for path in self.files:
            require_relative(path)
            require(path != MANIFEST and PurePosixPath(path).parts[0] not in UNLISTED, f"{path} must not be listed")
        require(list(self.plans) == sorted(set(self.plans)), "plans must be sorted names")
        require(self.default_plan in self.plans, f"default_plan must be one of plans, got {self.default_plan!r}")
        require(bool(self.engines), "engines must not be empty")
        loaded = [plan_path(name) for name in self.plans] + [self.text.tokenizer]
        loaded += [path for entry in self.engines for path in entry.files.values()]
        loaded += [path for graph in self.graphs.graphs for path in (graph.file, *graph.data_files)]
        for path in loaded:
            require(path in self.files, f"files must list {path}")


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
            data = _read_manifest(folder)
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
            raise IntegrityError(f"{plan_path(name)}: expected a plan named {name!r}, got {plan.name!r}", fix=_REBUILD)
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
            _require_equal(relative, entry, FileEntry(sha256=sha256_of(path), size=path.stat().st_size))
            self._checked.add(relative)
        return path

    def read_bytes(self, relative: str) -> bytes:
        """The content of a listed file; the very bytes that are returned were checked.

        Raises:
            IntegrityError: as `file`.
        """
        entry, path = self._locate(relative)
        data = path.read_bytes()
        _require_equal(relative, entry, FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data)))
        return data

    def check(self) -> None:
        """Check everything: every listed file, every plan against the graphs, and that nothing else lies there.

        Raises:
            IntegrityError: a file is missing, altered, not listed, or a link out of the bundle.
            InputError: a plan does not fit the graphs.
        """
        for relative in sorted(self.manifest.files):
            entry, path = self._locate(relative)
            _require_equal(relative, entry, FileEntry(sha256=sha256_of(path), size=path.stat().st_size))
        for relative in sorted(_files_below(self.path)):
            known = relative in self.manifest.files or relative == MANIFEST
            if not known and PurePosixPath(relative).parts[0] not in UNLISTED:
                raise IntegrityError(f"{relative}: not listed in the manifest", fix="remove it, or rebuild the bundle")
        for name in self.plans:
            self.plan(name)

    def pipeline(
        self,
        plan: str | None = None,
        *,
        backend: str | None = None,
        device: int = 0,
        threads: int | None = None,
        capture: Capture = "plan",
        roles: Collection[Role] | None = None,
    ) -> Pipeline:
        """Load the engines: a callable from prompts to frames.

        Args:
            plan: the plan of requests that name none; None: the bundle's default.
            backend: which engines; None: the first set.
            device: which GPU, as CUDA counts those that it sees.
            threads: CPU threads within an operator, 0: one for each CPU; None: as built. For ONNX Runtime.
            capture: what becomes a CUDA graph: the `plan`, each `step` (always so while a request reports progress),
                or `none`. For TensorRT.
            roles: which engines; None: all.

        Raises:
            UsageError, IntegrityError: as `plan`, `engine` and `file`.
            MissingDependencyError: the backend's package, driver or device is not here.
            UnsupportedError: the engines are for another machine; says the command that builds them for this one.
            EngineError: an engine does not load.
        """
        from lemica_trt.runtime.pipeline import Pipeline

        return Pipeline(self, plan=plan, backend=backend, device=device, threads=threads, capture=capture, roles=roles)

    def _locate(self, relative: str) -> tuple[FileEntry, Path]:
        entry = self.manifest.files.get(relative)
        if entry is None:
            raise IntegrityError(f"{relative}: not listed in the manifest", fix=_REBUILD)
        path = self.path / relative
        if not path.is_file():
            raise IntegrityError(f"{relative}: expected a file of {entry.size} bytes, it is missing", fix=_REBUILD)
        if not path.resolve().is_relative_to(self.path):
            raise IntegrityError(f"{relative}: expected a file in the bundle, got a link out of it", fix=_REBUILD)
        return entry, path


def manifest_from_json(data: bytes, *, where: str) -> Manifest:
    """Decode a manifest strictly.

    Raises:
        IntegrityError: it is damaged, or of a newer format.
    """

    class Version(msgspec.Struct):
        format_version: int

    try:
        version = value_from_json(Version, data, where=where).format_version
        if version > FORMAT_VERSION:
            raise IntegrityError(
                f"{where}: expected bundle format {FORMAT_VERSION} or older, got {version}",
                fix="pip install --upgrade lemica-trt",
            )
        return value_from_json(Manifest, data, where=where)
    except IntegrityError:
        raise
    except InputError as error:
        raise IntegrityError(error.what, fix=_REBUILD) from None


def check_plan(plan: StepPlan, graphs: GraphSet) -> None:
    """Raise InputError unless these graphs can run the plan: their histories are deep enough and none is missing."""
    roles = {graph.role for graph in graphs.graphs}
    needed = {"combine"} | {row.graph for row in plan.rows if row.graph != "none"}
    if not needed <= roles:
        raise InputError(
            f"plan {plan.name} needs the graphs {', '.join(sorted(needed))}, the bundle has {', '.join(sorted(roles))}",
            fix="rebuild the bundle for this plan",
        )
    try:
        for row in plan.rows:
            coefficient_vector(row, graphs.layout)
    except ValueError as error:
        raise InputError(f"plan {plan.name}: {error}", fix="rebuild the bundle for this plan") from None


def plan_path(name: str) -> str:
    """Where plan `name` lies in a bundle."""
    return f"plans/{name}.json"


def portable_source(source: str) -> str:
    """A model's source without the path of one machine: absolute paths, `~` and `..` keep their last part only."""
    path = PureWindowsPath(source) if re.match(r"[A-Za-z]:[\\/]|\\\\", source) else PurePosixPath(source)
    local = path.is_absolute() or source.startswith(("~", "file:")) or ".." in path.parts
    return path.name if local else source


def require_relative(path: str) -> None:
    """Raise ValueError unless `path` is plain, relative, `/`-separated and stays below its folder."""
    parts = path.split("/")
    plain = not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\:\x00-\x1f]", path)
    require(plain, f"expected a relative path inside the bundle, got {path!r}")


# ---------------------------------------------------------------- writing


def write_bundle(
    target: str | os.PathLike[str],
    *,
    profile: Profile,
    graphs: GraphSet,
    plans: Iterable[StepPlan],
    default_plan: str,
    text: TextSpec,
    engines: Iterable[EngineEntry],
    files: Mapping[str, Path | bytes],
    reports: Mapping[str, Path | bytes] | None = None,
    revision: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> Bundle:
    """Write a bundle, replacing an older one at `target` at the very end.

    Args:
        target: the folder; made with its parents. One writer at a time.
        files: path in the bundle → a file to copy, or its content. Plans are not among them.
        reports: the same, below `reports/`.
        profile, graphs, default_plan, text, engines, revision, versions: see `Manifest`; an absolute
            `profile.source` is shortened.
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
        check_plan(plan, graphs)
    contents: dict[str, Path | bytes] = dict(files)
    contents.update({plan_path(name): json_bytes(plan) for name, plan in by_name.items()})
    with _replacing(Path(target)) as (folder, staged):
        _require_space(staged, [*contents.values(), *(reports or {}).values()])
        try:
            entries = {}
            for path, content in sorted(contents.items()):
                require_relative(path)
                entries[path] = _store(content, staged / path)
            for path, content in (reports or {}).items():
                require_relative(path)
                _store(content, staged / REPORTS / path)
            manifest = Manifest(
                profile=msgspec.structs.replace(profile, source=portable_source(profile.source)),
                revision=revision,
                graphs=graphs,
                plans=tuple(sorted(by_name)),
                default_plan=default_plan,
                text=text,
                engines=tuple(engines),
                files=entries,
                versions=dict(versions or {}),
            )
        except ValueError as error:
            raise InputError(f"{target}: cannot make a bundle: {error}") from None
        _store(json_bytes(manifest), staged / MANIFEST)
    return Bundle.open(folder)


def add_plan(bundle: Bundle, *plans: StepPlan, default: str | None = None) -> Bundle:
    """Add plans to a bundle, replacing those of the same name; as atomic as `write_bundle`.

    Files that stay are linked, not copied, where the file system can.

    Args:
        bundle: stays as it was read; use the returned one.
        plans: what to add.
        default: the new default plan; None: as before.

    Raises:
        InputError: a plan does not fit the graphs, or is for another sampler, or `default` is not there.
        IntegrityError: the bundle is not whole.
    """
    sampler = bundle.plan().sampler_digest
    for plan in plans:
        check_plan(plan, bundle.manifest.graphs)
        if plan.sampler_digest != sampler:
            raise InputError(
                f"plan {plan.name}: expected a plan for the sampler {sampler[:12]}, got one for "
                f"{plan.sampler_digest[:12]} ({plan.scheduler}, {plan.num_steps} steps)",
                fix="build another bundle for it; `--calibration-from` saves most of the calibration",
            )
    changed = {plan_path(plan.name): json_bytes(plan) for plan in plans}
    bundle.check()
    with _replacing(bundle.path) as (folder, staged):
        entries = dict(bundle.manifest.files)
        unlisted = [path for path in _files_below(folder) if PurePosixPath(path).parts[0] in UNLISTED]
        for path in (*(path for path in bundle.manifest.files if path not in changed), *unlisted):
            _link(folder / path, staged / path)
        for path, data in changed.items():
            entries[path] = _store(data, staged / path)
        try:
            manifest = msgspec.structs.replace(
                bundle.manifest,
                plans=tuple(sorted({*bundle.plans, *(plan.name for plan in plans)})),
                default_plan=default or bundle.manifest.default_plan,
                files=entries,
            )
            manifest.__post_init__()
        except ValueError as error:
            raise InputError(f"{bundle.path.name}: cannot add plans: {error}") from None
        _store(json_bytes(manifest), staged / MANIFEST)
    return Bundle.open(folder)


def copy_bundle(bundle: Bundle, target: str | os.PathLike[str]) -> Bundle:
    """A second folder with the same bundle, without `UNLISTED`; as atomic as `write_bundle`.

    Files are linked, not copied, where the file system can; plans, which somebody may edit, are copied.

    Raises:
        IntegrityError, InputError: the bundle is not whole.
        UsageError: `target` is something else than a bundle or an empty folder.
    """
    bundle.check()
    with _replacing(Path(target)) as (folder, staged):
        edited = {MANIFEST, *(plan_path(name) for name in bundle.plans)}
        for path in (*sorted(bundle.manifest.files), MANIFEST):
            (_store if path in edited else _link)(bundle.path / path, staged / path)
    return Bundle.open(folder)


def move_bundle(bundle: Bundle, target: str | os.PathLike[str]) -> Bundle:
    """Give a bundle's folder, whatever is in it, another name, in place of an older bundle; at the very end, as
    `write_bundle`.

    Args:
        bundle: not to be used any more.
        target: on the same file system.

    Raises:
        UsageError: `target` is something else than a bundle or an empty folder.
    """
    with _replacing(Path(target)) as (folder, staged):
        staged.rmdir()
        bundle.path.rename(staged)
    return Bundle.open(folder)


@contextmanager
def _replacing(target: Path) -> Iterator[tuple[Path, Path]]:
    """Gives (target, an empty folder beside it); on leaving without an error, the folder takes the target's place.

    Three names: `.NAME.tmp-PID-…` is unfinished or on its way to be removed, `.NAME.old` is the old bundle, whole, in
    the moment between the two renames. Whoever finds `.NAME.old` and no NAME renames it back (`_restore`).
    """
    folder = Path(os.path.realpath(target))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _restore(folder)
    _remove_leftovers(folder)
    require_replaceable(folder)
    staged = _temporary(folder)
    staged.mkdir()
    try:
        yield folder, staged
        for inside in sorted((path for path in staged.rglob("*") if path.is_dir()), reverse=True):
            _sync_folder(inside)
        _sync_folder(staged)
        _swap(staged, folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _remove_leftovers(folder)


def require_replaceable(target: Path) -> None:
    """Ask before the work is done whether a bundle can be written there.

    Raises:
        UsageError: `target` is something else than a bundle, an empty folder, or nothing.
    """
    if target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir())):
        return
    if target.exists():
        raise UsageError(
            f"{target}: expected a bundle to replace, an empty folder or nothing, got something else",
            fix="give another output folder",
        )


def _swap(staged: Path, folder: Path) -> None:
    """Put `staged` in the place of `folder`."""
    aside = _aside(folder)
    while True:
        if folder.exists():
            folder.rename(aside)
        try:
            staged.rename(folder)
            break
        except OSError:
            if not folder.exists():  # else a reader's `_restore` came between the two renames: once more
                _restore(folder)
                raise
    _sync_folder(folder.parent)
    if aside.exists():
        aside.rename(_temporary(folder))


def _restore(folder: Path) -> None:
    """Undo half a swap: a writer was killed between the two renames."""
    if not folder.exists() and _aside(folder).exists():
        try:
            _aside(folder).rename(folder)
        except OSError:
            if not folder.exists():
                raise


def _read_manifest(folder: Path) -> bytes:
    """The manifest's bytes; a writer may be between its two renames just now, for microseconds: then once more."""
    for _ in range(SWAP_RETRIES):
        _restore(folder)
        try:
            return (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            if not any(folder.parent.glob(f".{folder.name}.*")):  # nobody is writing
                raise
            time.sleep(SWAP_PAUSE)
    return (folder / MANIFEST).read_bytes()


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead writers, or this one, left beside `folder`; call it with no `.NAME.old` worth keeping."""
    if folder.exists() and _aside(folder).exists():
        _aside(folder).rename(_temporary(folder))
    pattern = re.compile(re.escape(f".{folder.name}.tmp-") + r"(\d+)-[0-9a-f]{8}")
    for path in folder.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether another process of this machine has this id."""
    if pid == os.getpid() or os.name == "nt":  # there, signal 0 would end it; one writer at a time is the rule
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _store(content: Path | bytes, path: Path) -> FileEntry:
    """Write one file of a staged bundle, synced; its digest and size.

    Raises:
        InputError: the source cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
            digest, size = hashlib.sha256(content), len(content)
        else:
            digest, size = hashlib.sha256(), 0
            with _open_source(content) as source:
                while piece := source.read(1 << 22):
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)
    return FileEntry(sha256=digest.hexdigest(), size=size)


def _open_source(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: expected a readable file for the bundle, got: {error.strerror}") from None


def _link(source: Path, path: Path) -> None:
    """A hard link, or a copy where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, path)
    except OSError:
        _store(source, path)


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require_space(folder: Path, contents: Iterable[Path | bytes]) -> None:
    needed = 0
    for content in contents:
        if isinstance(content, bytes):
            needed += len(content)
        elif content.is_file():
            needed += content.stat().st_size
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MissingDependencyError(
            f"the bundle needs {needed / 1e9:.1f} GB beside {folder.parent}, {free / 1e9:.1f} GB are free",
            fix="free disk space, or give another output folder",
        )


def _files_below(folder: Path) -> Iterator[str]:
    """Relative paths of all files, and of all links."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _require_equal(relative: str, listed: FileEntry, found: FileEntry) -> None:
    if found.size != listed.size:
        raise IntegrityError(f"{relative}: expected {listed.size} bytes, got {found.size}", fix=_REBUILD)
    if found.sha256 != listed.sha256:
        raise IntegrityError(
            f"{relative}: expected SHA-256 {listed.sha256[:12]}…, got {found.sha256[:12]}…: altered", fix=_REBUILD
        )
