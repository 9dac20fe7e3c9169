"""`reports/` of a bundle: the verification as JSON, and the pictures that a person looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE, REPORTS, VERIFY_REPORT
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.metrics import psnr
from lemica_trt.core.values import value_from_json, write_value
from lemica_trt.ir.budget import FrontRow
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.report.contact_sheet import contact_sheet
from lemica_trt.report.plots import plot_front, plot_schedules

if TYPE_CHECKING:
    from lemica_trt.ir.report import Clip, VerifyReport


def write_reports(bundle: Bundle, report: VerifyReport, clips: Sequence[Clip]) -> None:
    """Write `verify.json`, `contact_sheet.png` (uncached beside the default plan) and, where the bundle
    has an error graph, `schedules.png`.

    Args:
        bundle: where to.
        report: what was verified.
        clips: what the sheet shows.
    """
    folder = bundle.path / REPORTS
    write_value(report, bundle.path / VERIFY_REPORT)
    plans = [bundle.plan(name) for name in bundle.plans]
    default = bundle.plan()
    if clips:
        rows = []
        for prompt, uncached, clip in clips:
            rows.append((f"{prompt}  –  uncached, {default.reference_steps or default.num_steps} full steps", uncached))
            rows.append((f"plan {default.name}, {default.budget} full steps: {psnr(clip, uncached):.1f} dB", clip))
        contact_sheet(rows, folder / "contact_sheet.png")
    if ERROR_GRAPH_FILE in bundle.manifest.files:
        graph = value_from_json(ErrorGraph, bundle.read_bytes(ERROR_GRAPH_FILE), where=ERROR_GRAPH_FILE)
        cached = [plan for plan in plans if plan.budget < plan.num_steps and plan.num_steps == graph.num_steps]
        plot_schedules(graph, sorted(cached, key=lambda plan: plan.name != default.name), folder / "schedules.png")


def write_front(bundle: Bundle, rows: Sequence[FrontRow]) -> Path:
    """Write `pareto.png`, quality against speed-up; its path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    path = bundle.path / REPORTS / "pareto.png"
    path.parent.mkdir(exist_ok=True)
    plot_front(rows, path, num_steps=bundle.manifest.profile.sampling.steps)
    return path
