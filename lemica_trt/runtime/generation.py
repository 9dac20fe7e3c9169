"""What a request asks for, and what it gets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, SupportsIndex

from lemica_trt.backends.base import Array
from lemica_trt.core.progress import duration
from lemica_trt.runtime.video import write_video


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and its settings; None: the bundle's default.

    Attributes:
        prompt: text of at most `text.MAX_PROMPT_BYTES`; cut to the bundle's text length.
        seed: 0 … 2^63 − 1.
        guidance_scale: g; the plan's by default. Guided bundles only.
        negative_prompt: the profile's by default. Guided bundles only.
        image: what the picture is, as `core.pictures.picture_from` takes it: path, content of a PNG, JPEG or WebP
            file, PIL image, or uint8 [H, W, 3]. Bundles that need one only.
        last_image: the same of the last frame. Bundles that need two only.
    """

    prompt: str
    seed: SupportsIndex = 0
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    image: Any = None
    last_image: Any = None


@dataclass(frozen=True, repr=False)
class Generation:
    """What one request got.

    Attributes:
        frames: uint8 [F, H, W, 3].
        latents: float32, the layout's `latent_shape`.
        seconds: wall-clock time by part: `text` and `denoise` of the whole batch that it ran in, `decode`.
        fps: frames a second that the model makes.
    """

    frames: Array
    latents: Array
    seconds: dict[str, float]
    fps: int

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        times = ", ".join(f"{part} {duration(seconds)}" for part, seconds in self.seconds.items())
        return f"<Generation: {count} frames {height}×{width}, {self.fps} a second; {times}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frames; the suffix is the format: `.mp4`, `.gif`, `.png` (side by side) or `.npy`.

        Raises:
            as `lemica_trt.runtime.video.write_video`.
        """
        write_video(self.frames, path, fps=self.fps)
