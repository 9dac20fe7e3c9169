"""A contact sheet: one clip made in several ways, a row each, with what it differs by at the right. One PNG."""

from __future__ import annotations

import importlib.util
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lemica_trt.core.errors import MissingDependencyError

BACKGROUND = (250, 250, 247)
INK = (38, 38, 38)
QUIET = (104, 104, 100)
RULE = (222, 222, 216)

MARGIN = 28
GUTTER = 6
"""Pixels between frames of a row, and between rows of a clip."""

BLOCK_GAP = 22
"""Pixels between frames and differences, and around the line between two clips."""

LABEL_WIDTH = 216
SIZES = {"title": 21, "name": 15, "text": 14}
LINE_GAP = 4
FRAME_WIDTH = 144
"""Pixels that a frame is shown at, at most: small frames are enlarged by a whole factor, large ones reduced."""

PLAIN = {"–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "·": ".", "≈": "~"}

Frames = npt.NDArray[Any]
Font = ImageFont.FreeTypeFont


class Row(NamedTuple):
    """One way of making a clip.

    Attributes:
        name: written bold at the left.
        lines: below the name.
        frames: uint8 [F, H, W, 3].
        difference: of the same shape, shown at the right; None: `aside` stands there.
        aside: a text in the place of differences.
    """

    name: str
    lines: Sequence[str]
    frames: Frames
    difference: Frames | None = None
    aside: str = ""


class Block(NamedTuple):
    """One clip: what it is, and how it was made."""

    heading: str
    rows: Sequence[Row]


def contact_sheet(
    title: str,
    caption: str,
    blocks: Sequence[Block],
    path: str | os.PathLike[str],
    *,
    columns: int = 3,
    scale: int | None = None,
) -> None:
    """Write a PNG: title, caption, and the clips one below the other.

    Args:
        title, caption: wrapped to the width.
        blocks: at least one, with at least one row each.
        path: where to.
        columns: most frames a row, evenly spaced in time, the first and the last among them.
        scale: whole factor by which frames are enlarged, without smoothing; None: to at most `FRAME_WIDTH` pixels.

    Raises:
        MissingDependencyError: Pillow was built without FreeType.
        ValueError: no rows, an array that is not a clip, or `columns` or `scale` below 1.
    """
    if not blocks or not all(block.rows for block in blocks) or columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"expected rows, and columns and scale of at least 1, got {len(blocks)}, {columns}, {scale}")
    strips = [[(_strip(row.frames, columns, scale), row) for row in block.rows] for block in blocks]
    width = max(strip.width for rows in strips for strip, _ in rows)
    paired = any(row.difference is not None for block in blocks for row in block.rows)
    inner = LABEL_WIDTH + width + (BLOCK_GAP + width if paired else 0)
    inner = max(inner, LABEL_WIDTH + 320)
    sheet = _Sheet(inner)
    sheet.text(title, "title", INK)
    sheet.gap(6)
    sheet.text(caption, "text", QUIET)
    for rows, block in zip(strips, blocks):
        sheet.rule()
        sheet.text(block.heading, "name", INK)
        sheet.gap(8)
        for strip, row in rows:
            right = None
            if row.difference is not None:
                right = _strip(row.difference, columns, scale)
            sheet.row(strip, row, right, LABEL_WIDTH + width + BLOCK_GAP)
    sheet.image().save(path, format="PNG", optimize=True)


class _Sheet:
    """Draws downwards on a page that grows."""

    def __init__(self, inner: int) -> None:
        self._inner, self._y = inner, MARGIN
        self._fonts = {kind: _font(size, bold=kind != "text") for kind, size in SIZES.items()}
        self._drawn: list[Any] = []

    def gap(self, pixels: int) -> None:
        """Leave some pixels blank."""
        self._y += pixels

    def text(self, words: str, kind: str, colour: tuple[int, int, int]) -> None:
        """Wrapped to the width of the page."""
        self._y += self._write(words, kind, colour, 0, self._y, self._inner)

    def rule(self) -> None:
        """A line across."""
        y = self._y + BLOCK_GAP
        self._drawn.append(lambda draw, _: draw.line((MARGIN, y, MARGIN + self._inner - 1, y), fill=RULE))
        self._y = y + 1 + BLOCK_GAP - 6

    def row(self, strip: Image.Image, row: Row, right: Image.Image | None, right_at: int) -> None:
        """Label, frames, and differences or what is said in their place."""
        top, used = self._y, 0
        used += self._write(row.name, "name", INK, 0, top, LABEL_WIDTH - 14)
        for line in row.lines:
            used += self._write(line, "text", QUIET, 0, top + used, LABEL_WIDTH - 14)
        self._paste(strip, LABEL_WIDTH, top)
        if right is not None:
            self._paste(right, right_at, top)
        elif row.aside and right_at < self._inner:
            used = max(used, self._write(row.aside, "text", QUIET, right_at, top, self._inner - right_at))
        self._y = top + max(strip.height, used) + GUTTER

    def image(self) -> Image.Image:
        """The page."""
        sheet = Image.new("RGB", (self._inner + 2 * MARGIN, self._y - GUTTER + MARGIN), BACKGROUND)
        draw = ImageDraw.Draw(sheet)
        for step in self._drawn:
            step(draw, sheet)
        return sheet

    def _paste(self, image: Image.Image, x: int, y: int) -> None:
        self._drawn.append(lambda _, sheet: sheet.paste(image, (MARGIN + x, y)))

    def _write(self, words: str, kind: str, colour: tuple[int, int, int], x: int, y: int, width: int) -> int:
        """Height of what is written."""
        font = self._fonts[kind]
        line = sum(font.getmetrics()) + LINE_GAP
        lines = _wrapped(_drawable(words, font), font, width) if words else []
        for number, text in enumerate(lines):
            self._drawn.append(
                lambda draw, _, text=text, at=(MARGIN + x, y + number * line): draw.text(
                    at, text, fill=colour, font=font
                )
            )
        return len(lines) * line


def _strip(frames: Frames, columns: int, scale: int | None) -> Image.Image:
    """Some frames of one clip, side by side."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.size == 0:
        raise ValueError(f"expected a clip [frames, height, width, 3], got shape {frames.shape}")
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int))
    height, width = frames.shape[1:3]
    if scale is None and width > FRAME_WIDTH:
        size, filtering = (FRAME_WIDTH, max(1, round(height * FRAME_WIDTH / width))), Image.Resampling.LANCZOS
    else:
        factor = scale if scale is not None else max(1, FRAME_WIDTH // width)
        size, filtering = (factor * width, factor * height), Image.Resampling.NEAREST
    strip = Image.new("RGB", (len(chosen) * size[0] + (len(chosen) - 1) * GUTTER, size[1]), BACKGROUND)
    for position, index in enumerate(chosen):
        pixels = np.clip(np.rint(frames[index]), 0, 255).astype(np.uint8)
        strip.paste(Image.fromarray(pixels).resize(size, filtering), (position * (size[0] + GUTTER), 0))
    return strip


def _font(size: int, *, bold: bool) -> Font:
    """DejaVu Sans where matplotlib brings it (Latin, Greek, Cyrillic), else Pillow's own, which knows ASCII only."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name
        if path.is_file():
            return ImageFont.truetype(str(path), size)  # Pillow 10 takes no Path
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise MissingDependencyError("contact sheets need a Pillow with FreeType", fix="pip install --upgrade pillow")
    return font


def _drawable(text: str, font: Font) -> str:
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


def _wrapped(text: str, font: Font, width: int) -> list[str]:
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
