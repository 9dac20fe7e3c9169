"""`reports/` of a bundle: the verification as JSON, and the pictures that a person looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lemica_trt.bundle import REPORTS, Bundle
from lemica_trt.graph import ErrorGraph
from lemica_trt.quality import psnr
from lemica_trt.report.contact_sheet import contact_sheet
from lemica_trt.report.plots import plot_schedules
from lemica_trt.values import value_from_json, write_value

if TYPE_CHECKING:
    from lemica_trt.verify import VerifyReport

CLIPS = 4
"""Prompts on the contact sheet."""


def write_reports(
    bundle: Bundle, report: VerifyReport, requests: Sequence[tuple[str, int]], *, error_graph: str
) -> None:
    """Write `verify.json`, `contact_sheet.png` (uncached beside the default plan) and `schedules.png`.

    Args:
        bundle: where to; it must have an uncached plan for the contact sheet.
        report: what was verified.
        requests: (prompt, seed) of held-out clips; the first few are shown.
        error_graph: path of the error graph in the bundle; plotted where the manifest lists it.
    """
    folder = bundle.path / REPORTS
    folder.mkdir(exist_ok=True)
    write_value(report, folder / "verify.json")
    plans = [bundle.plan(name) for name in bundle.plans]
    uncached = next((plan for plan in plans if plan.budget == plan.num_steps), None)
    default = bundle.plan()
    if uncached is not None and default.budget < default.num_steps:
        pipe = bundle.pipeline()
        rows = []
        for prompt, seed in requests[:CLIPS]:
            reference = pipe(prompt, seed=seed, plan=uncached.name).frames
            clip = pipe(prompt, seed=seed, plan=default.name).frames
            rows.append((f"{prompt}  –  uncached, {uncached.num_steps} full steps", reference))
            rows.append((f"plan {default.name}, {default.budget} full steps: {psnr(clip, reference):.1f} dB", clip))
        contact_sheet(rows, folder / "contact_sheet.png")
    if error_graph in bundle.manifest.files:
        graph = value_from_json(ErrorGraph, bundle.read_bytes(error_graph), where=error_graph)
        plot_schedules(graph, [plan for plan in plans if plan.budget < plan.num_steps], folder / "schedules.png")
