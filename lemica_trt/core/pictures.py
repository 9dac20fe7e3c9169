"""Pictures that a request brings, which nobody has checked → pixels; and pixels as networks take them.

Sizes and orientation are those of diffusers' `load_image`, resizing is Pillow's, as in the image processors of
diffusers and transformers. Pillow is loaded with the first picture.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import InputError
from lemica_trt.core.text import first_line

Pixels = npt.NDArray[np.uint8]
"""[H, W, 3], RGB."""

MAX_BYTES = 32 << 20
"""Largest file of a picture."""

MAX_SIDE = 8192
"""Most pixels of a picture's longer side."""

MAX_ASPECT = 16
"""Most times that a picture's longer side may have the pixels of the shorter one: what is cut off is resized first."""

_SIZES = f"expected a picture of at most {MAX_SIDE} pixels a side, the longer at most {MAX_ASPECT} times the shorter"

FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names; those that OpenAI's video API takes as `input_reference`."""

MAX_TEXT = (MAX_BYTES + 2) // 3 * 4 + 64
"""Characters of the largest picture as base64, with the head of a data URL."""

KINDS = "PNG, JPEG or WebP"
"""`FORMATS` for people."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's names of what has 8 bits a channel at most; all become RGB, transparency is left out."""


def read_picture(path: str | os.PathLike[str], *, digest: str | None = None) -> Pixels:
    """The pixels of a PNG, JPEG or WebP file.

    Args:
        digest: SHA-256 (hex) that the file must have.

    Raises:
        InputError: as `picture_file` and `decoded_picture`; or it is another file now.
    """
    data = picture_file(path)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise InputError(f"{path}: expected the picture that the prompts were read with, it has changed since")
    return decoded_picture(data, name=str(path))


def picture_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a picture's file, not decoded; of one that is too large the beginning, more than `MAX_BYTES`.

    Raises:
        InputError: not readable.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{path}: expected a picture, got: {error.strerror or error}", fix=f"name a {KINDS} file"
        ) from None


def picture_sent(value: str | bytes, *, name: str = "image") -> bytes:
    """The content of a picture's file as requests have it: as it is, in base64, or as a data URL (RFC 2397).

    No other URL is fetched: a server that does reaches what its clients cannot.

    Raises:
        InputError: too long, another URL, or not in base64.
    """
    data = value.encode("ascii", "replace") if isinstance(value, str) else value
    if len(data) > MAX_TEXT:
        raise InputError(f"{name}: expected at most {MAX_BYTES >> 20} MiB, got more", fix="make it smaller")
    head = re.match(rb"(?:data:[^,]{0,40};base64,|([a-z][a-z0-9+.-]*:))", data, re.IGNORECASE)
    if head is not None and head[1]:
        raise InputError(f"{name}: expected the picture itself, got a URL", fix="data:image/png;base64,…")
    try:
        return base64.b64decode(data[head.end() if head else 0 :], validate=True)
    except ValueError:
        if head is None and isinstance(value, bytes):  # no file of `FORMATS` is base64
            return value
        raise InputError(f"{name}: expected base64, got something else", fix="data:image/png;base64,…") from None


def decoded_picture(data: bytes, *, name: str = "the image") -> Pixels:
    """The pixels of the content of a PNG, JPEG or WebP file, of an animation its first picture; turned as its EXIF
    orientation says.

    Raises:
        InputError: too large, of another format, damaged, of more than 8 bits a channel, or of too many pixels; said
            before they are decoded.
    """
    from PIL import Image

    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: expected at most {MAX_BYTES >> 20} MiB, got more", fix="make it smaller")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # its own limit is above ours
        raise InputError(f"{name}: {_SIZES}, got far more", fix="make it smaller") from None
    except Exception:  # Pillow's parsers raise what they please
        raise InputError(f"{name}: expected a {KINDS} picture, got none of them", fix="convert it") from None
    _require_size(name, image.height, image.width)
    _require_mode(name, image.mode)
    return _pixels(image, name, turned=True)


def _pixels(image: Any, name: str, *, turned: bool) -> Pixels:
    """Decode a PIL image, turned as its EXIF orientation says or as it is."""
    from PIL import ImageOps

    try:
        if turned:
            ImageOps.exif_transpose(image, in_place=True)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # converting copies what is RGB, too
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"{name}: expected a whole picture, got: {first_line(error)}", fix="save it again") from None


def picture_from(value: object, *, name: str = "image") -> Pixels:
    """A picture in any of the ways that one is given: path, content of a file, `PIL.Image`, or uint8 [H, W, 3].

    Raises:
        InputError: none of them, or as `read_picture`.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return decoded_picture(bytes(value), name=name)
    if isinstance(value, str | os.PathLike):
        return read_picture(value)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
            raise InputError(f"{name}: expected an array uint8 [H, W, 3], got {value.dtype} {list(value.shape)}")
        _require_size(name, *value.shape[:2])
        return np.ascontiguousarray(value)
    from PIL import Image

    if isinstance(value, Image.Image):
        _require_size(name, value.height, value.width)
        _require_mode(name, value.mode)
        return _pixels(value, name, turned=False)
    raise InputError(
        f"{name}: expected a path, the content of a {KINDS} file, a PIL image or an array uint8 [H, W, 3], "
        f"got {type(value).__name__}"
    )


def _require_mode(name: str, mode: str) -> None:
    if mode not in MODES:
        raise InputError(f"{name}: expected at most 8 bits a channel, got a picture of mode {mode}", fix="convert it")


def _require_size(name: str, height: int, width: int) -> None:
    longer, shorter = max(height, width), min(height, width)
    if not 1 <= shorter <= longer <= MAX_SIDE or longer > MAX_ASPECT * shorter:
        raise InputError(f"{name}: {_SIZES}, got {height}×{width}", fix="make it smaller")


def resized(picture: Pixels, height: int, width: int, *, fit: str, by: str) -> Pixels:
    """A picture at another size, [height, width, 3]; `fit` and `by` as in `ir.graphs.PictureSpec`."""
    from PIL import Image

    rows, columns = picture.shape[:2]
    wanted = height, width
    if fit == "cover":  # as `get_resize_output_image_size` of transformers rounds
        if rows * width > columns * height:
            wanted = max(height, int(width * rows / columns)), width
        else:
            wanted = height, max(width, int(height * columns / rows))
    if wanted != (rows, columns):
        resampling = Image.Resampling[by.upper()]
        picture = np.array(Image.fromarray(picture).resize(wanted[::-1], resampling))
    top, left = (wanted[0] - height) // 2, (wanted[1] - width) // 2
    return picture[top : top + height, left : left + width]


def drawn_picture(text: str, height: int, width: int, *, name: str = "image") -> Pixels:
    """A picture that stands in for one that nobody gave: discs and rectangles before a plain ground, chosen by a text,
    and by the name of the picture (`ir.graphs.Source`).

    The same text gives the same pixels on every machine.
    """
    text = text if name == "image" else f"{text}\0{name}"
    bits = iter(hashlib.shake_256(text.encode("utf-8", "replace")).digest(64))
    down, across = np.mgrid[:height, :width]
    down, across = 512 * down + 256, 512 * across + 256  # centres of pixels, in 1/512: whole numbers alone
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = [next(bits) for _ in range(3)]
    picture += (down * 48 // (512 * height))[..., None].astype(np.uint8)  # a shade that grows downwards, and wraps
    for k in range(3):
        y, x = 2 * height * next(bits), 2 * width * next(bits)
        radius = min(height, width) * (40 + next(bits) % 60)
        color = [next(bits) for _ in range(3)]
        if k % 2:
            inside = (abs(down - y) <= radius) & (abs(across - x) <= 2 * radius)
        else:
            inside = (down - y) ** 2 + (across - x) ** 2 <= radius**2
        picture[inside] = color
    return picture


def digest_of_picture(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a picture's file, which is decoded once to see that it can be.

    Raises:
        InputError: as `read_picture`.
    """
    read_picture(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def planes(picture: Pixels, scale: Any, offset: Any) -> npt.NDArray[np.float32]:
    """[H, W, 3] → float32 [1, 3, H, W]: each channel times its scale, plus its offset."""
    values = picture.astype(np.float32) * np.float32(scale) + np.float32(offset)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])
