"""Estimated error graphs: exact at their knots, counted work, independent pieces, Grams of the same runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from lemica_trt.calibrate import inner_products
from lemica_trt.calibrate.cost import FIRST, KNOTS, cheap_cost, knot_stops
from lemica_trt.calibrate.estimate import (
    Calibrated,
    calibrate_cheaply,
    cheap_measurement,
    interpolate_sensitivity,
    mean_sensitivity,
    piece,
)
from lemica_trt.calibrate.exact import usual_batch
from lemica_trt.calibrate.journal import CheapMeasurement, Piece, journal_line, line_content
from lemica_trt.calibrate.replay import Stepper
from lemica_trt.core.errors import InputError, UnsupportedError, UsageError, VerificationError
from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.profile import NORMAL
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.testing.toy_model import Naive, ToyModel, awkward, euler

pytestmark = pytest.mark.cpu

PROMPTS = ["a cat", "a dog", "two boats"]
HISTORIES = SamplerTable(
    scheduler="Histories", rows=tuple(msgspec.structs.replace(row, noise=0.0) for row in awkward(12).rows)
)


@pytest.fixture(scope="module")
def model() -> ToyModel:
    return ToyModel()


def calibrated(model: ToyModel, journal: Path, **changes: Any) -> Calibrated:
    arguments: dict[str, Any] = {"table": euler(12), "prompts": PROMPTS, "samples": 2, "seed": 5, "max_skip": 4}
    return calibrate_cheaply(model, journal=journal, **{"method": "secant"} | arguments | changes)


def measurement(model: ToyModel, table: SamplerTable) -> CheapMeasurement:
    return cheap_measurement(model, table, PROMPTS, method="secant", seed=5, max_skip=4)


def parts(result: Calibrated) -> bytes:
    return json_bytes([result.graph, result.grams, result.cost])


# --- the estimates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [euler(12), awkward(12)], ids=["euler", "awkward"])
def test_estimates_are_exact_at_knots(tmp_path: Path, model: ToyModel, table: SamplerTable) -> None:
    graph = calibrated(model, tmp_path / "j", table=table, rollouts=1).graph
    errors = {(edge.start, edge.stop): edge.errors for edge in graph.edges}
    assert list(errors) == [(i, j) for i in range(11) for j in range(i + 2, min(i + 5, 12) + 1)]
    naive = Naive(model, table, PROMPTS[0], 5)
    for j in knot_stops(12, KNOTS, 0):
        i = max(j - 5, 0)
        assert errors[i, j][0] == pytest.approx(naive.error(i, j), rel=1e-3, abs=3e-6)


@pytest.mark.parametrize("table", [euler(12), awkward(12)], ids=["euler", "awkward"])
def test_secants_to_the_end_are_exact(tmp_path: Path, model: ToyModel, table: SamplerTable) -> None:
    graph = calibrated(model, tmp_path / "j", table=table, rollouts=1).graph
    naive = Naive(model, table, PROMPTS[0], 5)
    last = [edge for edge in graph.edges if edge.stop == 12]
    assert len(last) == 4
    for edge in last:
        assert edge.errors[0] == pytest.approx(naive.error(edge.start, 12), rel=1e-3, abs=3e-6)


def test_one_curve_serves_all_samples(tmp_path: Path, model: ToyModel) -> None:
    """That of the samples that were rolled out, the geometric mean; what each sample changes is its own."""
    first = calibrated(model, tmp_path / "a", samples=1)
    more = calibrated(model, tmp_path / "b", samples=2, rollouts=1)
    assert [edge.errors[0] for edge in more.graph.edges] == [edge.errors[0] for edge in first.graph.edges]
    assert [edge.errors[1] for edge in more.graph.edges] != [edge.errors[0] for edge in first.graph.edges]
    assert more.sensitivity == first.sensitivity
    pieces = [
        Piece(sample=s, rolled_out=s < 2, changes=(), outputs=(), knots=knots, full=0, skip=0)
        for s, knots in enumerate((((2, 4.0), (4, 1.0)), ((2, 1.0), (4, 4.0)), ()))
    ]
    np.testing.assert_allclose(mean_sensitivity(pieces, 4), [2, 2, 2, 2, 2])


def test_sensitivity_is_interpolated_in_its_logarithm() -> None:
    found = interpolate_sensitivity({2: 4.0, 4: 1.0}, 6)
    np.testing.assert_allclose(found, [4, 4, 4, 2, 1, 1, 1])
    np.testing.assert_array_equal(interpolate_sensitivity({}, 3), np.ones(4))


def test_knots_of_all_samples_cover_every_stop() -> None:
    assert {j for s in range(8) for j in knot_stops(50, 7, s)} == set(range(2, 51))
    for s in range(99):
        knots = knot_stops(50, 7, s)
        assert (knots[-4:], len(knots)) == ([47, 48, 49, 50], 11 + (2 in knots))
    assert knot_stops(2, 8, 5) == [2]


def test_nothing_is_rolled_out_twice_from_the_first_steps() -> None:
    """To roll out from stop 2 is nearly a whole sampling: it is a knot where no other one is near it."""
    for s in range(99):
        first, second, *_ = knot_stops(50, KNOTS, s)
        assert first <= 50 * FIRST < second
    assert [knot_stops(50, KNOTS, s)[0] for s in range(2)] == [2, 4]


# --- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "max_skip", "batch"), [(12, 4, None), (7, 6, 1), (2, 1, None)])
def test_cost_is_what_is_run(tmp_path: Path, num_steps: int, max_skip: int, batch: int | None) -> None:
    toy = ToyModel()
    rows = {"all": 0, "full": 0}

    def count(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows[name] += args[0].shape[0]

        return hook

    toy.pipeline.transformer.embed.register_forward_pre_hook(count("all"))
    toy.pipeline.transformer.blocks[0].register_forward_pre_hook(count("full"))
    found = calibrated(
        toy, tmp_path / "j", table=euler(num_steps), max_skip=max_skip, batch=batch, samples=3, rollouts=2
    )
    expected = cheap_cost(num_steps, max_skip, 3, rollouts=2)
    assert found.cost == expected
    assert expected.full == rows["full"] / 2  # two branches
    assert expected.skip == (rows["all"] - rows["full"]) / 2
    assert found.graph.samplings == expected.full / num_steps / 3
    assert found.graph.method == "secant"


def test_the_usual_cost_is_below_two_samplings_a_sample() -> None:
    assert cheap_cost(50, 9, NORMAL.samples, rollouts=NORMAL.rollouts).samplings / NORMAL.samples < 2


# --- Grams of the same runs ------------ ---------------------------------------------------------------------------


def test_grams_are_those_of_the_uncached_run(tmp_path: Path, model: ToyModel) -> None:
    found = calibrated(model, tmp_path / "j", samples=1)
    uncached = Stepper(model, euler(12), 1).sample("sample 0", PROMPTS[0], 5).uncached()
    stacked = np.stack([run.outputs[0].reshape(-1) for run in uncached.runs[1:]]).astype(np.float64)
    raw = stacked @ stacked.T
    np.testing.assert_allclose(found.grams.outputs, raw / np.trace(raw) * 12, rtol=1e-9)
    assert (found.grams.samples, found.grams.sampler_digest) == (1, found.graph.sampler_digest)


def test_inner_products_do_not_depend_on_where_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = list(np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32))
    expected = inner_products.inner_products(vectors, vectors[:2])
    monkeypatch.setattr(inner_products, "CHUNK", 64)
    np.testing.assert_allclose(inner_products.inner_products(vectors, vectors[:2]), expected, rtol=1e-12)
    np.testing.assert_allclose(expected[0, 1], (vectors[0].astype(float) * vectors[1]).sum(), rtol=1e-12)


# --- another grid, another guidance --------------------------------------------------------------------------------


def retargeted(model: ToyModel, journal: Path, known: Calibrated, **changes: Any) -> Calibrated:
    return calibrated(model, journal, method="retargeted", sensitivity=known.sensitivity, **changes)


@pytest.mark.parametrize("table", [euler(12), HISTORIES], ids=["euler", "histories"])
def test_retargeted_to_where_it_came_from_nothing_changes(tmp_path: Path, model: ToyModel, table: SamplerTable) -> None:
    source = calibrated(model, tmp_path / "s", table=table)
    found = retargeted(model, tmp_path / "r", source, table=table)
    for mine, theirs in zip(found.graph.edges, source.graph.edges):
        assert mine.errors == pytest.approx(theirs.errors, rel=0.02)  # knots at equal distances in time, not in index
    assert found.grams == source.grams
    assert (found.graph.method, found.sensitivity) == ("retargeted", None)
    assert found.cost == cheap_cost(12, 4, 2, rollouts=0)
    assert (found.cost.full, found.graph.samplings) == (24, 1.0)


def test_retargeted_to_fewer_steps_and_more_guidance_it_ranks_as_a_new_one(tmp_path: Path, model: ToyModel) -> None:
    source = calibrated(model, tmp_path / "s")
    other = ToyModel(guidance_scale=4.0)
    found = retargeted(other, tmp_path / "r", source, table=euler(9)).graph
    anew = calibrated(other, tmp_path / "n", table=euler(9)).graph
    ranks = [np.argsort(np.argsort([edge.error for edge in graph.edges])) for graph in (found, anew)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_retargeting_is_refused_before_anything_is_run(tmp_path: Path, model: ToyModel) -> None:
    source = calibrated(model, tmp_path / "s")
    toy = ToyModel(guidance_scale=6.0)
    toy.pipeline.transformer.embed.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    with pytest.raises(UnsupportedError, match=r"guidance 1\.5 … 5\.25 \(3 was measured\), asked for is 6"):
        retargeted(toy, tmp_path / "r", source)
    assert not (tmp_path / "r").exists()


# --- pieces and journals -------------------------------------------------------------------------------------------


def test_a_piece_depends_on_its_sample_alone(tmp_path: Path, model: ToyModel) -> None:
    calibrated(model, tmp_path / "j", samples=3)
    lines = (tmp_path / "j").read_bytes().splitlines()
    stepper = Stepper(model, euler(12), usual_batch(model))
    made = measurement(model, euler(12))
    sample = stepper.sample("sample 2", PROMPTS[2], made.seed + 2)
    alone, _ = piece(sample, euler(12), made, 2, rolled_out=True)
    assert alone == value_from_json(Piece, line_content(lines[3]) or b"", where="j")


def test_cut_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, model: ToyModel) -> None:
    whole = parts(calibrated(model, tmp_path / "whole"))
    data = (tmp_path / "whole").read_bytes()
    header = data.index(b"\n")
    for cut in (0, 1, header, header + 1, header + 9, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        assert parts(calibrated(model, tmp_path / "cut")) == whole, cut
        assert (tmp_path / "cut").read_bytes() == data


def test_more_samples_extend_and_a_finished_journal_needs_no_model(tmp_path: Path) -> None:
    toy, told = ToyModel(), list[tuple[float, float]]()
    calibrated(toy, tmp_path / "j", samples=1)
    found = calibrated(toy, tmp_path / "j", samples=3, progress=lambda *args: told.append(args))
    steps = [cheap_cost(12, 4, count, rollouts=count).full for count in (1, 2, 3)]
    assert told == [(done, steps[-1]) for done in steps]
    toy.pipeline.transformer.embed.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    assert parts(calibrated(toy, tmp_path / "j", samples=3)) == parts(found)


def test_journals_of_other_methods_are_refused(tmp_path: Path, model: ToyModel) -> None:
    source = calibrated(model, tmp_path / "j")
    with pytest.raises(InputError, match=r"another method \('secant' there\)"):
        retargeted(model, tmp_path / "j", source)


def test_a_piece_of_no_such_measurement_is_named(tmp_path: Path, model: ToyModel) -> None:
    calibrated(model, tmp_path / "j", samples=1)
    header, line = (tmp_path / "j").read_bytes().splitlines()
    content = line_content(line)
    assert content is not None
    for old, new, says in (
        (b'"changes":[', b'"changes":[1.0,', "line 2: expected changes of 38 segments, got 39"),
        (b'"outputs":[[', b'"outputs":[[1.0,', "line 2: expected inner products of 12 steps, got others"),
    ):
        (tmp_path / "j").write_bytes(header + b"\n" + journal_line(msgspec.Raw(content.replace(old, new))))
        with pytest.raises(InputError, match=says):
            calibrated(model, tmp_path / "j", samples=1)


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_refuses_what_cannot_be_measured(tmp_path: Path, model: ToyModel) -> None:
    with pytest.raises(UsageError, match="samples: expected at least 1, got 0"):
        calibrated(model, tmp_path / "j", samples=0)
    with pytest.raises(InputError, match="prompts: expected at least one"):
        calibrated(model, tmp_path / "j", prompts=[])
    with pytest.raises(UsageError, match="by retargeted: expected another calibration to use"):
        calibrated(model, tmp_path / "j", method="retargeted")


def test_nan_in_a_skipped_step_is_named(tmp_path: Path) -> None:
    toy = ToyModel()
    toy.split.skip.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(VerificationError, match=r"sample 0, edge \(0, 2\): expected a finite error, got nan"):
        calibrated(toy, tmp_path / "j")
