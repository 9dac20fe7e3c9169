"""The drawn world behind the bundled models: one coloured shape that moves over a soft background.

A clip is 9 frames of 64 x 64 RGB at 8 frames a second. Its caption says all that matters:
"a {size} {colour} {shape} {motion}", for example "a big red circle moves left". Everything else
(the start, the travel, the background's tint) is drawn from a seeded generator. A still picture is
a clip of one frame, whose caption says where the shape is: "a big red circle on the left".

Words:      2 sizes x 8 colours x 4 shapes x 6 motions or 5 places = 384 or 320 captions.
Held out:   of the 192 combinations colour x shape x motion, 48 are never drawn in training
            (`split_of`), 24 for calibration and 24 for evaluation, with both sizes each. So
            96 captions, 48 + 48, are new *combinations* of words that training has seen.
            Of the 160 combinations colour x shape x place these are 20 and 20.

This module knows numpy only.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FRAMES, HEIGHT, WIDTH, FPS = 9, 64, 64, 8

# Colour of the shape, sRGB in [0, 1].
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.17, 0.17),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.96, 0.85, 0.18),
    "green": (0.18, 0.66, 0.30),
    "blue": (0.16, 0.38, 0.86),
    "purple": (0.56, 0.24, 0.74),
    "pink": (0.96, 0.52, 0.72),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES: dict[str, float] = {"small": 8.0, "big": 14.0}  # circumscribed radius in pixels
# Direction of the travel (x to the right, y down), or the factor on the size from first to last.
TRAVELS: dict[str, tuple[int, int]] = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
SCALES: dict[str, float] = {"grows": 1.9, "shrinks": 1 / 1.9}
MOTIONS = (*TRAVELS, *SCALES)
# Where the centre is in a still picture: fifths of the room that the shape's size leaves it, x and y.
PLACES: dict[str, tuple[int, int]] = {
    "on the left": (0, 2),
    "on the right": (4, 2),
    "at the top": (2, 0),
    "at the bottom": (2, 4),
    "in the middle": (2, 2),
}


def words_of(motions: Iterable[str]) -> tuple[str, ...]:
    """Words of any prompt: the tokenizer's vocabulary after its special tokens."""
    return ("a", *SIZES, *COLOURS, *SHAPES, *dict.fromkeys(word for m in motions for word in m.split()))


WORDS = words_of(MOTIONS)


@dataclass(frozen=True)
class Caption:
    """What a prompt says; `str(caption)` is the prompt. `motion` is one of MOTIONS, or for a still of PLACES."""

    size: str
    colour: str
    shape: str
    motion: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.motion}"


def caption_from_text(text: str) -> Caption:
    """Inverse of `str(caption)`; a text of another form is a `ValueError`."""
    words = text.split()
    if len(words) < 5 or words[0] != "a":
        raise ValueError(f"expected 'a <size> <colour> <shape> <motion>', got {text!r}")
    caption = Caption(words[1], words[2], words[3], " ".join(words[4:]))
    if caption not in (*CAPTIONS, *STILLS):
        raise ValueError(f"{text!r} has a word that this world does not draw")
    return caption


CAPTIONS, STILLS = (
    tuple(Caption(*words) for words in itertools.product(SIZES, COLOURS, SHAPES, motions))
    for motions in (MOTIONS, PLACES)
)


def split_of(caption: Caption) -> str:
    """'train', 'calibration' or 'held_out': a Latin-square rule on colour x shape x motion.

    (colour + 2*shape + 3*motion) mod 8 is 0 for calibration and 4 for the held-out set. The
    motion has only 6 values (the place 5), so each (colour, shape) pair loses at most two motions and every
    pair of words still occurs in training.
    """
    colour = tuple(COLOURS).index(caption.colour)
    shape = SHAPES.index(caption.shape)
    motion = next(tuple(kind).index(caption.motion) for kind in (MOTIONS, PLACES) if caption.motion in kind)
    residue = (colour + 2 * shape + 3 * motion) % 8
    return {0: "calibration", 4: "held_out"}.get(residue, "train")


def captions_of(split: str, captions: tuple[Caption, ...] = CAPTIONS) -> tuple[Caption, ...]:
    """All captions of one split, in a fixed shuffled order (so that a prefix is varied)."""
    chosen = [caption for caption in captions if split_of(caption) == split]
    if not chosen:
        raise ValueError(f"no split {split!r}: use 'train', 'calibration' or 'held_out'")
    order = np.random.default_rng(0).permutation(len(chosen))
    return tuple(chosen[i] for i in order)


def prompt_file_of(split: str, folder: str, captions: tuple[Caption, ...] = CAPTIONS) -> str:
    """Text of the prompt file of one split: `#` comments, then one prompt a line."""
    head = (
        f"# {folder}, {split.replace('_', '-')} prompts. Written by tools/train_tiny.py;\n"
        f"# the split is `split_of` in tools/shapes.py: by colour x shape x {_last(captions)}, so that no\n"
        "# prompt here, nor its other-sized twin, is a training caption or in the other file.\n"
    )
    return head + "".join(f"{caption}\n" for caption in captions_of(split, captions))


def _last(captions: tuple[Caption, ...]) -> str:
    return "motion" if captions == CAPTIONS else "place"


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside; a bound is enough for the two polygons).

    x, y: offsets from the centre, y down. Formulas: Inigo Quilez, "2D distance functions".
    """
    if shape == "circle":
        return np.hypot(x, y) - 0.92 * radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.80 * radius
    if shape == "triangle":  # three half-planes; the centroid lies at the centre
        y = y - 0.12 * radius
        sides = [np.cos(a) * x + np.sin(a) * y for a in (np.pi / 2, np.pi / 2 + 2.0944, np.pi / 2 - 2.0944)]
        return np.maximum.reduce(sides) - 0.56 * radius
    if shape == "star":  # fold into one tenth of the plane, then one half-plane
        angle = np.arctan2(x, -y)  # 0 at the upper tip
        folded = abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        rho = np.hypot(x, y)
        px, py = rho * np.cos(folded), rho * np.sin(folded)
        tip, notch = 1.08 * radius, 0.50 * radius
        qx, qy = notch * np.cos(np.pi / 5), notch * np.sin(np.pi / 5)
        nx, ny = qy, tip - qx  # normal of the edge from the tip (tip, 0) to the notch (qx, qy)
        return (nx * (px - tip) + ny * py) / np.hypot(nx, ny)
    raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")


def _background(level: float) -> np.ndarray:
    """Slate blue, lighter toward the top; the level of its brightness is the clip's own. `[h, w, 3]` in [0, 1]."""
    shade = level * (1.12 - 0.24 * (np.arange(HEIGHT) + 0.5) / HEIGHT)
    return np.broadcast_to(shade[:, None, None], (HEIGHT, WIDTH, 1)) * np.array([0.80, 0.95, 1.25])


def draw_clip(caption: Caption, rng: np.random.Generator) -> np.ndarray:
    """One clip, or a still of one frame: uint8 `[frames, height, width, 3]`; anti-aliased from the signed distance."""
    radius = SIZES[caption.size] * rng.uniform(0.94, 1.06)
    time = np.linspace(-0.5, 0.5, FRAMES) if caption.motion in MOTIONS else np.zeros(1)
    if caption.motion in TRAVELS:
        direction = np.array(TRAVELS[caption.motion])
        travel = rng.uniform(22.0, 28.0)  # pixels from the first frame to the last
        margin = radius + 2 + abs(direction) * travel / 2
        radii = np.full(FRAMES, radius)
    elif caption.motion in SCALES:
        direction, travel = np.zeros(2), 0.0
        margin = np.full(2, radius * 1.3784 + 2)  # sqrt(1.9): the largest radius
        radii = radius * SCALES[caption.motion] ** time
    else:
        direction, travel = np.zeros(2), 0.0
        margin, radii = np.full(2, radius + 2), np.full(1, radius)
    low, high = margin, np.array([WIDTH, HEIGHT]) - margin
    if caption.motion in PLACES:
        fifth = (high - low) / 5
        low = low + fifth * PLACES[caption.motion]
        high = low + fifth
    centre = rng.uniform(low, high)
    path = centre + direction * travel * time[:, None]  # [frames, (x, y)] in pixels

    x, y = _grid()
    background = _background(rng.uniform(0.20, 0.30))
    colour = np.array(COLOURS[caption.colour])

    frames = np.repeat(background[None], len(time), axis=0)
    for frame, (position, r) in enumerate(zip(path, radii, strict=True)):
        reach = 1.08 * r + 1.5  # only pixels within it can differ from the background
        (left, top), (right, bottom) = np.floor(position - reach), np.ceil(position + reach)
        box = np.s_[max(int(top), 0) : int(bottom), max(int(left), 0) : int(right)]
        dx, dy = x[box] - position[0], y[box] - position[1]
        cover = np.clip(0.5 - _distance(caption.shape, dx, dy, r), 0.0, 1.0)[..., None]
        light = 1.0 - 0.10 * (dy / r).clip(-1, 1)[..., None]  # lit from above
        ink = np.clip(colour * light, 0, 1)
        frames[frame][box] = frames[frame][box] * (1 - cover) + ink * cover
    return np.round(frames * 255).astype(np.uint8)


def draw_clips(
    count: int, seed: int, split: str = "train", captions: tuple[Caption, ...] = CAPTIONS
) -> tuple[np.ndarray, list[Caption]]:
    """`count` clips of one split, uint8 `[count, frames, height, width, 3]`, and their captions.

    The same seed gives the same clips; a longer call begins with the clips of a shorter one.
    """
    chosen = captions_of(split, captions)
    clips, drawn = [], []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        drawn.append(chosen[rng.integers(len(chosen))])
        clips.append(draw_clip(drawn[-1], rng))
    return np.stack(clips), drawn


# ---------------------------------------------------------------- what a picture shows


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixels' centres."""
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    return x, y


def _moments(covers: np.ndarray) -> tuple[float, np.ndarray]:
    """Area and centre of mass, in pixels."""
    x, y = _grid()
    area = max(float(covers.sum()), 1e-6)
    return area, np.array([(covers * x).sum(), (covers * y).sum()]) / area


@lru_cache
def _unit(shape: str) -> tuple[float, np.ndarray]:
    """Area of a shape of radius 1, and its centre of mass from its centre."""
    x, y = _grid()
    area, centre = _moments(_distance(shape, x - WIDTH / 2, y - HEIGHT / 2, 20.0) < 0)
    return area / 400, (centre - np.array([WIDTH, HEIGHT]) / 2) / 20


def _radius(shape: str, area: float) -> float:
    """Circumscribed radius of a shape of that area."""
    return float(np.sqrt(area / _unit(shape)[0]))


def _overlap(shape: str, covers: np.ndarray) -> float:
    """Of the picture of a shape with the same area and centre of mass: intersection over union."""
    area, centre = _moments(covers)
    radius = _radius(shape, area)
    (x, y), (dx, dy) = _grid(), centre - radius * _unit(shape)[1]
    drawn = np.clip(0.5 - _distance(shape, x - dx, y - dy, radius), 0.0, 1.0)
    return float(np.minimum(drawn, covers).sum() / np.maximum(drawn, covers).sum())


def _seen(frame: np.ndarray) -> tuple[str, str, float, np.ndarray]:
    """Colour, shape, radius and centre of mass of what is in a frame, uint8 `[h, w, 3]`.

    The brightness of the background is that of the frame's border. The shape is the one that overlaps most.
    """
    picture = frame / 255
    border = np.ones((HEIGHT, WIDTH), bool)
    border[2:-2, 2:-2] = False
    background = _background(float(np.median((picture / _background(1.0))[border])))
    difference = picture - background
    distance = np.linalg.norm(difference, axis=-1)
    ink = picture[distance > 0.6 * np.sort(distance.ravel())[-20:].mean()].mean(0)
    colour = min(COLOURS, key=lambda name: float(np.linalg.norm(ink - COLOURS[name])))
    toward = ink - background
    covers = ((difference * toward).sum(-1) / (toward**2).sum(-1)).clip(0.0, 1.0)
    covers[covers < 0.2] = 0.0  # what is not quite the background
    shape = max(SHAPES, key=lambda name: _overlap(name, covers))
    area, centre = _moments(covers)
    return colour, shape, _radius(shape, area), centre


def read_clip(clip: np.ndarray) -> Caption:
    """What a clip or a still shows, uint8 `[frames, height, width, 3]`: the inverse of `draw_clip`.

    Colour and shape are those of most frames, the size that of the middle one. A clip whose shape stays within 10
    pixels grows or shrinks. A still's place is the nearest.
    """
    colours, shapes, radii, centres = zip(*map(_seen, clip), strict=True)
    colour, shape = (Counter(names).most_common(1)[0][0] for names in (colours, shapes))
    radius, centre = radii[len(clip) // 2], centres[len(clip) // 2]
    size = "big" if radius > np.sqrt(SIZES["small"] * SIZES["big"]) else "small"
    travel = centres[-1] - centres[0]
    if len(clip) == 1:
        room = np.array([WIDTH, HEIGHT]) - 2 * (radius + 2)
        fifths = (centre - radius - 2) / room * 5 - 0.5
        last = min(PLACES, key=lambda name: float(np.linalg.norm(fifths - PLACES[name])))
    elif np.linalg.norm(travel) > 10:
        last = max(TRAVELS, key=lambda name: float(travel @ TRAVELS[name]))
    else:
        last = "grows" if radii[-1] > radii[0] else "shrinks"
    return Caption(size, colour, shape, last)
