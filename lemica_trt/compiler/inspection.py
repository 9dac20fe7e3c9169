"""What a bundle, a plan or an error graph on disk is, as values that `report` shows."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import UNSET

from lemica_trt.bundle.contents import read_if_listed
from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE, FRONT_FILE, REPORTS, SELECTION_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.reports import stored_kept, stored_report
from lemica_trt.compiler.plan_quality import known_quality
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.values import read_value, write_bytes
from lemica_trt.ir.budget import Front
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import BundleSummary, ShapeSummary
from lemica_trt.ir.trials import TrialTables
from lemica_trt.planning.budget import front_rows
from lemica_trt.report import PAGE, PICTURES
from lemica_trt.report.page import PageFacts, page_html


def summarize(bundle: Bundle) -> BundleSummary:
    """A bundle for people."""
    manifest = bundle.manifest
    return BundleSummary(
        profile=manifest.profile,
        revision=manifest.revision,
        dtype=manifest.graphs.dtype,
        image=manifest.graphs.image is not UNSET,
        changeable=len(
            {(its.part, its.name) for graph in manifest.graphs.graphs for its in (graph.weights or {}).values()}
        ),
        last_image="last_image" in manifest.graphs.sources,
        plans=tuple(bundle.plan(name) for name in bundle.plans),
        default_plan=manifest.default_plan,
        engines=manifest.engines,
        size=sum(entry.size for entry in manifest.files.values()),
        files=len(manifest.files),
        versions=manifest.versions,
        measured=known_quality(bundle.path),
        further=tuple(shape_summary(bundle, shape) for shape in bundle.shapes[1:]),
        pictures={
            f"{REPORTS}/{name}": what for name, what in PICTURES.items() if (bundle.path / REPORTS / name).is_file()
        },
    )


def shape_summary(bundle: Bundle, shape: str) -> ShapeSummary:
    """Which plans of a bundle hold at one of its shapes, and why the others do not."""
    there = bundle.at(shape)
    bucket = there.manifest.buckets[shape]
    measured = {found.rows_digest: found.text for found in bucket.plans or ()}
    held, refused = {}, {}
    for name in bundle.at(bundle.shapes[0]).plans:
        try:
            held[name] = measured.get(there.plan(name).rows_digest, "")
        except UsageError as error:
            refused[name] = error.what
    return ShapeSummary(name=shape, held=held, refused=refused)


def page_facts(bundle: Bundle) -> PageFacts:
    """What the report page of a bundle shows.

    Raises:
        InputError: a file of the bundle that it shows was altered.
    """
    report, front = stored_report(bundle), read_if_listed(bundle, Front, FRONT_FILE)
    steps = None if report is None else report.steps
    return PageFacts(
        bundle=summarize(bundle),
        digest=bundle.digest,
        report=report,
        kept=stored_kept(bundle),
        graph=read_if_listed(bundle, ErrorGraph, ERROR_GRAPH_FILE),
        trials=read_if_listed(bundle, TrialTables, SELECTION_FILE),
        front=() if front is None else front_rows(front, steps),
    )


def write_page(bundle: Bundle, path: Path | None = None) -> Path:
    """Write the report page of a bundle.

    Args:
        path: where to; None: into its `reports/`.

    Raises:
        InputError: a file of the bundle that it shows was altered.
        MissingDependencyError: Jinja is not installed.
    """
    target = path or bundle.path / REPORTS / PAGE
    write_bytes(page_html(page_facts(bundle)).encode(), target)
    return target


def inspect(path: Path, plan: str | None) -> tuple[object, BundleSummary | StepPlan | ErrorGraph]:
    """The value behind a path – bundle, plan or error graph – as it is stored, and what to show of it.

    Of a bundle that is its manifest, and as `measured` what is known of each plan (`MeasuredPlan` or None).

    Raises:
        InputError: it is none of these.
        UsageError: the bundle has no such plan.
    """
    shown: StepPlan | ErrorGraph
    if not path.is_file():
        bundle = Bundle.open(path)
        if plan is None:
            summary = summarize(bundle)
            measured = {plan.name: summary.measured.of(plan) for plan in summary.plans}
            return {**msgspec.to_builtins(bundle.manifest), "measured": measured}, summary
        shown = bundle.plan(None if plan == "default" else plan)
        return shown, shown
    try:
        shown = read_value(ErrorGraph, path)
    except InputError:
        try:
            shown = read_value(StepPlan, path)
        except InputError as error:
            raise InputError(
                f"{path}: expected a bundle, a plan or an error graph; read as a plan: {error.what}",
                fix="give the folder of a bundle, or a file of its plans/ or calibration/",
            ) from None
    return shown, shown
