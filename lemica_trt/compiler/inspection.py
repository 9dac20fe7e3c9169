"""What a bundle, a plan or an error graph on disk is, as values that `report` shows."""

from __future__ import annotations

from pathlib import Path

from lemica_trt.bundle.manifest import REPORTS
from lemica_trt.bundle.reading import Bundle
from lemica_trt.compiler.plan_quality import known_quality
from lemica_trt.core.errors import InputError
from lemica_trt.core.values import read_value
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import BundleSummary
from lemica_trt.report import PICTURES


def summarize(bundle: Bundle) -> BundleSummary:
    """A bundle for people."""
    manifest = bundle.manifest
    return BundleSummary(
        profile=manifest.profile,
        revision=manifest.revision,
        dtype=manifest.graphs.dtype,
        plans=tuple(bundle.plan(name) for name in bundle.plans),
        default_plan=manifest.default_plan,
        engines=manifest.engines,
        size=sum(entry.size for entry in manifest.files.values()),
        files=len(manifest.files),
        versions=manifest.versions,
        measured=known_quality(bundle.path),
        pictures={
            f"{REPORTS}/{name}": what for name, what in PICTURES.items() if (bundle.path / REPORTS / name).is_file()
        },
    )


def inspect(path: Path, plan: str | None) -> tuple[object, BundleSummary | StepPlan | ErrorGraph]:
    """The value behind a path – bundle, plan or error graph – as it is stored, and what to show of it.

    Raises:
        InputError: it is none of these.
        UsageError: the bundle has no such plan.
    """
    shown: StepPlan | ErrorGraph
    if not path.is_file():
        bundle = Bundle.open(path)
        if plan is None:
            return bundle.manifest, summarize(bundle)
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
