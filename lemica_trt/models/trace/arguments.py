"""What a pipeline is called with while it is traced: found in the signature of its own `__call__`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from PIL import Image

from lemica_trt.core.errors import UsageError
from lemica_trt.ir.graphs import Source
from lemica_trt.ir.trace import TraceRequest

BASE = "the red cat sees a blue bird"
OTHER = "the blue cat sees a red bird"
"""The same words in another order: as many tokens for any tokenizer."""

LONGER = "the red bird sees a blue cat, and a red cat sees the other red bird"

BASE_SEED, BASE_IMAGE = 11, 1
"""Of the noise and of the pictures."""

LAST = 1000
"""What the seed of a last picture has more than that of the first."""

NEGATIVE = "a dull picture and the grey noise"
OTHER_NEGATIVE = "a grey picture and the dull noise"
SHORTER = "a blue bird"
LONGER_NEGATIVE = "a grey noise and the dull picture, and a dull picture"

SHORTER_NEGATIVE = "the grey noise"

FIELDS = {
    "height": "height",
    "width": "width",
    "num_frames": "frames",
    "frames": "frames",
    "video_length": "frames",
    "max_sequence_length": "max_sequence_length",
}
"""Argument of a pipeline's call → field of a request."""


EXACT_SHAPE = {"use_resolution_binning": False}
"""Latents have the shape that is asked for, not that of the nearest resolution of a list (PixArt, Sana)."""

IMAGE_SIZE = 64
"""Pixels of an input image where the request says nothing."""

GUIDER = "guider.guidance_scale"
"""The guidance scale where it is an attribute of a component."""


def _picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Random pixels."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator("cpu").manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


class Arguments:
    """The keyword arguments of a pipeline's call.

    Args:
        pipeline: a diffusers pipeline.
        request: what is asked for.

    Attributes:
        scales: guidance parameters → values: those whose value is above 1, where guidance is off.
        guider: the guidance scale of a guider, on or off; None: there is none.

    Raises:
        UsageError: the pipeline's call has no argument of that name.
    """

    def __init__(self, pipeline: Any, request: TraceRequest) -> None:
        self._names = inspect.signature(type(pipeline).__call__).parameters
        self._request = request
        self._kind = type(pipeline).__name__
        fixed: dict[str, Any] = {"num_inference_steps": request.steps, "output_type": "latent", **EXACT_SHAPE}
        self._fixed = {name: value for name, value in fixed.items() if name in self._names}
        for field in ("height", "width", "frames", "max_sequence_length"):
            value = getattr(request, field)
            if value is not None:
                self._fixed[self._named(field)] = value
        for name, value in request.arguments.items():
            if name not in self._names:
                raise UsageError(f"{self._kind} takes no argument {name!r}", fix=f"one of {', '.join(self._names)}")
            self._fixed[name] = value
        self._size = (request.width or IMAGE_SIZE, request.height or IMAGE_SIZE)
        self.scales = self._scales(getattr(pipeline, "guider", None))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all arguments of the pipeline's call."""
        return tuple(self._names)

    def at_steps(self, pipeline: Any, steps: int) -> Arguments:
        """The same of another number of steps."""
        return Arguments(pipeline, msgspec.structs.replace(self._request, steps=steps))

    def _named(self, field: str) -> str:
        for name, its in FIELDS.items():
            if its == field and name in self._names:
                return name
        raise UsageError(f"{self._kind} takes no {field.replace('_', ' ')}", fix="leave it out")

    def _scales(self, guider: Any) -> dict[str, float]:
        given = {
            name: self._fixed.get(name, parameter.default)
            for name, parameter in self._names.items()
            if re.search(r"(guidance|cfg)_scale(_\d+)?$", name)
        }
        if hasattr(guider, "guidance_scale") and getattr(guider, "_enabled", True):
            given = {GUIDER: guider.guidance_scale, **given}
        off = guider is not None and not given and (self._request.guidance_scale or 1.0) <= 1.0
        if self._request.guidance_scale is not None and not off:
            if not given:
                raise UsageError(f"{self._kind} takes no guidance scale", fix="leave it out")
            on = [name for name, value in given.items() if isinstance(value, int | float) and value > 1]
            given[next(iter([*on, *given]))] = self._request.guidance_scale
        self.guider: float | None = given.get(GUIDER)
        return {
            name: float(value)
            for name, value in given.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 1
        }

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that are asked for; None: not both are."""
        height, width = self._request.height, self._request.width
        return None if height is None or width is None else (height, width)

    @property
    def has_image(self) -> bool:
        """Whether an image is given."""
        parameter = self._names.get("image")
        return parameter is not None and (self._request.image or parameter.default is parameter.empty)

    def with_pictures(self, pipeline: Any) -> Iterator[Arguments]:
        """The same with an image, and with a last one beside it, where its call takes what it has not been given."""
        request = self._request
        for name in ("image", "last_image"):
            given = self.has_image if name == "image" else request.last_image
            if name in self._names and not given:
                request = msgspec.structs.replace(request, **{name: True})
                yield Arguments(pipeline, request)

    def pictures(self, seed: int, size: tuple[int, int] | None = None) -> dict[Source, Image.Image]:
        """Pictures of random pixels, as `at` gives them; a last one is as wide as the first is high."""
        width, height = size or self._size
        found: dict[Source, Image.Image] = {"image": _picture((width, height), seed)} if self.has_image else {}
        if self._request.last_image:
            found["last_image"] = _picture((height, width), seed + LAST)
        return found

    @property
    def other_sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of a wider and larger picture, and of a higher and smaller one."""
        width, height = self._size
        return (2 * width + 6, height + 10), (width // 3 + 2, 3 * height // 4 + 1)

    @property
    def max_sequence_length(self) -> int | None:
        """Tokens of a prompt; None: the pipeline's call says nothing of them."""
        if "max_sequence_length" not in self._names:
            return None
        value = self._fixed.get("max_sequence_length", self._names["max_sequence_length"].default)
        return value if isinstance(value, int) else None

    @property
    def has_prompt(self) -> bool:
        """Whether a prompt is given."""
        return "prompt" in self._names

    @property
    def has_negative(self) -> bool:
        """Whether a negative prompt can be given."""
        return "negative_prompt" in self._names

    def at(
        self,
        *,
        prompt: str = BASE,
        negative: str = NEGATIVE,
        seed: int = BASE_SEED,
        image: int = BASE_IMAGE,
        size: tuple[int, int] | None = None,
        scales: dict[str, float] | None = None,
        others: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The arguments of one run.

        Args:
            image: seed of the pictures.
            size: width and height of the first; None: those of the request.
            scales: of guidance parameters that differ from the request.
            others: further arguments of the pipeline's call.
        """
        texts = {"prompt": prompt, "negative_prompt": negative}
        return {
            **self._fixed,
            **{name: text for name, text in texts.items() if name in self._names},
            **{str(name): picture for name, picture in self.pictures(image, size).items()},
            **{name: value for name, value in {**self.scales, **(scales or {})}.items() if name in self._names},
            **({"generator": torch.Generator("cpu").manual_seed(seed)} if "generator" in self._names else {}),
            **(others or {}),
        }

    def numbers(self) -> dict[str, bool | int | float | str]:
        """The arguments that are numbers or text, prompts left out; for the trace."""
        return {
            name: value
            for name, value in {**self._fixed, **self.scales}.items()
            if isinstance(value, bool | int | float | str) and name != "output_type"
        }
