"""Clips that a verification keeps to be looked at: `reports/clips.json`, with pictures of frames in `reports/clips/`.

They lie beside the report, belong to no identity of a bundle, and may be deleted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from lemica_trt.core.values import Value, require, require_finite

KEPT_FORMAT = 1

UNCACHED = "uncached"
"""The method of the run that others are compared with, in a `KeptRun`."""

MAX_PIXELS = 1 << 20
"""Of all frames of one clip, as kept."""

MAX_CLIPS = 8

FILE = re.compile(r"clips/\d{1,6}-[a-z-]{1,24}\.webp")


class HeldOut(Value, frozen=True):
    """A held-out sample."""

    prompt: str
    seed: int


class KeptRun(Value, frozen=True):
    """One way of making a clip.

    Attributes:
        method: `UNCACHED`, `ir.report.PLAN`, or a baseline; see `evaluate.baselines.baselines`.
        full_steps: the steps that run in full.
        num_steps: N of the sampler that they are steps of.
        psnr: dB against the `UNCACHED` run, of the clip as it was made; None: it is that run.
        frames: picture below `reports/`: the frames that are kept, one below the other.
        difference: the same of eight times the absolute difference to the `UNCACHED` run; None: it is that run.
        flip: mean of FLIP against the `UNCACHED` run over the frames as kept; None: not measured.
        flip_map: picture of it in the colours that FLIP's authors use.
    """

    method: str
    full_steps: tuple[int, ...]
    num_steps: int
    psnr: float | None
    frames: str
    difference: str | None
    flip: float | None = None
    flip_map: str | None = None

    def __post_init__(self) -> None:
        require_finite([value for value in (self.psnr, self.flip) if value is not None], "psnr, flip")
        steps = list(self.full_steps)
        require(steps == sorted(set(steps)) != [] and steps[0] >= 0, f"full_steps must rise, got {steps}")
        require(steps[-1] < self.num_steps <= 10_000, f"full_steps must lie below num_steps, got {self.num_steps}")
        for path in self.files:
            require(FILE.fullmatch(path) is not None, f"expected a picture clips/NUMBER-NAME.webp, got {path!r}")

    @property
    def budget(self) -> int:
        """Full steps."""
        return len(self.full_steps)

    @property
    def files(self) -> tuple[str, ...]:
        """All pictures."""
        return tuple(path for path in (self.frames, self.difference, self.flip_map) if path is not None)


class KeptClip(Value, frozen=True):
    """One held-out sample, made in several ways; the `UNCACHED` run is the first."""

    sample: int
    prompt: str
    seed: int
    runs: tuple[KeptRun, ...]

    def __post_init__(self) -> None:
        require(bool(self.runs) and self.runs[0].method == UNCACHED, f"runs must begin with {UNCACHED}")
        methods = [run.method for run in self.runs]
        require(len(set(methods)) == len(methods), f"methods must differ, got {methods}")


class KeptClips(Value, frozen=True):
    """What was kept.

    Attributes:
        manifest_digest: of the bundle's manifest: what all this is of.
        plan: the bundle's default plan.
        samples: all that the default plan was compared on, by number.
        clips: some of them: the one that the plan does worst on, the median, and the best.
        source: frames, height and width of a clip as the model makes it.
        frames: numbers of the frames that are kept.
        height, width: of a frame as kept; smaller than in `source` where a clip is too large to keep.
        lossless: whether pictures hold every value as it was; otherwise WebP with loss.
    """

    manifest_digest: str
    plan: str
    samples: tuple[HeldOut, ...]
    clips: tuple[KeptClip, ...]
    source: tuple[int, int, int]
    frames: tuple[int, ...]
    height: int
    width: int
    lossless: bool
    format_version: int = KEPT_FORMAT

    def __post_init__(self) -> None:
        require(self.format_version == KEPT_FORMAT, f"format_version must be {KEPT_FORMAT}, got {self.format_version}")
        require(0 < len(self.clips) <= MAX_CLIPS, f"expected 1 … {MAX_CLIPS} clips, got {len(self.clips)}")
        numbers = list(self.frames)
        require(numbers == sorted(set(numbers)) != [] and numbers[0] >= 0, f"frames must rise, got {numbers}")
        require(numbers[-1] < self.source[0], f"there are {self.source[0]} frames, got number {numbers[-1]}")
        require(min(self.height, self.width) > 0, f"frames must have pixels, got {self.height}×{self.width}")
        require(
            len(numbers) * self.height * self.width <= MAX_PIXELS,
            f"expected at most {MAX_PIXELS} pixels a clip, got {len(numbers)} frames {self.height}×{self.width}",
        )
        for clip in self.clips:
            require(clip.sample < len(self.samples), f"sample {clip.sample} is none of {len(self.samples)}")

    @property
    def files(self) -> tuple[str, ...]:
        """All pictures, below `reports/`."""
        return tuple(path for clip in self.clips for run in clip.runs for path in run.files)

    @property
    def is_whole(self) -> bool:
        """Whether all frames are there, in their own size."""
        return self.source == (len(self.frames), self.height, self.width)


class Kept(NamedTuple):
    """What was kept, and its pictures: path below `reports/` → WebP."""

    clips: KeptClips
    pictures: Mapping[str, bytes]
