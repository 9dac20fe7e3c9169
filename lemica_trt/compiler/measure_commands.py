"""`bench` and `compare`: plans of finished bundles on the engines of this machine. No PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from lemica_trt.bundle.reading import Bundle
from lemica_trt.compiler.requests import prompts_of
from lemica_trt.core.errors import InputError, UsageError, VerificationError
from lemica_trt.core.progress import Reporter, Tally, count
from lemica_trt.evaluate.bench import Load
from lemica_trt.evaluate.bench import bench as run_bench
from lemica_trt.evaluate.compared import Side
from lemica_trt.evaluate.compared import compare as run_compare
from lemica_trt.evaluate.samples import held_out_samples
from lemica_trt.evaluate.step_timer import require_runnable
from lemica_trt.ir.measured import Bench, Comparison, summary_of
from lemica_trt.runtime.pipeline import Pipeline


def bench(
    path: Path,
    plans: Sequence[str],
    load: Load,
    reporter: Reporter,
    *,
    backend: str | None,
    prompts: Path | None,
    shape: str | None = None,
) -> Bench:
    """Latency of plans of a bundle, in turns.

    Args:
        plans: names; none: the default plan.
        backend: which engines; None: the first that run here.
        prompts: file of prompts; None: held-out ones of the profile.
        shape: as `Bundle.at` takes it.

    Raises:
        UsageError: no such shape, no such plan there, or one twice; a batch larger than the bundle's.
        LemicaError: as `Pipeline` and `prompts_of`.
    """
    bundle = Bundle.open(path).at(shape)
    chosen = [bundle.plan(name) for name in plans or [None]]  # type: ignore[list-item]
    names = [plan.name for plan in chosen]
    if len(set(names)) < len(names):
        raise UsageError(f"--plan: expected different plans, got {', '.join(names)}", fix="name each once")
    most = bundle.manifest.graphs.max_batch
    if load.batch > most:
        raise UsageError(f"--batch: expected 1 … {most} for this bundle, got {load.batch}", fix=f"--batch {most}")
    texts = _prompts(bundle, prompts)
    backend = backend or require_runnable(bundle, fix="bench the bundle where they run")
    reporter.stage("bench", f"{', '.join(names)} in turns on {backend}")
    with Pipeline(bundle, backend=backend) as pipe:
        return run_bench(
            pipe,
            chosen,
            texts,
            load,
            backend=backend,
            done=lambda done: reporter.advance(done, max(done, load.iterations)),
        )


def compare(
    a: str, b: str, samples: int, reporter: Reporter, *, backend: str | None, prompts: Path | None
) -> Comparison:
    """Two plans on the same prompts and seeds.

    Args:
        a, b: `BUNDLE` or `BUNDLE:PLAN`; b may be the name of a plan of the first bundle.
        samples: clips.
        backend: which engines of both; None: the first that run here.
        prompts: file of prompts; None: held-out ones of the first bundle's profile.

    Raises:
        UsageError: both are the same plan of the same bundle; or as `evaluate.compared.compare`.
        LemicaError: as `Pipeline` and `prompts_of`.
    """
    first, plan_a = _named(a, None)
    second, plan_b = _named(b, first)
    if first.digest == second.digest and plan_a == plan_b:
        raise UsageError(
            f"expected two plans, got {plan_a} of the same bundle twice",
            fix=f"name another: {' or '.join(name for name in first.plans if name != plan_a)}",
        )
    held_out = held_out_samples(_prompts(first, prompts), samples)
    with contextlib.ExitStack() as stack:
        pipes: dict[str, tuple[Pipeline, str]] = {}
        for bundle in (first, second):
            if bundle.digest not in pipes:
                engines = backend or require_runnable(bundle, fix="compare bundles where their engines run")
                pipes[bundle.digest] = stack.enter_context(Pipeline(bundle, backend=engines)), engines
        sides = []
        for label, bundle, name in ((a, first, plan_a), (b, second, plan_b)):
            pipe, engines = pipes[bundle.digest]
            sides.append(Side(label, pipe, bundle.plan(name), engines))
        steps = samples * sum(side.plan.budget for side in sides)
        reporter.stage("compare", f"{count(samples, 'clip')} by {plan_a} and {plan_b}, {steps} full steps")
        return run_compare(sides[0], sides[1], held_out, Tally(reporter, steps))


def require_alike(found: Comparison, decibels: float | None) -> None:
    """Raise VerificationError unless the mean PSNR is what was asked for; None: nothing was."""
    mean = summary_of(found.psnr)[0]
    if decibels is not None and mean < decibels:
        raise VerificationError(
            f"expected at least {decibels:g} dB between {found.a.plan} and {found.b.plan}, got {mean:.1f}",
            fix="choose a plan with more full steps, or build another one",
        )


def _named(text: str, other: Bundle | None) -> tuple[Bundle, str]:
    """A bundle and the name of one of its plans.

    Args:
        text: `BUNDLE`, `BUNDLE:PLAN`, or a plan of `other`.
    """
    if not Path(text).exists():
        if other is not None and text.lstrip(":") in other.plans:
            return other, text.lstrip(":")
        folder, colon, name = text.rpartition(":")
        if colon and folder:
            bundle = Bundle.open(folder)
            return bundle, bundle.plan(name).name
    bundle = Bundle.open(text)
    return bundle, bundle.plan().name


def _prompts(bundle: Bundle, prompts: Path | None) -> tuple[str, ...]:
    try:
        return prompts_of(bundle.manifest.profile, None if prompts is None else str(prompts), split="held_out")
    except InputError as error:
        raise InputError(error.what, fix="give a file of prompts, one a line: --prompts FILE") from None
