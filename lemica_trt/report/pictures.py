"""The pictures in the `reports/` folder of a bundle: what a verification found and kept → PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lemica_trt.core.errors import InputError
from lemica_trt.ir.budget import FrontRow
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.kept import UNCACHED, Kept, KeptRun
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import VerifyReport
from lemica_trt.report import CONTACT_SHEET, FRONT, SCHEDULES
from lemica_trt.report.contact_sheet import Block, Row, contact_sheet
from lemica_trt.report.plots import plot_front, plot_schedules
from lemica_trt.report.ways import Way, strips_of, ways_of

SHEET_CLIPS = 2
"""Clips on a contact sheet: the worst, and the median."""


def write_pictures(
    folder: Path,
    report: VerifyReport,
    kept: Kept | None,
    plans: Sequence[StepPlan],
    default: StepPlan,
    graph: ErrorGraph | None,
) -> None:
    """Write the contact sheet and, where there is an error graph, the plans on it.

    Args:
        folder: where to.
        report: of the bundle.
        kept: what the sheet shows; None: there is no sheet.
        plans: of the bundle.
        default: one of them.
        graph: of the bundle.

    Raises:
        InputError: a picture that was kept is damaged.
        MissingDependencyError: matplotlib is not installed.
    """
    if kept is not None:
        write_contact_sheet(folder / CONTACT_SHEET, report, kept, default, model="" if graph is None else graph.model)
    if graph is not None:
        plot_schedules(graph, strips_of(report, kept, plans, default), folder / SCHEDULES)


def write_contact_sheet(
    path: Path, report: VerifyReport, kept: Kept, default: StepPlan, *, model: str = "", timed: bool = True
) -> None:
    """Write the clip that the plan does worst on and the median one, in all ways in which they were made.

    Args:
        model: named in the title.
        timed: whether to say what each way takes.

    Raises:
        InputError: a picture that was kept is damaged.
    """
    ways = {way.method: way for way in ways_of(report, default)}
    count, clips = len(kept.clips.samples), kept.clips.clips[:SHEET_CLIPS]
    title = f"{default.budget} of {default.num_steps} steps in full, and what else they can be spent on"
    caption = (
        "Look at the right half: what each row differs by from the first, times 8. Black is no difference; what is "
        "left are edges that lie elsewhere. dB: PSNR against the first row."
    )
    if timed:
        predicted = any(way.predicted for way in ways.values())
        caption += f" Seconds: the denoising loop, {report.backend}, {report.machine}"
        caption += "; ≈: from the times of single steps." if predicted else "."
    places = ("worst", "median", "best")
    blocks = [
        Block(
            f"“{clip.prompt}”" + (f" – {place} of {count} held-out clips by the plan’s PSNR" if count > 1 else ""),
            [_row(run, ways.get(run.method), kept, timed) for run in clip.runs],
        )
        for clip, place in zip(clips, places)
    ]
    contact_sheet(f"{model}: {title}" if model else title, caption, blocks, path)


def _row(run: KeptRun, way: Way | None, kept: Kept, timed: bool) -> Row:
    name = run.method if way is None else way.name
    lines = [] if run.psnr is None else [f"{run.psnr:.1f} dB"]
    lines += [] if way is None or not timed else [way.cost]
    if run.method != UNCACHED:
        lines.append(f"{run.budget} full steps")
    frames = frames_from_picture(kept, run.frames)
    if run.difference is None:
        return Row(name, lines, frames, aside="what each row below differs by from this one, × 8")
    return Row(name, lines, frames, frames_from_picture(kept, run.difference))


def frames_from_picture(kept: Kept, path: str) -> npt.NDArray[np.uint8]:
    """Frames uint8 [F, H, W, 3] out of one of the pictures that were kept.

    Raises:
        InputError: it is damaged.
    """
    value = kept.clips
    size = (value.width, len(value.frames) * value.height)
    try:
        with Image.open(io.BytesIO(kept.pictures[path]), formats=["WEBP"]) as image:
            if image.size != size:
                raise InputError(f"{path}: expected {size[0]}×{size[1]} pixels, got {image.size[0]}×{image.size[1]}")
            pixels: npt.NDArray[Any] = np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a WebP picture, got: {error}") from None
    return pixels.reshape(len(value.frames), value.height, value.width, 3)


def write_front(
    rows: Sequence[FrontRow], folder: Path, *, num_steps: int, report: VerifyReport | None = None, plan: StepPlan
) -> None:
    """Write quality against speed-up.

    Args:
        report: of the bundle; None: it has none.
        plan: the bundle's default one.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    folder.mkdir(exist_ok=True)
    ways = [] if report is None else [way for way in ways_of(report, plan) if way.quality is not None]
    plot_front(rows, folder / FRONT, num_steps=num_steps, kept=plan.name, ways=ways)
