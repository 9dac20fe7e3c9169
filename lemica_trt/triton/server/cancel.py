"""Requests that end before their result: cancelled, out of time, or the process that works for them has died."""

from __future__ import annotations

import json
import math
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from lemica_trt.core.errors import InputError
from lemica_trt.triton.server import temporary
from lemica_trt.triton.server.errors import RequestEnded

T = TypeVar("T")

CHECK_INTERVAL_SECONDS = 0.05
"""How often a model that waits for another one looks whether the request is still wanted."""


def is_called(request: Any) -> bool:
    """Whether another model sent the request."""
    return "caller" in json.loads(request.parameters() or "{}")


class Cancellation:
    """Says between steps whether a request is still wanted.

    Args:
        request: with its `timeout` in microseconds, 0 for none, counted from now.
        token: the `caller` parameter, see `cancel_token`; None: a client sent the request.

    Attributes:
        called: whether another model sent the request.
    """

    def __init__(self, request: Any, token: str | None) -> None:
        self._request = request
        limit = request.timeout()
        self._limit = limit / 1e6 if limit else math.inf
        self._start = time.monotonic()
        if token is not None and not temporary.TOKEN.fullmatch(str(token)):
            raise InputError("caller is set by the pipeline models only")
        self.called = token is not None
        self._token = None if token is None else temporary.call_folder() / str(token)
        if self._token is not None:  # tell the caller which process works for it
            with suppress(FileNotFoundError):
                handle = os.open(self._token, os.O_WRONLY | os.O_NOFOLLOW)
                with open(handle, "w", encoding="ascii") as file:  # noqa: PTH123
                    file.write(str(os.getpid()))

    def ended(self, where: str) -> RequestEnded | None:
        """Why the request is over; None while it is not."""
        if self._request.is_cancelled() or (self._token is not None and not self._token.exists()):
            return RequestEnded("CANCELLED", f"cancelled {where}")
        if time.monotonic() - self._start > self._limit:
            return RequestEnded("UNAVAILABLE", f"the request's timeout of {self._limit:g} s passed {where}")
        return None


@contextmanager
def cancel_token() -> Iterator[Path]:
    """A file that exists while the block runs; its name is the `caller` parameter for a model that is called.

    Between models Triton 2.51 forwards neither a cancellation to the called one nor, in the middle of a stream, the
    death of its process to the caller. A file does both: the called model writes its process id into it, and stops
    when the file has gone.
    """
    file = temporary.made_call_folder() / f"{os.getpid()}-{secrets.token_hex(16)}"
    file.touch()
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def answers_while_wanted(
    responses: Iterator[T], check: Callable[[], None], every: float = CHECK_INTERVAL_SECONDS
) -> Iterator[T]:
    """The items of an iterator that may wait long or for ever; meanwhile `check` is called, and may raise."""
    found: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def take() -> None:
        try:
            for item in responses:
                found.put((True, item))
            found.put((False, None))
        except Exception as error:  # it is raised where the items are wanted
            found.put((False, error))

    threading.Thread(target=take, daemon=True).start()
    while True:
        try:
            more, item = found.get(timeout=every)
        except queue.Empty:
            check()
            continue
        if more:
            check()
            yield item
        elif item is None:
            return
        else:
            raise item


def require_wanted(request: Any, token: Path) -> None:
    """Raise RequestEnded if the request was cancelled, or the process that works for it has died."""
    if request.is_cancelled():
        raise RequestEnded("CANCELLED", "cancelled")
    process = token.read_text()
    if process and temporary.has_died(process):
        raise RequestEnded("UNAVAILABLE", "the process of denoiser_stream has died; load the model again")
