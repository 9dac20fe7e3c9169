"""The model of several GPUs: what it must give where the answer is known, and that its figures are still its own."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from record import Scaling
from scaling import LATENCY, LINKS, Model, all_gather, all_to_all, pipeline, rows_of, step_by_branches, step_on_one

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "scaling.json"


@pytest.mark.cpu
def test_collectives_send_what_others_need() -> None:
    assert all_gather(8.0, 2, 1.0) == LATENCY + 4  # each lacks one half
    assert all_gather(8.0, 1, 1.0) == all_to_all(8.0, 1, 1.0) == LATENCY
    assert all_to_all(16.0, 4, 1.0) == LATENCY + 3  # of its quarter, a device keeps a quarter


@pytest.mark.cpu
def test_the_slowest_stage_says() -> None:
    assert pipeline({"a": 3.0, "b": 1.0}, {"a": 1, "b": 1}) == 1 / 3
    assert pipeline({"a": 3.0, "b": 1.0}, {"a": 6, "b": 1}) == 1


@pytest.mark.cpu
def test_a_link_of_no_cost_halves_a_step() -> None:
    model = Model("", layers=2, heads=2, width=8, feed_forward=32, tokens=5, text=3, cross=False, latent=7, decode=0.0)
    assert model.branch == 2 * 2 * (4 * 5 * 8 * 8 + 2 * 5 * 8 * 32 + 2 * 5 * 5 * 8)
    assert step_by_branches(model, float("inf")) == pytest.approx(step_on_one(model) / 2 + LATENCY, rel=1e-12)


@pytest.mark.cpu
def test_the_committed_figures_are_those_of_the_model() -> None:
    result = msgspec.json.decode(FILE.read_bytes(), type=Scaling)
    decode = result.operations["CogVideoX-2B"][2]
    model = Model("CogVideoX-2B", 30, 30, 1920, 7680, 13 * 30 * 45 + 226, 226, False, 16 * 13 * 60 * 90, decode)
    rows = [row for row in result.rows if row.model == model.name]
    assert result.links == LINKS
    assert [row.way for row in rows] == [row.way for row in rows_of(model)]
    for row, found in zip(rows, rows_of(model)):
        expected = (row.step, row.latency, row.throughput)
        assert (found.step, found.latency, found.throughput) == pytest.approx(expected, rel=1e-5)
