"""Plots of error graphs, plans and quality: PNG files, about 1200 pixels wide. Matplotlib is imported when called."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lemica_trt.core.errors import MissingDependencyError, install_command
from lemica_trt.core.progress import count
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.report import PLAN
from lemica_trt.report.ways import Strip, Way

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
MARKERS = "sD^vPX*"

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


def plot_schedules(graph: ErrorGraph, strips: Sequence[Strip], path: str | os.PathLike[str]) -> None:
    """Heat map of the error graph, start of a segment × steps skipped, and below it a strip of full steps a plan.

    Only a plan that reuses residuals has the costs that the graph shows: the segments of the first such strip are
    outlined, and it is named.

    Args:
        graph: measured edges; cells that were not measured stay white.
        strips: drawn in the given order, from the top; none: the heat map alone.
        path: PNG to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: a strip has steps that the graph does not have.
    """
    for strip in strips:
        if strip.full_steps[-1] >= graph.num_steps:
            raise ValueError(f"{strip.name} has step {strip.full_steps[-1]}, the error graph {graph.num_steps} steps")
    below = 0.9 + 0.3 * len(strips)
    with house_figure(path, 4.2 + (below if strips else 0)) as figure:
        if not strips:
            axes = figure.subplots()
            _heat_map(figure, axes, graph, None)
            axes.set_xlabel("full step i")
            return
        above, axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.1, below]})
        _heat_map(figure, above, graph, next((strip for strip in strips if strip.reuses), None))
        _draw_strips(axes, strips, graph.num_steps)


def plot_front(
    rows: Sequence[FrontRow],
    path: str | os.PathLike[str],
    *,
    num_steps: int,
    kept: str | None = None,
    ways: Sequence[Way] = (),
) -> None:
    """PSNR against speed-up: a line through the best plan of each budget, and beside it what verification measured.

    Bars reach from the 5th percentile over clips to the mean. Points off the front are pale. Where step times are not
    known, the axis is N / B.

    Args:
        rows: see `budget.front_rows`; validation clips.
        path: PNG to write.
        num_steps: N.
        kept: name of the plan that is ringed.
        ways: the bundle's default plan and its baselines on held-out clips, each with its quality.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("expected at least one row")
    predicted = all(row.speedup is not None for row in rows)
    with house_figure(path, 5.2) as figure:
        axes = figure.subplots()
        at = [(row.speedup if predicted and row.speedup is not None else num_steps / row.budget, row) for row in rows]
        on = sorted((x, row.psnr) for x, row in at if not row.dominated)
        axes.plot(*zip(*on), color=ACCENT, linewidth=2, zorder=2)
        axes.plot([], [], "o-", color=ACCENT, linewidth=2, label="best plan of each budget, validation clips")
        for x, row in at:
            axes.plot([x, x], [row.psnr_p5, row.psnr], color=PALE, linewidth=3, zorder=1, solid_capstyle="butt")
            axes.plot(x, row.psnr, "o", color=GREY if row.dominated else ACCENT, markersize=6, zorder=3)
            if row.plan == kept:
                axes.plot(x, row.psnr, "o", color=INK, markersize=13, fillstyle="none", zorder=4)
        if any(row.plan == kept for row in rows):
            axes.plot([], [], "o", color=INK, markersize=11, fillstyle="none", label=f"the default plan, {kept}")
        markers = iter(MARKERS)
        for way in ways:
            if way.quality is None:
                continue
            x = way.speedup if predicted and way.speedup is not None else num_steps / way.budget
            marker, colour = next(markers), ACCENT if way.method == PLAN else INK
            label = f"{way.name}, {count(len(way.quality.each_psnr), 'held-out clip')}"
            axes.plot(x, way.quality.psnr, marker, color=colour, markersize=8, fillstyle="none", zorder=4, label=label)
        _front_axes(axes, predicted)
        axes.set_title(f"Quality by speed-up; numbers: full steps of {num_steps}")
        axes.legend(loc="best", fontsize=9, frameon=True, framealpha=1, edgecolor="none")
        placed: list[Any] = []
        for x, row in sorted(at, key=lambda pair: (pair[1].dominated, pair[1].budget)):
            _label(figure, axes, x, row, placed)


def _front_axes(axes: Axes, predicted: bool) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("speed-up of the denoising loop on this machine, ×" if predicted else "all steps / full steps, ×")
    axes.set_ylabel("PSNR against the uncached run, dB\n(bars: down to the 5th percentile of clips)")
    axes.margins(y=0.08)
    axes.grid()
    axes.set_axisbelow(True)


def _label(figure: Figure, axes: Axes, x: float, row: FrontRow, placed: list[Any]) -> None:
    """The number of full steps beside a point, where no other stands; not at all where there is no such place."""
    for place in ((5, 6), (5, -14), (-16, 6), (-16, -14), (0, 14), (0, -22)):
        colour = GREY if row.dominated else ACCENT
        made = axes.annotate(
            str(row.budget), (x, row.psnr), xytext=place, textcoords="offset points", color=colour, fontsize=9.5
        )
        box = made.get_window_extent(figure.canvas.get_renderer()).padded(2)  # type: ignore[attr-defined]
        if not any(box.overlaps(other) for other in placed):
            placed.append(box)
            return
        made.remove()


def _heat_map(figure: Figure, axes: Axes, graph: ErrorGraph, outlined: Strip | None) -> None:
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
    bar = figure.colorbar(image, cax=axes.inset_axes((1.015, 0, 0.025, 1)))
    bar.set_label("mean |change of the final latents|\nyellow: cheap, violet: expensive")
    bar.outline.set_visible(False)
    for start, stop in [] if outlined is None else _segments(outlined, graph.num_steps):
        cell = Rectangle((start - 0.5, stop - start - 1.5), 1, 1, fill=False, edgecolor=ACCENT, linewidth=2)
        axes.add_patch(cell)
    drawn = (
        ""
        if outlined is None
        else f"\nred: the segments that {outlined.name} reuses in its {len(outlined.full_steps)} full steps"
    )
    axes.set_title(f"{graph.model}: what it costs to reuse full step i up to the next full step, j{drawn}")
    axes.set_ylabel("steps left out between i and j\n(j − i − 1)")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.5, graph.num_steps - 0.5)


def _draw_strips(axes: Axes, strips: Sequence[Strip], num_steps: int) -> None:
    outlined = next((strip for strip in strips if strip.reuses), None)
    for row, strip in enumerate(strips):
        full = np.array(strip.full_steps)
        rest = np.setdiff1d(np.arange(num_steps), full)
        colour = ACCENT if strip is outlined else INK if strip.is_default else GREY
        axes.barh(np.full(len(rest), row), 0.86, 0.72, left=rest - 0.43, color=PALE)
        axes.barh(np.full(len(full), row), 0.86, 0.72, left=full - 0.43, color=colour)
        place, weight = ("axes fraction", "data"), "bold" if strip.is_default else "normal"
        axes.annotate(_decibels(strip), (1.015, row), xycoords=place, va="center", fontsize=9.5, weight=weight)
    names = [f"{strip.name}, {len(strip.full_steps)} full" for strip in strips]
    axes.set_yticks(range(len(strips)), names)
    for label, strip in zip(axes.get_yticklabels(), strips):
        label.set_fontweight("bold" if strip.is_default else "normal")
    axes.set_ylim(len(strips) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("denoising step i   (dark: runs in full, pale: left out; bold: the default plan)")


def _decibels(strip: Strip) -> str:
    if strip.quality is None:
        return ""
    return f"{strip.quality.psnr:.1f} dB, {count(len(strip.quality.each_psnr), 'clip')}"


def _segments(strip: Strip, num_steps: int) -> list[tuple[int, int]]:
    """(i, j) of the segments between full steps, the last one up to N."""
    full = strip.full_steps
    return [(i, j) for i, j in zip(full, (*full[1:], num_steps)) if j - i > 1]


@contextmanager
def house_figure(path: str | os.PathLike[str], height: float) -> Iterator[Figure]:
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
