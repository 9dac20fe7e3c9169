"""Exceptions as answers."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from lemica_trt.core.errors import InputError, LemicaError, UsageError

_UNAVAILABLE = re.compile(r"maximum queue size|timeout expired|is not (ready|healthy|found|at ready state)")
"""What Triton says of a model that takes no requests at the moment."""


class RequestEnded(LemicaError):
    """A request ended before its result.

    Args:
        code: name of the TritonError code.
        what: why.
    """

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


def code_of(error: Exception) -> str:
    """The name of the TritonError code that answers an exception."""
    if isinstance(error, RequestEnded):
        return error.code
    return "INVALID_ARG" if isinstance(error, (InputError, UsageError)) else "INTERNAL"


def one_line(error: Exception) -> str:
    """An exception in one line."""
    return " ".join((str(error) if isinstance(error, LemicaError) else f"{type(error).__name__}: {error}").split())


def triton_error(pb_utils: Any, error: Exception) -> Any:
    """An exception as Triton's error."""
    return pb_utils.TritonError(one_line(error), getattr(pb_utils.TritonError, code_of(error)))


def forward_error(pb_utils: Any, error: Any) -> RequestEnded:
    """The error of a model that was called, to be answered as it is.

    On the way from a streaming model Triton 2.51 makes every code INTERNAL, and it gives this code where a model has
    died or is being loaded: these are known by what they say.
    """
    message = error.message()
    if _UNAVAILABLE.search(message):
        return RequestEnded("UNAVAILABLE", message)
    for code in ("INVALID_ARG", "UNAVAILABLE", "CANCELLED"):
        if error.code() == getattr(pb_utils.TritonError, code):
            return RequestEnded(code, message)
    return RequestEnded("INTERNAL", message)


def send_error(pb_utils: Any, sender: Any, error: Exception, *, to_model: bool = False) -> None:
    """Answer with an error; the last answer of a request.

    Args:
        to_model: another model called. On the way to it Triton 2.51 loses the code of an error, and the whole error
            if it comes after other answers; the output `ended`, JSON [code, message], arrives.
    """
    if to_model:
        ended = json.dumps([code_of(error), one_line(error)]).encode()
        response = pb_utils.InferenceResponse([pb_utils.Tensor("ended", np.array([[ended]], np.object_))])
    else:
        response = pb_utils.InferenceResponse(error=triton_error(pb_utils, error))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
