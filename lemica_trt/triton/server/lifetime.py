"""Processes of models end with their server.

Triton 2.51 starts a process for each instance of a model. One whose server crashes or is killed would go on, and keep
its engines and its shared memory.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from lemica_trt.triton.server import temporary

CHECK_INTERVAL_SECONDS = 1.0

_SHARED_MEMORY = Path("/dev/shm")
_STUB = "triton_python_backend_stub"
_STUB_MODULE = "c_python_backend_utils"


def in_server() -> bool:
    """Whether the Python backend started this process: it is its program, which brings a module of its own."""
    with suppress(OSError):
        if Path("/proc/self/exe").readlink().name.startswith(_STUB):
            return True
    return _STUB_MODULE in sys.modules


def regions() -> list[str]:
    """Names of the shared memory that the server gave this process; none: no server started it.

    The backend starts a process with the model's file and this name; how the name begins is an option of the server,
    `shm-region-prefix-name`.
    """
    if not in_server():
        return []
    try:
        words = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return [word for word in words[2:3] if re.fullmatch(r"[^/\s]+", word)]


def exit_with_parent() -> None:
    """End this process, at once, when the one that started it has ended; may be called twice.

    Looked at from a thread: the kernel's own signal (PR_SET_PDEATHSIG) comes at the end of the thread that started a
    process, and Triton's ends when the model is loaded.
    """
    if any(thread.name == exit_with_parent.__name__ for thread in threading.enumerate()):
        return
    threading.Thread(target=_watch, args=(os.getppid(),), name=exit_with_parent.__name__, daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_INTERVAL_SECONDS)
    with suppress(OSError):
        temporary.remove_leftovers(own=True)
        for region in regions():
            (_SHARED_MEMORY / region).unlink(missing_ok=True)
    os._exit(1)
