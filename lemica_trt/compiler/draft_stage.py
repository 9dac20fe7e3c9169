"""Engines → a draft of the bundle, long before there is a calibration: it runs, is verified, and is replaced by the
bundle when that is verified. A build that is interrupted leaves it.

Its plans are the uncached one, and of the first budget one that needs no calibration. What is verified of engines and
the uncached plan is not verified again (`ir.report.FirstRun`), so that a draft costs no more than a run of its plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lemica_trt.bundle.manifest import MANIFEST, plan_path
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.reports import store_report
from lemica_trt.bundle.workspace import candidate_folder
from lemica_trt.bundle.writing import move_bundle, write_bundle
from lemica_trt.compiler import artifacts
from lemica_trt.compiler.artifacts import Draft, Engines, Exported, ModelFacts
from lemica_trt.compiler.context import Context, solver_tables
from lemica_trt.compiler.stage import Writes
from lemica_trt.core.errors import InputError, LemicaError
from lemica_trt.core.values import read_value, write_value
from lemica_trt.evaluate.step_timer import runnable_backend
from lemica_trt.ir.budget import MinPsnr
from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.layout import misfit
from lemica_trt.planning.planner import full_steps_for, planners
from lemica_trt.planning.search import resolve_budgets
from lemica_trt.planning.step_plan import UNCACHED

if TYPE_CHECKING:
    from lemica_trt.evaluate.verify import First

METHODS = ("stock:dpmsolver++", "published", "uniform", "stock:first-order")
"""What plans a draft, the first that can: none of them needs a calibration."""


def run_draft(context: Context, folder: Path) -> Writes:
    """Everything but a calibration → a bundle at the output, verified; nothing where a bundle lies there that is no
    draft of this build.

    Raises:
        VerificationError: the draft stays in `candidate_folder`.
    """
    output, found = context.output, Draft()
    assert output is not None
    writes: Writes = {"draft": [artifacts.DRAFT_FILE]}
    if not (output / MANIFEST).is_file() or _is_draft(context, output):
        plans = list(_plans(context))
        names = ", ".join(plan.name if plan.name == UNCACHED else f"{plan.name} by {plan.method}" for plan in plans)
        context.reporter.stage("draft", f"{output}: {names}; until there is a better plan")
        bundle = write_draft(context, plans)
        first = _verified(context, bundle) if context.inputs.request.verify_samples > 0 else None
        if first is not None:
            np.save(folder / artifacts.DRAFT_LATENTS, first.latents, allow_pickle=False)
            writes["draft"].append(artifacts.DRAFT_LATENTS)
        found = Draft(manifest=move_bundle(bundle, output).digest, run=None if first is None else first.run)
    write_value(found, folder / artifacts.DRAFT_FILE)
    return writes


def first_of_draft(context: Context) -> First | None:
    """What the verification of the draft found, for that of the bundle; None: there was none."""
    from lemica_trt.evaluate.verify import First

    found = context.read_if_there(Draft, artifacts.DRAFT_FILE)
    if found is None or found.run is None:
        return None
    latents = np.load(io.BytesIO(context.view.read_bytes(artifacts.DRAFT_LATENTS)), allow_pickle=False)
    return First(found.run, latents)


def is_there(context: Context) -> bool:
    """Whether a bundle lies at the output, the draft or a better one."""
    return context.output is not None and (context.output / MANIFEST).is_file()


def left_behind(context: Context) -> str | None:
    """What an interrupted build leaves at its output, in a line; None: no draft."""
    output = context.output
    if output is None or not is_there(context) or not _is_draft(context, output):
        return None
    plan = Bundle.open(output, trusted=()).plan()
    how = "" if plan.name == UNCACHED else f" or by {plan.method} in {plan.budget} of {plan.num_steps}"
    return (
        f"{output} is a bundle that runs, with all steps{how}: a draft; the same command goes on to the plan that was "
        "asked for"
    )


def _is_draft(context: Context, output: Path) -> bool:
    """Whether the bundle at the output is a draft of this work folder, be it of other inputs."""
    with contextlib.suppress(InputError):
        digest = Bundle.open(output, trusted=()).digest
        for stage, file in (("draft", artifacts.DRAFT_FILE), ("early", artifacts.EARLY_FILE)):
            if digest == _manifest_of(context, stage, file):
                return True
    return False


def _manifest_of(context: Context, stage: str, file: str) -> str | None:
    """Of the draft that a stage has left."""
    record = context.work.record(stage)
    if record is None or file not in record.files:
        return None
    return read_value(Draft, context.work.root / file).manifest


def _plans(context: Context) -> Iterator[StepPlan]:
    """The default plan first; that is the uncached one where no other is possible."""
    request = context.inputs.request
    problem = dataclasses.replace(context.problem(None), solver=solver_tables(context.table))
    for planner in (planners()[name] for name in METHODS):
        with contextlib.suppress(LemicaError):  # it lacks something here, or has no plan of this budget
            (budget,) = resolve_budgets(request.budgets[:1], [planner], context.times, problem.table.num_steps, None)
            count = None if isinstance(budget, MinPsnr) else full_steps_for(planner, budget)
            if count is not None and misfit(plan := planner(problem, count), context.layout) is None:
                yield plan
                break
    yield context.read(StepPlan, plan_path(UNCACHED))


def write_draft(context: Context, plans: list[StepPlan]) -> Bundle:
    """A bundle of these plans, the default first, beside the output."""
    exported = context.read(Exported, artifacts.EXPORT_FILE)
    listed = [path for name in ("sampler", "reference", "graphs", "engines") for path in context.view.artifact(name)]
    return write_bundle(
        candidate_folder(context.output or Path()),
        profile=context.built_profile,
        graphs=exported.graphs,
        plans=plans,
        default_plan=plans[0].name,
        encoders=exported.encoders,
        engines=context.read(Engines, artifacts.ENGINES_FILE).entries,
        files={path: context.work.root / path for path in listed if "/" in path},
        revision=context.read(ModelFacts, artifacts.MODEL_FILE).revision,
        versions=exported.versions,
    )


def _verified(context: Context, bundle: Bundle) -> First | None:
    """Of one held-out clip; None where no engines run here."""
    from lemica_trt.evaluate.samples import held_out_samples
    from lemica_trt.evaluate.verify import require_verified, verify

    backend, _ = runnable_backend(bundle)
    if backend is None:
        return None
    samples = held_out_samples(context.inputs.held_out, 1)
    found = verify(bundle, context.model, samples, reporter=context.reporter, backend=backend, draft=True)
    store_report(found.report, bundle)
    require_verified(found.report, bundle.path)
    return found.first
