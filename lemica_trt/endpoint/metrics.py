"""What Prometheus reads at `/metrics`: the names of Triton's models, and the queue."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from lemica_trt.endpoint.jobs import Job, Jobs, Outcome
from lemica_trt.endpoint.makers import Made
from lemica_trt.endpoint.requests import Model
from lemica_trt.triton.server.metrics import LATENCY_BUCKETS_SECONDS, OUTCOMES, STEP_KINDS

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts of one endpoint.

    | metric | labels | |
    |---|---|---|
    | `lemica_requests_total` | plan, outcome | `ok`, `cancelled`, `unavailable`, `error` |
    | `lemica_steps_total` | plan, kind | steps of clips that were finished: `full` ran the DiT, `skipped` did not |
    | `lemica_denoise_seconds` | plan | histogram of the denoising loop |
    | `lemica_request_seconds` | plan | histogram of whole requests, waiting included |
    | `lemica_jobs` | status | jobs that are known: `queued`, `in_progress`, `completed`, `failed` |
    | `process_…` | | memory, CPU time and open files of the process |
    """

    def __init__(self, model: Model) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside each count, which nobody reads
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "lemica_requests", "Requests, by how they ended", ["plan", "outcome"], registry=registry
        )
        self._steps = Counter("lemica_steps", "Denoising steps, by what ran", ["plan", "kind"], registry=registry)
        self._denoise, self._whole = (
            Histogram(name, about, ["plan"], buckets=LATENCY_BUCKETS_SECONDS, registry=registry)
            for name, about in (
                ("lemica_denoise_seconds", "Seconds from first to last step"),
                ("lemica_request_seconds", "Seconds from the request to its clip, waiting included"),
            )
        )
        self._jobs = Gauge("lemica_jobs", "Jobs that are known", ["status"], registry=registry)
        for plan in model.plans:  # so that each is there from the start
            for outcome in OUTCOMES:
                self._requests.labels(plan, outcome)
            for kind in STEP_KINDS:
                self._steps.labels(plan, kind)

    def ended(self, job: Job, outcome: Outcome, made: Made | None) -> None:
        """A job has ended."""
        self._requests.labels(job.plan, outcome).inc()
        if made is None:
            return
        self._whole.labels(job.plan).observe((job.completed_at or job.created_at) - job.created_at)
        if made.seconds is not None:
            self._denoise.labels(job.plan).observe(made.seconds)
        for kind, count in zip(STEP_KINDS, (made.full, made.skipped)):
            self._steps.labels(job.plan, kind).inc(count)

    def page(self, jobs: Jobs) -> bytes:
        """The text that Prometheus reads."""
        jobs.forget_old()
        for status in ("queued", "in_progress", "completed", "failed"):
            self._jobs.labels(status).set(jobs.count(status))
        return generate_latest(self._registry)
