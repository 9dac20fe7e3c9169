"""Frames → a file: `.mp4`, `.gif`, `.png` (frames side by side) or `.npy`, by the suffix.

Written beside the target and renamed: a killed process leaves no half file.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import InputError, MissingDependencyError, UsageError, install_command

Frames = npt.NDArray[np.uint8]

H264_RATE_FACTOR = 17
"""H.264's CRF: 0 is lossless, 23 the encoder's default; 17 looks lossless."""


SMALL, ENLARGED = 128, 4
"""Clips up to so many pixels wide and high are enlarged by this, where nobody says otherwise: players blur them."""


def default_scale(frames: Frames, path: str | os.PathLike[str]) -> int:
    """By what factor `lemica-trt run` enlarges a clip [F, H, W, 3] where it is told none; arrays are never enlarged."""
    return ENLARGED if max(frames.shape[1:3]) <= SMALL and Path(path).suffix.lower() != ".npy" else 1


def write_video(frames: Frames, path: str | os.PathLike[str], *, fps: int, scale: int = 1) -> None:
    """Write frames; the suffix of `path` is the format.

    Args:
        frames: uint8 [F, H, W, 3], F at least 1.
        path: `.mp4`: H.264, yuv420p, an odd last line or column doubled; `.gif`: endless loop; `.png`: one row of all
            frames; `.npy`: the array.
        fps: frames a second.
        scale: whole factor by which frames are enlarged, every pixel a square.

    Raises:
        UsageError: unknown suffix.
        InputError: `frames` is something else, or the folder cannot be written.
        MissingDependencyError: `.mp4` without PyAV.
    """
    target = Path(path)
    check_suffix(target)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise InputError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _WRITERS[target.suffix.lower()](np.ascontiguousarray(frames), temporary, fps)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: expected a file that can be written, got: {error.strerror or error}") from None


def encoded(frames: Frames, suffix: str, *, fps: int) -> bytes:
    """The content of the file that `write_video` writes.

    Args:
        suffix: `.mp4`, `.gif`, `.png` or `.npy`.

    Raises:
        as `write_video`.
    """
    with tempfile.TemporaryDirectory() as folder:  # FFmpeg moves an MP4's index to its front: in a file
        path = Path(folder) / f"clip{suffix}"
        write_video(frames, path, fps=fps)
        return path.read_bytes()


def check_suffix(path: str | os.PathLike[str], *, made_here: bool = True) -> None:
    """Refuse what `write_video` would refuse for its suffix; for asking before the work is done.

    Args:
        path: of the file.
        made_here: False: a server makes `.mp4`.

    Raises:
        UsageError: unknown suffix.
        MissingDependencyError: `.mp4` without PyAV.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _WRITERS:
        raise UsageError(
            f"cannot write {suffix or 'a file without a suffix'!r}", fix=f"use one of: {', '.join(_WRITERS)}"
        )
    if suffix == ".mp4" and made_here:
        _import_av()


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(f".mp4 needs PyAV, got: {error}", fix=install_command("video")) from None
    return av


def _write_mp4(frames: Frames, path: Path, fps: int) -> None:
    av = _import_av()
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(H264_RATE_FACTOR)})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _write_gif(frames: Frames, path: Path, fps: int) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)


def _write_png(frames: Frames, path: Path, fps: int) -> None:
    from PIL import Image

    Image.fromarray(np.concatenate(list(frames), axis=1)).save(path)


def _write_npy(frames: Frames, path: Path, fps: int) -> None:
    np.save(path, frames, allow_pickle=False)


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png, ".npy": _write_npy}
