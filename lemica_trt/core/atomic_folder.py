"""Replacing a folder in one step: a process that is killed leaves the old folder or the new one, whole.

Three names lie beside each other:

    NAME                  the folder
    .NAME.tmp-PID-RANDOM  unfinished, or on its way to be removed; files that are being written are called so, too
    .NAME.old             the old folder, whole, in the moment between the two renames
    .NAME.lock            locked by whoever writes, who removes it; one that a killed process left is locked by nobody

Whoever finds `.NAME.old` and no NAME renames it back (`finish_swap`). Leftovers of processes that have died are removed
by the next writer. One writer at a time (`held`).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lemica_trt.core.errors import UsageError

SWAP_RETRIES = 40
"""How often a reader looks again while a writer swaps folders."""

SWAP_PAUSE_SECONDS = 0.005
"""How long it waits before it looks again."""


@contextmanager
def replacing(target: Path, require_replaceable: Callable[[Path], None]) -> Iterator[tuple[Path, Path]]:
    """Fill an empty folder; when the block ends without an error, it takes the target's place.

    Args:
        target: the folder, which need not exist; where it is a link, what it points to.
        require_replaceable: raises if what lies there must not be replaced; called before anything is written.

    Yields:
        (the target without links, the empty folder beside it).

    Raises:
        UsageError: another process writes there.
    """
    folder = Path(os.path.realpath(target))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder):
        yield from _replaced(folder, require_replaceable)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the right to write a folder, or in it.

    Raises:
        UsageError: another process, or another thread of this one, holds it; says which.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        yield
        return
    folder = Path(os.path.realpath(folder))
    lock = folder.with_name(f".{folder.name}.lock")
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            writer = os.pread(handle, 20, 0).decode(errors="replace")
            os.close(handle)
            raise UsageError(
                f"{folder}: expected a free folder, another lemica-trt (process {writer or 'unknown'}) is writing it",
                fix="wait for it, and give the command again",
            ) from None
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(handle)):
                break
        os.close(handle)  # its holder has just removed it: once more
    try:
        with contextlib.suppress(OSError):  # who writes is told where there is room to say it
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _replaced(folder: Path, require_replaceable: Callable[[Path], None]) -> Iterator[tuple[Path, Path]]:
    """`replacing`, of a folder that is held."""
    finish_swap(folder)
    _clean_up(folder)
    require_replaceable(folder)
    staged = temporary_beside(folder)
    staged.mkdir()
    try:
        yield folder, staged
        for inside in sorted((path for path in staged.rglob("*") if path.is_dir()), reverse=True):
            sync_folder(inside)
        sync_folder(staged)
        _swap(staged, folder)
    except BaseException:  # Ctrl-C and the end of a generator, too: nothing half-written stays
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _clean_up(folder)


def finish_swap(folder: Path) -> None:
    """Undo half a swap, whose writer was killed between the two renames; does nothing otherwise."""
    if not folder.exists() and _old(folder).exists():
        try:
            _old(folder).rename(folder)
        except OSError:
            if not folder.exists():
                raise


def is_being_written(folder: Path) -> bool:
    """Whether a writer, alive or dead, has something beside the folder."""
    return any(folder.parent.glob(f".{folder.name}.*"))


def temporary_beside(path: Path) -> Path:
    """A free name beside a file or folder, by which a later writer knows whether this process is still alive."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def remove_leftovers(path: Path, *, own: bool = False) -> None:
    """Remove what dead writers left beside a file or folder under names of `temporary_beside`.

    Args:
        own: also what this process left; no other thread of it may be writing there.
    """
    pattern = re.compile(re.escape(f".{path.name}.tmp-") + r"(\d+)-[0-9a-f]{8}")
    for found in path.parent.iterdir():
        match = pattern.fullmatch(found.name)
        if match and (own if int(match[1]) == os.getpid() else not _is_alive(int(match[1]))):
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make names in a folder last; nothing on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clean_up(folder: Path) -> None:
    """Remove all that this and dead writers left beside a folder that is whole."""
    if folder.exists() and _old(folder).exists():
        _old(folder).rename(temporary_beside(folder))
    remove_leftovers(folder, own=True)


def _swap(staged: Path, folder: Path) -> None:
    old = _old(folder)
    while True:
        if folder.exists():
            folder.rename(old)
        try:
            staged.rename(folder)
            break
        except OSError:
            if not folder.exists():  # else a reader's `finish_swap` came between the two renames: once more
                finish_swap(folder)
                raise
    sync_folder(folder.parent)
    if old.exists():
        old.rename(temporary_beside(folder))


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine has this id; on Windows, where signal 0 would end it, none has."""
    if os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
