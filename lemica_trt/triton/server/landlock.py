"""A model's process may write in few places, the repository is none of them.

By Landlock (docs.kernel.org/userspace-api/landlock.html, Linux 5.13 and newer), which needs no privileges and cannot be
undone: every write below a folder that no rule names is refused by the kernel, whatever the modes of files say. Reading
is as before, and so are modes and times of files, which Landlock does not know. It binds the thread that asks and what
it starts: the engines' threads, but not those of Triton's own that watch for messages.

A second line, then: the first is a repository that the server's user may not write, or a read-only mount.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lemica_trt.core.errors import EngineError
from lemica_trt.core.files import user_cache
from lemica_trt.triton.server import cancel

WRITABLE = "LEMICA_WRITABLE"
"""Environment variable: more folders and files that models' processes may write, separated as PATH is."""

DEVICES = ("null", "zero", "random", "urandom", "tty", "shm", "dri", "dxg", "nvidia*")
"""Below /dev: what every process has, shared memory, GPUs; the server has found these before it starts a model."""

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_MAKE_DEVICES = 1 << 6 | 1 << 11
_CHANGES = (
    _WRITE_FILE
    | (1 << 4 | 1 << 5)  # remove folders and files
    | _MAKE_DEVICES
    | (1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 12)  # make folders, files, sockets, pipes, links
)
"""`LANDLOCK_ACCESS_FS_…` of version 1 that change something; version 2 adds moving and linking between folders (13),
version 3 cutting (14)."""


def version() -> int:
    """Of this kernel's Landlock; 0: it has none, or it is turned off."""
    if sys.platform != "linux":
        return 0
    return max(0, _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION))


def confine(repository: Path, bundle: Path, *, gpu: bool) -> bool:
    """Bind this thread, and what it starts, to the places that a model writes; False: this kernel cannot.

    They are the folder for temporary files, shared memory, devices, for a GPU the caches of what is compiled for it,
    and what `WRITABLE` names; never the repository or the bundle, even if they lie below one of these. Where they lie
    below the folder for temporary files, this process's lie in a folder of its own from then on.

    Raises:
        OSError: the kernel refuses.
    """
    if not version():
        return False
    temporary = Path(os.path.realpath(tempfile.gettempdir()))
    if temporary in Path(os.path.realpath(repository)).parents:  # then nothing new can be made there
        with suppress(OSError, EngineError):  # a model that needs it says what is wrong
            cancel.keep_temporary_files_here()
    roots = [temporary, Path("/proc/self")]
    roots += [found for name in DEVICES for found in Path("/dev").glob(name)]
    roots += [Path(part) for part in os.environ.get(WRITABLE, "").split(os.pathsep) if part]
    if gpu:
        roots += _caches()
    restrict_writes(places(roots, (repository, bundle)))
    return True


def _caches() -> Iterator[Path]:
    """Where TensorRT for RTX and CUDA keep what they compile for a GPU; made, since they cannot be made later."""
    cuda = os.environ.get("CUDA_CACHE_PATH")
    with suppress(RuntimeError):  # no home
        for folder in (user_cache(), Path(cuda) if cuda else Path.home() / ".nv"):
            if folder is not None:
                with suppress(OSError):
                    folder.mkdir(parents=True, exist_ok=True)
                yield folder


def places(roots: Iterable[Path], closed: Sequence[Path]) -> Iterator[Path]:
    """Folders and files that hold all of `roots` and nothing of `closed`: where something closed lies below a root,
    what lies beside it now."""
    shut = [Path(os.path.realpath(path)) for path in closed]
    for root in roots:
        yield from _beside(Path(os.path.realpath(root)), shut)


def _beside(root: Path, shut: Sequence[Path]) -> Iterator[Path]:
    if any(root == path or path in root.parents for path in shut):
        return
    if not any(root in path.parents for path in shut):
        yield root
        return
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if not entry.is_symlink():
                yield from _beside(Path(entry.path), shut)


def restrict_writes(allowed: Iterable[Path]) -> None:
    """Refuse this thread, and what it starts, every write that is not to these files or below these folders.

    Raises:
        OSError: this kernel has no Landlock, or refuses.
    """
    known = version()
    handled = _CHANGES | (1 << 13 if known >= 2 else 0) | (_TRUNCATE if known >= 3 else 0)
    attributes = struct.pack("=Q", handled)
    rules = _require(_syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        for path in allowed:
            with suppress(FileNotFoundError, PermissionError):  # what has gone needs no rule
                _allow(rules, path, handled & ~_MAKE_DEVICES)
        _require(_library().prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
        _require(_syscall(_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, access: int) -> None:
    """Add a rule: a folder and all below, or a file."""
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            access &= _WRITE_FILE | _TRUNCATE
        rule = struct.pack("=Qi", access, handle)
        _require(_syscall(_ADD_RULE, rules, _RULE_PATH_BENEATH, rule, 0))
    finally:
        os.close(handle)


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: object) -> int:
    """A system call that the C library has no function for; the same number on every processor. -1: see errno."""
    call = _library().syscall
    call.restype = ctypes.c_long
    return int(call(ctypes.c_long(number), *arguments))


def _require(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
