"""Contact sheets: everything in its place, nothing over anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFont
from report_data import clip

from lemica_trt.report import contact_sheet as module
from lemica_trt.report.contact_sheet import BACKGROUND, GUTTER, MARGIN, contact_sheet

pytestmark = pytest.mark.null

Pixels = npt.NDArray[np.uint8]


def drawn(rows: list[tuple[str, Pixels]], path: Path, **options: int) -> Pixels:
    contact_sheet(rows, path / "sheet.png", **options)
    with Image.open(path / "sheet.png") as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def blank(pixels: Pixels) -> bool:
    return bool((pixels == BACKGROUND).all())


def test_frames_are_enlarged_without_smoothing_and_side_by_side(tmp_path: Path) -> None:
    frames = clip(5)
    sheet = drawn([("caption", frames)], tmp_path, columns=3, scale=2)
    assert sheet.shape[1] == 2 * MARGIN + 3 * 128 + 2 * GUTTER
    top = sheet.shape[0] - MARGIN - 128
    for position, index in enumerate((0, 2, 4)):
        left = MARGIN + position * (128 + GUTTER)
        shown = sheet[top : top + 128, left : left + 128]
        assert (shown == frames[index].repeat(2, axis=0).repeat(2, axis=1)).all()
    assert blank(sheet[top:, MARGIN + 128 : MARGIN + 128 + GUTTER])
    assert blank(sheet[:MARGIN]) and blank(sheet[-MARGIN:]) and blank(sheet[:, :MARGIN]) and blank(sheet[:, -MARGIN:])


def test_each_caption_stands_above_its_own_frames(tmp_path: Path) -> None:
    white = np.full((2, 64, 64, 3), 255, np.uint8)
    sheet = drawn([("one", white), ("two", white)], tmp_path, scale=3)
    ink = (sheet.max(axis=2) < 120).any(axis=1)
    frames = (sheet == 255).all(axis=2).sum(axis=1) >= 2 * 192
    kinds = "".join("t" if i else "f" if f else " " for i, f in zip(ink, frames))
    assert kinds.replace(" ", "").startswith("t")
    order = "".join(k for k, before in zip(kinds.replace(" ", ""), " " + kinds.replace(" ", "")) if k != before)
    assert order == "tftf"
    assert not (ink & frames).any()


def test_long_captions_wrap_and_push_the_frames_down(tmp_path: Path) -> None:
    frames = clip(2)
    short = drawn([("short", frames)], tmp_path, scale=2)
    prompt = "a prompt that goes on and on " * 6 + "x" * 200
    long = drawn([(prompt, frames)], tmp_path, scale=2)
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0] + 60
    assert blank(long[:, -MARGIN:])
    assert (long[-MARGIN - 128 :] == short[-MARGIN - 128 :]).all()


def test_wrapping_loses_no_word() -> None:
    font = module._font()
    text = "some words and " + "averyverylongone" * 9
    lines = module._wrapped(text, font, 150)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 150 for line in lines)


def test_sizes_follow_the_frames(tmp_path: Path) -> None:
    small = drawn([("", clip(1, 32, 32))], tmp_path)
    assert small.shape[1] == 2 * MARGIN + 320  # six times enlarged; room for a caption at least
    large = drawn([("", clip(2, 480, 720))], tmp_path)
    assert large.shape[1] == 2 * MARGIN + 2 * 192 + GUTTER


def test_floats_are_rounded_and_clipped(tmp_path: Path) -> None:
    frames = np.full((1, 64, 64, 3), 300.0)
    frames[:, :32] = 99.6
    sheet = drawn([("", frames)], tmp_path, scale=1)
    shown = sheet[-MARGIN - 64 : -MARGIN, MARGIN : MARGIN + 64]
    assert (shown[:32] == 100).all() and (shown[32:] == 255).all()


def test_letters_that_the_font_lacks_are_replaced() -> None:
    font = ImageFont.load_default(15)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert module._drawable("64×64 – café", font) in ("64x64 - cafe", "64×64 – café")
    pytest.importorskip("matplotlib")
    assert module._drawable("64×64 – café", module._font()) == "64×64 – café"


@pytest.mark.parametrize("options", [{"columns": 0}, {"scale": 0}])
def test_impossible_sheets_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="columns and scale of at least 1"):
        contact_sheet([("", clip(1))], tmp_path / "sheet.png", **options)
    with pytest.raises(ValueError, match="expected rows"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"got shape \(64, 64, 3\)"):
        contact_sheet([("", clip(1)[0])], tmp_path / "sheet.png")
