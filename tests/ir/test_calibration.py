"""What calibration measures: Gram matrices, and all parts as one value that belong together."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.calibration import Calibration, TrajectoryGrams, gram_from_samples
from lemica_trt.testing.values import (
    N,
    calibration_of,
    flow_table,
    grams_of,
    graph_of,
    noisy,
    samples_of,
    sensitivity_of,
)

pytestmark = pytest.mark.null

Array = npt.NDArray[np.float64]
TABLE = flow_table()


# --- Grams -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_gram_knows_every_fit(seed: int) -> None:
    """The error of any combination, by definition over the normalised trajectories, follows from G alone."""
    samples = samples_of(seed)
    random = np.random.default_rng(seed)
    weights, (t, *steps) = random.standard_normal(3), random.choice(N, 4, replace=False).tolist()
    gram = np.array(grams_of(samples, TABLE).outputs)
    a = samples / np.sqrt((samples**2).sum((1, 2), keepdims=True) / N)
    expected = float(((a[:, t] - np.einsum("k,skd->sd", weights, a[:, steps])) ** 2).sum(1).mean())
    signed = np.array([1.0, *-weights])
    assert signed @ gram[np.ix_([t, *steps], [t, *steps])] @ signed == pytest.approx(expected, rel=1e-9)
    assert np.trace(gram) == pytest.approx(N)


def test_no_sample_counts_for_more_because_it_is_louder() -> None:
    samples = samples_of(1)
    louder = samples * np.array([1.0, 1e3, 1e-3])[:, None, None]
    np.testing.assert_allclose(grams_of(louder, TABLE).outputs, grams_of(samples, TABLE).outputs, rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"num_steps": 1}, "num_steps must be 2 … 10000, got 1"),
        ({"num_steps": N + 1}, f"outputs must have {N + 1} rows of {N + 1} numbers"),
        ({"outputs": tuple((0.0,) * N for _ in range(N))}, r"outputs\[0\]\[0\] must be above 0, got 0.0"),
        ({"outputs": tuple((float("nan"),) * N for _ in range(N))}, r"outputs\[0\]\[0\] must be finite"),
        ({"outputs": tuple(tuple(1.0 + (k < j) for k in range(N)) for j in range(N))}, "outputs must be symmetric"),
    ],
)
def test_grams_refuse(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrajectoryGrams(**msgspec.structs.asdict(grams_of(samples_of(0), TABLE)) | changes)


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


# --- one value -------------------------------------------------------------------------------------------------------


def test_a_calibration_survives_json_and_is_of_its_sampler() -> None:
    calibration = calibration_of(TABLE, sensitivity=sensitivity_of(TABLE))
    assert value_from_json(Calibration, json_bytes(calibration), where="test") == calibration
    assert calibration.is_of(TABLE)
    assert not calibration.is_of(flow_table(N - 1)) and not calibration.is_of(noisy(TABLE))
    moved = msgspec.structs.replace(calibration.graph, sampler_probe=tuple(2 * p for p in TABLE.probe))
    assert not Calibration(graph=moved).is_of(TABLE), "the same settings, other numbers"


@pytest.mark.parametrize("field", ["revision", "sampler_digest", "guidance_scale"])
def test_parts_of_different_calibrations_are_refused(field: str) -> None:
    other: dict[str, Any] = {field: 7.0 if field == "guidance_scale" else "another"}
    with pytest.raises(ValueError, match=f"grams: expected {field}"):
        calibration_of(TABLE, grams=grams_of(samples_of(0), TABLE, **other))
    with pytest.raises(ValueError, match=f"sensitivity: expected {field}"):
        calibration_of(TABLE, sensitivity=sensitivity_of(TABLE, **other))


def test_a_retargeted_graph_has_the_sensitivity_of_its_source() -> None:
    source = sensitivity_of(TABLE, sampler_digest="another", guidance_scale=2.0)
    graph = graph_of(TABLE, method="retargeted")
    assert calibration_of(TABLE, graph=graph, sensitivity=source).sensitivity == source
    with pytest.raises(ValueError, match="sensitivity: expected revision"):
        calibration_of(TABLE, graph=graph, sensitivity=sensitivity_of(TABLE, revision="another"))
