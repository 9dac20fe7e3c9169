"""Jobs: order, bounds, progress, cancelling, expiry, the end of the process."""

from __future__ import annotations

import logging
import queue

import pytest
import toy
from makers import ROWS, Held, Silent

from lemica_trt.core.errors import EngineError, MissingDependencyError
from lemica_trt.endpoint import jobs as module
from lemica_trt.endpoint.errors import Refused
from lemica_trt.endpoint.jobs import Job, Jobs
from lemica_trt.endpoint.makers import Made, TritonServer
from lemica_trt.endpoint.requests import Asked
from lemica_trt.runtime.denoise import Cancelled
from lemica_trt.runtime.generation import GenerationRequest
from lemica_trt.triton import client

pytestmark = pytest.mark.null

PLAN = toy.euler_plan("ffff", name="b4")


def asked(seed: int = 0) -> Asked:
    return Asked(GenerationRequest("a secret prompt", seed), PLAN, "toy")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def wait(job: Job) -> Job:
    job.future.result(timeout=60)
    return job


def test_a_job_waits_runs_and_ends() -> None:
    maker, clock = Held(), Clock()
    ended: list[tuple[str, Made | None]] = []
    jobs = Jobs(maker, clock=clock, on_end=lambda job, outcome, made: ended.append((outcome, made)))
    first, second = jobs.submit(asked(5), ".mp4"), jobs.submit(asked(6), ".mp4")
    maker.arrive()
    assert (first.status, first.progress, second.status) == ("in_progress", 0, "queued")
    maker.step()
    assert first.progress == 25 and jobs.count("in_progress") == jobs.count("queued") == 1
    clock.now = 1010.0
    maker.finish()
    assert wait(first).data == b"5 .mp4" and wait(second).data == b"6 .mp4"
    assert (first.status, first.progress, first.completed_at) == ("completed", 100, 1010.0)
    assert maker.made == [5, 6] and [outcome for outcome, _ in ended] == ["ok", "ok"]
    assert jobs.all() == [first, second] and jobs.find(second.id) is second


def test_a_full_queue_says_when_to_come_again() -> None:
    maker, clock = Held(), Clock()
    jobs = Jobs(maker, queue=1, clock=clock)
    running = jobs.submit(asked(), ".mp4")
    maker.arrive()
    waiting = jobs.submit(asked(), ".mp4")
    with pytest.raises(Refused, match="1 requests wait already") as refused:
        jobs.submit(asked(), ".mp4")
    assert (refused.value.status, refused.value.retry_after) == (429, 1)
    jobs.remove(waiting.id)
    clock.now += 7.0
    for _ in range(ROWS):
        maker.step()
    wait(running)
    running = jobs.submit(asked(), ".mp4")
    maker.arrive()
    jobs.submit(asked(), ".mp4")
    with pytest.raises(Refused) as refused:
        jobs.submit(asked(), ".mp4")
    assert refused.value.retry_after == 7  # as long as the last one took
    maker.finish()
    jobs.cancel_all()


def test_cancelled_between_two_steps_or_before_the_first() -> None:
    maker, outcomes = Held(), []
    jobs = Jobs(maker, on_end=lambda job, outcome, made: outcomes.append(outcome))
    running, waiting = jobs.submit(asked(1), ".mp4"), jobs.submit(asked(2), ".mp4")
    maker.arrive()
    jobs.remove(waiting.id)
    jobs.remove(running.id)
    assert wait(running).error == wait(waiting).error and running.error is not None
    assert running.error["code"] == "cancelled" and running.status == "failed"
    for job in (running, waiting):
        with pytest.raises(Refused, match="no such video"):
            jobs.find(job.id)
    maker.finish()
    last = wait(jobs.submit(asked(3), ".mp4"))
    assert last.data == b"3 .mp4" and maker.made == [3]
    assert outcomes == ["cancelled", "cancelled", "ok"]


def test_what_is_cancelled_before_it_runs_leaves_nothing() -> None:
    maker = Held()
    jobs = Jobs(maker)
    running = jobs.submit(asked(1), ".mp4")
    maker.arrive()
    for _ in range(5):
        jobs.remove(jobs.submit(asked(2), ".mp4").id)
    assert jobs._pool._work_queue.qsize() == 0 and not jobs._waiting
    waiting = jobs.submit(asked(3), ".mp4")
    assert jobs._pool._work_queue.qsize() == 0  # the worker that runs takes it
    maker.finish()
    assert wait(running).data == b"1 .mp4" and wait(waiting).data == b"3 .mp4" and maker.made == [1, 3]
    jobs.cancel_all()


def test_workers_run_side_by_side() -> None:
    maker = Held()
    jobs = Jobs(maker, workers=2)
    made = [jobs.submit(asked(seed), ".mp4") for seed in range(3)]
    maker.arrive()
    maker.arrive()
    assert [job.status for job in made] == ["in_progress", "in_progress", "queued"]
    maker.finish()
    assert all(wait(job).status == "completed" for job in made)
    jobs.cancel_all()


@pytest.mark.parametrize("end", ["deleted", "shut down", "shut down in a check"])
def test_a_silent_maker_holds_nothing_up(end: str) -> None:
    maker = Silent()
    jobs = Jobs(maker)
    if end == "shut down in a check":
        checking = jobs.probe()
        assert checking is not None and maker.arrived.wait(60)
        jobs.close()
        assert isinstance(checking.exception(timeout=60), Cancelled)
    else:
        job = jobs.submit(asked(), ".mp4")
        assert maker.arrived.wait(60)
        if end == "deleted":
            jobs.remove(job.id)
            jobs._pool.submit(int).result(timeout=60)  # its worker is free again
    jobs.cancel_all()


def test_who_waits_for_a_silent_server_may_stop() -> None:
    left = [1, 2]

    def check() -> None:
        if not left:
            raise Cancelled
        left.pop()

    with pytest.raises(Cancelled):
        client._receive(queue.Queue(), "frames", None, check)


class Failure:
    """An exception of tritonclient."""

    def __init__(self, status: str, message: str) -> None:
        self._status, self._message = status, message

    def status(self) -> str:
        return self._status

    def message(self) -> str:
        return self._message


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (client._error(Failure("", "Request timeout expired"), "triton:8001"), "unavailable"),
        (client._error(Failure("StatusCode.UNAVAILABLE", "Socket closed"), "triton:8001"), "unavailable"),
        (MissingDependencyError("expected a Triton server at triton:8001, got: x"), "unavailable"),
        (client._error(Failure("", "Exceeds maximum queue size"), "triton:8001"), "queue_full"),
        (client._error(Failure("", "no memory"), "triton:8001"), "generation_failed"),
    ],
)
def test_faults_of_triton_say_whether_to_try_again_and_not_where_it_is(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, code: str
) -> None:
    def generate(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(client, "generate", generate)
    outcomes: list[str] = []
    maker = TritonServer("triton:8001", None, "b4")  # type: ignore[arg-type]
    jobs = Jobs(maker, on_end=lambda job, outcome, made: outcomes.append(outcome))
    job = wait(jobs.submit(asked(), ".mp4"))
    assert job.error is not None and job.error["code"] == code and "triton:8001" not in str(job.error)
    assert (job.error_status, job.retry_after) == {
        "unavailable": (503, 5), "queue_full": (429, 1), "generation_failed": (500, None),
    }[code]  # fmt: skip
    assert outcomes == ["error" if code == "generation_failed" else "unavailable"]
    jobs.cancel_all()


def test_faults_end_a_job_and_say_nothing_of_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    maker = Held(failure=EngineError("no memory"))
    maker.finish()
    jobs = Jobs(maker)
    job = wait(jobs.submit(asked(), ".mp4"))
    assert job.error == {"message": "no memory", "type": "server_error", "param": None, "code": "generation_failed"}
    maker.failure = KeyError("a secret prompt")
    with caplog.at_level(logging.ERROR):
        job = wait(jobs.submit(asked(), ".mp4"))
    assert job.error is not None and job.error["code"] == "internal_error" and job.error_status == 500
    assert "KeyError" in caplog.text and "makers.py" in caplog.text and "secret" not in caplog.text
    assert "secret" not in repr(job) and "secret" not in repr(asked())


def test_finished_jobs_are_few_small_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, clock = Held(), Clock()
    maker.finish()
    jobs = Jobs(maker, kept=2, expiry=60.0, clock=clock)
    made = []
    for seed in range(3):
        clock.now += 1.0
        made.append(wait(jobs.submit(asked(seed), ".mp4")))
    assert jobs.all() == made[1:]
    monkeypatch.setattr(module, "KEPT_BYTES", len(made[2].data or b""))
    assert jobs.all() == made[2:]
    clock.now += 60.0
    assert jobs.all() == made[2:]
    clock.now += 0.5
    assert jobs.all() == []


def test_old_jobs_go_when_another_ends_and_when_they_are_counted() -> None:
    maker, clock = Held(), Clock()
    jobs = Jobs(maker, expiry=60.0, clock=clock)
    first = jobs.submit(asked(1), ".mp4")
    maker.arrive()
    for _ in range(ROWS):
        maker.step()
    wait(first)
    second = jobs.submit(asked(2), ".mp4")
    maker.arrive()
    clock.now += 61.0
    maker.finish()
    wait(second)
    assert jobs.is_forgotten(first) and not jobs.is_forgotten(second)
    clock.now += 61.0
    jobs.forget_old()
    assert jobs.is_forgotten(second) and jobs.count("completed") == 0


def test_what_its_client_waits_for_is_not_listed() -> None:
    maker = Held()
    jobs = Jobs(maker)
    inline, listed = jobs.submit(asked(1), ".png", listed=False), jobs.submit(asked(2), ".mp4")
    assert jobs.all() == [listed] and jobs.find(inline.id) is inline
    maker.finish()
    jobs.cancel_all()


def test_the_end_of_the_process() -> None:
    maker = Held()
    jobs = Jobs(maker)
    running, waiting = jobs.submit(asked(1), ".mp4"), jobs.submit(asked(2), ".mp4")
    maker.arrive()
    assert jobs.close() == [running]
    assert wait(waiting).error_status == 503
    with pytest.raises(Refused, match="shutting down") as refused:
        jobs.submit(asked(), ".mp4")
    assert refused.value.status == 503 and jobs.probe() is None
    maker.finish()
    assert wait(running).data == b"1 .mp4"
    jobs.cancel_all()

    maker = Held()
    jobs = Jobs(maker)
    running = jobs.submit(asked(1), ".mp4")
    maker.arrive()
    jobs.close()
    maker.finish()
    maker.failure = EngineError("it was not cancelled")
    jobs.cancel_all()
    assert wait(running).ended
