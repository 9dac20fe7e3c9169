"""Parameters and tensors of a request, checked: what is wrong is said as INVALID_ARGUMENT, with what is allowed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lemica_trt.backends.base import Array
from lemica_trt.core.errors import InputError
from lemica_trt.ir.plan import StepPlan
from lemica_trt.runtime.validation import require_known
from lemica_trt.triton.interface import Port
from lemica_trt.triton.server.cancel import Cancellation
from lemica_trt.triton.server.errors import RequestEnded


@dataclass
class DenoiseJob:
    """One request to denoise.

    Attributes:
        conditions: the layout's, of one request: [2, …] where both branches have a row, the negative prompt's first.
        plan, seed, guidance_scale: what was asked for, or the default.
        sender: where its answers go.
        cancellation: whether it is still wanted.
        stopped: why it ended before its result; it has been answered so.
    """

    conditions: Mapping[str, Array]
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
    require_known((name for name in found if not name.startswith("triton_")), allowed)
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


def require_requested(request: Any, name: str, output: str) -> None:
    """Raise InputError if a client asks for other tensors than the one that its parameter `output` makes."""
    names = request.requested_output_names()
    if name not in names:
        raise InputError(f"outputs must be {name}, which output {output!r} makes; got {', '.join(names)}")


def tensor_from(pb_utils: Any, request: Any, port: Port) -> Array:
    """An input of one sample, without its batch dimension.

    Raises:
        InputError: missing, of another shape or dtype, or with numbers that are not finite.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, port.name)
    array = None if tensor is None else tensor.as_numpy()
    if array is None or not port.takes(array.shape) or array.dtype != port.numpy:
        got = "none" if array is None else f"{array.dtype} {list(array.shape)}"
        wanted = f"{np.dtype(port.numpy).name} {[1, *port.dims]}"
        raise InputError(f"{port.name} must be {wanted}, one sample a request; got {got}")
    if array.dtype != np.object_ and not np.isfinite(array).all():
        raise InputError(f"{port.name} must be finite")
    return np.asarray(array[0])
