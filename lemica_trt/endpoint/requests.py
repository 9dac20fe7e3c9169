"""What a request asks for, checked against the bundle: OpenAI's names, and those that other servers have added.

A request cannot ask for another size, length or number of steps than the bundle was built for. Clients send such
numbers all the same: they are compared with the bundle's, and another one is refused with what there is.

An image comes as OpenAI's video API has it (openai-python, `VideoCreateParams.input_reference`): a file of a form, or
an object with a data URL as `image_url`, whose field in a form is `input_reference[image_url]`. vLLM-Omni's name of the
object is `image_reference` (docs/serving/videos_api.md there); SGLang's JSON has a string, which here is a data URL or
base64. A last image beside it is `last_image`, given in the same ways; OpenAI has none. No URL is fetched, and no file
of this machine is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError
from lemica_trt.core.pictures import MAX_TEXT, picture_sent
from lemica_trt.endpoint.errors import Refused
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Shape
from lemica_trt.runtime.generation import GenerationRequest
from lemica_trt.runtime.validation import choose_plan, guidance_from, require_known, seed_from, text_from

NESTED = ("nvext", "extra_body", "extra_params")
"""Objects in a request whose fields count as the request's own: Dynamo's, SGLang's and vLLM-Omni's."""

TEXTS = ("model", "prompt", "negative_prompt", "plan", "quality", "size", "user", "response_format", "output_format",
         "background")  # fmt: skip
PICTURES = ("input_reference", "image_reference")
"""OpenAI's name of the image, and vLLM-Omni's."""
LAST = ("last_image",)
"""Of the last one, as diffusers and the Triton models have it."""
NUMBERS = ("steps", "seed", "guidance_scale", "num_inference_steps", "num_frames", "fps", "width", "height", "n",
           "seconds")  # fmt: skip
PARAMETERS = frozenset(TEXTS + NUMBERS + PICTURES + LAST)
"""Everything that a request may have."""

ONLY_IMAGES = frozenset({"output_format", "background"})
ONLY_VIDEOS = frozenset({"num_frames", "fps", "seconds"})

MAX_BODY_BYTES = 1 << 20
"""Of a request without an image; prompts have 8192 bytes at most."""


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

    Attributes:
        needs_image, needs_last_image: whether requests must have one.
    """

    def __init__(self, bundle: Bundle, plan: str | None = None) -> None:
        self.needs_image = bundle.manifest.graphs.image is not UNSET
        self.needs_last_image = "last_image" in bundle.manifest.graphs.sources
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
    def max_body_bytes(self) -> int:
        """Of a request."""
        return MAX_BODY_BYTES + MAX_TEXT * (self.needs_image + self.needs_last_image)

    @property
    def makes_images(self) -> bool:
        """Whether a clip is one frame."""
        return self.shape.is_image

    @property
    def _makes(self) -> str:
        return "images" if self.makes_images else "videos"

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
            path = "/v1/images/generations" if self.makes_images else "/v1/videos"
            raise InputError(f"model {self.name} makes {self._makes}: POST {path}")
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
            image=self._image(found, PICTURES, needed=self.needs_image),
            last_image=self._image(found, LAST, needed=self.needs_last_image),
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

    def _image(self, found: Mapping[str, Any], called: tuple[str, ...], *, needed: bool) -> bytes | None:
        """The content of a picture's file, not decoded; None: the model needs none.

        Args:
            called: its names, the first of them is ours.

        Raises:
            InputError: there is one too many or too few, or it is not given as one is.
        """
        names = [name for name in called if name in found]
        if not needed:
            if names:
                of = "a first image" if self.needs_image else "text"
                raise InputError(f"{names[0]} must be left out: the model makes {self._makes} from {of} alone")
            return None
        if len(names) != 1:
            ways = 'a file of a form, or {"image_url": "data:image/png;base64,…"}'
            image = "a last image" if called is LAST else "an image"
            raise InputError(f"{called[0]} must be given, once: the model needs {image}, {ways}")
        (name,) = names
        value = found[name]
        if isinstance(value, Mapping):
            if set(value) != {"image_url"}:
                raise InputError(f"{name} must have image_url, a data URL, and nothing else; got {', '.join(value)}")
            value = value["image_url"]
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise InputError(f"{name} must be a file, or an object with image_url; got {type(value).__name__}")
        return picture_sent(value, name=name)

    def _require_output(self, found: Mapping[str, Any], *, image: bool) -> None:
        """Raise InputError for an output that there is not."""
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

    Args:
        fields: text, or of a file its content. `NAME[KEY]` is a field of an object, as OpenAI's clients write them.

    Raises:
        InputError: an object is no JSON object.
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inner = re.fullmatch(rf"({'|'.join(PICTURES + LAST)})\[(\w+)\]", name)
        if not isinstance(value, str):
            found[name] = value
        elif inner is not None:
            found[inner[1]] = {inner[2]: value}
        elif name in NESTED or (name in (*PICTURES, *LAST) and value.lstrip().startswith("{")):
            found[name] = body_from_json(value.encode("utf-8", "surrogatepass"))
        elif name in NUMBERS:
            try:
                found[name] = msgspec.json.decode(value, type=int | float)
            except (msgspec.DecodeError, UnicodeEncodeError):
                found[name] = value
        else:
            found[name] = value
    return found
