"""Results → pictures of docs/, in the house's style (`lemica_trt.report.plots`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from record import PeerRow, Peers
from tables import OURS, best_settings, is_plan, peer_name

from lemica_trt.report.plots import ACCENT, GREY, INK, PALE, house_figure

TONES = {
    "cache-dit": ("#123f63", "#3d7ea6", "#86b9da"),
    "diffusers": ("#4f3813", "#97752f", "#cfae70"),
    OURS: (INK, "#6f6a66", "#aaa49f"),
}
"""Library → colours of its methods."""

LINES = ("-", "--", ":")
"""Of the methods with the first colour, and of those that have it again."""

MARKERS = "osD^vPX*<"

SHOWN = 30.0
"""Full steps up to which methods are drawn: beyond, there is little to save."""


def peers_picture(result: Peers) -> str:
    """File name of its picture."""
    return f"peers-{result.model}.png"


def plot_peers(result: Peers, path: Path) -> None:
    """PSNR against full steps, a line a method: above the mean over clips, below the worst clip.

    Args:
        path: PNG to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    from matplotlib.ticker import MultipleLocator

    methods: dict[str, list[PeerRow]] = {}
    for row in result.rows:
        if not row.refusal and np.mean(row.full_steps) <= SHOWN:
            methods.setdefault(peer_name(row), []).append(row)
    with house_figure(path, 8.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        used: dict[str, int] = {}
        for name, rows in methods.items():
            own, library = is_plan(rows[0]), rows[0].library
            used[library] = used.get(library, -1) + 1
            style: dict[str, Any] = {
                "color": ACCENT if own else TONES[library][used[library] % len(TONES[library])],
                "marker": MARKERS[used[library] % len(MARKERS)],
                "zorder": 3 if own else 2,
            }
            best = best_settings(rows)
            for axes, number in ((above, np.mean), (below, np.min)):
                places = {id(row): (float(np.mean(row.full_steps)), float(number(row.psnr))) for row in rows}
                rest = [places[id(row)] for row in rows if row not in best]
                if rest:
                    axes.plot(*zip(*rest), **style, linestyle="none", markersize=3.5, alpha=0.35)
                line = [places[id(row)] for row in best]
                wide = {"markersize": 7, "linewidth": 2.2} if own else {"markersize": 5, "linewidth": 1.1}
                dashes = LINES[used[library] // len(TONES[library]) % len(LINES)]
                axes.plot(*zip(*line), **style, **wide, linestyle=dashes, label=name)
        for axes, what in ((above, "mean over clips"), (below, "worst clip")):
            axes.set_ylabel(f"PSNR to the uncached run, dB\n({what})")
            axes.grid(color=PALE)
            axes.set_axisbelow(True)
        above.set_title(f"{result.model}, {result.steps} steps: quality by the work of the transformer's blocks")
        below.xaxis.set_major_locator(MultipleLocator(5))
        below.set_xlabel(
            f"work of the blocks, in full steps of {result.steps}   (lines: the best settings by mean; pale: others)"
        )
        legend = figure.legend(
            *above.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5, labelcolor=INK
        )
        legend.get_frame().set_edgecolor(GREY)
