"""The world of the bundled models: deterministic, split without overlap, true to its captions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.null
SPLITS = ("train", "calibration", "held_out")


def _module():
    spec = importlib.util.spec_from_file_location("shapes", ROOT / "tools" / "shapes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


shapes = _module()


def _mask(clip: np.ndarray, colour: str) -> np.ndarray:
    """Pixels nearer to the shape's colour than to anything of the background: `[9, 64, 64]`."""
    pixels = clip.astype(float) / 255
    return np.linalg.norm(pixels - np.array(shapes.COLOURS[colour]), axis=-1) < 0.25


def _clip(text: str, seed: int = 0) -> np.ndarray:
    return shapes.draw_clip(shapes.caption_from_text(text), np.random.default_rng(seed))


def test_the_same_seed_draws_the_same_clips_and_a_longer_call_begins_with_a_shorter() -> None:
    clips, captions = shapes.draw_clips(4, seed=7)
    again, captions_again = shapes.draw_clips(6, seed=7)
    assert clips.dtype == np.uint8 and clips.shape == (4, 9, 64, 64, 3)
    assert np.array_equal(clips, again[:4]) and captions == captions_again[:4]
    assert not np.array_equal(clips, shapes.draw_clips(4, seed=8)[0])


def test_the_splits_partition_the_captions_by_colour_shape_and_motion() -> None:
    sets = {split: set(shapes.captions_of(split)) for split in SPLITS}
    assert sum(map(len, sets.values())) == len(shapes.CAPTIONS) == 384
    assert set().union(*sets.values()) == set(shapes.CAPTIONS)
    combinations = {k: {(c.colour, c.shape, c.motion) for c in v} for k, v in sets.items()}
    assert not combinations["train"] & (combinations["calibration"] | combinations["held_out"])
    assert not combinations["calibration"] & combinations["held_out"]
    assert len(sets["calibration"]) >= 32 and len(sets["held_out"]) >= 48


WORLDS = {"clips": (shapes.CAPTIONS, shapes.MOTIONS), "stills": (shapes.STILLS, shapes.PLACES)}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_holds_every_word(split: str, world: str) -> None:
    captions, motions = WORLDS[world]
    words = {word for caption in shapes.captions_of(split, captions) for word in str(caption).split()}
    assert words == set(shapes.words_of(motions))


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_drawn_is_read_back(world: str) -> None:
    clips, captions = shapes.draw_clips(24, 9, "held_out", WORLDS[world][0])
    assert [shapes.read_clip(clip) for clip in clips] == captions


def test_stills_keep_combinations_of_colour_shape_and_place_apart() -> None:
    sets = [{(c.colour, c.shape, c.motion) for c in shapes.captions_of(split, shapes.STILLS)} for split in SPLITS]
    assert sum(map(len, sets)) == len(set().union(*sets)) == len(shapes.STILLS) / 2 == 160
    assert [len(its) for its in sets] == [120, 20, 20]


def test_training_holds_every_pair_of_words() -> None:
    fields = ("size", "colour", "shape", "motion")
    train = shapes.captions_of("train")
    for a in fields:
        for b in fields:
            pairs = {(getattr(c, a), getattr(c, b)) for c in train}
            assert pairs == {(getattr(c, a), getattr(c, b)) for c in shapes.CAPTIONS}


def test_a_caption_reads_back_from_its_text() -> None:
    assert all(shapes.caption_from_text(str(c)) == c for c in shapes.CAPTIONS)
    for bad in ("a red circle moves left", "the big red circle moves left", "a big red cat grows"):
        with pytest.raises(ValueError):
            shapes.caption_from_text(bad)


@pytest.mark.parametrize("motion", shapes.MOTIONS)
def test_the_shape_does_what_the_caption_says(motion: str) -> None:
    for colour in shapes.COLOURS:
        mask = _mask(_clip(f"a big {colour} square {motion}"), colour)
        area = mask.sum((1, 2))
        assert area.min() > 30, f"{colour}: the shape is lost"
        y, x = (
            np.array([np.nonzero(m)[axis].mean() for m in mask]) for axis in (0, 1)
        )  # centre of mass a frame, pixels
        travel = np.array([x[-1] - x[0], y[-1] - y[0]])
        if motion in shapes.TRAVELS:
            assert 20 < travel @ np.array(shapes.TRAVELS[motion]) < 30
            assert np.abs(travel).min() < 1.5
        else:
            assert (area[-1] > 1.5 * area[0]) == (motion == "grows")
            assert np.abs(travel).max() < 2.0


def test_big_is_bigger_than_small_and_the_shape_stays_in_the_picture() -> None:
    for shape in shapes.SHAPES:
        for motion in shapes.MOTIONS:
            areas = {}
            for size in shapes.SIZES:
                mask = _mask(_clip(f"a {size} red {shape} {motion}"), "red")
                areas[size] = mask[4].sum()
                border = mask[:, [0, -1]].any() or mask[:, :, [0, -1]].any()
                assert not border, f"a {size} {shape} that {motion} touches the border"
            assert areas["big"] > 2 * areas["small"]


@pytest.mark.parametrize(("folder", "world"), [("cogvideox-tiny", "clips"), ("flux-tiny", "stills")])
@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_prompt_file_is_what_the_generator_defines(split: str, folder: str, world: str) -> None:
    text = (ROOT / "calibration" / folder / f"{split}.txt").read_text()
    assert text == shapes.prompt_file_of(split, folder, WORLDS[world][0])


def _prompts(file: Path) -> list[str]:
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_video_prompts_are_many_varied_and_disjoint() -> None:
    folder = ROOT / "calibration" / "video"
    calibration, held_out = (_prompts(folder / f"{s}.txt") for s in SPLITS[1:])
    assert len(calibration) >= 70 and len(held_out) >= 35
    assert len(set(calibration + held_out)) == len(calibration) + len(held_out)
    heads = [
        {
            line
            for line in (folder / f"{s}.txt").read_text().splitlines()
            if line.startswith("# ") and line[2:].replace(" ", "").isalpha() and line.islower()
        }
        for s in SPLITS[1:]
    ]
    assert heads[0] == heads[1] and len(heads[0]) >= 7
    assert all(6 <= len(p.split()) <= 60 for p in calibration + held_out)
