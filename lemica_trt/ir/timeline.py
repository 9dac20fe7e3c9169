"""A plan on one line: as text, and as a small picture."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lemica_trt.ir.plan import PlanRow, StepPlan

FULL, MIXED, SKIP, NONE = "■", "▪", "·", " "
"""Marks of a timeline: the whole DiT; several steps a mark, some of them full; the skip graph; no graph at all."""


def mark(row: PlanRow) -> str:
    """The mark of a row."""
    return FULL if row.full else SKIP if row.cached else NONE


def timeline_text(plan: StepPlan, width: int) -> str:
    """One character a denoising step: ■ full, · skip, blank where no graph runs (reused or folded steps).

    A plan of more steps than `width` is drawn to scale, several steps a character: ■ all of them full, ▪ some, · none.

    Args:
        width: most characters, at least 1.

    Raises:
        ValueError: `width` below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    marks = [NONE] * plan.num_steps
    for row in plan.rows[:-1]:
        marks[row.step] = mark(row)
    if plan.num_steps <= width:
        return "".join(marks)
    bounds = [plan.num_steps * k // width for k in range(width + 1)]
    cells = ["".join(marks[a:b]) for a, b in pairwise(bounds)]
    return "".join(FULL if set(c) == {FULL} else MIXED if FULL in c else SKIP if SKIP in c else NONE for c in cells)


def guidance_text(plan: StepPlan) -> str:
    """For which guidance scales of a request a plan holds: `2 … 7`, or `any`."""
    return "any" if plan.guidance_range is None else " … ".join(f"{scale:g}" for scale in plan.guidance_range)


def timeline_svg(plan: StepPlan) -> str:
    """One bar a denoising step, as SVG text: high where the whole DiT runs, low where a part of it does."""
    marks, step, high = timeline_text(plan, plan.num_steps), 8, 24
    bars = [
        f'<rect x="{step * i + 1}" y="{high - height}" width="{step - 2}" height="{height}"/>'
        for i, height in enumerate({FULL: high, SKIP: 8}.get(character, 2) for character in marks)
    ]
    size = f'width="{step * len(marks)}" height="{high}"'
    label = f"{plan.budget} of {plan.num_steps} steps run in full"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} fill="currentColor" role="img" aria-label="{label}">'
    return head + "".join(bars) + "</svg>"


def plan_line(plan: StepPlan) -> str:
    """What a plan is, in one line."""
    return (
        f"{plan.name}: {plan.budget} of {plan.num_steps} steps in full, {plan.method}, {plan.scheduler}, "
        f"guidance {guidance_text(plan)}"
    )
