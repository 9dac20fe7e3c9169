"""Does a bundle do what it must, and how good are its plans?

    agreement   graphs and whole runs on the bundle's engines against PyTorch and diffusers
    quality     each plan on held-out prompts; beside the default one LeMiCa's and the sampler with as few steps
    timing      a full step, a skipped step, each whole plan, and what a plan costs beyond its steps, of the same runs

Knows nothing of how the bundle was made.
"""

from __future__ import annotations

from pathlib import Path

from lemica_trt.backends.machine import describe_machine
from lemica_trt.bundle.manifest import VERIFY_REPORT
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError, VerificationError
from lemica_trt.core.progress import Reporter, Tally, count
from lemica_trt.core.text import shortened
from lemica_trt.core.values import read_value
from lemica_trt.evaluate.agreement import check_graphs, check_runs
from lemica_trt.evaluate.deployed import Deployed
from lemica_trt.evaluate.quality import cases_of, measure_quality, quality_steps
from lemica_trt.evaluate.samples import Samples
from lemica_trt.evaluate.timing import TIMED_BESIDE, backend_name, measure_steps
from lemica_trt.ir.report import Clip, VerifyReport
from lemica_trt.models import Model
from lemica_trt.runtime.pipeline import Pipeline


def stored_report(bundle: Bundle) -> VerifyReport | None:
    """The report in a bundle's `reports/`, if there is one that this version can read."""
    try:
        return read_value(VerifyReport, bundle.path / VERIFY_REPORT)
    except InputError:
        return None


def verify(
    bundle: Bundle,
    model: Model,
    samples: Samples,
    *,
    reporter: Reporter,
    backend: str | None = None,
    further: int | None = None,
) -> tuple[VerifyReport, list[Clip]]:
    """Verify a bundle against the model that it was built from.

    Args:
        bundle: what to verify; every file is checked first.
        model: the same model in PyTorch.
        samples: the held-out ones, see `evaluate.samples`.
        backend: which engines; None: the preferred ones.
        further: how many of the samples plans beside the default one run on; None: all.

    Returns:
        The report, and some clips to look at.

    Raises:
        IntegrityError: a file is altered or missing.
        VerificationError: a result of the model itself is not finite.
    """
    bundle.check()
    pipe = Pipeline(bundle, backend=backend)
    key = bundle.engine(backend).key
    reporter.stage("verify", f"{samples.count} held-out clips, {key.backend} {key.version} on {key.target}")
    _warn(pipe, samples, reporter)
    graphs, plans = check_graphs(pipe, model), [bundle.plan(name) for name in bundle.plans]
    cases = cases_of(bundle, model, samples.count, samples.count if further is None else further)
    compared = sum(plan.budget for plan in plans) + quality_steps(cases, samples.count)
    compared += 0 if cases else sum(plan.budget for plan in plans)  # nothing to compare: one run of each
    tally = Tally(reporter, TIMED_BESIDE + compared)
    deployed = Deployed(pipe, tally)
    agreement = check_runs(deployed, model, *samples[0], tally)
    steps = measure_steps(pipe, known=deployed.full_step(max(plans, key=lambda plan: plan.budget)))
    tally(TIMED_BESIDE)
    quality, clips = measure_quality(deployed, model, samples, cases, tally)
    report = VerifyReport(
        manifest_digest=bundle.manifest.digest,
        samples=samples.count,
        machine=describe_machine(),
        backend=backend_name(key),
        dtype=bundle.manifest.profile.dtype,
        graphs=tuple(graphs),
        agreement=tuple(agreement),
        quality=tuple(quality),
        timing=tuple(deployed.timing(plans)),
        steps=steps,
    )
    return report, clips


def _warn(pipe: Pipeline, samples: Samples, reporter: Reporter) -> None:
    """Say in one line which of the prompts are cut, or far from those of the calibration."""
    prompts = dict.fromkeys(samples[s][0] for s in range(samples.count))
    found = {prompt: lines for prompt in prompts if (lines := pipe.warnings(prompt))}
    if found:
        prompt, (line, *_) = next(iter(found.items()))
        reporter.note(f"{len(found)} of {count(len(prompts), 'prompt')}, the first {shortened(prompt)!r}: {line}")


def require_verified(report: VerifyReport, bundle: Path) -> None:
    """Raise VerificationError, naming everything that failed and where the bundle is, unless all is well."""
    failures = report.failures()
    if failures:
        raise VerificationError("; ".join(failures), fix=f"do not deploy {bundle}; report it with its {VERIFY_REPORT}")
