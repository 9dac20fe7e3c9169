"""Jobs: a bounded queue, progress, cancelling between two steps, finished clips until they expire. In memory only."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from lemica_trt.core.errors import LemicaError
from lemica_trt.endpoint.errors import Refused, error_object, status_of
from lemica_trt.endpoint.makers import Made, Maker
from lemica_trt.endpoint.requests import PARAMETERS, Asked
from lemica_trt.runtime.denoise import Cancelled

LOGGER = logging.getLogger("lemica_trt")
"""Told of faults, without prompts."""

KEPT_BYTES = 1 << 30
"""Most bytes of finished clips; the oldest go first."""

Status = Literal["queued", "in_progress", "completed", "failed"]
Outcome = Literal["ok", "cancelled", "unavailable", "error"]
"""How a job may end; the words of Triton's `lemica_requests_total`."""


@dataclass(eq=False)
class Job:
    """A clip that is to be made, is being made, or was.

    Attributes:
        id: cannot be guessed.
        suffix: `.mp4` or `.png`.
        model, plan: what was asked for.
        created_at, started_at, completed_at: seconds since 1970.
        done, rows: steps that were run, and all.
        data: the file; None: there is none yet, or any more.
        error: OpenAI's error object, with HTTP status `error_status`.
        wanted: false: it ends before its next step.
        fetched: whether somebody has read the file.
        listed: false: its client waits for the answer, and nobody else is told of it.
        future: done when the job is, whatever came of it; its result is nothing.
    """

    id: str
    suffix: str
    model: str
    plan: str
    created_at: float
    status: Status = "queued"
    started_at: float | None = None
    completed_at: float | None = None
    done: int = 0
    rows: int = 0
    data: bytes | None = field(default=None, repr=False)
    error: dict[str, str | None] | None = None
    error_status: int = 500
    retry_after: int | None = None
    wanted: bool = True
    fetched: bool = False
    listed: bool = True
    future: Future[None] = field(default_factory=Future, repr=False)

    @property
    def ended(self) -> bool:
        """Whether nothing more happens."""
        return self.status in ("completed", "failed")

    @property
    def progress(self) -> int:
        """Percent; 100 when the file is there."""
        return 100 if self.status == "completed" else min(99, 100 * self.done // self.rows) if self.rows else 0


OnEnd = Callable[[Job, Outcome, Made | None], None]


def _ignore(job: Job, outcome: Outcome, made: Made | None) -> None:
    """Nobody counts."""


class Jobs:
    """All jobs of a process. May be shared by threads.

    Args:
        maker: makes the clips.
        workers: how many at a time.
        queue: most jobs that wait.
        kept: most finished jobs.
        expiry: seconds after which a finished job is forgotten.
        on_end: told of each end.
        clock: seconds since 1970.

    Attributes:
        expiry: as given.
        succeeded: jobs that have made their clip.
    """

    def __init__(
        self,
        maker: Maker,
        *,
        workers: int = 1,
        queue: int = 16,
        kept: int = 64,
        expiry: float = 3600.0,
        on_end: OnEnd = _ignore,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._maker, self._queue, self._kept, self.expiry = maker, queue, kept, expiry
        self._on_end, self._clock = on_end, clock
        self._jobs: dict[str, Job] = {}
        self._waiting: dict[str, tuple[Job, Asked]] = {}  # one that is cancelled leaves nothing here
        self._lock = threading.Lock()
        self._workers, self._working = workers, 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="lemica-trt")
        self._closing = False
        self._last_seconds = 1.0
        self.succeeded = 0

    def submit(self, asked: Asked, suffix: str, *, listed: bool = True) -> Job:
        """Queue a job.

        Args:
            listed: whether `all` has it.

        Raises:
            Refused: the queue is full (429), or the server is shutting down (503).
        """
        with self._lock:
            self._forget()
            if self._closing:
                raise Refused(503, "shutting_down", "the server is shutting down", retry_after=5)
            waiting = self.count("queued")
            if waiting >= self._queue:
                after = max(1, round(self._last_seconds))
                raise Refused(429, "queue_full", f"{waiting} requests wait already, as many as may", retry_after=after)
            name, now = f"video_{secrets.token_hex(16)}", self._clock()
            job = Job(name, suffix, asked.model, asked.plan.name, now, listed=listed)
            self._jobs[job.id] = job
            self._waiting[job.id] = job, asked
            if self._working < self._workers:
                self._working += 1
                self._pool.submit(self._run_next)
            return job

    @property
    def closing(self) -> bool:
        """Whether it takes no more jobs."""
        return self._closing

    def forget_old(self) -> None:
        """Drop what has expired; done whenever a job comes, ends or is asked for, too."""
        with self._lock:
            self._forget()

    def count(self, status: Status) -> int:
        """How many jobs have a status."""
        return sum(job.status == status for job in list(self._jobs.values()))

    def find(self, name: str) -> Job:
        """The job of this id.

        Raises:
            Refused: there is none (404).
        """
        with self._lock:
            self._forget()
            if name not in self._jobs:
                raise Refused(404, "not_found", "no such video: it was deleted, has expired, or never was")
            return self._jobs[name]

    def all(self) -> list[Job]:
        """All jobs that are listed, the oldest first."""
        with self._lock:
            self._forget()
            return [job for job in self._jobs.values() if job.listed]

    def remove(self, name: str) -> None:
        """Forget a job; one that waits or runs is cancelled.

        Raises:
            Refused: there is none (404).
        """
        self.forget(self.find(name))

    def forget(self, job: Job) -> None:
        """Keep nothing of a job whose client has its answer, or has gone: then it is cancelled."""
        with self._lock:
            self._jobs.pop(job.id, None)
            self._cancel(job, "cancelled", "deleted, or the client has gone")

    def is_forgotten(self, job: Job) -> bool:
        """Whether a job is not kept any more."""
        return job.id not in self._jobs

    def close(self) -> list[Job]:
        """Take no more jobs, cancel those that wait; the ones that run."""
        with self._lock:
            self._closing = True
            for job in self._jobs.values():
                if job.status == "queued":
                    self._cancel(job, "shutting_down", "the server is shutting down", status=503)
            return [job for job in self._jobs.values() if job.status == "in_progress"]

    def cancel_all(self, *, wait: bool = True) -> None:
        """Cancel what runs between two steps, and wait for it."""
        with self._lock:
            self._closing = True
            for job in self._jobs.values():
                self._cancel(job, "shutting_down", "the server is shutting down", status=503)
        self._pool.shutdown(wait=wait)

    def probe(self) -> Future[None] | None:
        """Have the maker check itself; None: jobs run or wait, which shows more."""
        with self._lock:
            if self._closing or self.count("in_progress") or self.count("queued"):
                return None
            return self._pool.submit(self._maker.check, self._require_open)

    def _require_open(self) -> None:
        if self._closing:
            raise Cancelled

    def _run_next(self) -> None:
        """Run the job that has waited longest; then again, behind a check that waits, as long as there are any."""
        with self._lock:
            found = self._waiting.pop(next(iter(self._waiting), ""), None)
        try:
            if found is not None:
                self._run(*found)
        finally:
            with self._lock:
                if self._waiting:
                    self._pool.submit(self._run_next)
                else:
                    self._working -= 1

    def _run(self, job: Job, asked: Asked) -> None:
        """Make a clip; whatever happens, the job ends."""

        def check() -> None:
            if not job.wanted:
                raise Cancelled

        def on_progress(done: int, rows: int) -> None:
            job.done, job.rows = done, rows
            check()

        with self._lock:
            if job.ended or not job.wanted:
                return
            job.status, job.started_at = "in_progress", self._clock()
        made: Made | None = None
        failure: Exception | None = None
        try:
            made = self._maker.make(asked.generation, job.plan, job.suffix, on_progress, check)
        except Cancelled:
            failure = Refused(499, "cancelled", "the video was cancelled")
        except LemicaError as error:
            failure = error
        except BaseException as error:  # the job ends all the same; its text may hold the prompt: the place must do
            where = "".join(traceback.format_tb(error.__traceback__))
            LOGGER.error("job %s: %s\n%s", job.id, type(error).__name__, where)
            failure = error if isinstance(error, Exception) else RuntimeError()
        with self._lock:
            if job.ended:  # cancelled meanwhile, and told so
                made, failure = None, Refused(499, "cancelled", "the video was cancelled")
            elif made is not None:
                job.data, job.status, job.completed_at = made.data, "completed", self._clock()
                self.succeeded += 1
                self._last_seconds = job.completed_at - (job.started_at or job.created_at)
            else:
                assert failure is not None
                self._fail(job, failure)
            self._forget()
        self._on_end(job, _outcome(failure), made)
        _finish(job)

    def _cancel(self, job: Job, code: str, why: str, *, status: int = 499) -> None:
        """End a job that waits, at once; have one that runs end before its next step."""
        if job.ended:
            return
        job.wanted = False
        self._waiting.pop(job.id, None)
        queued = job.status == "queued"
        self._fail(job, Refused(status, code, why))
        if queued:
            self._on_end(job, "cancelled", None)
        _finish(job)

    def _fail(self, job: Job, failure: Exception) -> None:
        job.status, job.completed_at = "failed", self._clock()
        job.error, (job.error_status, _) = error_object(failure, PARAMETERS), status_of(failure)
        job.retry_after = failure.retry_after if isinstance(failure, Refused) else None

    def _forget(self) -> None:
        """Drop finished jobs that are too old or too many."""
        now = self._clock()
        finished = [job for job in self._jobs.values() if job.ended]
        finished.sort(key=lambda job: -(job.completed_at or 0.0))
        size = 0
        for place, job in enumerate(finished):
            size += len(job.data or b"")
            if place >= self._kept or size > KEPT_BYTES or now - (job.completed_at or 0.0) > self.expiry:
                del self._jobs[job.id]


def _finish(job: Job) -> None:
    """Wake who waits for the job, who may have given up."""
    with suppress(InvalidStateError):
        job.future.set_result(None)


def _outcome(failure: Exception | None) -> Outcome:
    if failure is None:
        return "ok"
    if isinstance(failure, Refused):
        return "cancelled" if failure.status == 499 else "unavailable"
    return "error"
