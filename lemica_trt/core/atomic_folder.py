"""Putting a folder in the place of another, so that a killed process leaves the old one or the new one."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

SWAP_RETRIES, SWAP_PAUSE = 40, 0.005
"""How often, and how many seconds apart, a reader looks again while a writer swaps bundles."""


def swap(staged: Path, folder: Path) -> None:
    """Put `staged` in the place of `folder`."""
    old = aside(folder)
    while True:
        if folder.exists():
            folder.rename(old)
        try:
            staged.rename(folder)
            break
        except OSError:
            if not folder.exists():  # else a reader's `restore` came between the two renames: once more
                restore(folder)
                raise
    sync_folder(folder.parent)
    if old.exists():
        old.rename(temporary_beside(folder))


def restore(folder: Path) -> None:
    """Undo half a swap: a writer was killed between the two renames."""
    if not folder.exists() and aside(folder).exists():
        try:
            aside(folder).rename(folder)
        except OSError:
            if not folder.exists():
                raise


def aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def temporary_beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def remove_leftovers(folder: Path) -> None:
    """Remove what dead writers, or this one, left beside `folder`; call it with no `.NAME.old` worth keeping."""
    if folder.exists() and aside(folder).exists():
        aside(folder).rename(temporary_beside(folder))
    pattern = re.compile(re.escape(f".{folder.name}.tmp-") + r"(\d+)-[0-9a-f]{8}")
    for path in folder.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
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


def sync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
