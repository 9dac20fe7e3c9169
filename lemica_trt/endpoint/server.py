"""The endpoint on uvicorn: where it listens, and how it stops.

SIGTERM or Ctrl-C: nothing new is taken, what waits is cancelled, and what runs may finish, and be fetched, within the
grace; then it is cancelled between two steps. Every open request is answered; a client that does not read its answer is
not waited for longer than `FLUSH_SECONDS`, or what is left of the grace. A second signal, of either kind, ends the
grace: what runs is cancelled before its next step, and the process ends with the step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.endpoint.app import Endpoint
from lemica_trt.endpoint.guard import is_loopback
from lemica_trt.endpoint.jobs import Jobs
from lemica_trt.endpoint.makers import Maker
from lemica_trt.endpoint.metrics import Metrics
from lemica_trt.endpoint.requests import Model

KEY_VARIABLE = "LEMICA_TRT_API_KEY"
"""Environment variable with the API key."""

SHORTEST_KEY = 16
"""Characters of an API key."""

POLL_SECONDS = 0.05
"""How often a server that stops looks whether it may."""

FLUSH_SECONDS = 3
"""How long clients have to read their answers when the grace is over."""

BACKLOG = 128


@dataclass(frozen=True)
class Settings:
    """How an endpoint runs; see `lemica-trt serve --help`."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    queue: int = 16
    keep: int = 64
    expire: float = 3600.0
    grace: float = 25.0
    key: str | None = None


def read_key(file: Path | None) -> str | None:
    """The API key, from a file or the environment; None: there is none.

    Raises:
        InputError: the file cannot be read, or the key is too short or not of plain characters.
    """
    where = f"${KEY_VARIABLE}" if file is None else str(file)
    try:
        key = os.environ.get(KEY_VARIABLE) if file is None else file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "other characters than ASCII"
        raise InputError(f"{file}: expected a readable file with an API key, got: {why}") from None
    if key is not None and not (len(key) >= SHORTEST_KEY and key.isascii() and key.isprintable() and " " not in key):
        raise InputError(
            f"{where}: expected an API key of at least {SHORTEST_KEY} plain characters without spaces",
            fix="openssl rand -hex 32 > FILE",
        )
    return key


def listen(settings: Settings) -> socket.socket:
    """The socket, bound.

    Raises:
        UsageError: others could reach it and there is no key; no such address; the port is taken.
    """
    if settings.key is None and not is_loopback(settings.host):
        raise UsageError(
            f"expected an API key to listen on {settings.host}, where other machines reach it",
            fix=f"--api-key-file FILE, or {KEY_VARIABLE}",
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}",
            fix="give another --host or --port",
        ) from None


def serve(model: Model, maker: Maker, settings: Settings, started: Callable[[str], None]) -> None:
    """Serve until a signal comes.

    Args:
        started: told the address once requests are taken.

    Raises:
        LemicaError: the maker's check fails, or as `listen`.
    """
    with listen(settings) as at:
        maker.check()
        metrics = Metrics(model)
        jobs = Jobs(
            maker,
            workers=settings.workers,
            queue=settings.queue,
            kept=settings.keep,
            expiry=settings.expire,
            on_end=metrics.ended,
        )
        app = Endpoint(model, jobs, metrics, int(time.time())).app(settings.key)
        with _logging():
            config = uvicorn.Config(
                app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False
            )
            host, port = at.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            server = _Server(config, jobs, settings.grace, lambda: started(f"http://{shown}:{port}"))
            server.run(sockets=[at])


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Requests and faults as lines on standard error."""
    logger, handler = logging.getLogger("lemica_trt"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before, propagated = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagated


class _Server(uvicorn.Server):
    """uvicorn's server, which lets jobs end before it closes."""

    def __init__(self, config: uvicorn.Config, jobs: Jobs, grace: float, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._jobs, self._grace, self._started = jobs, grace, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests, and say so."""
        await super().startup(sockets)
        self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let jobs end, then close; until then finished clips can be fetched."""
        running, end = self._jobs.close(), time.monotonic() + self._grace
        while time.monotonic() < end and not self.force_exit:
            if all(job.fetched or job.status == "failed" or self._jobs.is_forgotten(job) for job in running):
                break
            await asyncio.sleep(POLL_SECONDS)
        self.config.timeout_graceful_shutdown = max(FLUSH_SECONDS, math.ceil(end - time.monotonic()))
        await asyncio.to_thread(self._jobs.cancel_all, wait=not self.force_exit)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins the grace, the second ends it; uvicorn knows the second of Ctrl-C only."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the process ends with 0: it was asked to, and has."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
