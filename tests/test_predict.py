"""Predictions are what they say: exact where the trajectory is what the recipe takes it for, best where fitted."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemica_trt.core.errors import InputError, UnsupportedError, UsageError
from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.calibration import TrajectoryGrams, gram_from_samples
from lemica_trt.ir.prediction import LEMICA, Prediction, Predictor
from lemica_trt.ir.sampler import NoiseLevels, SamplerRow, SamplerTable
from lemica_trt.planning.prediction import fitted_gain, least_squares, predict, squared_error
from lemica_trt.planning.step_plan import plan_from_schedule
from lemica_trt.testing.values import schedule_of

pytestmark = pytest.mark.null

Array = npt.NDArray[np.float64]

N = 16
SIGMA = tuple(1 - i / N for i in range(N + 1))


def table_of() -> SamplerTable:
    """Flow matching from pure noise to data: log-SNR is −inf at the first step, inf behind the last."""
    rows = [SamplerRow(latents=(1.0,), timestep=1000.0)]
    rows += [
        SamplerRow(latents=(1.0,), outputs=(-1 / N,), timestep=1000 * SIGMA[i] if i < N else None)
        for i in range(1, N + 1)
    ]
    levels = NoiseLevels(target="flow_prediction", signal=tuple(1 - s for s in SIGMA), noise=SIGMA)
    return SamplerTable(scheduler="FlowToy", rows=tuple(rows), levels=levels)


def samples_of(seed: int, samples: int = 3, size: int = 40, smooth: int = 6) -> Array:
    """Trajectories [samples, N, size]: a few smooth functions of the step, each sample with its own loudness."""
    random = np.random.default_rng(seed)
    basis = np.array([np.cos(np.pi * k * np.arange(N) / N) / (1 + k) ** 2 for k in range(smooth)])
    found: Array = np.einsum("kn,skd->snd", basis, random.standard_normal((samples, smooth, size)))
    return found * 10 ** random.uniform(-1, 1, (samples, 1, 1))


def grams_of(outputs: Array, residuals: Array | None = None, **changes: Any) -> TrajectoryGrams:
    fields: dict[str, Any] = {
        "model": "toy",
        "revision": "0",
        "scheduler": "FlowToy",
        "sampler_digest": table_of().digest,
        "sampler_probe": table_of().probe,
        "num_steps": N,
        "dtype": "fp32",
        "guidance_scale": 4.0,
        "negative_prompt": "",
        "text_length": 4,
        "latent_shape": (40,),
        "samples": len(outputs),
        "seed": 0,
        "prompts_digest": "0",
        "outputs": gram_from_samples([a @ a.T for a in outputs]),
        "residuals": () if residuals is None else gram_from_samples([a @ a.T for a in residuals]),
    }
    return TrajectoryGrams(**fields | changes)


def normalised(samples: Array) -> Array:
    return samples / np.sqrt((samples**2).sum((1, 2), keepdims=True) / N)


def error(samples: Array, t: int, steps: list[int], weights: Any) -> float:
    """mean ‖a_t − Σ c·a‖², by definition."""
    a = normalised(samples)
    return float(((a[:, t] - np.einsum("k,skd->sd", weights, a[:, steps])) ** 2).sum(1).mean())


# --- Grams ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_gram_knows_every_fit(seed: int) -> None:
    samples = samples_of(seed)
    random = np.random.default_rng(seed)
    weights, (t, *steps) = random.standard_normal(3), random.choice(N, 4, replace=False).tolist()
    gram = np.array(grams_of(samples).outputs)
    assert squared_error(gram, t, steps, weights) == pytest.approx(error(samples, t, steps, weights), rel=1e-9)
    assert np.trace(gram) == pytest.approx(N)


def test_no_sample_counts_for_more_because_it_is_louder() -> None:
    samples = samples_of(1)
    louder = samples * np.array([1.0, 1e3, 1e-3])[:, None, None]
    np.testing.assert_allclose(grams_of(louder).outputs, grams_of(samples).outputs, rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"num_steps": N + 1}, f"outputs must have {N + 1} rows of {N + 1} numbers"),
        ({"residuals": ((1.0,),)}, f"residuals must have {N} rows"),
        ({"outputs": tuple((0.0,) * N for _ in range(N))}, r"outputs\[0\]\[0\] must be above 0, got 0.0"),
        ({"outputs": tuple((float("nan"),) * N for _ in range(N))}, r"outputs\[0\]\[0\] must be finite"),
        ({"outputs": tuple(tuple(1.0 + (k < j) for k in range(N)) for j in range(N))}, "outputs must be symmetric"),
    ],
)
def test_grams_refuse(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrajectoryGrams(**msgspec.structs.asdict(grams_of(samples_of(0))) | changes)


@pytest.mark.parametrize(
    ("grams", "says"),
    [
        (np.zeros((2, 3, 3)), "all zero"),
        (np.ones((2, 3, 4)), r"shape \(2, 3, 4\)"),
        (np.zeros((0, 3, 3)), "shape"),
        (np.full((1, 3, 3), np.inf), "finite"),
    ],
)
def test_gram_from_samples_refuses(grams: Array, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gram_from_samples(grams)


def test_grams_survive_json() -> None:
    grams = grams_of(samples_of(0), samples_of(1))
    assert value_from_json(TrajectoryGrams, json_bytes(grams), where="test") == grams


# --- least squares and gains -----------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_least_squares_are_best_on_what_they_were_fitted_to(seed: int, terms: int) -> None:
    random = np.random.default_rng(seed)
    samples = samples_of(seed)
    gram = np.array(grams_of(samples).outputs)
    *steps, t = sorted(random.choice(N, terms + 1, replace=False).tolist())
    steps = steps[::-1]
    best = least_squares(gram, t, steps, ridge=0.0)
    least = error(samples, t, steps, best)
    for other in [np.eye(terms)[0], best + 1e-3, best * 0.99, best + 0.1 * random.standard_normal(terms)]:
        assert least <= error(samples, t, steps, other) + 1e-12
    ridged = least_squares(gram, t, steps)
    assert error(samples, t, steps, ridged) <= error(samples, t, steps, np.eye(terms)[0]) + 1e-12
    if terms > 1:
        assert least <= error(samples, t, steps[:-1], least_squares(gram, t, steps[:-1], ridge=0.0)) + 1e-12


def test_least_squares_with_a_ridge_minimise_what_they_say() -> None:
    gram, t, steps, ridge = np.array(grams_of(samples_of(3)).outputs), 9, [6, 4, 1], 0.05

    def objective(c: Array) -> float:
        return squared_error(gram, t, steps, c) + ridge * gram[6, 6] * float(((c - [1, 0, 0]) ** 2).sum())

    best = least_squares(gram, t, steps, ridge)
    for k in range(3):
        for step in (-1e-4, 1e-4):
            assert objective(best) < objective(best + step * np.eye(3)[k])
    assert least_squares(gram, t, steps, 1e9) == pytest.approx([1, 0, 0], abs=1e-6)


def test_least_squares_of_equal_vectors_stay_finite() -> None:
    assert least_squares(np.ones((4, 4)), 3, [2, 1, 0]) == pytest.approx([1, 0, 0], abs=1e-6)
    assert least_squares(np.ones((4, 4)), 3, [2, 1], ridge=0.0).sum() == pytest.approx(1)


@given(st.integers(0, 999), st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_gains_minimise_what_they_say(seed: int, slope: float) -> None:
    gram, (p, i, t) = np.array(grams_of(samples_of(seed)).outputs), (2, 5, 8)
    power = slope**2 * (gram[i, i] - 2 * gram[i, p] + gram[p, p])

    def objective(gain: float, ridge: float) -> float:
        step = gain * slope
        return squared_error(gram, t, [i, p], [1 + step, -step]) + ridge * power * (gain - 1) ** 2

    for ridge in (0.0, 0.1, 2.0):
        best = fitted_gain(gram, p, i, t, slope, ridge)
        assert all(objective(best, ridge) <= objective(best + d, ridge) + 1e-12 for d in (-0.01, 0.01, 0.5))
    assert fitted_gain(gram, p, i, t, slope, 1e9) == pytest.approx(1, abs=1e-6)
    assert fitted_gain(gram, p, i, t, 0.0) == 1


# --- predictions -----------------------------------------------------------------------------------------------------

FULL = (0, 1, 4, 9, 11)


def predicted(predictor: Predictor, trajectory: Array, **given: Any) -> Array:
    """A trajectory [N, …] whose skipped steps are predicted from its full ones."""
    prediction = predict(predictor, schedule_of(N, *FULL), table_of(), **given)
    found = trajectory.copy()
    full: list[int] = []
    for t, weights in enumerate(prediction.weights):
        assert (not weights) == (t in FULL)
        if weights:
            found[t] = sum(w * trajectory[f] for w, f in zip(weights, full))
        else:
            full.insert(0, t)
    return found


@pytest.mark.parametrize("variable", ["step", "log-snr"])
def test_linear_is_exact_where_the_output_is_linear_in_the_variable(variable: Any) -> None:
    levels = table_of().levels
    assert levels is not None
    position = np.arange(N) if variable == "step" else np.array(levels.log_snr[:N])
    line = 3.0 - 0.5 * np.where(np.isfinite(position), position, -9.0)
    found = predicted(Predictor(of="output", method="linear", variable=variable), line)
    behind = slice(2 if variable == "step" else 5, N)  # log-SNR is −inf at step 0: no slope before step 4
    np.testing.assert_allclose(found[behind], line[behind], atol=1e-12)
    assert not np.allclose(predicted(Predictor(of="output"), line)[behind], line[behind])
    if variable == "log-snr":
        np.testing.assert_array_equal(found[2:4], line[1])


@pytest.mark.parametrize(("directions", "exact_from"), [(2, 2), (3, 5)])
def test_least_squares_are_exact_in_their_span(directions: int, exact_from: int) -> None:
    """Trajectories of two (three) directions: any two (three) of their steps give every other one."""
    samples = samples_of(5, smooth=directions)
    predictor = Predictor(of="residual", method="lsq2" if directions == 2 else "lsq3")
    grams = grams_of(samples_of(6), samples)
    found = predicted(predictor, samples[0], grams=grams)
    # Exact but for the ridge: see how far it moves the weights of a well-posed fit.
    assert np.abs(found - samples[0])[exact_from:].max() <= 1e-2 * np.abs(samples[0]).max()
    gram = np.array(grams.residuals)
    exact = least_squares(gram, 12, FULL[::-1][:directions], ridge=0.0)
    assert squared_error(gram, 12, FULL[::-1][:directions], exact) <= 1e-14


def test_reuse_is_the_paper() -> None:
    schedule = schedule_of(N, *FULL)
    assert Predictor(of="residual", method="reuse") == LEMICA
    prediction = predict(LEMICA, schedule, table_of())
    assert prediction.weights == tuple(() if t in FULL else (1.0,) for t in range(N))
    plan = plan_from_schedule(schedule, table_of(), name="a", guidance_scale=1.0, method="lemica")
    assert plan == plan_from_schedule(
        schedule, table_of(), name="a", guidance_scale=1.0, method="lemica", prediction=prediction
    )
    assert {row.residuals for row in plan.rows} == {(), (1.0,)}


def test_before_the_second_full_step_there_is_nothing_to_extrapolate() -> None:
    prediction = predict(Predictor(method="linear"), schedule_of(6, 0, 3), small_table(6))
    assert prediction.weights == (
        (),
        (1.0,),
        (1.0,),
        (),
        pytest.approx((4 / 3, -1 / 3)),
        pytest.approx((5 / 3, -2 / 3)),
    )


def small_table(num_steps: int) -> SamplerTable:
    rows = [SamplerRow(latents=(1.0,), timestep=float(num_steps))]
    for i in range(1, num_steps + 1):
        rows.append(
            SamplerRow(latents=(1.0,), outputs=(1.0,), timestep=float(num_steps - i) if i < num_steps else None)
        )
    return SamplerTable(scheduler="Small", rows=tuple(rows))


def test_gains_scale_the_slope() -> None:
    linear = Predictor(of="output", method="linear", gains=True)
    gains = [0.0] * 6
    gains[4], gains[5] = 0.5, 2.0
    prediction = predict(linear, schedule_of(6, 0, 3), small_table(6), gains=gains)
    assert prediction.weights[4:] == (pytest.approx((7 / 6, -1 / 6)), pytest.approx((7 / 3, -4 / 3)))
    samples = samples_of(2)
    fitted = predict(linear, schedule_of(N, *FULL), table_of(), grams=grams_of(samples))
    plain = predict(Predictor(of="output", method="linear"), schedule_of(N, *FULL), table_of())
    for t, full in ((6, [4, 1]), (10, [9, 4]), (15, [11, 9])):
        assert error(samples, t, full, fitted.weights[t]) <= error(samples, t, full, plain.weights[t])


def test_output_rows_weigh_the_outputs_of_full_rows() -> None:
    linear = Predictor(of="output", method="linear")
    plan = plan_from_schedule(
        schedule_of(6, 0, 3),
        small_table(6),
        name="a",
        guidance_scale=1.0,
        method="x",
        prediction=predict(linear, schedule_of(6, 0, 3), small_table(6)),
    )
    assert [row.graph for row in plan.rows] == ["full", "none", "none", "full", "none", "none", "none"]
    assert [row.reuse for row in plan.rows[:4]] == [(), (1.0,), (0.0, 1.0), ()]
    assert plan.rows[4].reuse == pytest.approx((4 / 3, 0, 0, -1 / 3))
    assert plan.rows[5].reuse == pytest.approx((0, 5 / 3, 0, 0, -2 / 3))
    assert plan.predictor == linear
    assert value_from_json(type(plan), json_bytes(plan), where="test") == plan


def test_names_are_distinct_and_readable() -> None:
    assert LEMICA.name == "residual-reuse"
    assert Predictor(of="output", method="linear", variable="log-snr", gains=True).name == "output-linear-log-snr-gains"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Predictor(method="lsq2", variable="log-snr"), "log-snr belongs to linear, not to lsq2"),
        (lambda: Predictor(gains=True), "gains belong to linear, not to reuse"),
        (lambda: Prediction(predictor=LEMICA, weights=((), (float("inf"),))), r"weights\[1\]\[0\] must be finite"),
        (lambda: predict(LEMICA, schedule_of(5, 0), table_of()), f"for 5 steps, the sampler has {N}"),
    ],
)
def test_predictors_refuse(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


LSQ2 = Predictor(method="lsq2")


@pytest.mark.parametrize(
    ("predictor", "given", "kind", "says"),
    [
        (LSQ2, {}, UsageError, "residual-lsq2 needs the Grams of uncached runs → calibrate first"),
        (LSQ2, {"grams": grams_of(samples_of(0))}, InputError, "expected Grams of the residuals"),
        (LSQ2, {"grams": grams_of(samples_of(0), sampler_digest="1")}, InputError, "measured with another"),
        (LSQ2, {"gains": [1.0] * N}, UsageError, "for residual-lsq2"),
        (Predictor(method="linear", gains=True), {"gains": [1.0]}, UsageError, "expected 16 gains .* got 1"),
    ],
)
def test_predict_refuses(predictor: Predictor, given: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        predict(predictor, schedule_of(N, 0, 3), table_of(), **given)


def test_log_snr_needs_levels() -> None:
    with pytest.raises(UnsupportedError, match="expected the noise level of each step of Small"):
        predict(Predictor(method="linear", variable="log-snr"), schedule_of(6, 0, 3), small_table(6))


def test_a_prediction_belongs_to_one_schedule() -> None:
    prediction = predict(LEMICA, schedule_of(6, 0, 3), small_table(6))
    with pytest.raises(ValueError, match="the prediction was made for another schedule"):
        plan_from_schedule(
            schedule_of(6, 0, 2), small_table(6), name="a", guidance_scale=1.0, method="x", prediction=prediction
        )


# --- noise levels ----------------------------------------------------------------------------------------------------


def test_levels_are_no_part_of_the_digest() -> None:
    table = table_of()
    bare = SamplerTable(scheduler=table.scheduler, rows=table.rows)
    assert table.digest == bare.digest
    assert b"levels" not in json_bytes(bare)
    again = value_from_json(SamplerTable, json_bytes(table), where="test")
    assert again == table and again.levels == table.levels
    assert value_from_json(SamplerTable, json_bytes(bare), where="test").levels is None


def test_log_snr_and_outputs() -> None:
    levels = NoiseLevels(target="v_prediction", signal=(0.0, 3.0, 1.0), noise=(1.0, 4.0, 0.0))
    assert levels.log_snr == (-np.inf, pytest.approx(2 * np.log(0.75)), np.inf)
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
    with pytest.raises(ValueError, match="2 noise levels for 17 rows"):
        SamplerTable(
            scheduler="x",
            rows=table_of().rows,
            levels=NoiseLevels(target="epsilon", signal=(1.0, 1.0), noise=(1.0, 0.0)),
        )
