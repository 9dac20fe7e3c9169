"""Graphs, engines, plans → a bundle beside the one that it will replace; and its verification there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import UNSET

from lemica_trt.bundle.manifest import MANIFEST, PROMPTS_FILE, REPORTS, plan_path
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.reports import store_kept, store_report, stored_report
from lemica_trt.bundle.workspace import Files, candidate_folder
from lemica_trt.bundle.writing import add_plan, write_bundle
from lemica_trt.compiler import artifacts
from lemica_trt.compiler.artifacts import Engines, Exported, ModelFacts, PlanIndex, Verified, Written
from lemica_trt.compiler.context import Context
from lemica_trt.compiler.draft_stage import first_of_draft
from lemica_trt.compiler.inspection import write_page
from lemica_trt.compiler.requests import Inputs
from lemica_trt.compiler.stage import Writes
from lemica_trt.core.errors import InputError
from lemica_trt.core.progress import Reporter, size
from lemica_trt.core.values import json_bytes, write_value
from lemica_trt.evaluate.step_timer import runnable_backend
from lemica_trt.ir.graphs import EncoderSpec
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.prompts import PromptFacts, facts_from_prompts, prompt_from_line
from lemica_trt.planning.layout import misfit
from lemica_trt.planning.planner import PAPER
from lemica_trt.planning.step_plan import UNCACHED
from lemica_trt.runtime.text import PromptTokenizer

if TYPE_CHECKING:
    from lemica_trt.evaluate.verify import First
    from lemica_trt.ir.report import VerifyReport
    from lemica_trt.models import Model


def run_bundle(context: Context, folder: Path) -> Writes:
    """Everything → a bundle at `candidate_folder`; where the one that it would replace is the same, that stays."""
    assert context.output is not None
    context.reporter.stage("bundle", str(context.output))
    exported = context.read(Exported, artifacts.EXPORT_FILE)
    index = context.read(PlanIndex, artifacts.PLANS_FILE)
    candidate = candidate_folder(context.output)
    bundle = write_bundle(
        candidate,
        profile=context.built_profile,
        graphs=exported.graphs,
        plans=[context.read(StepPlan, plan_path(name)) for name in dict.fromkeys((*index.plans, UNCACHED))],
        default_plan=index.plans[0],
        encoders=exported.encoders,
        engines=context.read(Engines, artifacts.ENGINES_FILE).entries,
        files={**{path: context.work.root / path for path in context.bundle_files}, **calibration_facts(context)},
        revision=context.read(ModelFacts, artifacts.MODEL_FILE).revision,
        versions=exported.versions,
    )
    context.reporter.note(size(sum(entry.size for entry in bundle.manifest.files.values())))
    if _bundle_at(context.output, bundle.digest) is not None:
        shutil.rmtree(candidate)
    write_value(Written(manifest=bundle.digest), folder / artifacts.BUNDLE_FILE)
    return {"bundle": [artifacts.BUNDLE_FILE]}


def calibration_facts(context: Context) -> dict[str, bytes]:
    """`PROMPTS_FILE`, where there was a calibration and there is a text encoder: what a bundle says of its prompts."""
    encoders = context.read(Exported, artifacts.EXPORT_FILE).encoders
    if not encoders or not context.takes_part("calibrate"):
        return {}
    return {PROMPTS_FILE: json_bytes(facts_of(context.inputs, encoders, context.view))}


def facts_of(inputs: Inputs, encoders: Sequence[EncoderSpec], files: Files) -> PromptFacts:
    """What is kept of the prompts that a calibration, its fits and trials have used.

    Args:
        encoders: at least one.
        files: with the tokenizers.
    """
    settings = inputs.profile.calibration
    used = inputs.prompts[: settings.fit_samples + settings.validation_samples]
    longest = max(encoders, key=lambda encoder: encoder.length)
    tokenizer = PromptTokenizer(longest, files.read_bytes(longest.tokenizer))
    prompts = tuple(dict.fromkeys(prompt_from_line(line).text for line in used))
    return facts_from_prompts(prompts, [tokenizer.count(prompt) for prompt in prompts])


def written_bundle(context: Context) -> Bundle | None:
    """The bundle that was written last, or what its verification made of it, where it lies, whole; None: it is gone, or
    was altered."""
    assert context.output is not None
    digest = context.read(Written, artifacts.BUNDLE_FILE).manifest
    verified = context.read_if_there(Verified, artifacts.VERIFIED_FILE)
    if verified is not None and verified.replaced is not UNSET and verified.replaced[0] == digest:
        digest = verified.replaced[1]
    return _bundle_at(context.output, digest) or _bundle_at(candidate_folder(context.output), digest)


def _bundle_at(path: Path, digest: str) -> Bundle | None:
    if not (path / MANIFEST).is_file():
        return None
    try:
        bundle = Bundle.open(path, trusted=())
        if bundle.digest != digest:
            return None
        bundle.check()
    except InputError:
        return None
    return bundle


def run_verify(context: Context, folder: Path) -> Writes:
    """Bundle, held-out prompts → report, on the first of its engines that run here.

    Where LeMiCa's plan does better on the held-out clips than the default one that `auto` chose, by more than chance,
    it takes that one's place, and the bundle is verified again.

    Raises:
        VerificationError: after the report was stored in the bundle.
    """
    bundle = written_bundle(context)
    assert bundle is not None
    written = context.read(Written, artifacts.BUNDLE_FILE).manifest
    backend, unverified = runnable_backend(bundle)
    if backend is not None:
        report = _verified(context, bundle, backend)
        better = None if bundle.digest != written else _better_plan(context, bundle, report)
        if better is not None:
            context.reporter.note(f"{better.name}: {better.method} takes the place of {bundle.plan().method}")
            bundle = add_plan(bundle, better)
            _verified(context, bundle, backend)
    replaced = UNSET if bundle.digest == written else (written, bundle.digest)
    verified = Verified(backend=backend, unverified=unverified, replaced=replaced)
    write_value(verified, folder / artifacts.VERIFIED_FILE)
    return {"verified": [artifacts.VERIFIED_FILE]}


def _verified(context: Context, bundle: Bundle, backend: str) -> VerifyReport:
    inputs = context.inputs
    return verify_bundle(
        bundle, context.model, inputs.held_out, inputs.request.verify_samples, context.reporter, backend=backend,
        further=inputs.request.further_samples, first=first_of_draft(context),
    )  # fmt: skip


def _better_plan(context: Context, bundle: Bundle, report: VerifyReport) -> StepPlan | None:
    """LeMiCa's plan, where it is to take the place of the default one.

    Only where `auto` chose for a number of full steps, all run in one precision, and N steps are the reference.
    """
    from lemica_trt.evaluate.baselines import baselines
    from lemica_trt.evaluate.quality import error_graph_of, is_ahead
    from lemica_trt.ir.report import PLAN

    plan, request = bundle.plan(), context.inputs.request
    rows = {row.method: row for row in report.quality if row.plan == plan.name}
    chosen = "auto" in request.methods and request.schedule is None and isinstance(request.budgets[0], int)
    if not chosen or plan.reference_steps is not None or report.precision is not UNSET:
        return None
    if PAPER not in rows or PLAN not in rows or not is_ahead(rows[PAPER], rows[PLAN]):
        return None
    found = baselines(plan, context.model, error_graph_of(bundle), (PAPER,)).get(PAPER)
    layout = bundle.manifest.graphs.layout
    return None if found is None or misfit(found, layout) is not None else found


def verify_bundle(
    bundle: Bundle,
    model: Model,
    prompts: Sequence[str],
    samples: int,
    reporter: Reporter,
    *,
    backend: str,
    further: int | None = None,
    first: First | None = None,
) -> VerifyReport:
    """Verify, store the report and its pictures in the bundle, and fail if something is not as it must be.

    Args:
        prompts: held out.
        samples: how many clips are compared.
        backend: which engines.
        further: clips of plans beside the default one; None: as many.
        first: as `evaluate.verify.verify` takes it.

    Raises:
        IntegrityError: the bundle is not whole.
        MissingDependencyError, UnsupportedError: these engines cannot run here.
        VerificationError: after the report was stored.
    """
    from lemica_trt.compiler.plan_quality import quality_from_report, store_quality
    from lemica_trt.evaluate.quality import baselines_ahead, error_graph_of
    from lemica_trt.evaluate.samples import held_out_samples
    from lemica_trt.evaluate.verify import require_verified, verify
    from lemica_trt.report.pictures import write_pictures

    held_out = held_out_samples(prompts, samples)
    report, kept, _ = verify(bundle, model, held_out, reporter=reporter, backend=backend, further=further, first=first)
    store_report(report, bundle)
    store_kept(kept, bundle)
    plans = [bundle.plan(name) for name in bundle.plans]
    store_quality(bundle.path, quality_from_report(report, plans))
    write_pictures(bundle.path / REPORTS, report, kept, plans, bundle.plan(), error_graph_of(bundle))
    write_page(bundle)
    for line in baselines_ahead(report.quality, bundle.plan()):
        reporter.note(line)
    require_verified(report, bundle.path)
    return report


def report_of(context: Context) -> VerifyReport | None:
    """The report of the bundle that was written last; None: no engines run here, or it is of another bundle."""
    bundle, verified = written_bundle(context), context.read_if_there(Verified, artifacts.VERIFIED_FILE)
    if bundle is None or verified is None or verified.backend is None:
        return None
    report = stored_report(bundle)
    return report if report is not None and report.manifest_digest == bundle.digest else None


def is_verified(context: Context) -> bool:
    """Whether the bundle has the report of the verification that was recorded, and it says that all is well."""
    if context.read(Verified, artifacts.VERIFIED_FILE).backend is None:
        return True
    report = report_of(context)
    return report is not None and not report.failures()
