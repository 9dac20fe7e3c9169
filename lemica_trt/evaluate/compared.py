"""Plans side by side on the engines of bundles: the same prompts and seeds, in turns. No PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import msgspec

from lemica_trt.backends.machine import describe_machine
from lemica_trt.core.errors import UsageError
from lemica_trt.core.metrics import SSIM_WINDOW, psnr, ssim
from lemica_trt.evaluate.deployed import Deployed
from lemica_trt.evaluate.samples import Samples
from lemica_trt.evaluate.timing import backend_name
from lemica_trt.ir.measured import ComparedSide, Comparison, MeasuredPlan
from lemica_trt.ir.plan import StepPlan
from lemica_trt.runtime.pipeline import Pipeline


class Side(NamedTuple):
    """A plan, where it runs, and what it is called."""

    label: str
    pipe: Pipeline
    plan: StepPlan
    backend: str | None


def compare(a: Side, b: Side, samples: Samples, done: Callable[[float], None]) -> Comparison:
    """Both on every sample.

    Args:
        samples: at least one.
        done: told of full steps.

    Raises:
        UsageError: they make clips of different shapes.
        LemicaError: as `Pipeline`.
    """
    shapes = [(s.frames, s.height, s.width) for s in (side.pipe.bundle.manifest.profile.shape for side in (a, b))]
    if shapes[0] != shapes[1]:
        what = " and ".join(f"{f} frames {h}×{w}" for f, h, w in shapes)
        raise UsageError(f"expected two bundles that make clips of one shape, got {what}", fix="build both for one")
    runs = [Deployed(side.pipe, done) for side in (a, b)]
    found, similar = [], []
    for number in range(samples.count):
        first, second = (run.decoded(side.plan, *samples[number]) for run, side in zip(runs, (a, b)))
        found.append(psnr(second, first))
        if min(first.shape[1:3]) >= SSIM_WINDOW:
            similar.append(ssim(second, first))
    sides = [_compared(side, run) for side, run in zip((a, b), runs)]
    return Comparison(
        a=sides[0],
        b=sides[1],
        machine=describe_machine(),
        samples=samples.shown,
        psnr=tuple(found),
        ssim=tuple(similar) or None,
    )


def _compared(side: Side, run: Deployed) -> ComparedSide:
    rows = run.first_run(side.plan)[1]
    return ComparedSide(
        label=side.label,
        bundle=side.pipe.bundle.digest,
        plan=side.plan.name,
        method=side.plan.method,
        full_steps=side.plan.full_steps,
        num_steps=side.plan.num_steps,
        backend=backend_name(side.pipe.bundle.engine(side.backend).key),
        seconds=run.seconds(side.plan),
        full_step=median(rows.full),
        skipped_step=median(rows.cached) if rows.cached else None,
    )


def measure_plans(
    pipe: Pipeline,
    plans: Sequence[StepPlan],
    uncached: StepPlan,
    samples: Samples,
    done: Callable[[float], None],
    *,
    backend: str,
    exact: Pipeline | None = None,
) -> list[MeasuredPlan]:
    """Quality of plans against the uncached one, and the time of all of them.

    Args:
        plans: of the bundle, or any that fit its graphs.
        uncached: of the same sampler.
        samples: at least one.
        done: told of full steps.
        backend: of the pipeline.
        exact: of quantised engines, a pipeline of those that they were made from: its uncached run is the one that all
            plans are compared with, the uncached one too. None: the pipeline's own.

    Returns:
        One for each plan; then the uncached plan's.
    """
    run = Deployed(pipe, done)
    plans = [msgspec.structs.replace(plan, name=plan.rows_digest) for plan in plans]  # two may have one name
    scores: list[list[float]] = [[] for _ in plans]
    of_uncached, compared_with = list[float](), None if exact is None else Deployed(exact, done)
    for number in range(samples.count):
        reference = run.decoded(uncached, *samples[number])
        if compared_with is not None:
            own, reference = reference, compared_with.decoded(uncached, *samples[number])
            of_uncached.append(psnr(own, reference))
        for plan, found in zip(plans, scores):
            found.append(psnr(run.decoded(plan, *samples[number]), reference))
    named = backend_name(pipe.bundle.engine(backend).key)
    times = {timing.plan: timing for timing in run.timing([*plans, uncached])}
    return [
        MeasuredPlan(
            rows_digest=plan.rows_digest,
            psnr=tuple(found),
            seconds=times[plan.name].total,
            speedup=times[plan.name].speedup,
            machine=describe_machine(),
            backend=named,
        )
        for plan, found in (*zip(plans, scores), (uncached, of_uncached))
    ]
