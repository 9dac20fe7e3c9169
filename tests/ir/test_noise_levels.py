"""Noise levels of a sampler table."""

from __future__ import annotations

from typing import Any

import pytest

from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.sampler import NoiseLevels, SamplerTable
from lemica_trt.testing.values import N, flow_table

pytestmark = pytest.mark.null


def test_levels_are_no_part_of_the_digest() -> None:
    table = flow_table()
    bare = SamplerTable(scheduler=table.scheduler, rows=table.rows)
    assert table.digest == bare.digest
    assert b"levels" not in json_bytes(bare)
    again = value_from_json(SamplerTable, json_bytes(table), where="test")
    assert again == table and again.levels == table.levels
    assert value_from_json(SamplerTable, json_bytes(bare), where="test").levels is None


def test_what_a_perfect_model_gives() -> None:
    levels = NoiseLevels(target="v_prediction", signal=(0.0, 3.0, 1.0), noise=(1.0, 4.0, 0.0))
    assert levels.output(1) == (-0.8, 0.6)
    for target, expected in (("epsilon", (0, 1)), ("sample", (1, 0)), ("flow_prediction", (-1, 1))):
        assert NoiseLevels(target=target, signal=(1.0,), noise=(2.0,)).output(0) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"signal": (1.0,)}, "1 signal and 2 noise levels"),
        ({"signal": (1.0, -0.1)}, "signal must not be negative"),
        ({"noise": (1.0, float("inf"))}, r"noise\[1\] must be finite"),
        ({"signal": (1.0, 0.0), "noise": (1.0, 0.0)}, "must not both be 0"),
    ],
)
def test_levels_refuse(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NoiseLevels(**{"target": "epsilon", "signal": (0.5, 1.0), "noise": (0.5, 0.0)} | fields)


def test_tables_refuse_levels_of_another_length() -> None:
    with pytest.raises(ValueError, match=f"2 noise levels for {N + 1} rows"):
        SamplerTable(
            scheduler="x",
            rows=flow_table().rows,
            levels=NoiseLevels(target="epsilon", signal=(1.0, 1.0), noise=(1.0, 0.0)),
        )
