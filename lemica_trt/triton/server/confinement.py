"""A model's process may write in few places; the repository is not one of them.

By `core.landlock`, which binds the thread that loads the model and what this one starts: the engines' threads, but not
those of Triton's own that watch for messages.

It is the second line of defence; the first is a repository that the server's user may not write, or a read-only mount.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lemica_trt.core import landlock
from lemica_trt.core.errors import EngineError
from lemica_trt.core.files import user_cache
from lemica_trt.core.text import printable
from lemica_trt.triton.server import temporary

WRITABLE = "LEMICA_WRITABLE"
"""Environment variable: more folders and files that models' processes may write, separated as PATH is."""

DEVICES = ("null", "zero", "random", "urandom", "tty", "shm", "dri", "dxg", "nvidia*")
"""Below /dev: what every process has, shared memory, GPUs; the server has found these before it starts a model."""


def confine(repository: Path, bundle: Path, *, gpu: bool) -> list[str]:
    """Bind this thread, and what it starts, to the places that a model writes.

    They are the folders for temporary files, shared memory, devices, for a GPU the caches of what is compiled for it
    and the pipes of CUDA's multi-process service, and what `WRITABLE` names; never the repository or the bundle, even
    if they lie below one of these. Where they lie below the folder for temporary files, this process's lie in a folder
    of its own from then on.

    Returns:
        Lines for the log: what this kernel cannot refuse, and what of `WRITABLE` cannot be allowed.
    """
    if not landlock.version():
        return [_no_help("no Landlock here, or it is turned off")]
    folder = Path(os.path.realpath(tempfile.gettempdir()))
    if folder in Path(os.path.realpath(repository)).parents:  # then nothing new can be made there
        with suppress(OSError, EngineError):  # a model that needs it says what is wrong
            temporary.keep_files_here()
    roots = [folder, Path("/tmp"), Path("/proc/self")]
    roots += [found for name in DEVICES for found in Path("/dev").glob(name)]
    if gpu:
        roots += [*_caches(), *_multi_process_service()]
    closed = (repository, bundle)
    wanted = [Path(part) for part in os.environ.get(WRITABLE, "").split(os.pathsep) if part]
    notes = list(_not_allowed(wanted, closed))
    try:
        landlock.restrict_writes(landlock.places([*roots, *wanted], closed))
    except OSError as error:
        return [_no_help(str(error.strerror)), *notes]
    if landlock.version() < landlock.TRUNCATE_VERSION:
        notes.append("this kernel cannot refuse truncating the repository's files: mount it read-only")
    return notes


def _no_help(why: str) -> str:
    return f"this kernel keeps no process from writing into the repository ({why}): mount it read-only"


def _not_allowed(wanted: Sequence[Path], closed: Sequence[Path]) -> Iterator[str]:
    """What of `WRITABLE` there can be no rule for."""
    for path in wanted:
        if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a name is too long
            yield f"{WRITABLE}: {printable(str(path))}: not there, not allowed"
        elif next(landlock.places([path], closed), None) is None:
            yield f"{WRITABLE}: {printable(str(path))}: in the repository, not allowed"


def _caches() -> Iterator[Path]:
    """Where TensorRT for RTX and CUDA keep what they compile for a GPU; made, since they cannot be made later."""
    cuda = os.environ.get("CUDA_CACHE_PATH")
    with suppress(RuntimeError):  # no home
        for folder in (user_cache(), Path(cuda) if cuda else Path.home() / ".nv"):
            if folder is not None:
                with suppress(OSError):
                    folder.mkdir(parents=True, exist_ok=True)
                yield folder


def _multi_process_service() -> Iterator[Path]:
    """Pipes and logs of CUDA MPS, by which a process reaches a GPU that several share (docs.nvidia.com/deploy/mps)."""
    for variable, usual in (("PIPE", "/tmp/nvidia-mps"), ("LOG", "/var/log/nvidia-mps")):
        yield Path(os.environ.get(f"CUDA_MPS_{variable}_DIRECTORY") or usual)
