"""Files read in pieces: digests and memory maps."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lemica_trt.core.errors import InputError


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from None
    return digest.hexdigest()


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """A file's bytes for as long as the block runs, without a copy of them in memory.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # nothing can be mapped of it
            yield b""
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
