"""What a request asks for, checked against the bundle: OpenAI's names, and those that other servers have added.

A request cannot ask for another size, length or number of steps than the bundle was built for. Clients send such
numbers all the same: they are compared with the bundle's, and another one is refused with what there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.endpoint.errors import Refused
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Shape
from lemica_trt.runtime.generation import GenerationRequest
from lemica_trt.runtime.validation import choose_plan, guidance_from, require_known, seed_from, text_from

NESTED = ("nvext", "extra_body", "extra_params")
"""Objects in a request whose fields count as the request's own: Dynamo's, SGLang's and vLLM-Omni's."""

TEXTS = ("model", "prompt", "negative_prompt", "plan", "quality", "size", "user", "response_format", "output_format",
         "background", "input_reference")  # fmt: skip
NUMBERS = ("steps", "seed", "guidance_scale", "num_inference_steps", "num_frames", "fps", "width", "height", "n",
           "seconds")  # fmt: skip
PARAMETERS = frozenset(TEXTS + NUMBERS)
"""Everything that a request may have."""

ONLY_IMAGES = frozenset({"output_format", "background"})
ONLY_VIDEOS = frozenset({"input_reference", "num_frames", "fps", "seconds"})


@dataclass(frozen=True)
class Asked:
    """A request that can be run.

    Attributes:
        generation: prompt, seed, guidance; not shown, so that no log has the prompt.
        plan: which steps run.
        model: how the request named the model.
        inline: whether the clip is wanted in the answer, not a job to ask for.
    """

    generation: GenerationRequest = field(repr=False)
    plan: StepPlan
    model: str
    inline: bool = False


class Model:
    """What a bundle can be asked for.

    Args:
        bundle: opened.
        plan: the plan of requests that name none; None: the bundle's default.

    Raises:
        UnsupportedError: requests need an image.
    """

    def __init__(self, bundle: Bundle, plan: str | None = None) -> None:
        if bundle.manifest.graphs.image is not UNSET:
            raise UnsupportedError(
                "the bundle needs an image beside the prompt, which cannot be served yet",
                fix="lemica-trt run, or in Python",
            )
        self.name = bundle.manifest.profile.name
        self.plans: dict[str, StepPlan] = {name: bundle.plan(name) for name in bundle.plans}
        self.default = bundle.plan(plan).name
        self.guided = bundle.manifest.graphs.layout.guided
        self.shape: Shape = bundle.manifest.profile.shape

    @property
    def size(self) -> str:
        """OpenAI's word for width × height: `720x480`."""
        return f"{self.shape.width}x{self.shape.height}"

    @property
    def seconds(self) -> str:
        """The length of a clip, seconds."""
        return f"{self.shape.frames / self.shape.fps:g}"

    @property
    def makes_images(self) -> bool:
        """Whether a clip is one frame."""
        return self.shape.is_image

    @property
    def ids(self) -> dict[str, str]:
        """Names of the model → plan; the name alone is the default plan's."""
        return {self.name: self.default, **{f"{self.name}:{plan}": plan for plan in self.plans}}

    def read(self, body: Mapping[str, Any], *, image: bool) -> Asked:
        """What a request asks for.

        Args:
            body: the parameters; null is the same as not there.
            image: whether it came to the images' endpoint.

        Raises:
            InputError: a parameter is unknown, or its value is not one that the bundle has.
            Refused: no such model (404).
        """
        found = _flat(body)
        require_known(found, PARAMETERS - (ONLY_VIDEOS if image else ONLY_IMAGES))
        if image != self.makes_images:
            does = "images: POST /v1/images/generations" if self.makes_images else "videos: POST /v1/videos"
            raise InputError(f"model {self.name} makes {does}")
        for name in found:
            if name in TEXTS and not isinstance(found[name], str):
                raise InputError(f"{name} must be a string, got {type(found[name]).__name__}")
        plan = self._plan(found)
        self._require_shape(found, plan)
        self._require_output(found, image=image)
        if "prompt" not in found:
            raise InputError("prompt must be given")
        negative = found.get("negative_prompt")
        if negative is not None and not self.guided:
            raise InputError("negative_prompt must be left out: this bundle was built without guidance")
        scale = guidance_from(found, plan, guided=self.guided)
        generation = GenerationRequest(
            prompt=text_from("prompt", found["prompt"]),
            seed=seed_from(found),
            guidance_scale=scale if self.guided else None,
            negative_prompt=None if negative is None else text_from("negative_prompt", negative),
        )
        return Asked(generation, plan, found.get("model", self.name), inline=image or "response_format" in found)

    def _plan(self, found: Mapping[str, Any]) -> StepPlan:
        """The plan that `model`, `quality`, `plan` and `steps` agree on."""
        default, model = self.default, found.get("model", self.name)
        if model not in self.ids:
            raise Refused(404, "model_not_found", f"model must be one of {', '.join(self.ids)}; got {model!r}")
        asked = {name: found[name] for name in ("plan", "steps", "quality") if name in found}
        chosen = choose_plan(asked, self.plans, default)
        if model == self.name:
            return chosen
        named = self.plans[self.ids[model]]
        if asked.keys() & {"plan", "steps"} and chosen is not named:
            raise InputError(f"model names plan {named.name}: leave out plan and steps, or name the model {self.name}")
        return named

    def _require_shape(self, found: Mapping[str, Any], plan: StepPlan) -> None:
        """Raise InputError for a size, length or number of steps that the bundle does not have."""
        shape, seconds = self.shape, self.shape.frames / self.shape.fps
        allowed = {
            "size": (self.size, "auto"),
            "width": (shape.width,),
            "height": (shape.height,),
            "num_frames": (shape.frames,),
            "fps": (shape.fps,),
            "seconds": (seconds, max(1, math.floor(seconds + 0.5))),
            "num_inference_steps": (plan.num_steps,),
        }
        for name, values in allowed.items():
            value = found.get(name, values[0])
            if name == "seconds" and isinstance(value, str):  # OpenAI's type for it
                value = _number(value)
            if isinstance(value, bool) or value not in values:
                what = " or ".join(
                    dict.fromkeys(f"{each:g}" if isinstance(each, float) else str(each) for each in values)
                )
                more = "; for fewer full steps name a plan" if name == "num_inference_steps" else ""
                raise InputError(f"{name} must be {what}, which the bundle was built for{more}; got {found[name]!r}")

    def _require_output(self, found: Mapping[str, Any], *, image: bool) -> None:
        """Raise InputError for an output that there is not."""
        if "input_reference" in found:
            raise InputError("input_reference must be left out: the model makes videos from text alone")
        allowed: dict[str, tuple[object, ...]] = {
            "n": (1,),
            "response_format": ("b64_json",),
            "output_format": ("png",),
            "background": ("auto", "opaque"),
        }
        for name, values in allowed.items():
            if name in found and (isinstance(found[name], bool) or found[name] not in values):
                more = "; send a request for each, with its own seed" if name == "n" else ""
                raise InputError(f"{name} must be {' or '.join(map(str, values))}{more}; got {found[name]!r}")


def _flat(body: Mapping[str, Any]) -> dict[str, Any]:
    """A request with the fields of nested objects among its own, and without nulls."""
    found = {name: value for name, value in body.items() if name not in NESTED and value is not None}
    for name in NESTED:
        inner = body.get(name) or {}
        if not isinstance(inner, Mapping):
            raise InputError(f"{name} must be an object")
        for key, value in inner.items():
            if value is not None and found.setdefault(key, value) != value:
                raise InputError(f"{key} must be given once; it is also in {name}")
    return found


def _number(text: str) -> float | str:
    """A number out of a text; the text itself where there is none."""
    try:
        value = msgspec.json.decode(text, type=float)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return text
    return value


def body_from_json(data: bytes) -> dict[str, Any]:
    """The parameters in a JSON body.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InputError("the body must be a JSON object") from None


def body_from_form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in a form, in which everything is text: numbers become numbers, objects objects.

    Raises:
        InputError: an object is no JSON object.
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if not isinstance(value, str):  # a file
            found[name] = "(a file)"
        elif name in NESTED:
            found[name] = body_from_json(value.encode("utf-8", "surrogatepass"))
        elif name in NUMBERS:
            try:
                found[name] = msgspec.json.decode(value, type=int | float)
            except (msgspec.DecodeError, UnicodeEncodeError):
                found[name] = value
        else:
            found[name] = value
    return found
