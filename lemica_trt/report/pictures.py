"""The pictures in the `reports/` folder of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lemica_trt.core.metrics import psnr
from lemica_trt.ir.budget import FrontRow
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import Clip
from lemica_trt.report import CONTACT_SHEET, FRONT, SCHEDULES
from lemica_trt.report.contact_sheet import contact_sheet
from lemica_trt.report.plots import plot_front, plot_schedules


def write_pictures(
    folder: Path, clips: Sequence[Clip], plans: Sequence[StepPlan], default: StepPlan, graph: ErrorGraph | None
) -> None:
    """Write the contact sheet (uncached beside the default plan) and, where there is an error graph, the plans on it.

    Args:
        folder: where to.
        clips: what the sheet shows; none: there is no sheet.
        plans: of the bundle.
        default: one of them.
        graph: of the bundle.
    """
    if clips:
        rows = []
        for prompt, uncached, clip in clips:
            rows.append((f"{prompt}  –  uncached, {default.reference_steps or default.num_steps} full steps", uncached))
            rows.append((f"plan {default.name}, {default.budget} full steps: {psnr(clip, uncached):.1f} dB", clip))
        contact_sheet(rows, folder / CONTACT_SHEET)
    if graph is not None:
        cached = [plan for plan in plans if plan.budget < plan.num_steps and plan.num_steps == graph.num_steps]
        plot_schedules(graph, sorted(cached, key=lambda plan: plan.name != default.name), folder / SCHEDULES)


def write_front(rows: Sequence[FrontRow], folder: Path, *, num_steps: int) -> None:
    """Write quality against speed-up.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    folder.mkdir(exist_ok=True)
    plot_front(rows, folder / FRONT, num_steps=num_steps)
