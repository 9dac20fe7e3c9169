"""A contact sheet: clips as rows of frames, each under its caption, in one PNG."""

from __future__ import annotations

import importlib.util
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lemica_trt.core.errors import MissingDependencyError

BACKGROUND = (250, 250, 247)
INK = (38, 38, 38)
RULE = (222, 222, 216)

MARGIN = 24
GUTTER = 6
"""Pixels between frames of a row."""

ROW_GAP = 18
CAPTION_GAP = 8
CAPTION_SIZE = 15
FRAME_WIDTH = 192
"""Pixels that a frame is shown at, about: small frames are enlarged by a whole factor, large ones reduced."""

PLAIN = {"–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "·": "."}

Frames = npt.NDArray[Any]


def contact_sheet(
    rows: Sequence[tuple[str, Frames]],
    path: str | os.PathLike[str],
    *,
    columns: int = 6,
    scale: int | None = None,
) -> None:
    """Write a PNG with one row a clip: its caption, then up to `columns` of its frames, evenly spaced in time.

    Args:
        rows: (caption, frames); frames uint8 or float 0 … 255, [F, H, W, 3]. Captions wrap to the sheet's width.
        path: where to.
        columns: most frames a row; the first and the last frame are always among them.
        scale: whole factor by which frames are enlarged, without smoothing; None: to about `FRAME_WIDTH` pixels.

    Raises:
        MissingDependencyError: Pillow was built without FreeType.
        ValueError: no rows, an array that is not a clip, or `columns` or `scale` below 1.
    """
    if not rows or columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"expected rows, and columns and scale of at least 1, got {len(rows)}, {columns}, {scale}")
    font = _font()
    strips = [_strip(frames, columns, scale) for _, frames in rows]
    inner = max(320, *(strip.width for strip in strips))
    captions = [_wrapped(_drawable(caption, font), font, inner) for caption, _ in rows]

    line = sum(font.getmetrics())
    heights = [len(text) * line + CAPTION_GAP + strip.height for text, strip in zip(captions, strips)]
    height = 2 * MARGIN + sum(heights) + (2 * ROW_GAP + 1) * (len(rows) - 1)
    sheet = Image.new("RGB", (inner + 2 * MARGIN, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for index, (text, strip) in enumerate(zip(captions, strips)):
        if index > 0:
            top += ROW_GAP
            draw.line((MARGIN, top, MARGIN + inner - 1, top), fill=RULE)
            top += ROW_GAP + 1
        for words in text:
            draw.text((MARGIN, top), words, fill=INK, font=font)
            top += line
        top += CAPTION_GAP
        sheet.paste(strip, (MARGIN, top))
        top += strip.height
    sheet.save(path, format="PNG", optimize=True)


def _strip(frames: Frames, columns: int, scale: int | None) -> Image.Image:
    """The frames of one clip, side by side."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.size == 0:
        raise ValueError(f"expected a clip [frames, height, width, 3], got shape {frames.shape}")
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int))
    height, width = frames.shape[1:3]
    if scale is None and width > FRAME_WIDTH:
        size, filtering = (FRAME_WIDTH, round(height * FRAME_WIDTH / width)), Image.Resampling.LANCZOS
    else:
        factor = scale if scale is not None else max(1, FRAME_WIDTH // width)
        size, filtering = (factor * width, factor * height), Image.Resampling.NEAREST
    strip = Image.new("RGB", (len(chosen) * size[0] + (len(chosen) - 1) * GUTTER, size[1]), BACKGROUND)
    for position, index in enumerate(chosen):
        pixels = np.clip(np.rint(frames[index]), 0, 255).astype(np.uint8)
        strip.paste(Image.fromarray(pixels).resize(size, filtering), (position * (size[0] + GUTTER), 0))
    return strip


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans where matplotlib brings it (Latin, Greek, Cyrillic), else Pillow's own, which knows ASCII only."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), CAPTION_SIZE)  # Pillow 10 takes no Path
    font = ImageFont.load_default(CAPTION_SIZE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise MissingDependencyError("contact sheets need a Pillow with FreeType", fix="pip install --upgrade pillow")
    return font


def _drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text with letters that the font lacks replaced by plain ones: a dash, or the letter without its accent."""
    missing = bytes(font.getmask("\ue123"))  # private use: no font draws it
    plain = []
    for letter in text:
        if letter.isspace() or bytes(font.getmask(letter)) != missing:
            plain.append(letter)
        else:
            stripped = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
            plain.append(PLAIN.get(letter) or stripped or letter)
    return "".join(plain)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, within them where one is too long."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
