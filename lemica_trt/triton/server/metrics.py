"""What `/metrics` shows beside Triton's own queue and request metrics."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from lemica_trt.ir.graphs import Role
from lemica_trt.runtime.pipeline import Pipeline

LATENCY_BUCKETS_SECONDS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0]
"""Upper bounds of the latency histogram."""

OUTCOMES = ("ok", "cancelled", "unavailable", "error")
"""How a request may end."""


STEP_KINDS = ("full", "skipped")
"""Labels of the step metric."""


class Metrics:
    """What a model reports in `/metrics`, beside Triton's own queue and request metrics.

    | metric | labels | |
    |---|---|---|
    | `lemica_steps_total` | model, plan, kind | steps of requests: `full` ran the DiT, `skipped` did not |
    | `lemica_requests_total` | model, plan, outcome | `ok`, `cancelled`, `unavailable`, `error` |
    | `lemica_denoise_seconds` | model, plan | histogram of a request's denoising, its batch's time |
    | `lemica_batch_size` | model | the largest batch whose results are the bits of batches of 1 |
    | `lemica_engine_bytes` | model | size of the engine files that are loaded |
    | `lemica_resident_bytes` | model | memory of the model's process |
    """

    def __init__(self, pb_utils: Any, model: str, plans: Collection[str]) -> None:
        def family(name: str, description: str, kind: str) -> Any:
            return pb_utils.MetricFamily(name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind))

        self._families = {
            "steps": family("lemica_steps_total", "Denoising steps, by what ran", "COUNTER"),
            "requests": family("lemica_requests_total", "Requests, by how they ended", "COUNTER"),
            "seconds": family("lemica_denoise_seconds", "Seconds from first to last step", "HISTOGRAM"),
            "batch": family("lemica_batch_size", "Largest batch with the bits of batches of 1", "GAUGE"),
            "engines": family("lemica_engine_bytes", "Size of the engine files that are loaded", "GAUGE"),
            "resident": family("lemica_resident_bytes", "Memory of the model's process", "GAUGE"),
        }

        def metric(name: str, **labels: str) -> Any:
            return self._families[name].Metric(labels={"model": model, **labels})

        self._gauges = {name: metric(name) for name in ("batch", "engines", "resident")}
        self._steps = {(plan, kind): metric("steps", plan=plan, kind=kind) for plan in plans for kind in STEP_KINDS}
        self._requests = {
            (plan, outcome): metric("requests", plan=plan, outcome=outcome) for plan in plans for outcome in OUTCOMES
        }
        self._seconds = {
            plan: self._families["seconds"].Metric(
                labels={"model": model, "plan": plan}, buckets=LATENCY_BUCKETS_SECONDS
            )
            for plan in plans
        }

    def loaded(self, pipeline: Pipeline, backend: str, roles: Collection[Role], batch: int) -> None:
        """What was loaded."""
        manifest = pipeline.bundle.manifest
        files = {file for role, file in pipeline.bundle.engine(backend).files.items() if role in roles}
        for graph in manifest.graphs.graphs:
            if graph.file in files:
                files.update(graph.data_files)
        self._gauges["engines"].set(float(sum(manifest.files[name].size for name in files)))
        self._gauges["batch"].set(float(batch))
        self.resident()

    def resident(self) -> None:
        """Measure the process's memory (Linux)."""
        with suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._gauges["resident"].set(float(pages * os.sysconf("SC_PAGE_SIZE")))

    def row(self, plan: str, full: bool, requests: int) -> None:
        """A row has run for some requests."""
        self._steps[plan, STEP_KINDS[not full]].increment(float(requests))

    def request(self, plan: str, outcome: str, seconds: float | None = None) -> None:
        """A request has ended."""
        self._requests[plan, outcome].increment(1.0)
        if seconds is not None:
            self._seconds[plan].observe(seconds)
