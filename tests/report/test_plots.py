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
from report_data import error_graph, quality

from lemica_trt.core.errors import MissingDependencyError
from lemica_trt.ir.budget import FrontRow
from lemica_trt.planning.budget import front_budgets
from lemica_trt.report.plots import plot_front, plot_schedules
from lemica_trt.report.ways import Strip, Way

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

pytestmark = pytest.mark.cpu

SEGMENTS = (0, 1, 4, 8, 12)
STRIPS = [
    Strip("b4", (0, 5, 10, 15), quality(4, "plan", 44.5, 8), False, True),
    Strip("LeMiCa", SEGMENTS, quality(5, "lemica", 31.2, 1), True, False),
]
GRAPH = error_graph(20, 7)


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


def test_heat_map_holds_every_edge_and_outlines_the_plan_that_has_its_costs(figures: list[Any], tmp_path: Path) -> None:
    plot_schedules(GRAPH, STRIPS, tmp_path / "schedules.png")
    (figure,) = figures
    assert_tidy(figure, tmp_path / "schedules.png")
    above, below = figure.axes[:2]
    shown = above.images[0].get_array()
    assert shown.shape == (7, 20)
    for edge in GRAPH.edges:
        assert shown[edge.stop - edge.start - 2, edge.start] == edge.error
    assert shown.count() == len(GRAPH.edges)
    # segments (1, 4), (4, 8), (8, 12), (12, 20) of LeMiCa, the first that reuses: the cell of (start, steps skipped)
    assert outlined(above) == {(0.5, 1.5), (3.5, 2.5), (7.5, 2.5), (11.5, 6.5)}
    assert "j − i − 1" in above.get_ylabel() and "next full step, j" in above.get_title(loc="left")
    assert any("cogvideox-tiny" in text and "LeMiCa reuses in its 5 full steps" in text for text in words(figure))
    assert any("yellow: cheap" in text for text in words(figure))
    assert above.get_xlim() == below.get_xlim() == (-0.5, 19.5)


def test_schedules_are_strips_with_their_quality(figures: list[Any], tmp_path: Path) -> None:
    plot_schedules(GRAPH, STRIPS, tmp_path / "schedules.png")
    below = figures[0].axes[1]
    assert [label.get_text() for label in below.get_yticklabels()] == ["b4, 4 full", "LeMiCa, 5 full"]
    assert [text.get_text() for text in below.texts] == ["44.5 dB, 8 clips", "31.2 dB, 1 clip"]
    full = [container for container in below.containers if len(container) in (4, 5)]
    assert len(full) == len(STRIPS)
    for strip, bars in zip(STRIPS, full):
        assert tuple(bar.get_x() + bar.get_width() / 2 for bar in bars) == pytest.approx(strip.full_steps)


@pytest.mark.parametrize("strips", [[], STRIPS[:1]])
def test_no_outline_of_costs_that_no_plan_has(figures: list[Any], tmp_path: Path, strips: list[Strip]) -> None:
    plot_schedules(GRAPH, strips, tmp_path / "schedules.png")
    assert_tidy(figures[0], tmp_path / "schedules.png")
    assert not outlined(figures[0].axes[0])
    assert not any("reuses" in text for text in words(figures[0]))


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


WAYS = [
    Way("plan", "plan b15", 15, 50, 0.2, 3.3, False, quality(15, "plan", 41.0, 8)),
    Way("lemica", "LeMiCa", 15, 50, 0.2, 3.2, True, quality(15, "lemica", 33.0, 8)),
]


@pytest.mark.parametrize("timed", [True, False])
def test_the_front_is_drawn_through_what_is_not_dominated(figures: list[Any], tmp_path: Path, timed: bool) -> None:
    budgets = front_budgets(50, 9)
    rows = [front_row(b, 20 + 1.5 * b - 9 * (b == 9), dominated=b == 9, timed=timed) for b in budgets]
    kept = next(b for b in budgets if b > 12)
    plot_front(rows, tmp_path / "pareto.png", num_steps=50, kept=f"b{kept}", ways=WAYS)
    (figure,) = figures
    assert_tidy(figure, tmp_path / "pareto.png")
    (axes,) = figure.axes
    front = axes.lines[0]
    factor = 40 if timed else 50
    at = [factor / b for b in reversed(budgets) if b != 9]
    assert list(front.get_xdata()) == pytest.approx(at) and list(front.get_ydata()) == [
        20 + 1.5 * b for b in reversed(budgets) if b != 9
    ]
    numbers = {text.get_text() for text in axes.texts}
    assert numbers <= set(map(str, budgets)) and len(numbers) >= len(budgets) - 2  # none where it would lie on another
    assert "this machine" in axes.get_xlabel() if timed else "full steps" in axes.get_xlabel()
    bars = [line.get_ydata() for line in axes.lines[1:] if len(line.get_ydata()) == 2]
    assert [bar[1] - bar[0] for bar in bars] == pytest.approx([9.0] * len(budgets))
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[1:] == [f"the default plan, b{kept}", "plan b15, 8 held-out clips", "LeMiCa, 8 held-out clips"]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() in "sD"]
    assert points == [(3.3 if timed else 50 / 15, 41.0), (3.2 if timed else 50 / 15, 33.0)]


def test_pictures_are_reproducible_and_leave_no_trace(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    for name in ("a.png", "b.png"):
        plot_schedules(GRAPH, STRIPS, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert dict(mpl.rcParams) == before


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="b4 has step 15, the error graph 12 steps"):
        plot_schedules(error_graph(12, 3), STRIPS, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one row"):
        plot_front([], tmp_path / "x.png", num_steps=50)
    assert not (tmp_path / "x.png").exists()


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="pip install 'lemica-trt\\[build\\]'"):
        plot_schedules(GRAPH, STRIPS, tmp_path / "x.png")
