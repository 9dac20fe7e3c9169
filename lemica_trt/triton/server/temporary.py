"""The folder that models' processes share for callers' files, and where each has its own temporary files."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from lemica_trt.core.errors import EngineError

TOKEN = re.compile("([0-9]{1,10})-[0-9a-f]{32}")
"""A caller's file: its process, and a random number."""

_FILES = re.compile("([0-9]{1,10})-files")
"""A process's folder of temporary files, where it has one of its own."""

_kept: Path | None = None
"""`call_folder`, since temporary files go elsewhere."""


def keep_files_here() -> Path:
    """The folder of callers' files, made now; this process's temporary files lie in it from now on, by themselves.

    Raises:
        EngineError: it is somebody else's.
        OSError: it cannot be made.
    """
    global _kept
    _kept = made_call_folder()
    own = _kept / f"{os.getpid()}-files"
    own.mkdir(mode=0o700, exist_ok=True)
    tempfile.tempdir = str(own)
    return _kept


def remove_leftovers(*, own: bool = False) -> None:
    """Remove the files of callers and processes that were killed; with `own`, those of this process, too."""
    with suppress(FileNotFoundError):
        for file in call_folder().iterdir():
            found = TOKEN.fullmatch(file.name) or _FILES.fullmatch(file.name)
            if not found or not (has_died(found[1]) or (own and int(found[1]) == os.getpid())):
                continue
            if _FILES.fullmatch(file.name):
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)


def has_died(process: str) -> bool:
    """Whether there is no process of this id, or one that has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def made_call_folder() -> Path:
    """`call_folder`, there, and nobody else's.

    Raises:
        EngineError: it is somebody else's.
    """
    folder = call_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EngineError(f"{folder}: expected a folder of this user alone, got another", fix="remove it")
    return folder


def call_folder() -> Path:
    """Of callers' files: of this user, and of those processes whose ids are comparable: containers may share
    a folder for such files."""
    if _kept is not None:
        return _kept
    namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116
    return Path(tempfile.gettempdir()) / f"lemica-trt-calls-{os.getuid()}-{namespace}"
