"""A maker without engines, which a test holds at every step."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from lemica_trt.endpoint.makers import Check, Made, OnProgress, wait_on
from lemica_trt.runtime.generation import GenerationRequest

ROWS = 4


@dataclass
class Held:
    """Makes `seed` as bytes, in `ROWS` steps; each waits until the test lets it go.

    Attributes:
        failure: raised instead of a clip.
        sick: raised by a check.
        made: requests that have come to their end, in order.
        images: theirs, of those that have one.
        checks: how many checks there were.
    """

    failure: Exception | None = None
    sick: Exception | None = None
    free: bool = False
    made: list[int] = field(default_factory=list)
    images: list[object] = field(default_factory=list)
    checks: int = 0
    _steps: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def make(
        self, request: GenerationRequest, plan: str, suffix: str, on_progress: OnProgress, check: Check = wait_on
    ) -> Made:
        self._arrived.release()
        for row in range(ROWS):
            if not self.free:
                assert self._steps.acquire(timeout=60)
            on_progress(row + 1, ROWS)
            if not self.free:
                self._arrived.release()
        if self.failure is not None:
            raise self.failure
        self.made.append(int(request.seed))
        self.images += [] if request.image is None else [request.image]
        return Made(f"{request.seed} {suffix}".encode(), 0.5, full=3, skipped=1)

    def check(self, check: Check = wait_on) -> None:
        self.checks += 1
        if self.sick is not None:
            raise self.sick

    def arrive(self) -> None:
        """Wait until a request has come in, or has done the step that it was allowed."""
        assert self._arrived.acquire(timeout=60)

    def step(self) -> None:
        """Let it do one step, and wait until it has."""
        self._steps.release()
        self.arrive()

    def finish(self) -> None:
        """Let everything run from now on."""
        self.free = True
        self._steps.release(1000)


class Silent:
    """A maker of another process that does not answer: only `check` ends what it does."""

    def __init__(self) -> None:
        self.arrived = threading.Event()

    def make(
        self, request: GenerationRequest, plan: str, suffix: str, on_progress: OnProgress, check: Check = wait_on
    ) -> Made:
        self.check(check)
        raise AssertionError("unreachable")

    def check(self, check: Check = wait_on) -> None:
        self.arrived.set()
        never = threading.Event()
        for _ in range(6000):
            check()
            never.wait(0.01)
        raise AssertionError("it was never cancelled")
