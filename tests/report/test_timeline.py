"""Plans as text."""

from __future__ import annotations

import io

import pytest
from report_data import plan
from rich.console import Console

from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.timeline import timeline_text
from lemica_trt.report.timeline import plan_table

pytestmark = pytest.mark.null


def printed(made: StepPlan, width: int = 160) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(plan_table(made))
    return stream.getvalue()


def test_one_mark_a_step() -> None:
    assert timeline_text(plan((0, 1, 4), num_steps=6), 6) == "■■··■·"
    assert timeline_text(plan((0, 1, 4), num_steps=6), 80) == "■■··■·"


def test_many_steps_are_drawn_to_scale() -> None:
    made = plan((0, 1, 2, 3, 9), num_steps=12)
    assert timeline_text(made, 6) == "■■··▪·"
    assert timeline_text(made, 1) == "▪"
    for width in range(1, 12):
        assert len(timeline_text(made, width)) == width
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        timeline_text(made, 0)


def folded() -> StepPlan:
    """Full at 0 and 2, step 1 without a graph, step 3 folded away; noise, scales, guidance and reuse all in use."""
    rows = (
        PlanRow(variant="full", step=0, latents=(14.6,), timestep=999.0, in_scale=0.068, guidance=(1.0, 0.25)),
        PlanRow(
            variant=None, step=1, latents=(1.0,), outputs=(-0.5,), timestep=600.0, reuse=(1.0,), draws=1, noise=(0.125,)
        ),
        PlanRow(variant="full", step=2, latents=(1.0, 0.5), outputs=(-1.5, 0.25), timestep=300.0),
        PlanRow(variant=None, step=4, latents=(1.0,), outputs=(1 / 3,)),
    )
    return StepPlan(
        name="tight",
        num_steps=4,
        guidance_scale=6.0,
        rows=rows,
        scheduler="EulerAncestralDiscreteScheduler",
        sampler_digest="0",
        method="given",
    )


def test_steps_without_a_graph_are_blank() -> None:
    assert timeline_text(folded(), 10) == "■ ■ "


def test_table_says_what_the_plan_is_and_what_each_row_does() -> None:
    made = plan((0, 1, 4), num_steps=6, name="fast")
    text = printed(made)
    lines = [line.split() for line in text.splitlines()]
    assert "plan fast: 3 of 6 steps in full, Toy, guidance 6 (any), planned by lemica" in text
    assert "■■··■·" in text
    assert ["step", "timestep", "graph", "latents", "outputs"] in lines
    assert ["0", "1000", "full", "1"] in lines
    assert ["2", "666.667", "skip", "0.9", "-0.3"] in lines
    assert ["6", "result", "0.9", "-0.3"] in lines
    assert [line[0] for line in lines if line and line[0].isdigit()] == [str(i) for i in range(7)]


def test_columns_appear_when_they_say_something() -> None:
    text = printed(folded())
    lines = [line.split() for line in text.splitlines()]
    expected = ["step", "timestep", "graph", "latents", "outputs", "noise", "in", "scale", "guidance", "reuse"]
    assert expected in lines
    assert ["0", "999", "full", "14.6", "0.068", "1", "+", "0.25·g"] in lines
    assert ["1", "600", "1", "-0.5", "0.125", "1", "1·g", "1"] in lines
    assert ["4", "result", "1", "0.33333"] in lines


def test_a_pipe_gets_plain_text_within_its_width() -> None:
    for width in (60, 100):
        text = printed(folded(), width)
        assert "\x1b" not in text
        assert max(len(line) for line in text.splitlines()) <= width
