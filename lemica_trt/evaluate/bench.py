"""Latency of whole requests on the engines of a bundle, plans in turns: A B A B. No PyTorch.

In trtexec's words: a warm-up of at least so many milliseconds, then at least so many iterations and so many seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

from lemica_trt.backends.machine import describe_machine
from lemica_trt.evaluate.timing import backend_name
from lemica_trt.ir.measured import Bench, PlanTimes, RowTimes
from lemica_trt.ir.plan import StepPlan
from lemica_trt.runtime.denoise import RowDone
from lemica_trt.runtime.generation import GenerationRequest
from lemica_trt.runtime.pipeline import Pipeline

ROW_RUNS = 3
"""Runs that are timed row by row, after the others: they wait for the device after every row."""


class Load(NamedTuple):
    """How much is run.

    Attributes:
        warm_up: seconds of requests before, at least one round.
        iterations, duration: rounds at least, and seconds at least; a round is one request of each plan.
        batch: requests at once.
    """

    warm_up: float
    iterations: int
    duration: float
    batch: int


def bench(
    pipe: Pipeline,
    plans: Sequence[StepPlan],
    prompts: Sequence[str],
    load: Load,
    *,
    backend: str,
    done: Callable[[int], None],
) -> Bench:
    """Time requests.

    Args:
        plans: of the bundle, of different names.
        prompts: in turns; seeds count from 0. All plans of a round get the same. Where shapes follow the prompt, the
            first one alone: a batch has one length, and each length is prepared when it first comes.
        backend: of the pipeline.
        done: told of rounds.

    Raises:
        LemicaError: as `Pipeline.run`.
    """
    times: dict[str, list[tuple[float, float, float, float]]] = {plan.name: [] for plan in plans}
    if pipe.bundle.manifest.graphs.layout.text_axes:
        prompts = prompts[:1]

    def requests(number: int) -> list[GenerationRequest]:
        first = number * load.batch
        return [pipe.request(prompts[k % len(prompts)], k) for k in range(first, first + load.batch)]

    def play(number: int) -> None:
        for plan in plans:
            start = perf_counter()
            results = pipe.run(requests(number), plan=plan.name)
            whole = perf_counter() - start
            shared, decode = results[0].seconds, sum(result.seconds["decode"] for result in results)
            times[plan.name].append((shared["text"], shared["denoise"], decode, whole))

    began, warm = perf_counter(), 0
    while warm == 0 or perf_counter() - began < load.warm_up:
        play(warm)
        warm += 1
    for found in times.values():
        found.clear()
    warmed, began, count = perf_counter() - began, perf_counter(), 0
    while count < load.iterations or perf_counter() - began < load.duration:
        play(count)
        count += 1
        done(count)
    rows = {plan.name: _rows(pipe, plan, requests(0)) for plan in plans}
    return Bench(
        bundle=pipe.bundle.digest,
        machine=describe_machine(),
        backend=backend_name(pipe.bundle.engine(backend).key),
        batch=load.batch,
        warm_up=warmed,
        memory=peak_memory(),
        device_memory=pipe.device_memory(),
        plans=tuple(_plan_times(plan, times[plan.name], rows[plan.name]) for plan in plans),
    )


def _plan_times(
    plan: StepPlan, times: Sequence[tuple[float, float, float, float]], rows: tuple[RowTimes, ...]
) -> PlanTimes:
    text, denoise, decode, whole = zip(*times)
    return PlanTimes(
        plan=plan.name, full_steps=plan.budget, text=text, denoise=denoise, decode=decode, latency=whole, rows=rows
    )


def _rows(pipe: Pipeline, plan: StepPlan, requests: Sequence[GenerationRequest]) -> tuple[RowTimes, ...]:
    """Times of the rows of a plan, of one batch."""
    runs: list[list[RowDone]] = []
    for _ in range(ROW_RUNS):
        runs.append([])
        pipe.run(requests, plan=plan.name, on_step=runs[-1].append)
    return tuple(
        RowTimes(step=same[0].step, variant=same[0].variant, seconds=tuple(row.seconds for row in same))
        for same in zip(*runs)
    )


def peak_memory() -> int:
    """Bytes of host memory that this process has held at most; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
