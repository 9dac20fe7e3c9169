"""Plots: what is drawn, where, and that every word lies within the picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_data import error_graph, plan

from lemica_trt.core.errors import MissingDependencyError
from lemica_trt.ir.budget import FrontRow
from lemica_trt.planning.budget import front_budgets
from lemica_trt.report.plots import plot_error_graph, plot_front, plot_quality, plot_schedules

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

pytestmark = pytest.mark.cpu

PLANS = [plan((0, 1, 4, 8, 12), 20), plan((0, 5, 10, 15), 20, name="uniform")]
GRAPH = error_graph(20, 7)
CURVES = {
    "predicted": [(15, 44.5), (10, 38.1)],
    "lemica": [(10, 30.2), (15, 35.4)],
    "least sum": [(10, 30.0), (15, 35.3)],
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Figures as they are written."""
    written: list[Any] = []
    save = Figure.savefig

    def savefig(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        written.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    yield written


def words(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def assert_tidy(figure: Any, path: Path) -> None:
    """1200 pixels wide, all text inside, no label over another."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width == 1200
        assert np.asarray(image.convert("L")).std() > 5
    extent = figure.get_tightbbox()  # inches, all that is drawn
    assert (
        extent.x0 >= 0 and extent.y0 >= 0 and extent.x1 <= figure.get_figwidth() and extent.y1 <= figure.get_figheight()
    )
    labels = [text.get_window_extent() for axes in figure.axes for text in [*axes.texts, axes.xaxis.label, axes.title]]
    assert not any(a.overlaps(b) for a, b in combinations([box for box in labels if box.width > 1], 2))


def outlined(axes: Any) -> set[tuple[float, float]]:
    return {patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()}


def test_heat_map_holds_every_edge_and_outlines_the_plan(figures: list[Any], tmp_path: Path) -> None:
    plot_error_graph(GRAPH, tmp_path / "graph.png", PLANS[0])
    (figure,) = figures
    assert_tidy(figure, tmp_path / "graph.png")
    axes, bar = figure.axes
    shown = axes.images[0].get_array()
    assert shown.shape == (7, 20)
    for edge in GRAPH.edges:
        assert shown[edge.stop - edge.start - 2, edge.start] == edge.error
    assert shown.count() == len(GRAPH.edges)
    # segments (1, 4), (4, 8), (8, 12), (12, 20): the cell centred on (start, steps skipped)
    assert outlined(axes) == {(0.5, 1.5), (3.5, 2.5), (7.5, 2.5), (11.5, 6.5)}
    assert axes.get_xlabel() == "start of the segment, step i"
    assert axes.get_ylabel() == "steps skipped, j − i − 1"
    assert "latent units" in bar.get_ylabel()
    assert any("cogvideox-tiny" in text and "plan default, 5 of 20" in text for text in words(figure))


def test_schedules_are_strips_on_the_heat_map_s_steps(figures: list[Any], tmp_path: Path) -> None:
    plot_schedules(GRAPH, PLANS, tmp_path / "schedules.png")
    (figure,) = figures
    assert_tidy(figure, tmp_path / "schedules.png")
    above, below = figure.axes[:2]
    assert above.get_xlim() == below.get_xlim() == (-0.5, 19.5)
    assert [label.get_text() for label in below.get_yticklabels()] == [made.name for made in PLANS]
    pale = [container for container in below.containers if len(container) in (15, 16)]
    full = [container for container in below.containers if len(container) in (4, 5)]
    assert len(pale) == len(full) == 2
    for made, bars in zip(PLANS, full):
        assert tuple(bar.get_x() + bar.get_width() / 2 for bar in bars) == pytest.approx(made.full_steps)
    assert len(outlined(above)) == 4


def test_schedules_without_plans_are_the_heat_map(figures: list[Any], tmp_path: Path) -> None:
    plot_schedules(GRAPH, [], tmp_path / "schedules.png")
    assert_tidy(figures[0], tmp_path / "schedules.png")
    assert not outlined(figures[0].axes[0])


def test_quality_curves_are_sorted_and_named(figures: list[Any], tmp_path: Path) -> None:
    plot_quality(CURVES, tmp_path / "quality.png", num_steps=50)
    (figure,) = figures
    assert_tidy(figure, tmp_path / "quality.png")
    (axes,) = figure.axes
    assert [tuple(line.get_xdata()) for line in axes.lines] == [(10, 15)] * 3
    assert tuple(axes.lines[0].get_ydata()) == (38.1, 44.5)
    names = {text.get_text().strip(): text.get_position()[1] for text in axes.texts}
    assert set(names) == set(CURVES)
    assert names["predicted"] > names["lemica"] > names["least sum"]
    assert axes.get_xlabel() == "budget B, full steps of 50"
    assert axes.get_ylabel() == "PSNR against the uncached run, dB"
    assert list(axes.get_xticks()) == [10, 15]


def front_row(budget: int, psnr: float, dominated: bool = False, timed: bool = True) -> FrontRow:
    return FrontRow(
        plan=f"b{budget}",
        method="fitted",
        budget=budget,
        psnr=psnr,
        psnr_low=psnr - 1,
        psnr_p5=psnr - 9,
        psnr_worst=psnr - 12,
        seconds=0.1 * budget if timed else None,
        speedup=40 / budget if timed else None,
        dominated=dominated,
    )


@pytest.mark.parametrize("timed", [True, False])
def test_the_front_is_drawn_through_what_is_not_dominated(figures: list[Any], tmp_path: Path, timed: bool) -> None:
    budgets = front_budgets(50, 9)
    rows = [front_row(b, 20 + 1.5 * b - 9 * (b == 9), dominated=b == 9, timed=timed) for b in budgets]
    plot_front(rows, tmp_path / "pareto.png", num_steps=50)
    (figure,) = figures
    assert_tidy(figure, tmp_path / "pareto.png")
    (axes,) = figure.axes
    front = axes.lines[0]
    at = [(40 if timed else 50) / b for b in reversed(budgets) if b != 9]
    assert list(front.get_xdata()) == pytest.approx(at) and list(front.get_ydata()) == [
        20 + 1.5 * b for b in reversed(budgets) if b != 9
    ]
    assert {text.get_text() for text in axes.texts} == set(map(str, budgets))
    assert ("predicted" in axes.get_xlabel()) == timed
    bars = [line.get_ydata() for line in axes.lines[1:] if len(line.get_ydata()) == 2]
    assert [bar[1] - bar[0] for bar in bars] == pytest.approx([9.0] * len(budgets))


def test_pictures_are_reproducible_and_leave_no_trace(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    for name in ("a.png", "b.png"):
        plot_schedules(GRAPH, PLANS, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert dict(mpl.rcParams) == before


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plan default has 12 steps, the error graph 20"):
        plot_error_graph(GRAPH, tmp_path / "x.png", plan((0, 3), 12))
    with pytest.raises(ValueError, match="at least one curve"):
        plot_quality({"lemica": []}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one row"):
        plot_front([], tmp_path / "x.png", num_steps=50)
    assert not (tmp_path / "x.png").exists()


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="pip install 'lemica-trt\\[build\\]'"):
        plot_error_graph(GRAPH, tmp_path / "x.png")
