"""What plans and their steps take on the engines of this machine. No PyTorch.

    measure_steps   a full step, a skipped one and the rest, in the time of a few steps: what a time affords
    measure_total   a whole plan

One request of the bundle's shape, its denoising loop: the text encoder and the VAE are not in it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lemica_trt.backends.machine import describe_machine
from lemica_trt.bundle.manifest import STEP_TIMES, VERIFY_REPORT
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.atomic_folder import held
from lemica_trt.core.errors import UsageError
from lemica_trt.core.values import write_value
from lemica_trt.ir.budget import StepTimes
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.graphs import StepLayout, kind_of_variant
from lemica_trt.ir.plan import CacheRead, PlanRow, StepPlan, uncached_of
from lemica_trt.ir.report import Measured
from lemica_trt.runtime.denoise import RowDone
from lemica_trt.runtime.pipeline import Pipeline
from lemica_trt.runtime.random import Generator

Array = npt.NDArray[Any]


SHORT = 4
"""Full rows of the plan that steps are timed on, and skipped ones."""


TIMED_STEPS = 20
"""Full steps that `measure_steps` runs, about."""

TIMED_BESIDE = 4
"""Full steps that it runs where full steps have been timed: one a run."""

SHORT_RUNS, SHORT_SECONDS = (3, 6), 1.0
"""Least and most runs of it, and the seconds after which no further one begins."""


def measure_steps(pipe: Pipeline, *, known: float | None = None) -> StepTimes:
    """Time single steps on a plan cut short, so that a model of many slow steps is measured in a few of them.

    Medians over all rows of a kind and all runs, after a warm-up, waiting for the device after every row: where a plan
    runs as one CUDA graph it is a little faster than these steps say, not slower. A skipped step that came out slower
    than a full one is taken to be as slow.

    Args:
        known: seconds of a full step, where it has been timed; None: it is timed here.
    """
    bundle = pipe.bundle
    uncached = require_uncached(bundle)
    short = shortened(uncached, bundle.manifest.graphs.layout, full=SHORT if known is None else 1)
    run = request(pipe, short)
    began = perf_counter()
    run()
    full: list[float] = []
    cached: list[float] = []
    rest: list[float] = []
    least, most = SHORT_RUNS
    most = most if known is None else least
    while len(rest) < least or (len(rest) < most and perf_counter() - began < SHORT_SECONDS):
        whole, rows = row_by_row(run)
        full += rows.full
        cached += rows.cached
        rest.append(whole - sum(rows.full) - sum(rows.cached))
    kinds = Counter(kinds_of([row for row in uncached.rows if row.full]))
    step = known or mean_of_kinds(kinds_of([row for row in short.rows if row.full]) * len(rest), full, kinds)
    skipped = kinds_of([row for row in short.rows if row.cached]) * len(rest)
    return StepTimes(
        full=step,
        skipped=min(mean_of_kinds(skipped, cached, kinds), step) if cached else None,
        rest=max(median(rest), 0.0),
    )


def kinds_of(rows: Sequence[PlanRow]) -> list[int]:
    """The kind of steps that each of some rows is of, which run the DiT."""
    return [kind_of_variant(row.variant) for row in rows if row.variant is not None]


def mean_of_kinds(kinds: Sequence[int], seconds: Sequence[float], counts: Mapping[int, int] | None = None) -> float:
    """What a step takes: the median of each kind of steps, and the mean of these.

    Args:
        kinds: of each row.
        seconds: of each row.
        counts: how many steps there are of each kind; None: as many as rows.
    """
    counts = Counter(kinds) if counts is None else counts
    medians = {kind: median([taken for its, taken in zip(kinds, seconds) if its == kind]) for kind in set(kinds)}
    return sum(counts[kind] * taken for kind, taken in medians.items()) / sum(counts[kind] for kind in medians)


def require_uncached(bundle: Bundle) -> StepPlan:
    """The uncached plan of a bundle.

    Raises:
        UsageError: it has none.
    """
    found = uncached_of(map(bundle.plan, bundle.plans))
    if found is None:
        raise UsageError("the bundle has no plan of all steps to compare with", fix="rebuild it")
    return found


def shortened(uncached: StepPlan, layout: StepLayout, *, full: int = SHORT) -> StepPlan:
    """Of each kind of steps some full rows, and at most `SHORT` that read caches; and the last row.

    What it computes means nothing; what its rows take is what they take in any plan.

    Args:
        uncached: the plan of all steps.
        layout: says which variants there are.
        full: full rows of a kind, at most.
    """
    *every, last = uncached.rows
    rows: list[PlanRow] = []
    for kind in dict.fromkeys(kinds_of(every)):
        steps = [row for row, its in zip(every, kinds_of(every)) if its == kind]
        skips = (its for its in layout.variants if its.reads and kind_of_variant(its.name) == kind)
        cached = next(skips, None)
        count = min(full, max(1, len(steps) // 2)) if cached else min(full, len(steps))
        rows += steps[:count]
        if cached is not None:
            reads = tuple(CacheRead(slot=slot, weights=(1.0,)) for slot in cached.reads)
            rows += [
                msgspec.structs.replace(row, variant=cached.name, caches=reads) for row in steps[count : count + SHORT]
            ]
    rows = sorted(rows, key=lambda row: row.step)
    cut = [
        msgspec.structs.replace(
            row,
            latents=row.latents[: i + 1],
            outputs=row.outputs[:i],
            noise=row.noise[: sum(its.draws for its in (*rows[:i], row))],
        )
        for i, row in enumerate([*rows, last])
    ]
    return msgspec.structs.replace(uncached, name="short", rows=tuple(cut))


def measure_total(pipe: Pipeline, plan: StepPlan, *, repeats: int = 3) -> float:
    """Seconds of a whole plan: median of some runs, after a warm-up."""
    run = request(pipe, plan)
    run()
    return median(seconds_of(run) for _ in range(repeats))


def request(pipe: Pipeline, plan: StepPlan) -> Callable[..., object]:
    """One request, ready to run: random noise and embeddings, the time does not depend on them."""
    graphs = pipe.bundle.manifest.graphs
    draw = np.random.default_rng(0)
    random = {
        spec.name: np.float32(0.1) * draw.standard_normal(spec.at(1), np.float32) for spec in graphs.layout.conditions
    }
    noise = Generator(0).randn((1, *graphs.layout.latent_shape))
    return partial(pipe.latents, random, noise, plan=plan, seeds=[0] if plan.stochastic else None)


class RowSeconds(NamedTuple):
    """Seconds of the rows of one run that run the DiT."""

    full: list[float]
    cached: list[float]


def row_by_row(run: Callable[..., object]) -> tuple[float, RowSeconds]:
    """Seconds of a run, and of its rows.

    Args:
        run: takes `on_step`, and waits for the device after every row where that is given.
    """
    rows: list[RowDone] = []
    whole = seconds_of(partial(run, on_step=rows.append))
    ran = [row for row in rows if row.variant is not None]
    return whole, RowSeconds([row.seconds for row in ran if row.full], [row.seconds for row in ran if not row.full])


def seconds_of(run: Callable[[], object]) -> float:
    """What a call takes."""
    start = perf_counter()
    run()
    return perf_counter() - start


def backend_name(key: EngineKey) -> str:
    """Backend, its version, what it is quantised to, and target: with `describe_machine` what a time is of."""
    return f"{key.title} {key.target}"


def stored_steps(bundle: Bundle, backend: str) -> StepTimes | None:
    """Step times of these engines on this machine that lie in the bundle's reports, by `plan` or `verify`; None: none.

    Reports stay with the engines that they are of: a bundle that is built again loses them.
    """

    class Part(msgspec.Struct):
        """What both files have."""

        machine: str
        backend: str
        steps: StepTimes

    for file in (STEP_TIMES, VERIFY_REPORT):
        try:
            found = msgspec.json.decode((bundle.path / file).read_bytes(), type=Part)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if (found.machine, found.backend) == (describe_machine(), backend):
            return found.steps
    return None


def store_steps(bundle: Bundle, measured: Measured) -> None:
    """Put step times into the bundle's reports."""
    with contextlib.suppress(UsageError), held(bundle.path):  # not while another bundle is put in its place
        write_value(measured, bundle.path / STEP_TIMES)
