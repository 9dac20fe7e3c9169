"""Does a bundle do what it must, and how good are its plans?

    agreement   graphs and whole runs on the bundle's engines against PyTorch and diffusers
    quality     each plan on held-out prompts; beside the default one LeMiCa's and the sampler with as few steps
    timing      a full step, a skipped step, each whole plan, and what a plan costs beyond its steps, of the same runs

Knows nothing of how the bundle was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
from msgspec import UNSET

from lemica_trt.backends.machine import describe_machine
from lemica_trt.bundle.manifest import VERIFY_REPORT
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import VerificationError
from lemica_trt.core.progress import Reporter, Tally, count
from lemica_trt.core.text import shortened
from lemica_trt.evaluate.agreement import check_graphs, check_runs
from lemica_trt.evaluate.deployed import Deployed
from lemica_trt.evaluate.kept import Keeper
from lemica_trt.evaluate.quality import Case, cases_of, measure_quality, quality_steps
from lemica_trt.evaluate.samples import Samples
from lemica_trt.evaluate.timing import TIMED_BESIDE, RowSeconds, backend_name, measure_steps
from lemica_trt.ir.budget import StepTimes
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.kept import Kept
from lemica_trt.ir.plan import StepPlan, uncached_of
from lemica_trt.ir.prompts import prompt_from_line
from lemica_trt.ir.report import PLAN, Agreement, FirstRun, GraphCheck, VerifyReport
from lemica_trt.models import Model
from lemica_trt.runtime.pipeline import Pipeline

Array = npt.NDArray[Any]


class First(NamedTuple):
    """The first run of the uncached plan: what was found, and its result, fp32 latent_shape."""

    run: FirstRun
    latents: Array


class Verification(NamedTuple):
    """A report, clips to look at, and what another verification of the same engines may take over."""

    report: VerifyReport
    kept: Kept | None
    first: First


def verify(
    bundle: Bundle,
    model: Model,
    samples: Samples,
    *,
    reporter: Reporter,
    backend: str | None = None,
    further: int | None = None,
    first: First | None = None,
    draft: bool = False,
    every: bool = False,
    steps: StepTimes | None = None,
) -> Verification:
    """Verify a bundle, which has an uncached plan, against the model that it was built from.

    Args:
        bundle: what to verify; every file is checked first.
        model: the same model in PyTorch.
        samples: the held-out ones, see `evaluate.samples`.
        backend: which engines; None: the preferred ones.
        further: how many of the samples plans beside the default one run on; None: all.
        first: of an earlier verification of the same engines on the same samples.
        draft: whether the bundle is one: then its plan is compared with the uncached run alone, on the engines.
        every: whether each plan has a baseline, and not the default one alone.
        steps: step times, where they were measured just now; None: they are measured.

    Raises:
        IntegrityError: a file is altered or missing.
        VerificationError: a result of the model itself is not finite.
    """
    bundle.check()
    with Pipeline(bundle, backend=backend) as pipe:
        entry, plans = bundle.engine(backend), [bundle.plan(name) for name in bundle.plans]
        _tell(pipe, entry.key, samples, reporter, draft=draft)
        cases = cases_of(
            bundle, model, samples.count, further, compared=not draft, every=every, quantized=bool(entry.quantized)
        )
        uncached = uncached_of(plans) or max(plans, key=lambda plan: plan.budget)
        compared = [uncached] if draft else plans
        deployed = Deployed(pipe, tally := _tally(reporter, compared, cases, samples.count), entry.quantized)
        name = backend_name(entry.key)
        first, agreement = _agreed(deployed, model, uncached, samples, first, tally, plans=compared, backend=name)
        steps = steps or _timed(pipe, deployed.full_step(uncached), tally)
        quality = measure_quality(deployed, model, samples, cases, tally, keeper := Keeper())
    report = VerifyReport(
        manifest_digest=bundle.digest,
        samples=samples.count,
        machine=describe_machine(),
        backend=name,
        dtype=bundle.manifest.profile.dtype,
        graphs=first.run.graphs,
        agreement=tuple(agreement),
        quality=tuple(quality),
        timing=tuple(deployed.timing(compared)),
        steps=steps,
        precision=entry.precision if entry.quantized else UNSET,
    )
    kept = keeper.kept(report.manifest_digest, bundle.plan(), samples, PLAN)
    return Verification(report, kept, first)


def _timed(pipe: Pipeline, full_step: float, tally: Tally) -> StepTimes:
    """Step times, measured now beside what a full step is known to take."""
    found = measure_steps(pipe, known=full_step)
    tally(TIMED_BESIDE)
    return found


def _tally(reporter: Reporter, compared: Sequence[StepPlan], cases: Sequence[Case], samples: int) -> Tally:
    """Of all full steps of a verification."""
    once = sum(plan.budget for plan in compared)  # in PyTorch; on the engines, too, where there is nothing to compare
    return Tally(reporter, TIMED_BESIDE + once + (quality_steps(cases, samples) if cases else once))


def _taken_over(
    first: First | None, deployed: Deployed, uncached: StepPlan, samples: Samples, backend: str
) -> First | None:
    """An earlier run, taken as made; None: there is none of these engines and samples."""
    if first is None or (first.run.backend, first.run.prompt, first.run.seed) != (backend, *samples[0]):
        return None
    run = first.run
    deployed.know(uncached, run.prompt, run.seed, first.latents, (run.seconds, RowSeconds([*run.rows], [])))
    return first


def _agreed(
    deployed: Deployed,
    model: Model,
    uncached: StepPlan,
    samples: Samples,
    first: First | None,
    tally: Tally,
    *,
    plans: Sequence[StepPlan],
    backend: str,
) -> tuple[First, Sequence[Agreement]]:
    """The first run of the uncached plan, and how plans agree with the model; what `first` knows is not run again.

    Args:
        first: of an earlier verification; None: there was none.
    """
    first = _taken_over(first, deployed, uncached, samples, backend)
    tally(0 if first is None else 2 * uncached.budget)
    graphs = check_graphs(deployed.pipe, model, deployed.quantized) if first is None else first.run.graphs
    known = [] if first is None else [first.run.agreement]
    agreement = check_runs(deployed, model, *samples[0], tally, known, plans=plans)
    return first or _first(deployed, uncached, samples, graphs, agreement, backend), agreement


def _first(
    deployed: Deployed,
    uncached: StepPlan,
    samples: Samples,
    graphs: Sequence[GraphCheck],
    agreement: Sequence[Agreement],
    backend: str,
) -> First:
    """Of a verification that is under way."""
    seconds, rows = deployed.first_run(uncached)
    prompt, seed = samples[0]
    run = FirstRun(
        backend=backend,
        prompt=prompt,
        seed=seed,
        graphs=tuple(graphs),
        agreement=next(found for found in agreement if found.plan == uncached.name),
        seconds=seconds,
        rows=tuple(rows.full),
    )
    return First(run, deployed.latents(uncached, prompt, seed, keep=True))


def _tell(pipe: Pipeline, key: EngineKey, samples: Samples, reporter: Reporter, *, draft: bool) -> None:
    """Say what is verified; and in one line which of the prompts are cut, or far from those of the calibration."""
    where = f"{key.title} on {key.target}"
    reporter.stage("draft" if draft else "verify", f"{count(samples.count, 'held-out clip')}, {where}")
    prompts = dict.fromkeys(samples[s][0] for s in range(samples.count))
    found = {prompt: lines for prompt in prompts if (lines := pipe.warnings(prompt_from_line(prompt).text))}
    if found:
        prompt, (line, *_) = next(iter(found.items()))
        reporter.note(f"{len(found)} of {count(len(prompts), 'prompt')}, the first {shortened(prompt)!r}: {line}")


def require_verified(report: VerifyReport, bundle: Path) -> None:
    """Raise VerificationError, naming everything that failed and where the bundle is, unless all is well."""
    failures = report.failures()
    if failures:
        raise VerificationError("; ".join(failures), fix=f"do not deploy {bundle}; report it with its {VERIFY_REPORT}")
