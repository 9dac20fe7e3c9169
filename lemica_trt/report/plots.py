"""Plots of error graphs, plans and quality: PNG files, about 1200 pixels wide. Matplotlib is imported when called."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lemica_trt.core.errors import MissingDependencyError, install_command
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.plan import StepPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lemica_trt.ir.budget import FrontRow

DPI = 150
WIDTH = 8.0
"""Inches: 1200 pixels."""

INK = "#262626"
GREY = "#8a8a86"
PALE = "#e4e4df"
ACCENT = "#d1495b"
COLOURS = ("#d1495b", "#00798c", "#c8871b", "#5b5f97", "#66a182", "#8d6b94", "#30638e", "#a26769")
MARKERS = "osD^vPX*"

STYLE: Any = {  # matplotlib's rcParams
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "grid.color": PALE,
}


def plot_error_graph(graph: ErrorGraph, path: str | os.PathLike[str], plan: StepPlan | None = None) -> None:
    """Heat map of the error graph: start of a segment × steps skipped; the plan's segments are outlined.

    Args:
        graph: measured edges; cells that were not measured stay white.
        path: PNG to write.
        plan: on the same number of steps.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: plan and graph have different numbers of steps.
    """
    with _figure(path, 3.9) as figure:
        axes = figure.subplots()
        _heat_map(figure, axes, graph, [] if plan is None else [plan])
        axes.set_xlabel("start of the segment, step i")


def plot_schedules(graph: ErrorGraph, plans: Sequence[StepPlan], path: str | os.PathLike[str]) -> None:
    """All plans on the error graph: the heat map with the first plan's segments, and a strip of full steps a plan.

    Args:
        graph: measured edges.
        plans: drawn in the given order, from the top; none: the heat map alone.
        path: PNG to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: plan and graph have different numbers of steps.
    """
    if not plans:
        plot_error_graph(graph, path)
        return
    strips = 0.5 + 0.3 * len(plans)
    with _figure(path, 4.3 + strips) as figure:
        above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.1, strips]})
        _heat_map(figure, above, graph, plans[:1])
        _strips(below, plans)


def plot_quality(
    curves: Mapping[str, Sequence[tuple[int, float]]], path: str | os.PathLike[str], *, num_steps: int | None = None
) -> None:
    """PSNR against budget, a line a method, labelled at its end.

    Args:
        curves: method → (budget B, PSNR in dB), any order; the first method is emphasised.
        path: PNG to write.
        num_steps: N, named on the axis.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: no curves, or an empty one.
    """
    if not curves or not all(curves.values()):
        raise ValueError("expected at least one curve, none of them empty")
    with _figure(path, 4.8) as figure:
        axes = figure.subplots()
        ends = []
        for index, (name, points) in enumerate(curves.items()):
            budgets, values = zip(*sorted(points))
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(
                budgets,
                values,
                color=colour,
                linewidth=2.4 if index == 0 else 1.5,
                marker=MARKERS[index % len(MARKERS)],
                markersize=6 if index == 0 else 5,
                zorder=3 if index == 0 else 2,
            )
            ends.append((values[-1], budgets[-1], name, colour))
        axes.set_xticks(sorted({budget for points in curves.values() for budget, _ in points}))
        axes.set_xlabel("budget B, full steps" + (f" of {num_steps}" if num_steps else ""))
        axes.set_ylabel("PSNR against the uncached run, dB")
        axes.set_title("Quality at equal numbers of full steps")
        axes.grid(axis="y")
        axes.margins(x=0.04)
        _label_ends(figure, axes, ends)


def plot_front(rows: Sequence[FrontRow], path: str | os.PathLike[str], *, num_steps: int) -> None:
    """PSNR against predicted speed-up, a point a budget, labelled with its full steps; the front is drawn through.

    Bars reach from the 5th percentile over clips to the mean. Points off the front are pale. Where step times are not
    known, the axis is N / B.

    Args:
        rows: see `budget.front_rows`.
        path: PNG to write.
        num_steps: N.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("expected at least one row")
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    predicted = all(row.speedup is not None for row in rows)
    at = [(row.speedup if predicted and row.speedup is not None else num_steps / row.budget, row) for row in rows]
    with _figure(path, 4.8) as figure:
        axes = figure.subplots()
        on = sorted((x, row.psnr) for x, row in at if not row.dominated)
        axes.plot(*zip(*on), color=ACCENT, linewidth=2, zorder=2)
        for x, row in at:
            colour = GREY if row.dominated else ACCENT
            axes.plot([x, x], [row.psnr_p5, row.psnr], color=PALE, linewidth=3, zorder=1, solid_capstyle="butt")
            axes.plot(x, row.psnr, "o", color=colour, markersize=6, zorder=3)
            axes.annotate(
                str(row.budget), (x, row.psnr), xytext=(4, 6), textcoords="offset points", color=colour, fontsize=9.5
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel(
            "predicted speed-up of the denoising loop on this machine, ×" if predicted else "all steps / full steps, ×"
        )
        axes.set_ylabel("PSNR against the uncached run, dB")
        axes.set_title(
            f"Quality by speed-up; numbers: full steps of {num_steps};\nbars: down to the 5th percentile of clips"
        )
        axes.grid()
        axes.set_axisbelow(True)


def _label_ends(figure: Figure, axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each line (value, budget, name, colour) at the right, names that would touch moved apart evenly."""
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    height = (top - bottom) / axes.get_window_extent().height * 14 * DPI / 72  # one line of text, in dB
    right = max(budget for _, budget, _, _ in ends)
    groups: list[list[tuple[float, float, str, str]]] = []
    for end in sorted(ends):
        groups.append([end])
        while (
            len(groups) > 1
            and _centre(groups[-1]) - _centre(groups[-2]) < height * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
    for group in groups:
        for place, (_, _, name, colour) in enumerate(group):
            y = _centre(group) + height * (place - (len(group) - 1) / 2)
            axes.text(right, y, f"   {name}", color=colour, va="center", fontsize=9.5, clip_on=False)


def _centre(group: list[tuple[float, float, str, str]]) -> float:
    return sum(value for value, *_ in group) / len(group)


def _heat_map(figure: Figure, axes: Axes, graph: ErrorGraph, plans: Sequence[StepPlan]) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    errors = np.full((graph.max_skip, graph.num_steps), np.nan)
    for edge in graph.edges:
        errors[edge.stop - edge.start - 2, edge.start] = edge.error
    shown = np.ma.masked_less_equal(np.ma.masked_invalid(errors), 0)
    norm = LogNorm(shown.min(), shown.max()) if shown.count() and shown.min() < shown.max() else None
    image = axes.imshow(
        shown,
        origin="lower",
        aspect="auto",
        cmap="viridis_r",
        norm=norm,
        extent=(-0.5, graph.num_steps - 0.5, 0.5, graph.max_skip + 0.5),
        interpolation="none",
    )
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.set_label("error of the segment\nmean |Δ latent|, latent units")
    bar.outline.set_visible(False)
    for plan in plans:
        _check_steps(graph, plan)
        for start, stop in _segments(plan):
            cell = Rectangle((start - 0.5, stop - start - 1.5), 1, 1, fill=False, edgecolor=ACCENT, linewidth=2)
            axes.add_patch(cell)
    drawn = "".join(f"\noutlined: plan {plan.name}, {plan.budget} of {plan.num_steps} steps in full" for plan in plans)
    axes.set_title(f"{graph.model}: what caching each segment costs{drawn}")
    axes.set_ylabel("steps skipped, j − i − 1")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.5, graph.num_steps - 0.5)


def _strips(axes: Axes, plans: Sequence[StepPlan]) -> None:
    for row, plan in enumerate(plans):
        full = np.array(plan.full_steps)
        rest = np.setdiff1d(np.arange(plan.num_steps), full)
        axes.barh(np.full(len(rest), row), 0.86, 0.72, left=rest - 0.43, color=PALE)
        axes.barh(np.full(len(full), row), 0.86, 0.72, left=full - 0.43, color=ACCENT if row == 0 else INK)
    axes.set_yticks(range(len(plans)), [plan.name for plan in plans])
    axes.set_ylim(len(plans) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("denoising step i   (dark or red: full, pale: skipped)")


def _segments(plan: StepPlan) -> list[tuple[int, int]]:
    """(i, j) of the cached segments."""
    full = plan.full_steps
    return [(i, j) for i, j in zip(full, (*full[1:], plan.num_steps)) if j - i > 1]


def _check_steps(graph: ErrorGraph, plan: StepPlan) -> None:
    if plan.num_steps != graph.num_steps:
        raise ValueError(f"plan {plan.name} has {plan.num_steps} steps, the error graph {graph.num_steps}")


@contextmanager
def _figure(path: str | os.PathLike[str], height: float) -> Iterator[Figure]:
    """A figure in the house's style, written to `path` when the block ends without an error. No window, no global."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib", fix=install_command("build")) from error
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, format="png", metadata={"Software": None})
