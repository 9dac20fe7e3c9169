"""Readiness by a real check: the text encoder and the first step of the default plan, behind whatever runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

from lemica_trt.core.text import first_line
from lemica_trt.endpoint.jobs import Jobs

LOGGER = logging.getLogger("lemica_trt.endpoint")

FRESH_SECONDS = 5.0
"""How long the result of a check holds, so that nobody can keep the engines busy with checks."""

LIMIT_SECONDS = 60.0
"""How long a check may take."""


class Health:
    """Whether clips can be made.

    Args:
        jobs: whose maker is checked.
        clock: seconds; from any start.
    """

    def __init__(self, jobs: Jobs, clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs, self._clock = jobs, clock
        self._running: Future[None] | None = None
        self._failure: str | None = None
        self._checked_at = -float("inf")
        self._seen = 0

    async def check(self) -> tuple[bool, dict[str, str | int | None]]:
        """Whether it is ready, and what is known: last failure, jobs that run and wait.

        While jobs run there is nothing to check: the last check holds, until a job succeeds. A server that shuts down
        is not ready.
        """
        if not self._jobs.closing and self._clock() - self._checked_at >= FRESH_SECONDS:
            if self._running is None:
                self._running = self._jobs.probe()
            if self._running is not None:
                await self._wait(self._running)
        if self._jobs.succeeded > self._seen:
            self._failure = None
        running, waiting = self._jobs.count("in_progress"), self._jobs.count("queued")
        status = "stopping" if self._jobs.closing else "ready" if self._failure is None else "failed"
        return status == "ready", {
            "status": status, "reason": self._failure, "running": running, "waiting": waiting,
        }  # fmt: skip

    async def _wait(self, running: Future[None]) -> None:
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(running)), LIMIT_SECONDS)
        except asyncio.TimeoutError:
            self._failure = f"a first step takes more than {LIMIT_SECONDS:g} seconds"
            self._seen = self._jobs.succeeded
            return  # the next one waits for the same check
        except Exception as error:  # a check has no prompt that its text could hold
            LOGGER.error("the check failed: %s: %s", type(error).__name__, first_line(error))
            self._failure = "the check failed; see the log"
        else:
            self._failure = None
        self._running, self._checked_at, self._seen = None, self._clock(), self._jobs.succeeded
