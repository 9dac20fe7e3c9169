"""Contact sheets: everything in its place, nothing over anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFont
from report_data import clip

from lemica_trt.report import contact_sheet as module
from lemica_trt.report.contact_sheet import (
    BACKGROUND,
    BLOCK_GAP,
    GUTTER,
    LABEL_WIDTH,
    MARGIN,
    Block,
    Row,
    contact_sheet,
)

pytestmark = pytest.mark.null

Pixels = npt.NDArray[np.uint8]


def drawn(
    rows: list[Row], path: Path, *, title: str = "", caption: str = "", heading: str = "", **options: int
) -> Pixels:
    contact_sheet(title, caption, [Block(heading, rows)], path / "sheet.png", **options)
    with Image.open(path / "sheet.png") as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def blank(pixels: Pixels) -> bool:
    return bool((pixels == BACKGROUND).all())


def test_frames_are_enlarged_without_smoothing_and_side_by_side(tmp_path: Path) -> None:
    frames = clip(5)
    sheet = drawn([Row("name", ["line"], frames, frames[::-1])], tmp_path, columns=3, scale=2)
    width = 3 * 128 + 2 * GUTTER
    assert sheet.shape[1] == 2 * MARGIN + LABEL_WIDTH + 2 * width + BLOCK_GAP
    top = sheet.shape[0] - MARGIN - 128
    for start, order in ((0, (0, 2, 4)), (width + BLOCK_GAP, (4, 2, 0))):
        for position, index in enumerate(order):
            left = MARGIN + LABEL_WIDTH + start + position * (128 + GUTTER)
            shown = sheet[top : top + 128, left : left + 128]
            assert (shown == frames[index].repeat(2, axis=0).repeat(2, axis=1)).all()
    left = MARGIN + LABEL_WIDTH
    assert blank(sheet[top:, left + 128 : left + 128 + GUTTER])
    assert blank(sheet[:MARGIN]) and blank(sheet[-MARGIN:]) and blank(sheet[:, :MARGIN]) and blank(sheet[:, -MARGIN:])


def test_each_label_stands_beside_its_own_frames(tmp_path: Path) -> None:
    white = np.full((2, 64, 64, 3), 255, np.uint8)
    rows = [Row("one", ["a", "b", "c"], white), Row("two", [], white)]
    sheet = drawn(rows, tmp_path, scale=3)
    ink = (sheet[:, MARGIN : MARGIN + LABEL_WIDTH].max(axis=2) < 200).any(axis=1)
    frames = (sheet == 255).all(axis=2).sum(axis=1) >= 2 * 192
    starts = np.flatnonzero(frames & ~np.roll(frames, 1))
    assert len(starts) == 2
    for start in starts:
        assert ink[start : start + 24].any() and not ink[start - GUTTER : start].any()
    assert ink[starts[0] :].sum() > ink[starts[1] :].sum() > 0


def test_labels_longer_than_frames_push_the_next_row_down(tmp_path: Path) -> None:
    frames = clip(2)
    short = drawn([Row("short", [], frames), Row("next", [], frames)], tmp_path, scale=2)
    long = drawn([Row("a name that goes on " * 12, [], frames), Row("next", [], frames)], tmp_path, scale=2)
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0] + 40
    bottom = slice(-MARGIN - 128, None)
    assert (long[bottom, MARGIN + LABEL_WIDTH :] == short[bottom, MARGIN + LABEL_WIDTH :]).all()


def test_long_captions_wrap(tmp_path: Path) -> None:
    rows = [Row("", [], clip(2))]
    short = drawn(rows, tmp_path, title="short", caption="short")
    long = drawn(rows, tmp_path, title="short", caption="a caption that goes on and on " * 6 + "x" * 200)
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0] + 60
    assert blank(long[:, -MARGIN:])


def test_what_stands_in_the_place_of_differences(tmp_path: Path) -> None:
    frames = clip(2)
    other = Row("plan", [], frames, frames)
    without, aside = (drawn([Row("all", [], frames, None, text), other], tmp_path) for text in ("", "see below"))
    assert without.shape == aside.shape
    right = MARGIN + LABEL_WIDTH + (without.shape[1] - 2 * MARGIN - LABEL_WIDTH - BLOCK_GAP) // 2 + BLOCK_GAP
    changed = (without != aside).any(axis=2)
    assert changed.any() and not changed[:, : right - 1].any()


def test_wrapping_loses_no_word() -> None:
    font = module._font(15, bold=False)
    text = "some words and " + "averyverylongone" * 9
    lines = module._wrapped(text, font, 150)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 150 for line in lines)


def test_sizes_follow_the_frames(tmp_path: Path) -> None:
    small = drawn([Row("", [], clip(1, 32, 32))], tmp_path)
    assert small.shape[1] == 2 * MARGIN + LABEL_WIDTH + 320  # four times enlarged; room for a caption at least
    large = drawn([Row("", [], clip(3, 480, 720))], tmp_path)
    assert large.shape[1] == 2 * MARGIN + LABEL_WIDTH + 3 * 144 + 2 * GUTTER


def test_floats_are_rounded_and_clipped(tmp_path: Path) -> None:
    frames = np.full((1, 64, 64, 3), 300.0)
    frames[:, :32] = 99.6
    sheet = drawn([Row("", [], frames)], tmp_path, scale=1)
    shown = sheet[-MARGIN - 64 : -MARGIN, MARGIN + LABEL_WIDTH : MARGIN + LABEL_WIDTH + 64]
    assert (shown[:32] == 100).all() and (shown[32:] == 255).all()


def test_letters_that_the_font_lacks_are_replaced() -> None:
    font = ImageFont.load_default(15)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert module._drawable("64×64 – café", font) in ("64x64 - cafe", "64×64 – café")
    pytest.importorskip("matplotlib")
    assert module._drawable("64×64 – café", module._font(15, bold=True)) == "64×64 – café"


@pytest.mark.parametrize("options", [{"columns": 0}, {"scale": 0}])
def test_impossible_sheets_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="columns and scale of at least 1"):
        drawn([Row("", [], clip(1))], tmp_path, **options)
    with pytest.raises(ValueError, match="expected rows"):
        contact_sheet("", "", [], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="expected rows"):
        drawn([], tmp_path)
    with pytest.raises(ValueError, match=r"got shape \(64, 64, 3\)"):
        drawn([Row("", [], clip(1)[0])], tmp_path)
