"""Before any route: who may ask, how much a request may hold, and one line of log, without what was asked for."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
import traceback

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lemica_trt.endpoint.errors import Refused, error_object, status_of
from lemica_trt.endpoint.requests import MAX_BODY_BYTES

LOGGER = logging.getLogger("lemica_trt.endpoint")

OPEN = re.compile(r"/(health/(live|ready)|metrics)?")
"""Paths that need no key: for probes and Prometheus."""

KNOWN = re.compile(
    r"/|/health/(live|ready)|/metrics|/v1/models|/v1/images/generations|/v1/videos(/video_[0-9a-f]{32}(/content)?)?"
)
"""Paths that are logged as they are."""


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without brackets, is of this machine alone."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware.

    Without a key it is for this machine alone: a page in a browser here, which may send forms to any address, is
    refused by its `Origin`, and one that has made its own name point here by its `Host`.

    Args:
        app: what is guarded.
        key: the bearer token; None: no key.
        most: bytes of a request.
    """

    def __init__(self, app: ASGIApp, key: str | None = None, most: int = MAX_BODY_BYTES) -> None:
        self._app, self._most = app, most
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._require_allowed(scope)
            await self._app(scope, _limited(receive, self._most), answer)
        except Exception as error:  # whatever it was, the request gets an answer
            if not isinstance(error, Refused):  # its text may hold what was asked for: the place must do
                where = "".join(traceback.format_tb(error.__traceback__))
                LOGGER.error("%s\n%s", type(error).__name__, where)
            if status:
                raise
            await _refuse(answer, error)
        finally:
            path = scope["path"] if KNOWN.fullmatch(scope["path"]) else "(another path)"
            milliseconds = round(1000 * (time.perf_counter() - start))
            LOGGER.info("%s %s %s %d ms", scope["method"], path, status, milliseconds)

    def _require_allowed(self, scope: Scope) -> None:
        """Raise Refused unless the request may come in."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most:
            raise _too_large(self._most)
        if self._key is None:
            _, _, host = headers.get(b"host", b"").decode("latin-1").rpartition("@")
            name = re.sub(r":\d*$", "", host).strip("[]")
            if b"origin" in headers or not is_loopback(name):
                raise Refused(403, "forbidden", "without an API key only programs on this machine may ask")
        elif not OPEN.fullmatch(scope["path"]):
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self._key)
            if scheme.lower() != b"bearer" or not right:
                raise Refused(401, "invalid_api_key", "expected the API key in the header Authorization: Bearer KEY")


def _too_large(most: int) -> Refused:
    """A new one each time: a traceback grows whenever its exception is raised again."""
    return Refused(413, "request_too_large", f"a request must have at most {most} bytes")


def _limited(receive: Receive, most: int = MAX_BODY_BYTES) -> Receive:
    """The same messages, until there are too many bytes."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise _too_large(most)
        return message

    return limited


async def _refuse(send: Send, error: Exception) -> None:
    status, _ = status_of(error)
    body = json.dumps({"error": error_object(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:  # what is left of the body is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
