"""A plan as a table of its rows; on one line: `ir.timeline`."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.timeline import FULL, NONE, SKIP, guidance_text, mark, timeline_text

STYLES = {FULL: "bold", SKIP: "dim", NONE: "dim italic"}


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
    if plan.guidance_history:
        columns["guidance terms"] = [_numbers(row.guidance_terms) for row in rows]
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
        table.add_row(*cells, style=STYLES[mark(row)] if row is not rows[-1] else "")
    return Group(Text(title, style="bold"), Text(timeline_text(plan, 100)), table)


def _numbers(coefficients: tuple[float, ...]) -> str:
    return "  ".join(f"{c:.5g}" for c in coefficients)


def _guidance(row: PlanRow) -> str:
    offset, factor = row.guidance
    parts = [f"{offset:g}"] * bool(offset) + [f"{factor:.4g}·g"] * bool(factor)
    return " + ".join(parts) or "0"
