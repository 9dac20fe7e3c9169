"""Pictures: untrusted bytes end as pixels or in one line, and become what diffusers and transformers make of them."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lemica_trt.core import pictures
from lemica_trt.core.errors import InputError
from lemica_trt.core.pictures import (
    MAX_SIDE,
    Pixels,
    decoded_picture,
    drawn_picture,
    picture_from,
    picture_sent,
    planes,
    read_picture,
    resized,
)

pytestmark = pytest.mark.cpu


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def encoded(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def empty_png(height: int, width: int) -> bytes:
    """A PNG that says its size, and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def empty_webp(width: int, height: int) -> bytes:
    """The head of an animated WebP, which says its size, and a first picture of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    def number(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    pixel = encoded(np.zeros((1, 1, 3), np.uint8), "WEBP", lossless=True)[12:]
    head = chunk(b"VP8X", b"\2\0\0\0" + number(width - 1) + number(height - 1))
    picture = chunk(b"ANMF", number(0) * 2 + number(0) * 2 + number(0) + b"\0" + pixel)
    body = b"WEBP" + head + chunk(b"ANIM", bytes(6)) + picture
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_a_picture_may_be_given_in_several_ways(tmp_path: Path) -> None:
    pixels = noise(30, 20)
    (tmp_path / "first.png").write_bytes(encoded(pixels))
    ways = (tmp_path / "first.png", str(tmp_path / "first.png"), encoded(pixels), Image.fromarray(pixels), pixels)
    for way in ways:
        assert np.array_equal(picture_from(way), pixels)
    jpeg = decoded_picture(encoded(np.full((8, 8, 3), 77, np.uint8), "JPEG"))
    assert jpeg.shape == (8, 8, 3) and abs(jpeg.astype(int) - 77).max() <= 1
    assert np.array_equal(decoded_picture(encoded(pixels, "WEBP", lossless=True)), pixels)
    more = [Image.fromarray(noise(30, 20)[::-1])]
    animated = encoded(pixels, "WEBP", lossless=True, save_all=True, append_images=more)
    assert np.array_equal(decoded_picture(animated), pixels), "the first of them"
    assert decoded_picture(empty_webp(300, 200)).shape == (200, 300, 3)


def test_a_picture_is_sent_in_several_ways() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(noise(30, 20), kind)
        text = base64.b64encode(data).decode()
        urls = (f"data:image/png;base64,{text}", f"DATA:image/webp;charset=utf-8;base64,{text}")
        for way in (data, text, text.encode(), *urls, urls[0].encode()):
            assert picture_sent(way) == data


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ("http://localhost/first.png", "expected the picture itself, got a URL → data:"),
        ("file:///etc/passwd", "expected the picture itself, got a URL"),
        (b"https://example.com", "expected the picture itself, got a URL"),
        ("data:image/png,abc", "expected the picture itself, got a URL"),
        ("data:image/png;base64,a!", "expected base64, got something else"),
        ("/etc/passwd\n", "expected base64, got something else"),
        ("\ud800", "expected base64, got something else"),
        ("A" * (pictures.MAX_TEXT + 1), "expected at most 32 MiB, got more"),
    ],
    ids=range(8),
)
def test_what_is_sent_otherwise_is_refused(sent: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"first: {message}"):
        picture_sent(sent, name="first")


def test_orientation_and_colours_are_those_of_load_image(tmp_path: Path) -> None:
    from diffusers.utils import load_image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    (tmp_path / "turned.jpg").write_bytes(encoded(noise(16, 24), "JPEG", exif=exif))
    Image.fromarray(np.dstack([noise(9, 9), noise(9, 9)[..., :1]])).save(tmp_path / "clear.png")
    Image.fromarray(noise(9, 9)).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(noise(9, 9)[..., 0]).save(tmp_path / "grey.png")
    for path in tmp_path.iterdir():
        assert np.array_equal(read_picture(path), np.array(load_image(str(path)))), path.name
    assert read_picture(tmp_path / "turned.jpg").shape == (24, 16, 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "expected a PNG, JPEG or WebP picture, got none of them"),
        (b"GIF89a" + bytes(40), "expected a PNG, JPEG or WebP picture, got none of them"),
        (encoded(noise(8, 8))[:-40], "expected a whole picture, got"),
        (encoded(noise(64, 64), "JPEG")[:900], "expected a whole picture, got"),
        (empty_png(60_000, 60_000), "expected a picture of at most 8192 pixels a side"),
        (empty_webp(8193, 8000), "expected a picture of at most 8192 pixels a side.* got 8000×8193"),
        (empty_webp(1 << 24, 255), "expected a picture of at most 8192 pixels a side.* got far more"),
        (encoded(noise(64, 64), "WEBP")[:900], "expected a"),
        (empty_png(8000, 10), "the longer at most 16 times the shorter, got 8000×10"),
        (encoded(Image.fromarray(np.zeros((8, 8), np.uint16))), "expected at most 8 bits a channel"),
        (bytes((32 << 20) + 1), "expected at most 32 MiB, got more"),
        (np.zeros((8, 8, 3), np.float32), r"expected an array uint8 \[H, W, 3\], got float32 \[8, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), "got 0×8"),
        ("nothing.png", "nothing.png: expected a picture, got: No such file"),
        (7, "expected a path, the content of a PNG, JPEG or WebP file, a PIL image or an array uint8"),
    ],
    ids=range(15),
)
def test_what_is_no_picture_is_refused_in_a_line(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        picture_from(value)
    assert str(caught.value).isprintable()


def test_a_picture_that_pillow_has_not_decoded_yet_is_refused_in_a_line() -> None:
    with pytest.raises(InputError, match="image: expected a whole picture, got"):
        picture_from(Image.open(io.BytesIO(encoded(noise(64, 64))[:400])))


def test_files_that_were_changed_by_chance_are_pixels_or_are_refused() -> None:
    chance = random.Random(0)
    whole = [
        encoded(noise(24, 40)),
        encoded(noise(24, 40), "JPEG"),
        encoded(Image.fromarray(noise(24, 40)).convert("P")),
        encoded(noise(24, 40), "WEBP"),
    ]
    refused = 0
    for number in range(800):
        data = bytearray(whole[number % 4])
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data) if number % 2 else 60)] = chance.randrange(256)
        if number % 7 == 0:
            del data[chance.randrange(len(data)) :]
        try:
            found = decoded_picture(bytes(data))
        except InputError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            assert found.dtype == np.uint8 and found.shape[2] == 3 and max(found.shape) <= MAX_SIDE
    assert 100 < refused < 800


@pytest.mark.parametrize("size", [(30, 80), (80, 30), (48, 72), (200, 210), (32, 48)])
def test_resized_pixels_are_those_of_the_video_processor(size: tuple[int, int]) -> None:
    from diffusers.video_processor import VideoProcessor

    picture = noise(*size)
    want = VideoProcessor(vae_scale_factor=8).preprocess(Image.fromarray(picture), height=32, width=48).numpy()
    got = planes(resized(picture, 32, 48, fit="stretch", by="lanczos"), (2 / 255,) * 3, (-1.0,) * 3)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(got - want).max() < 1e-6


@pytest.mark.parametrize("size", [(300, 900), (901, 299), (224, 224), (100, 150), (223, 222), (333, 225)])
def test_resized_and_cropped_pixels_are_those_of_clip(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    picture, processor = noise(*size), CLIPImageProcessorPil()
    want = np.asarray(processor(Image.fromarray(picture), return_tensors="np")["pixel_values"])
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    got = planes(resized(picture, 224, 224, fit="cover", by="bicubic"), 1 / 255 / std, -mean / std)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 2e-6


def test_drawn_pictures_follow_the_text_alone() -> None:
    one, again, other = drawn_picture("a cat", 32, 48), drawn_picture("a cat", 32, 48), drawn_picture("a dog", 32, 48)
    assert one.shape == (32, 48, 3) and one.dtype == np.uint8
    assert np.array_equal(one, again) and (one != other).mean() > 0.5
    assert zlib.crc32(one.tobytes()) == CRC
    assert len(np.unique(one.reshape(-1, 3), axis=0)) > 3


CRC = 4193936539
"""Of the pixels for "a cat": what calibrations with drawn pictures were measured on."""
