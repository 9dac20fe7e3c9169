"""The values that flow between stages: strict, canonical, and saying where something is wrong."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given as forall
from hypothesis import strategies as st

from lemica_trt.core import errors, values
from lemica_trt.core.errors import InputError
from lemica_trt.core.values import json_bytes, read_value, value_from_json, write_bytes, write_value
from lemica_trt.ir.calibration import Edge, ErrorGraph
from lemica_trt.ir.graphs import step_layout
from lemica_trt.ir.plan import CacheRead, PlanRow, StepPlan, coefficient_vector, layout_from_plans, trunk_reads
from lemica_trt.ir.profile import CalibrationSettings, Sampling, Shape
from lemica_trt.ir.sampler import SamplerRow, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.step_plan import plan_from_schedule

pytestmark = pytest.mark.null

finite = st.floats(allow_nan=False, allow_infinity=False)


def test_a_changed_value_is_checked_too() -> None:
    """What `structs.replace` makes; up to msgspec 0.20 it was not."""
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        msgspec.structs.replace(Shape(frames=1, height=8, width=8), frames=0)


def table_of(num_steps: int) -> SamplerTable:
    """A two-step sampler: x_i = x_{i−1} + ½·m_{i−1} + ¼·m_{i−2}."""
    rows = [
        SamplerRow(
            latents=(1.0,), outputs=(0.5, 0.25)[: min(i, 2)], timestep=None if i == num_steps else float(num_steps - i)
        )
        for i in range(num_steps + 1)
    ]
    return SamplerTable(scheduler="Euler", rows=tuple(rows))


def graph_fields(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": "toy",
        "revision": "0",
        "scheduler": "Euler",
        "sampler_digest": "0",
        "sampler_probe": (0.5, -0.25),
        "num_steps": 6,
        "max_skip": 3,
        "dtype": "fp32",
        "guidance_scale": 6.0,
        "negative_prompt": "",
        "text_length": 16,
        "latent_shape": (2, 4),
        "samples": 2,
        "seed": 0,
        "prompts_digest": "0",
        "edges": (Edge(start=0, stop=2, errors=(0.5, 0.25)), Edge(start=2, stop=6, errors=(0.1, 0.2))),
    }
    return fields | changes


def plan_fields(**changes: Any) -> dict[str, Any]:
    rows = (
        PlanRow(variant="full", step=0, latents=(1.0,), timestep=2.0),
        PlanRow(
            variant="skip",
            step=1,
            latents=(1.0,),
            outputs=(0.5,),
            timestep=1.0,
            caches=trunk_reads(1.0),
        ),
        PlanRow(variant=None, step=2, latents=(1.0,), outputs=(0.5,)),
    )
    fields: dict[str, Any] = {
        "name": "default",
        "num_steps": 2,
        "guidance_scale": 6.0,
        "rows": rows,
        "scheduler": "Euler",
        "sampler_digest": "0",
        "method": "lemica",
    }
    return fields | changes


# --- values --------------------------------------------------------------------------------------------------------


@forall(
    st.lists(finite, min_size=1, max_size=3),
    finite,
    finite,
    st.lists(st.tuples(finite, finite), min_size=1, max_size=3),
)
def test_json_round_trip_is_exact(latents: list[float], noise: float, scale: float, pairs: list[Any]) -> None:
    rows = [SamplerRow(latents=tuple(latents[:1]), noise=noise, timestep=scale, guidance=pair) for pair in pairs]
    table = SamplerTable(scheduler="ä", rows=(*rows, SamplerRow(latents=tuple(latents[: len(rows) + 1]))))
    data = json_bytes(table)
    again = value_from_json(SamplerTable, data, where="x")
    assert again == table
    assert json_bytes(again) == data
    assert again.digest == table.digest


def test_json_is_canonical() -> None:
    data = json_bytes(Schedule(num_steps=4, full_steps=(0, 2), bottleneck=(0.1, 1e-300)))
    assert data == json_bytes(Schedule(bottleneck=(0.1, 1e-300), full_steps=(0, 2), num_steps=4))
    text = data.decode()
    assert text.endswith("}\n")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    graph = ErrorGraph(**graph_fields(versions={"torch": "2", "numpy": "1"}))
    assert graph.digest == ErrorGraph(**graph_fields(versions={"numpy": "1", "torch": "2"})).digest


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Schedule(num_steps=4, full_steps=(0, 2)).num_steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "truncated"),
        ("[1]", "Expected `object`, got `array`"),
        ('{"num_steps": 4, "full_steps": [0], "other": 1}', "unknown field `other`"),
        ('{"num_steps": 4}', "missing required field `full_steps`"),
        ('{"num_steps": "4", "full_steps": [0]}', r"Expected `int`, got `str` - at `\$\.num_steps`"),
        ('{"num_steps": 4.5, "full_steps": [0]}', r"Expected `int`, got `float` - at `\$\.num_steps`"),
        ('{"num_steps": 4, "full_steps": [0, null]}', r"at `\$\.full_steps\[1\]`"),
        ('{"num_steps": 4, "full_steps": [0], "bottleneck": [NaN]}', "malformed"),
        ('{"num_steps": 4, "full_steps": [0], "bottleneck": [1e999]}', r"out of range.*bottleneck"),
        ('{"num_steps": 4, "full_steps": [0, 4]}', r"full_steps must lie in 0 … 3, got 4"),
        ('{"num_steps": 4, "full_steps": [0]} x', "trailing characters"),
    ],
)
def test_decoding_is_strict_and_says_where(text: str, says: str) -> None:
    with pytest.raises(InputError, match=f"plans/a.json: expected a valid Schedule, got: .*{says}") as caught:
        value_from_json(Schedule, text.encode(), where="plans/a.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b'{"num_steps": 4, "\xff": 1}', b'{"x":' + b"[" * 100_000])
def test_bytes_that_are_no_json_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="expected a valid Schedule"):
        value_from_json(Schedule, data, where="plans/a.json")


def test_decoding_says_which_row() -> None:
    rows = json.loads(json_bytes(table_of(4)))
    rows["rows"][3]["timestep"] = "soon"
    with pytest.raises(InputError, match=r"at `\$\.rows\[3\]\.timestep`"):
        value_from_json(SamplerTable, json.dumps(rows).encode(), where="x")


def test_read_and_write(tmp_path: Path) -> None:
    path = tmp_path / "new" / "schedule.json"
    schedule = Schedule(num_steps=4, full_steps=(0, 2))
    write_value(schedule, path)
    assert read_value(Schedule, path) == schedule
    assert path.read_bytes() == json_bytes(schedule)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [child.name for child in path.parent.iterdir()] == ["schedule.json"]
    with pytest.raises(InputError, match=r"gone\.json: expected a readable Schedule file, got: No such file"):
        read_value(Schedule, tmp_path / "gone.json")
    with pytest.raises(InputError, match="readable Schedule file"):
        read_value(Schedule, tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_bytes(b"old", path)

    def full_disk(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(values.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_bytes(b"new", path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_exit_codes_are_distinct_and_documented() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.LemicaError)]
    codes = [c.exit_code for c in classes]
    assert sorted(codes) == list(range(1, len(classes) + 1))
    assert set(errors.EXIT_CODES) == set(codes) - {1} | {errors.INTERNAL_ERROR}
    for cls in classes:
        line = next(line for line in (errors.__doc__ or "").splitlines() if f" {cls.__name__} " in line)
        assert f" {cls.exit_code} " in line
    assert str(errors.UsageError("a", fix="b")) == "a → b"
    assert str(errors.UsageError("a")) == "a"


# --- spec ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Shape(frames=0, height=8, width=8), "frames must be at least 1, got 0"),
        (lambda: Shape(frames=1, height=8, width=8, max_batch=0), "max_batch must be at least 1"),
        (lambda: Sampling(steps=1), "steps must be at least 2, got 1"),
        (lambda: Sampling(guidance_scale=math.nan), r"guidance_scale\[0\] must be finite"),
        (lambda: CalibrationSettings(samples=0), "samples must be at least 1"),
        (lambda: CalibrationSettings(max_skip=0), "max_skip must be at least 1"),
    ],
)
def test_spec_refuses(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_offsets_tile_the_vector() -> None:
    layout = step_layout(latent_shape=(4,), latent_history=2, output_history=3, trunk_depth=2, guidance_history=1)
    ends = {name: (part.start, part.stop) for name, part in layout.offsets.items()}
    assert ends == {
        "latents": (0, 2),
        "outputs": (2, 5),
        "guidance_terms": (5, 6),
        "noise": (6, 7),
        "in_scale": (7, 8),
        "timestep": (8, 9),
        "trunk": (9, 11),
        "reuse": (11, 14),
    }


# --- sampler -------------------------------------------------------------------------------------------------------


def test_sampler_table_properties() -> None:
    table = table_of(4)
    assert (table.num_steps, table.latent_history, table.output_history, table.stochastic) == (4, 1, 2, False)
    assert table.timesteps == (4.0, 3.0, 2.0, 1.0)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ((SamplerRow(latents=(1.0,)),), "at least 2 rows, got 1"),
        ((SamplerRow(latents=(1.0,)), SamplerRow(latents=(1.0,))), r"rows\[0\]: timestep must be given"),
        (2 * (SamplerRow(latents=(1.0,), timestep=1.0),), r"rows\[1\]: timestep must be absent"),
        (
            (SamplerRow(latents=(1.0, 1.0), timestep=1.0), SamplerRow(latents=(1.0,))),
            r"rows\[0\]: 2 latents, but only 1",
        ),
        (
            (SamplerRow(latents=(1.0,), outputs=(1.0,), timestep=1.0), SamplerRow(latents=(1.0,))),
            r"rows\[0\]: 1 outputs, but only 0",
        ),
    ],
)
def test_sampler_table_refuses(rows: tuple[SamplerRow, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplerTable(scheduler="Euler", rows=rows)


@pytest.mark.parametrize("field", ["latents", "outputs", "guidance", "noise", "in_scale", "timestep"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [SamplerRow, PlanRow])
def test_rows_refuse_numbers_that_are_not_finite(row: Any, field: str, bad: float) -> None:
    fields: dict[str, Any] = {"latents": (1.0,), "timestep": 1.0}
    scalars = ("in_scale", "timestep") if row is PlanRow else ("noise", "in_scale", "timestep")
    fields[field] = bad if field in scalars else (1.0, bad)
    with pytest.raises(ValueError, match=rf"{field}.*must be finite, got"):
        row(**fields, **({"variant": "full", "step": 0} if row is PlanRow else {}))


# --- error graph ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"start": 1, "stop": 2, "errors": (1.0,)}, r"edge \(1, 2\) must span at least 2 steps"),
        ({"start": -1, "stop": 2, "errors": (1.0,)}, r"edge \(-1, 2\) must span"),
        ({"start": 1, "stop": 3, "errors": ()}, r"edge \(1, 3\) has no errors"),
        ({"start": 1, "stop": 3, "errors": (1.0, math.nan)}, r"edge \(1, 3\)\.errors\[1\] must be finite, got nan"),
        ({"start": 1, "stop": 3, "errors": (-1.0,)}, r"edge \(1, 3\) has a negative error"),
        ({"start": 1, "stop": 3, "errors": (1.0,), "cost": 0}, r"edge \(1, 3\)\.cost must be 1 … 2, got 0"),
        ({"start": 1, "stop": 3, "errors": (1.0,), "cost": 3}, r"edge \(1, 3\)\.cost must be 1 … 2, got 3"),
    ],
)
def test_edge_refuses(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Edge(**fields)


def test_edge_error_is_the_mean() -> None:
    assert ErrorGraph(**graph_fields()).edges[0].error == 0.375


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"num_steps": 1}, "num_steps must be 2 … 10000, got 1"),
        ({"max_skip": 0}, r"max_skip must be 1 … 5, got 0"),
        ({"max_skip": 6}, r"max_skip must be 1 … 5, got 6"),
        ({"max_skip": 2}, r"edge \(2, 6\) skips more than max_skip = 2"),
        ({"num_steps": 5}, r"edge \(2, 6\) ends after step 5"),
        ({"samples": 3}, r"edge \(0, 2\) has 2 errors for 3 samples"),
        ({"edges": graph_fields()["edges"][::-1]}, "edges must be sorted"),
        ({"edges": 2 * graph_fields()["edges"][:1]}, "edges must be sorted by .* and unique"),
    ],
)
def test_error_graph_refuses(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ErrorGraph(**graph_fields(**changes))


# --- plan ----------------------------------------------------------------------------------------------------------


@forall(st.integers(2, 30), st.data())
def test_plan_from_schedule_keeps_the_sampler(num_steps: int, data: st.DataObject) -> None:
    full = {0} | data.draw(st.sets(st.integers(0, num_steps - 1)))
    table, schedule = table_of(num_steps), Schedule(num_steps=num_steps, full_steps=tuple(sorted(full)))
    plan = plan_from_schedule(schedule, table, name="fast", guidance_scale=3.0, method="given")
    assert plan.full_steps == schedule.full_steps
    assert plan.budget == schedule.budget
    assert plan.sampler_digest == table.digest
    assert [row.variant for row in plan.rows] == ["full" if i in full else "skip" for i in range(num_steps)] + [None]
    for row, source in zip(plan.rows, table.rows):
        same = set(SamplerRow.__struct_fields__) - {"noise", "kind"}
        assert all(getattr(row, name) == getattr(source, name) for name in same)
    assert value_from_json(StepPlan, json_bytes(plan), where="x") == plan


def test_plan_from_schedule_of_another_length() -> None:
    with pytest.raises(ValueError, match="the schedule is for 5 steps, the sampler has 4"):
        plan_from_schedule(
            Schedule(num_steps=5, full_steps=(0,)), table_of(4), name="a", guidance_scale=1.0, method="x"
        )


def test_plan_properties() -> None:
    plan = StepPlan(**plan_fields())
    assert (plan.budget, plan.latent_history, plan.output_history, plan.cache_depths) == (1, 1, 1, {"trunk": 1})
    assert not plan.stochastic


def test_folded_plan_is_a_plan() -> None:
    """Histories count rows: skipped steps are folded away, steps jump."""
    rows = (
        PlanRow(variant="full", step=0, latents=(1.0,), timestep=4.0),
        PlanRow(variant="full", step=3, latents=(1.0,), outputs=(1.5,), timestep=1.0),
        PlanRow(variant=None, step=4, latents=(1.0,), outputs=(0.5, 0.25)),
    )
    assert StepPlan(**plan_fields(rows=rows, num_steps=4)).full_steps == (0, 3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"caches": trunk_reads(1.0), "reuse": (1.0,)}, "step 1: caches belong to rows with a variant"),
        ({"variant": "skip", "caches": trunk_reads(1.0) * 2}, "step 1: a cache slot is read twice"),
        (
            {"variant": "skip", "caches": trunk_reads(1.0), "reuse": (1.0,)},
            "step 1: reuse belongs to rows",
        ),
        ({"variant": "full", "timestep": None}, "step 1: variant full needs a timestep"),
        ({"reuse": (math.nan,)}, r"reuse\[0\] must be finite"),
        ({"variant": "full", "draws": -1}, "step 1: draws must not be negative, got -1"),
    ],
)
def test_plan_row_refuses(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PlanRow(**{"step": 1, "latents": (1.0,), "timestep": 1.0} | fields)


def changed_row(index: int, **changes: Any) -> tuple[PlanRow, ...]:
    rows = list(plan_fields()["rows"])
    rows[index] = PlanRow(**{name: getattr(rows[index], name) for name in PlanRow.__struct_fields__} | changes)
    return tuple(rows)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format_version must be 4, got 2"),
        ({"guidance_range": (0.0, 0.5)}, "guidance_range must hold guidance_scale"),
        ({"guidance_range": (-math.inf, 9.0)}, "guidance_range.*must be finite"),
        ({"rows": changed_row(1, draws=1, noise=(1.0, 1.0))}, r"rows\[1\]\.noise: 2 given, 1 draws until there"),
        ({"name": "../x"}, r"name must be letters, digits, - and _, got '\.\./x'"),
        ({"name": ""}, "name must be letters"),
        ({"guidance_scale": math.inf}, "guidance_scale.*must be finite"),
        ({"rows": plan_fields()["rows"][:1]}, "at least 2 rows, got 1"),
        ({"num_steps": 3}, r"rows\[2\]: the last row, and only it, has step 3"),
        ({"num_steps": 1}, r"rows\[1\]: the last row, and only it, has step 1"),
        ({"rows": changed_row(1, step=0)}, r"rows\[1\]\.step must rise from 0 to 2, got 0 after 0"),
        ({"rows": changed_row(2, step=3)}, r"rows\[2\]\.step must rise from 0 to 2, got 3 after 1"),
        ({"rows": changed_row(0, latents=())}, r"rows\[0\]\.latents: 0 given, 1 exist"),
        ({"rows": changed_row(1, latents=(1.0, 1.0, 1.0))}, r"rows\[1\]\.latents: 3 given, 2 exist"),
        ({"rows": changed_row(0, outputs=(1.0,))}, r"rows\[0\]\.outputs: 1 given, 0 exist"),
        (
            {"rows": changed_row(1, caches=trunk_reads(1.0, 1.0))},
            r"rows\[1\]: reads trunk 2 full rows back, 1 are",
        ),
        ({"rows": changed_row(1, variant=None, caches=())}, r"rows\[1\]: a row without a variant needs reuse"),
        (
            {"rows": changed_row(1, variant=None, caches=(), reuse=(1.0, 1.0))},
            r"rows\[1\]\.reuse: 2 given, 1 exist",
        ),
        ({"rows": changed_row(2, reuse=(1.0,))}, r"rows\[2\]: the last row only combines"),
        ({"rows": changed_row(2, variant="full", timestep=1.0)}, r"rows\[2\]: the last row only combines"),
        (
            {"rows": (PlanRow(variant=None, step=0, latents=(1.0,), reuse=(1.0,)), *plan_fields()["rows"][1:])},
            r"rows\[0\]\.reuse: 1 given, 0 exist",
        ),
    ],
)
def test_plan_refuses(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StepPlan(**plan_fields(**changes))


def test_layout_from_plans_is_the_smallest_that_takes_all() -> None:
    rows = (
        PlanRow(variant="full", step=0, latents=(1.0,), timestep=9.0),
        PlanRow(variant="full", step=1, latents=(1.0, 0.5), timestep=8.0),
        PlanRow(
            variant="skip",
            step=2,
            latents=(1.0,),
            timestep=7.0,
            caches=(
                CacheRead(
                    slot="trunk",
                    weights=(
                        0.5,
                        0.5,
                    ),
                ),
            ),
            draws=1,
            noise=(0.1,),
        ),
        PlanRow(variant=None, step=3, latents=(1.0,), reuse=(1.0, 0.0, 2.0)),
        PlanRow(variant=None, step=4, latents=(1.0,), outputs=(1.0, 1.0)),
    )
    deep = StepPlan(**plan_fields(rows=rows, num_steps=4))
    flat = StepPlan(**plan_fields(rows=(rows[0], PlanRow(variant=None, step=4, latents=(1.0,))), num_steps=4))
    assert layout_from_plans([flat], latent_shape=(4,), guided=False) == step_layout(
        latent_shape=(4,), latent_history=1, output_history=1, trunk_depth=0, stochastic=False, guided=False
    )
    layout = layout_from_plans([flat, deep], latent_shape=(4,), guided=True)
    assert layout == step_layout(
        latent_shape=(4,), latent_history=2, output_history=3, trunk_depth=2, stochastic=True, guided=True
    )
    for row in (*flat.rows, *deep.rows):
        coefficient_vector(row, layout)


def test_coefficient_vector() -> None:
    layout = step_layout(latent_shape=(4,), latent_history=2, output_history=2, trunk_depth=2, stochastic=True)
    row = PlanRow(
        variant="skip",
        step=1,
        latents=(0.5,),
        outputs=(0.25, 0.125),
        draws=2,
        noise=(1.2, -1.6),
        timestep=7.0,
        in_scale=3.0,
        caches=trunk_reads(1.0),
    )
    vector = coefficient_vector(row, layout)
    assert vector.dtype == np.float32
    assert vector.tolist() == [0.5, 0, 0.25, 0.125, 2, 3, 7, 1, 0, 0, 0]
    reuse = coefficient_vector(PlanRow(variant=None, step=1, latents=(1.0,), reuse=(2.0, -1.0)), layout)
    assert reuse.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 2, -1]


@forall(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), max_size=4))
def test_draws_are_mixed_into_one_standard_normal(noise: list[float]) -> None:
    row = PlanRow(variant=None, step=1, latents=(1.0,), draws=len(noise), noise=tuple(noise))
    mixed = [row.noise_scale * weight for weight in row.noise_weights] or [0.0] * len(noise)
    assert mixed == pytest.approx(noise, rel=1e-12)
    assert not row.noise_weights or math.hypot(*row.noise_weights) == pytest.approx(1)
    if len(noise) == 1 and noise[0]:
        assert (row.noise_scale, row.noise_weights) == (noise[0], (1.0,))


def test_stochastic_steps_draw_once() -> None:
    table = table_of(3)
    rows = [SamplerRow(**{n: getattr(r, n) for n in SamplerRow.__struct_fields__} | {"noise": 0.5}) for r in table.rows]
    noisy = SamplerTable(scheduler="Noisy", rows=(table.rows[0], *rows[1:]))
    schedule = Schedule(num_steps=3, full_steps=(0, 2))
    plan = plan_from_schedule(schedule, noisy, name="a", guidance_scale=1.0, method="x")
    assert [(row.draws, row.noise) for row in plan.rows] == [(0, ()), *3 * [(1, (0.5,))]]
    assert (plan.stochastic, plan.noise_history) == (True, 1)


def test_coefficient_vector_refuses() -> None:
    layout = step_layout(latent_shape=(4,), latent_history=1, output_history=1)
    with pytest.raises(ValueError, match="step 3: 2 outputs coefficients, the graphs take 1"):
        coefficient_vector(PlanRow(variant=None, step=3, latents=(1.0,), outputs=(1.0, 1.0)), layout)
    with pytest.raises(ValueError, match="step 3 draws noise, the graphs take none"):
        coefficient_vector(PlanRow(variant=None, step=3, latents=(1.0,), draws=1, noise=(1.0,)), layout)
