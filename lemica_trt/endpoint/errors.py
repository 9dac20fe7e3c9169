"""Exceptions as OpenAI's error objects.

{"error": {"message": "…", "type": "invalid_request_error", "param": "seed", "code": "invalid_value"}}
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lemica_trt.core.errors import InputError, LemicaError, UsageError


class Refused(LemicaError):
    """A request that is answered with another status than 400.

    Args:
        status: of HTTP.
        code: for programs.
        what: for people.
        retry_after: seconds after which another try makes sense; None: none does.
    """

    def __init__(self, status: int, code: str, what: str, *, retry_after: int | None = None) -> None:
        super().__init__(what)
        self.status = status
        self.code = code
        self.retry_after = retry_after


def status_of(error: Exception) -> tuple[int, str]:
    """HTTP status and code of an exception."""
    if isinstance(error, Refused):
        return error.status, error.code
    if isinstance(error, (InputError, UsageError)):
        return 400, "invalid_value"
    return 500, "generation_failed" if isinstance(error, LemicaError) else "internal_error"


def error_object(error: Exception, parameters: Collection[str] = ()) -> dict[str, str | None]:
    """OpenAI's error object.

    Args:
        parameters: names that a request may have; the one that the message begins with is the `param`.
    """
    status, code = status_of(error)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    # What nobody has thought of is not told to strangers; it is in the log.
    message = str(error) if isinstance(error, LemicaError) else "an internal error of the server"
    named = re.match(r"(?:unknown parameter ')?(\w+)", message)
    param = named[1] if named and (named[1] in parameters or message.startswith("unknown parameter '")) else None
    return {"message": message, "type": kind, "param": param, "code": code}
