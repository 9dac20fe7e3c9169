"""Values of a request, checked: what is wrong is said as InputError, with what is allowed. Every server shares them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lemica_trt.core.errors import InputError
from lemica_trt.ir.graphs import GraphSet
from lemica_trt.ir.plan import StepPlan
from lemica_trt.runtime.text import require_prompt

GUIDANCE_SCALE_RANGE = (0.0, 100.0)
"""Lowest and highest guidance scale of a request."""


def require_known(names: Iterable[str], allowed: Collection[str]) -> None:
    """Raise InputError if there is a parameter that nothing reads."""
    for name in names:
        if name not in allowed:
            raise InputError(f"unknown parameter {name!r}: expected {', '.join(sorted(allowed))}")


QUALITIES = {
    **dict.fromkeys(("auto", "balanced", "standard", "medium"), "default"),
    **dict.fromkeys(("fast", "low"), "fewest"),
    **dict.fromkeys(("high", "hd"), "most"),
    "lossless": "all",
}
"""OpenAI's words and vLLM-Omni's → which plan: the default one; that of fewest full steps; that of most which still
leaves some out; that with all steps."""


def plan_of_quality(quality: object, plans: Mapping[str, StepPlan], default: str) -> str:
    """The name of the plan that a word of `QUALITIES` means; among equals the default.

    Raises:
        InputError: it is no such word.
    """
    meant = QUALITIES.get(quality) if isinstance(quality, str) else None
    if meant is None:
        raise InputError(f"quality must be one of {', '.join(QUALITIES)}; got {quality!r}")
    if meant == "default":
        return default
    cached = [name for name, plan in plans.items() if plan.budget < plan.num_steps] or list(plans)
    if meant == "fewest":
        return min(cached, key=lambda name: (plans[name].budget, name != default, name))
    return max(plans if meant == "all" else cached, key=lambda name: (plans[name].budget, name == default, name))


def choose_plan(parameters: Mapping[str, Any], plans: Mapping[str, StepPlan], default: str) -> StepPlan:
    """The plan that `plan`, `steps` (full steps) and `quality` ask for; `quality` says the default, no more.

    Raises:
        InputError: there is none.
    """
    name, steps = parameters.get("plan"), parameters.get("steps")
    default = plan_of_quality(parameters.get("quality", "auto"), plans, default)
    if name == "default" and name not in plans:
        name = default
    if name is not None and (not isinstance(name, str) or name not in plans):
        raise InputError(f"plan must be one of {', '.join(plans)}; got {name!r}")
    if steps is None:
        return plans[name or default]
    candidates = [default, *plans] if name is None else [name]
    for candidate in candidates:
        if not isinstance(steps, bool) and plans[candidate].budget == steps:
            return plans[candidate]
    known = ", ".join(f"{plans[c].budget} (plan {c})" for c in dict.fromkeys(candidates))
    raise InputError(f"steps, the number of full steps, must be one of {known}; got {steps!r}")


def seed_from(parameters: Mapping[str, Any]) -> int:
    """The seed; 0 if none is given.

    Raises:
        InputError: it is not 0 … 2^63 − 1.
    """
    seed = parameters.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise InputError(f"seed must be an integer from 0 to 2^63 - 1; got {seed!r}")
    return seed


def timeout_from(parameters: Mapping[str, Any]) -> int:
    """Microseconds that a request may take; 0: it says nothing of it.

    Raises:
        InputError: it is not 1 … 2^63 − 1.
    """
    limit = parameters.get("timeout")
    if limit is None:
        return 0
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit < 1 << 63:
        raise InputError(f"timeout must be a number of microseconds from 1 to 2^63 - 1; got {limit!r}")
    return limit


def guidance_from(parameters: Mapping[str, Any], plan: StepPlan, *, guided: bool) -> float:
    """The guidance scale; the plan's where none is asked for.

    Raises:
        InputError: out of `GUIDANCE_SCALE_RANGE`, or of what the plan holds for, or the bundle has none.
    """
    if "guidance_scale" not in parameters:
        return plan.guidance_scale
    scale = parameters["guidance_scale"]
    if not guided:
        raise InputError("this bundle was built without guidance: it takes no guidance_scale and no negative_prompt")
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    low, high = GUIDANCE_SCALE_RANGE
    if not number or not low <= scale <= high:
        raise InputError(f"guidance_scale must be a number from {low:g} to {high:g}; got {scale!r}")
    plan.require_guidance(scale)
    return float(scale)


def require_image(graphs: GraphSet, image: object | None, last_image: object | None = None) -> None:
    """Raise InputError unless there are the images that a bundle needs, and none that it does not take."""
    for name, picture in (("image", image), ("last_image", last_image)):
        needed, words = name in graphs.sources, name.replace("_", " ")
        if picture is not None and not needed:
            raise InputError(f"the bundle takes no {words}: its pipeline has none", fix="leave it out")
        if picture is None and needed:
            article, beside = ("an", "prompt") if name == "image" else ("a", "first one")
            raise InputError(
                f"the bundle needs {article} {words} beside the {beside}, got none",
                fix=f"give one: {name}=… or --{name.replace('_', '-')} FILE",
            )


def text_from(name: str, value: object) -> str:
    """A prompt.

    Raises:
        InputError: not UTF-8, or too long (`lemica_trt.runtime.text`).
    """
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InputError(f"{name} must be UTF-8; got: {error.reason}") from None
    return require_prompt(text, name)
