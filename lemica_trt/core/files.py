"""Files: digests of large ones that are computed by several threads, memory maps, the user's cache, whether one can be
written."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lemica_trt.core.errors import InputError, UsageError

PART_BYTES = 64 << 20
"""Size of the parts that `PartedDigest` is made of."""

PIECE_BYTES = 4 << 20
"""What is read at a time."""

DIGEST_THREADS = 8
"""Most threads that read files at once; hashing frees Python's lock."""


def require_writable(path: Path) -> Path | None:
    """Ask before the work is done whether a file can be written; folders above it are made when it is.

    Returns:
        The first folder above it that has to be made; None: all are there.

    Raises:
        UsageError: it is a folder, something above it is none, or nothing may be written there.
    """
    if path.is_dir():
        raise UsageError(f"{path}: expected a file to write, got a folder", fix=f"name a file in it: {path / 'NAME'}")
    missing, above = None, path.parent
    while not above.exists():
        missing, above = above, above.parent
    if not above.is_dir():
        raise UsageError(f"{path}: expected folders above it, got a file {above}", fix="give another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: nothing may be written in {above}", fix="give another path, or the permission")
    return missing


def user_cache() -> Path | None:
    """This tool's folder in the user's cache, which need not exist; None without a home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "lemica-trt"
    except RuntimeError:
        return None


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from None
    return digest.hexdigest()


class PartedDigest:
    """SHA-256 of bytes in parts, so that several threads can compute it.

    Up to `PART_BYTES` it is the plain SHA-256; of more, the SHA-256 of the digests (32 bytes each) of the parts of
    `PART_BYTES`, the last one shorter. A size belongs beside it.
    """

    def __init__(self) -> None:
        self._part, self._filled = hashlib.sha256(), 0
        self._finished: list[bytes] = []

    def update(self, data: bytes) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            if self._filled == PART_BYTES:
                self._finished.append(self._part.digest())
                self._part, self._filled = hashlib.sha256(), 0
            piece = view[: PART_BYTES - self._filled]
            self._part.update(piece)
            self._filled += len(piece)
            view = view[len(piece) :]

    def hexdigest(self) -> str:
        """The digest of what came so far."""
        return _joined([*self._finished, self._part.digest()])


def parted_digests(paths: Sequence[Path]) -> list[str]:
    """The `PartedDigest` (hex) of each file, all parts of all files in threads.

    Raises:
        InputError: one of them cannot be read.
    """
    try:
        parts = [(path, start) for path in paths for start in range(0, max(1, path.stat().st_size), PART_BYTES)]
        with ThreadPoolExecutor(max(1, min(DIGEST_THREADS, os.cpu_count() or 1, len(parts)))) as pool:
            digests = list(pool.map(_digest_part, *zip(*parts))) if parts else []
    except OSError as error:
        raise InputError(f"{error.filename}: expected a readable file, got: {error.strerror}") from None
    by_path: dict[Path, list[bytes]] = {}
    for (path, _), digest in zip(parts, digests):
        by_path.setdefault(path, []).append(digest)
    return [_joined(by_path[path]) for path in paths]


def _digest_part(path: Path, start: int) -> bytes:
    digest, left = hashlib.sha256(), PART_BYTES
    with path.open("rb") as file:
        file.seek(start)
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()


def _joined(parts: Sequence[bytes]) -> str:
    return parts[0].hex() if len(parts) == 1 else hashlib.sha256(b"".join(parts)).hexdigest()


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
