"""Geometry of the charts on a report page: numbers in, places in a drawing of `WIDTH` units out; no picture library.

front_chart      quality by speed-up
schedule_chart   the error graph, and the full steps of each plan below it
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lemica_trt.ir.budget import FrontRow
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import PLAN, VerifyReport
from lemica_trt.report.ways import Strip, Way

WIDTH = 760
LINE = 15.0
"""Height of a line of text."""

LETTER = 6.4
"""Width of a letter, about."""

RAMP = ("#fde725", "#7ad151", "#22a884", "#2a788e", "#414487", "#440154")
"""Viridis at six places, cheap to expensive (van der Walt and Smith 2015)."""


def front_chart(
    report: VerifyReport, plans: Sequence[StepPlan], ways: Sequence[Way], front: Sequence[FrontRow]
) -> dict[str, Any] | None:
    """PSNR by speed-up: the bundle's plans on held-out clips, baselines of the default one, and the front that was
    measured on validation clips; None: nothing of it was.
    """
    default = next((way.quality.plan for way in ways if way.method == PLAN and way.quality is not None), None)
    points, validation = [], []
    speeds = {timing.plan: timing.speedup for timing in report.timing}
    for row in report.quality:
        if row.method == PLAN and (speedup := speeds.get(row.plan)):
            kind = "default" if row.plan == default else "plan"
            points.append((speedup, row.psnr, f"{row.plan}, {row.psnr:.1f} dB", kind))
    for way in ways:
        if way.quality is not None and way.method != PLAN and way.speedup is not None:
            points.append((way.speedup, way.quality.psnr, f"{way.name}, {way.quality.psnr:.1f} dB", "other"))
    for each in front:
        if each.speedup is not None and not each.dominated:
            validation.append((each.speedup, each.psnr))
    if not points:
        return None
    left, right, top, bottom = 62.0, WIDTH - 24.0, 16.0, 340.0
    xs, ys = zip(*((x, y) for x, y, *_ in [*points, *validation]))
    low, high = math.log2(min(xs)) - 0.2, math.log2(max(xs)) + 0.35
    floor, ceiling, step = _range(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / (high - low)
        return round(left + across * (right - left), 1), round(
            bottom - (y - floor) / (ceiling - floor) * (bottom - top), 1
        )

    ticks = [x for x in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100) if low <= math.log2(x) <= high]
    line = [at(x, y) for x, y, _, kind in sorted(points) if kind != "other"]
    return {
        "width": WIDTH,
        "height": 388,
        "box": (left, top, right, bottom),
        "x_ticks": [(at(x, floor)[0], f"{x:g}×") for x in ticks],
        "y_ticks": [(at(1, y)[1], f"{y:g}") for y in np.arange(floor, ceiling + step / 2, step).tolist()],
        "line": " ".join(f"{x},{y}" for x, y in line),
        "validation": " ".join(f"{x},{y}" for x, y in (at(*point) for point in sorted(validation))),
        "points": _labelled([(*at(x, y), text, kind) for x, y, text, kind in points], right),
    }


def _labelled(points: list[tuple[float, float, str, str]], right: float) -> list[dict[str, Any]]:
    """Each point with a place for its label where no other label and no point is; the default plan chooses first."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y, _, _ in points]
    made = []
    for x, y, text, kind in sorted(points, key=lambda point: ("default", "other", "plan").index(point[3])):
        wide = LETTER * len(text)
        beside = [(x + 9, y - 10), (x + 11, y + 4), (x + 8, y + 19), (x - 11 - wide, y + 4), (x - wide / 2, y - 13)]
        beside += [(x + 11, y + 4 + LINE * turn * sign) for turn in (1, 2, 3, 4) for sign in (-1, 1)]
        places = [(a, b) for a, b in beside if a + wide <= right and a >= 62] or beside[3:4]
        free = [place for place in places if not _hits((place[0], place[1] - 12, place[0] + wide, place[1] + 3), taken)]
        a, b = (free or places)[0]
        taken.append((a, b - 12, a + wide, b + 3))
        made.append({"x": x, "y": y, "text": text, "kind": kind, "label": (round(a, 1), round(b, 1))})
    return made


def _hits(box: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> bool:
    return any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)


def _range(low: float, high: float) -> tuple[float, float, float]:
    """Round limits around some values, and a round step between ticks."""
    span = max(high - low, 1.0)
    step = next(step for step in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0) if span / step <= 7)
    return step * math.floor((low - 0.04 * span) / step), step * math.ceil((high + 0.04 * span) / step), step


def schedule_chart(graph: ErrorGraph, strips: Sequence[Strip]) -> dict[str, Any]:
    """The error graph as a picture of one pixel a segment, the segments of the first strip that reuses, and strips."""
    left, right, top, row = 118.0, WIDTH - 132.0, 12.0, 24.0
    cell = (right - left) / graph.num_steps
    tall = max(8.0, min(20.0, 200.0 / graph.max_skip))
    bottom = top + tall * graph.max_skip
    errors = [edge.error for edge in graph.edges if edge.error > 0]
    low, high = (min(errors), max(errors)) if errors else (1.0, 1.0)
    reusing = next((strip for strip in strips if strip.reuses), None)
    outlined = []
    for start, stop in [] if reusing is None else pairwise((*reusing.full_steps, graph.num_steps)):
        if 1 < stop - start <= graph.max_skip + 1:
            outlined.append((round(left + start * cell, 1), round(bottom - (stop - start - 1) * tall, 1)))
    drawn = [
        {
            "name": f"{strip.name}, {len(strip.full_steps)} full",
            "text": "" if strip.quality is None else f"{strip.quality.psnr:.1f} dB",
            "kind": "default" if strip.is_default else "reused" if strip is reusing else "plan",
            "y": round(bottom + 16 + number * row, 1),
            "bars": [round(left + step * cell + 0.5, 2) for step in strip.full_steps],
        }
        for number, strip in enumerate(strips)
    ]
    end = bottom + 16 + len(strips) * row
    skips = [s for s in range(1, graph.max_skip + 1) if graph.max_skip <= 12 or s % 5 == 0]
    every = next(step for step in (5, 10, 20, 50, 100, 500, 1000) if graph.num_steps / step <= 12)
    return {
        "width": WIDTH,
        "height": round(end + 44, 1),
        "box": (left, top, right, bottom),
        "cell": (round(cell, 3), tall),
        "image": _heat_picture(graph, low, high),
        "outlined": outlined,
        "reusing": reusing.name if reusing is not None else None,
        "strips": drawn,
        "end": end,
        "y_ticks": [(round(bottom - (s - 0.5) * tall + 4, 1), str(s)) for s in skips],
        "x_ticks": [(round(left + (s + 0.5) * cell, 1), str(s)) for s in range(0, graph.num_steps, every)],
        "ramp": RAMP[::-1],
        "low": f"{low:.1e}",
        "high": f"{high:.1e}",
    }


def _heat_picture(graph: ErrorGraph, low: float, high: float) -> str:
    """PNG of one pixel a segment, as a data address; segments that were not measured are clear."""
    from PIL import Image

    ramp = np.array([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in RAMP], float)
    pixels = np.zeros((graph.max_skip, graph.num_steps, 4), np.uint8)
    for edge in graph.edges:
        share = 0.0 if edge.error <= low or high <= low else math.log(edge.error / low) / math.log(high / low)
        place = min(share, 1.0) * (len(RAMP) - 1)
        base = min(int(place), len(RAMP) - 2)
        colour = ramp[base] + (place - base) * (ramp[base + 1] - ramp[base])
        pixels[graph.max_skip - (edge.stop - edge.start - 1), edge.start] = [*colour.round(), 255]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
