"""A plan on one line, and a plan as a table of its rows."""

from __future__ import annotations

from itertools import pairwise

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lemica_trt.ir.plan import PlanRow, StepPlan

FULL, MIXED, SKIP, NONE = "■", "▪", "·", " "
"""Marks of a timeline: the whole DiT; several steps a mark, some of them full; the skip graph; no graph at all."""


STYLES = {FULL: "bold", SKIP: "dim", NONE: "dim italic"}


def _mark(row: PlanRow) -> str:
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
        marks[row.step] = _mark(row)
    if plan.num_steps <= width:
        return "".join(marks)
    bounds = [plan.num_steps * k // width for k in range(width + 1)]
    cells = ["".join(marks[a:b]) for a, b in pairwise(bounds)]
    return "".join(FULL if set(c) == {FULL} else MIXED if FULL in c else SKIP if SKIP in c else NONE for c in cells)


def guidance_text(plan: StepPlan) -> str:
    """For which guidance scales of a request a plan holds: `2 … 7`, or `any`."""
    return "any" if plan.guidance_range is None else " … ".join(f"{scale:g}" for scale in plan.guidance_range)


def plan_table(plan: StepPlan) -> RenderableType:
    """A plan for rich to print: what it is, its timeline, and a table of its rows, coefficients newest first.

    Columns that would say the same in every row are left out; printed into a pipe it is plain text.
    """
    title = (
        f"plan {plan.name}: {plan.budget} of {plan.num_steps} steps in full, "
        f"{plan.scheduler}, guidance {plan.guidance_scale:g} ({guidance_text(plan)}), planned by {plan.method}"
    )
    if plan.reference_steps is not None:
        title += f", compared with {plan.reference_steps} steps"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows = plan.rows
    columns = {
        "step": [str(row.step) for row in rows],
        "timestep": ["" if row.timestep is None else f"{row.timestep:.6g}" for row in rows],
        "graph": ["result" if row is rows[-1] else row.variant or "" for row in rows],
        "latents": [_numbers(row.latents) for row in rows],
        "outputs": [_numbers(row.outputs) for row in rows],
    }
    if plan.stochastic:
        columns["noise"] = [_numbers(row.noise) for row in rows]
    if any(row.in_scale != 1.0 for row in rows):
        columns["in scale"] = [_numbers((row.in_scale,)) for row in rows[:-1]] + [""]
    if any(row.guidance != (0.0, 1.0) for row in rows):
        columns["guidance"] = [_guidance(row) for row in rows[:-1]] + [""]
    for slot in plan.cache_depths:
        weights = [next((read.weights for read in row.caches if read.slot == slot), ()) for row in rows]
        if any(numbers not in ((), (1.0,)) for numbers in weights):
            columns[slot] = [_numbers(numbers) for numbers in weights]
    if any(row.reuse for row in rows):
        columns["reuse"] = [_numbers(row.reuse) for row in rows]
    for name in columns:
        right = name in ("step", "timestep")
        table.add_column(name, justify="right" if right else "left", no_wrap=name in ("step", "timestep", "graph"))
    for row, cells in zip(rows, zip(*columns.values())):
        table.add_row(*cells, style=STYLES[_mark(row)] if row is not rows[-1] else "")
    return Group(Text(title, style="bold"), Text(timeline_text(plan, 100)), table)


def _numbers(coefficients: tuple[float, ...]) -> str:
    return "  ".join(f"{c:.5g}" for c in coefficients)


def _guidance(row: PlanRow) -> str:
    offset, factor = row.guidance
    return f"{offset:g} + {factor:.4g}·g" if offset else f"{factor:.4g}·g"
