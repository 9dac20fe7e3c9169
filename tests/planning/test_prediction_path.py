"""Schedules planned for predicted outputs: the optimum by brute force, priced by least squares as it reads."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

from lemica_trt.core.errors import InfeasibleError, InputError
from lemica_trt.ir.calibration import Edge, ErrorGraph
from lemica_trt.ir.sampler import SamplerRow, SamplerTable
from lemica_trt.planning.prediction_path import prediction_errors, sensitivities, solve_prediction_path
from lemica_trt.testing.values import N, flow_table, grams_of, graph_of

pytestmark = pytest.mark.null

Array = npt.NDArray[np.float64]

SIZE = 7
"""Dimensions of the toy outputs: more than three terms, so that prediction always leaves something."""


def two_steps(n: int) -> SamplerTable:
    """A sampler that reads two outputs and two latents back."""
    rows = [SamplerRow(latents=(1.0,), timestep=1000.0)]
    rows += [
        SamplerRow(
            latents=(0.8, 0.1)[: min(i, 2)],
            outputs=(-0.3, 0.1)[: min(i, 2)],
            timestep=1000.0 - 10 * i if i < n else None,
        )
        for i in range(1, n + 1)
    ]
    return SamplerTable(scheduler="TwoSteps", rows=tuple(rows))


def outputs_of(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((3, N, SIZE)).cumsum(1)


def normalised(samples: Array) -> Array:
    return samples / np.sqrt((samples**2).sum((1, 2), keepdims=True) / N)


def left_by_prediction(table: SamplerTable, outputs: Array, read: list[int], j: int) -> float:
    """ε² by running the sampler: the change of what lies behind step j where the skipped outputs are all 0, then what
    the outputs read cannot tell of it."""
    i = read[0]

    def behind(changed: Array) -> Array:
        """Σ over s ≥ j of what the histories at j put into row s, no model running."""
        latents, total = {t: np.zeros(SIZE) for t in range(-2, j)}, np.zeros(SIZE)
        for t in range(i + 1, table.num_steps + 1):
            row = table.rows[t]
            x = sum((c * latents.get(t - 1 - k, np.zeros(SIZE)) for k, c in enumerate(row.latents)), np.zeros(SIZE))
            for k, c in enumerate(row.outputs):
                if t - 1 - k < j:
                    x = x + c * changed[t - 1 - k]
            if t < j:
                latents[t] = x
            else:
                total = total + x  # its own effect on later rows is the later rows' affair
        return total

    target, basis = [], []
    for sample in normalised(outputs):
        skipped = np.where((np.arange(N) > i)[:, None] & (np.arange(N) < j)[:, None], sample, 0.0)
        target.append(behind(skipped))
        basis.append(sample[read])
    a, t = np.concatenate([b.T for b in basis]), np.concatenate(target)
    weights = np.linalg.lstsq(a, t, rcond=None)[0]
    return float(np.square(t - a @ weights).sum() / len(outputs))


@pytest.mark.parametrize("table", [flow_table(), two_steps(N)], ids=["one-step", "two-steps"])
def test_errors_are_what_least_squares_leaves(table: SamplerTable) -> None:
    outputs = outputs_of(1)
    errors = prediction_errors(table, grams_of(outputs, table), 4)
    for q, p, i, j in [(0, 2, 3, 7), (4, 6, 9, 13), (5, 7, 8, 9), (9, 12, 13, 16), (3, 4, 6, 8)]:
        expected = left_by_prediction(table, outputs, [i, p, q], j)
        assert errors[i, i - p, p - q, j - i] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert errors[0, 0, 0, 3] == pytest.approx(left_by_prediction(table, outputs, [0], 3), rel=1e-5)
    assert errors[2, 2, 0, 3] == pytest.approx(left_by_prediction(table, outputs, [2, 0], 5), rel=1e-5)
    assert errors[5, 1, 1, 1] == pytest.approx(0, abs=1e-9), "nothing is skipped"
    assert np.isinf(errors[2, 3, 0, 1]) and np.isinf(errors[2, 1, 2, 1]) and np.isinf(errors[N - 1, 1, 1, 2])


@pytest.mark.parametrize("power", [1.0, 0.85])
def test_schedules_are_the_best_of_all(power: float) -> None:
    table = two_steps(N)
    graph, grams = graph_of(table, 2), grams_of(outputs_of(2), table)
    errors = prediction_errors(table, grams, 5)
    weights = sensitivities(table, graph, grams) ** (2 * power)

    def price(steps: tuple[int, ...]) -> float:
        total = 0.0
        for k, i in enumerate(steps):
            j = steps[k + 1] if k + 1 < len(steps) else N
            back = i - steps[k - 1] if k else 0
            further = steps[k - 1] - steps[k - 2] if k > 1 else 0
            total += errors[i, back, further, j - i] * weights[j] if max(j - i, back, further) <= 5 else np.inf
        return total

    found = solve_prediction_path(table, graph, grams, [4, 6, 7], power=power)
    for budget, schedule in found.items():
        every = [(0, *rest) for rest in combinations(range(1, N), budget - 1)]
        best = min(price(steps) for steps in every)
        assert schedule.budget == budget and np.isfinite(best)
        assert price(schedule.full_steps) == pytest.approx(best, rel=1e-12)
    # Planned together or alone, it is the same.
    assert solve_prediction_path(table, graph, grams, [6], power=power) == {6: found[6]}


def test_sensitivity_is_error_over_what_reuse_leaves() -> None:
    """Errors made as c_j times what reuse leaves give c back, but for one factor; stops without an edge lie between."""
    table = flow_table(shift=1.0)
    outputs = outputs_of(3)
    grams = grams_of(outputs, table)
    c = np.exp(np.linspace(1.0, -2.0, N + 1))
    samples, edges = normalised(outputs), []
    for i in range(N - 1):
        for j in range(i + 2, min(i + 5, N) + 1):
            if j in (6, 7):
                continue
            change = sum((samples[:, i] - samples[:, t]) / N for t in range(i + 1, j))
            left = np.sqrt(np.square(change).sum(1).mean())
            edges.append(Edge(start=i, stop=j, errors=(float(c[j] * left), float(c[j] * left))))
    graph = graph_of(table, 0)
    fields = {name: getattr(graph, name) for name in ErrorGraph.__struct_fields__} | {"edges": tuple(edges)}
    found = sensitivities(table, ErrorGraph(**fields), grams)
    np.testing.assert_allclose(np.log(found[2:]) - np.log(found[2]), np.log(c[2:]) - np.log(c[2]), atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    table = flow_table()
    graph, grams = graph_of(table, 0), grams_of(outputs_of(0), table)
    with pytest.raises(InfeasibleError, match="got 3"):
        solve_prediction_path(table, graph, grams, [3])
    with pytest.raises(InputError, match="error graph of this sampler"):
        solve_prediction_path(table, graph_of(two_steps(N), 0), grams, [8])
    with pytest.raises(InputError, match="Grams of this sampler"):
        solve_prediction_path(table, graph, grams_of(outputs_of(0), two_steps(N)), [8])
