"""Parameters and tensors of a request, checked: what is wrong is said as INVALID_ARGUMENT, with what is allowed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lemica_trt.backends.base import Array
from lemica_trt.core.errors import InputError
from lemica_trt.ir.plan import StepPlan
from lemica_trt.runtime.text import require_prompt
from lemica_trt.triton.server.cancel import Cancellation
from lemica_trt.triton.server.errors import RequestEnded

GUIDANCE_SCALE_RANGE = (0.0, 100.0)
"""Lowest and highest guidance scale of a request."""


@dataclass
class DenoiseJob:
    """One request to denoise.

    Attributes:
        embeds: [1 or 2, text_length, width]; with guidance the negative prompt's first.
        plan, seed, guidance_scale: what was asked for, or the default.
        sender: where its answers go.
        cancellation: whether it is still wanted.
        stopped: why it ended before its result; it has been answered so.
    """

    embeds: Array
    plan: StepPlan
    seed: int
    guidance_scale: float
    sender: Any = None
    cancellation: Cancellation | None = None
    stopped: RequestEnded | None = None


def read_parameters(request: Any, allowed: Collection[str]) -> dict[str, Any]:
    """A request's parameters; a calling model's come as JSON in `settings`, because models pass no floats on.

    Raises:
        InputError: one of them is unknown, or they are no JSON object.
    """
    found = _object_from(request.parameters() or "{}", "parameters")
    if "caller" in found and "settings" in found:
        found.update(_object_from(found.pop("settings"), "settings"))
    for name in found:
        if name not in allowed and not name.startswith("triton_"):
            raise InputError(f"unknown parameter {name!r}: expected {', '.join(sorted(allowed))}")
    return found


def _object_from(text: object, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: it is none.
    """
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{name} must be a JSON object")
    return found


def choose_plan(parameters: Mapping[str, Any], plans: Mapping[str, StepPlan], default: str) -> StepPlan:
    """The plan that `plan`, `steps` (full steps), both or neither ask for.

    Raises:
        InputError: there is none.
    """
    name, steps = parameters.get("plan"), parameters.get("steps")
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


def timeout_from(parameters: Mapping[str, Any], request: Any) -> int:
    """Microseconds that a request may take, 0 for no limit: Triton's own, or the parameter `timeout`, which its
    endpoint `generate` hands on as it does every other.

    Raises:
        InputError: it is no positive integer of 64 bits.
    """
    if "timeout" not in parameters:
        return int(request.timeout())
    limit = parameters["timeout"]
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit < 1 << 63:
        raise InputError(f"timeout must be a positive integer, in microseconds; got {limit!r}")
    return limit


def require_requested(request: Any, name: str, output: str) -> None:
    """Raise InputError if a client asks for other tensors than the one that its parameter `output` makes."""
    names = request.requested_output_names()
    if name not in names:
        raise InputError(f"outputs must be {name}, which output {output!r} makes; got {', '.join(names)}")


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


def tensor_from(pb_utils: Any, request: Any, name: str, shape: Sequence[int], kind: Any) -> Array:
    """An input of one sample, without its batch dimension.

    Raises:
        InputError: missing, of another shape or dtype, or with numbers that are not finite.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    array = None if tensor is None else tensor.as_numpy()
    if array is None or array.shape != (1, *shape) or array.dtype != kind:
        got = "none" if array is None else f"{array.dtype} {list(array.shape)}"
        raise InputError(f"{name} must be {np.dtype(kind).name} {[1, *shape]}, one sample a request; got {got}")
    if array.dtype != np.object_ and not np.isfinite(array).all():
        raise InputError(f"{name} must be finite")
    return np.asarray(array[0])
