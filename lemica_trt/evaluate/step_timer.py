"""What steps and plans take on the engines of this machine, and which engines run here at all."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lemica_trt.backends.machine import describe_machine
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import MissingDependencyError, UnsupportedError
from lemica_trt.core.progress import Reporter
from lemica_trt.evaluate.timing import (
    backend_name,
    measure_steps,
    measure_total,
    store_steps,
    stored_steps,
)
from lemica_trt.ir.budget import StepTimes, format_seconds
from lemica_trt.ir.graphs import COMBINE
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import Measured, Speed, VerifyReport
from lemica_trt.runtime.pipeline import Pipeline

CHANGED = 0.2
"""Part by which step times may differ from stored ones without a word."""

SMALLEST = (COMBINE,)
"""Engines that are loaded to see whether those of a backend run here: one speaks for all of them."""


def runnable_backend(bundle: Bundle) -> tuple[str | None, dict[str, str]]:
    """The first backend, in order of preference, whose engines run here; and why the others are not used.

    One is enough: engines are of the same graphs, and on a GPU machine nobody waits for the same plans on a CPU.
    `verify --backend` asks for another.
    """
    chosen, reasons = None, {}
    for entry in bundle.manifest.engines:
        name = entry.key.backend
        if chosen is not None:
            reasons[name] = f"{chosen} was; ask for it with --backend {name}"
            continue
        try:
            Pipeline(bundle, backend=name, roles=SMALLEST)
            chosen = name
        except (MissingDependencyError, UnsupportedError) as error:
            reasons[name] = error.what
    return chosen, reasons


def require_runnable(bundle: Bundle, *, fix: str) -> str:
    """The first backend whose engines run here.

    Raises:
        MissingDependencyError: there is none.
    """
    backend, reasons = runnable_backend(bundle)
    if backend is None:
        raise MissingDependencyError(
            "expected engines that run on this machine, got "
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
            fix=fix,
        )
    return backend


class StepTimer:
    """Times the steps and plans of a bundle on the first of its backends that runs here.

    Args:
        bundle: what to time.
        reporter: told what a step takes.
    """

    def __init__(self, bundle: Bundle, reporter: Reporter) -> None:
        self._bundle, self._reporter = bundle, reporter

    @functools.cached_property
    def _backend(self) -> str:
        fix = "plan where they run, or ask for a number of full steps: --budget"
        return require_runnable(self._bundle, fix=fix)

    @functools.cached_property
    def _pipe(self) -> Pipeline:
        return Pipeline(self._bundle, backend=self._backend, roles=self._bundle.manifest.graphs.layout.step_graphs)

    @functools.cached_property
    def measured(self) -> Measured:
        """Step times, measured now.

        Raises:
            MissingDependencyError: none of the bundle's engines run here.
        """
        return Measured(machine=describe_machine(), backend=self._name, steps=measure_steps(self._pipe))

    @functools.cached_property
    def steps(self) -> StepTimes:
        """Step times, measured now; those in the bundle's reports are compared with them and, where they are of another
        machine or differ by more than `CHANGED`, replaced.

        Raises:
            MissingDependencyError: none of the bundle's engines run here.
        """
        found, before = self.measured.steps, stored_steps(self._bundle, self._name)
        self._reporter.stage("time", times_text(found, self._name))
        change = None if before is None else found.full / before.full - 1
        if change is not None and abs(change) > CHANGED:
            self._reporter.note(
                f"a full step took {format_seconds(before.full if before else 0.0)} when it was measured before: "
                f"{change:+.0%}; is this machine busy, or was it then?"
            )
        if change is None or abs(change) > CHANGED:
            store_steps(self._bundle, self.measured)
        return found

    @property
    def _name(self) -> str:
        return backend_name(self._bundle.engine(self._backend).key)

    def speeds(self, plans: Sequence[StepPlan], times: StepTimes) -> dict[str, Speed]:
        """Whole plans, measured now; the time of the uncached plan follows from its steps.

        A speed-up is N/B at most: what the drift of a machine shows beyond is none of the plan's.
        """
        found = {}
        for plan in plans:
            seconds = measure_total(self._pipe, plan)
            speedup = min(times.total(plan.num_steps) / seconds, plan.num_steps / plan.budget)
            found[plan.name] = Speed(seconds=seconds, speedup=speedup)
        return found


def speeds_from_report(report: VerifyReport) -> dict[str, Speed]:
    """What a verification measured of each plan."""
    return {t.plan: Speed(seconds=t.total, speedup=t.speedup) for t in report.timing if t.speedup is not None}


def times_text(times: StepTimes, backend: str) -> str:
    """Step times in one line."""
    skipped = "" if times.skipped is None else f", a skipped one {format_seconds(times.skipped)}"
    return f"a full step takes {format_seconds(times.full)}{skipped}; {backend}, {describe_machine()}"
