"""Which clips a verification keeps to be looked at, and how large.

Of all held-out samples three are kept – where the default plan does worst, the median, and where it does best – each
made without caching, by the plan, and by its baselines. Small clips are kept as they are; of larger ones some frames,
reduced, so that a page of them is about 2 MB at most.
"""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from lemica_trt.bundle.manifest import KEPT_FOLDER
from lemica_trt.core.metrics import flip
from lemica_trt.evaluate.samples import Samples
from lemica_trt.ir.kept import UNCACHED, HeldOut, Kept, KeptClip, KeptClips, KeptRun
from lemica_trt.ir.plan import StepPlan

Frames = npt.NDArray[np.uint8]

KEPT_FRAMES = 13
"""Frames of a clip, at most."""

KEPT_PIXELS = 250_000
"""Pixels of all of them, at most."""

LOSSLESS_PIXELS = 1 << 16
"""Up to so many, pictures are lossless."""

LOSSY_QUALITY = 80

LOSSLESS_EFFORT = 75
"""Of 100, how hard WebP searches; at 100 it takes eighty times as long for 2 % less."""

DIFFERENCE_FACTOR = 8

SHOWN_WIDTH = 256
"""Screen pixels that a clip is taken to be enlarged to, by a whole factor, where FLIP asks how large it is seen."""

PIXELS_PER_DEGREE = 67.0
"""FLIP's default: a 0.7 m wide 4K screen seen from 0.7 m."""


class _Run(NamedTuple):
    """`frames` as kept, `psnr` of the whole clip; None: it is what others are compared with."""

    plan: StepPlan
    frames: Frames
    psnr: float | None


class Keeper:
    """Takes every clip of the default plan and its baselines, and keeps some."""

    def __init__(self) -> None:
        self._runs: dict[int, dict[str, _Run]] = {}
        self._source = (0, 0, 0)

    def add(self, sample: int, method: str, plan: StepPlan, frames: npt.NDArray[Any], psnr: float | None) -> None:
        """Take a clip.

        Args:
            sample: its number.
            method: `UNCACHED` for what the others are compared with, which is the first of a sample.
            plan: what made it.
            frames: uint8 [F, H, W, 3], all of one shape.
            psnr: dB against `UNCACHED`; None for that.
        """
        self._source = frames.shape[:3]
        self._runs.setdefault(sample, {})[method] = _Run(plan, reduced(frames), psnr)

    def kept(self, manifest_digest: str, plan: StepPlan, samples: Samples, method: str) -> Kept | None:
        """What is kept; None: nothing was taken.

        Args:
            manifest_digest: of the bundle.
            plan: its default plan.
            samples: all held-out ones.
            method: that of the default plan.
        """
        if not any(method in runs for runs in self._runs.values()):
            return None
        ranked = sorted(self._runs, key=lambda sample: (self._runs[sample][method].psnr or 0.0, sample))
        chosen = list(dict.fromkeys((ranked[0], ranked[(len(ranked) - 1) // 2], ranked[-1])))
        _, height, width, _ = next(iter(self._runs[chosen[0]].values())).frames.shape
        numbers = kept_numbers(self._source[0])
        lossless, pictures = len(numbers) * height * width <= LOSSLESS_PIXELS, dict[str, bytes]()
        clips = tuple(
            KeptClip(
                sample=sample,
                prompt=samples.shown[sample][0],
                seed=samples[sample][1],
                runs=tuple(
                    _stored(sample, name, run, self._runs[sample][UNCACHED], pictures, lossless)
                    for name, run in self._runs[sample].items()
                ),
            )
            for sample in chosen
        )
        held_out = samples.shown
        value = KeptClips(
            manifest_digest=manifest_digest,
            plan=plan.name,
            samples=tuple(HeldOut(prompt=prompt, seed=seed) for prompt, seed in held_out),
            clips=clips,
            source=self._source,
            frames=numbers,
            height=height,
            width=width,
            lossless=lossless,
        )
        return Kept(value, pictures)


def _stored(
    sample: int, method: str, run: _Run, reference: _Run, pictures: dict[str, bytes], lossless: bool
) -> KeptRun:
    """A run; its pictures are put beside the others."""

    def store(name: str, frames: Frames) -> str:
        path = f"{KEPT_FOLDER.partition('/')[2]}/{sample}-{name}.webp"
        pictures[path] = picture(frames, lossless=lossless)
        return path

    difference, mean, flip_map = None, None, None
    if run is not reference:
        difference = store(f"{method}-difference", enlarged_difference(run.frames, reference.frames))
        found = seen_flip(run.frames, reference.frames)
        if found is not None:
            mean, maps = found
            flip_map = store(f"{method}-flip", maps)
    return KeptRun(
        method=method,
        full_steps=run.plan.full_steps,
        num_steps=run.plan.num_steps,
        psnr=run.psnr,
        frames=store(method, run.frames),
        difference=difference,
        flip=mean,
        flip_map=flip_map,
    )


def seen_flip(frames: Frames, reference: Frames) -> tuple[float, Frames] | None:
    """FLIP of a clip as it is seen on a screen, small ones enlarged (`SHOWN_WIDTH`); as `metrics.flip`."""
    shown = max(1, SHOWN_WIDTH // frames.shape[2])
    return flip(frames, reference, pixels_per_degree=PIXELS_PER_DEGREE / shown)


def kept_numbers(count: int) -> tuple[int, ...]:
    """Numbers of the frames that are kept of a clip: evenly spaced, the first and the last among them."""
    chosen = np.linspace(0, count - 1, min(count, KEPT_FRAMES)).round().astype(int)
    return tuple(int(number) for number in np.unique(chosen))


def reduced(frames: npt.NDArray[Any]) -> Frames:
    """The frames that are kept of a clip uint8 [F, H, W, 3], smaller where they would be too many pixels."""
    chosen = frames[list(kept_numbers(len(frames)))]
    count, height, width, _ = chosen.shape
    factor = math.sqrt(KEPT_PIXELS / (count * height * width))
    if factor >= 1:
        return np.ascontiguousarray(chosen, np.uint8)
    size = (max(1, int(width * factor)), max(1, int(height * factor)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in chosen])


def enlarged_difference(frames: Frames, reference: Frames) -> Frames:
    """`DIFFERENCE_FACTOR` times the absolute difference of two clips, 255 at most."""
    apart = np.abs(frames.astype(np.int16) - reference.astype(np.int16))
    difference: Frames = np.minimum(DIFFERENCE_FACTOR * apart, 255).astype(np.uint8)
    return difference


def picture(frames: Frames, *, lossless: bool) -> bytes:
    """WebP of frames uint8 [F, H, W, 3], one below the other."""
    data = io.BytesIO()
    column = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    column.save(data, "WEBP", lossless=lossless, quality=LOSSLESS_EFFORT if lossless else LOSSY_QUALITY, method=4)
    return data.getvalue()
