"""A process gives up the right to write, but for some places: Landlock.

docs.kernel.org/userspace-api/landlock.html, Linux 5.13 and newer. It needs no privileges and cannot be undone: every
write that is not below a place that a rule names is refused by the kernel, whatever the modes of files say. Reading is
as before, and so are modes and times of files, which Landlock does not know. It binds the thread that asks and what it
starts from then on; threads that were there before stay free.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

TRUNCATE_VERSION = 3
"""The first version that refuses truncating: Linux 6.2."""

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
version 3 truncating (14)."""


def version() -> int:
    """Of this kernel's Landlock; 0: there is none, or it is turned off."""
    if sys.platform != "linux":
        return 0
    return max(0, _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION))


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

    A place that cannot be opened, because it has gone, say, is not allowed, and all else is as it should be. Before
    `TRUNCATE_VERSION` files elsewhere can still be truncated.

    Raises:
        OSError: this kernel has no Landlock, or refuses.
    """
    known = version()
    handled = _CHANGES | (1 << 13 if known >= 2 else 0) | (_TRUNCATE if known >= TRUNCATE_VERSION else 0)
    attributes = struct.pack("=Q", handled)
    rules = _require(_syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        for path in allowed:
            with suppress(OSError):  # one place must not decide on all
                _allow(rules, path, handled & ~_MAKE_DEVICES)
        _require(_library().prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
        _require(_syscall(_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, access: int) -> None:
    """Add a rule: a folder and all below, or a file.

    Raises:
        OSError: it cannot be opened, or the kernel takes no rule for it.
    """
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
