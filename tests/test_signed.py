"""Signed errors: equal to direct roll-outs for linear models, in float64; plans that never leave the budget."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemica_trt.core.errors import InfeasibleError, InputError
from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.sampler import SamplerRow, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.signed import (
    DOUBT,
    AdjointProducts,
    output_adjoints,
    plan_errors,
    signed_errors,
    signed_objective,
    solve_signed,
)

pytestmark = pytest.mark.null

N, SIZE, PROBES, MAX_SKIP = 8, 5, 3, 4


def table(latents: tuple[float, ...], outputs: tuple[float, ...]) -> SamplerTable:
    """A sampler that reads as far back as it is given coefficients; they vary by step."""
    rows = [SamplerRow(latents=(1.0,), timestep=1000.0)]
    for i in range(1, N + 1):
        rows.append(
            SamplerRow(
                latents=tuple(c + 0.02 * i for c in latents[: i + 1]),
                outputs=tuple(c - 0.03 * i for c in outputs[:i]),
                timestep=None if i == N else 1000.0 - 100.0 * i,
            )
        )
    return SamplerTable(scheduler="Toy", rows=tuple(rows))


TABLES = pytest.mark.parametrize(
    "sampler",
    [table((0.9,), (-0.3,)), table((0.9,), (-0.4, 0.2)), table((0.7, 0.2), (-0.3, 0.1, 0.05))],
    ids=["one-step", "two outputs", "two latents, three outputs"],
)


class Linear:
    """m_t = C_t·x_t + c_t under a sampler, and its exact adjoints."""

    def __init__(self, sampler: SamplerTable) -> None:
        random = np.random.default_rng(0)
        self.sampler = sampler
        self.start = random.standard_normal(SIZE)
        self.matrices = random.standard_normal((N, SIZE, SIZE)) / 2
        self.constants = random.standard_normal((N, SIZE))
        self.directions = random.standard_normal((PROBES, SIZE))

    def run(self, replaced: dict[int, Any] | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
        """x_N and all outputs, where `replaced` outputs are linear combinations {step: coefficient} of others."""
        latents, outputs = [self.start], list[np.ndarray]()
        for t, row in enumerate(self.sampler.rows):
            x = sum(c * old for c, old in zip(row.latents, reversed(latents)))
            x = x + sum(c * old for c, old in zip(row.outputs, reversed(outputs)))
            latents.append(x)
            if t == N:
                return x, outputs
            if replaced and t in replaced:
                outputs.append(sum(c * outputs[k] for k, c in replaced[t].items()))
            else:
                outputs.append(self.matrices[t] @ x + self.constants[t])
        raise AssertionError("a table ends at N")

    def products(self) -> np.ndarray:
        """M [PROBES, N + 1, N], by backpropagation through the whole run."""
        adjoints = np.zeros((N + 1, PROBES, SIZE))
        adjoints[N] = self.directions
        for t in reversed(range(N)):
            rows = list(enumerate(self.sampler.rows[t + 1 :]))
            of_output = sum(row.outputs[k] * adjoints[t + 1 + k] for k, row in rows if k < len(row.outputs))
            beside = sum(row.latents[k] * adjoints[t + 1 + k] for k, row in rows if k < len(row.latents))
            adjoints[t] = beside + of_output @ self.matrices[t]
        return np.einsum("srd,td->rst", adjoints, np.array(self.run()[1])) / SIZE**0.5


@TABLES
@pytest.mark.parametrize("gain", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("times", [None, tuple(np.log(np.linspace(9.0, 1.0, N)))], ids=["index", "log"])
def test_signed_errors_are_those_of_direct_roll_outs(sampler: SamplerTable, gain: float, times: Any) -> None:
    model = Linear(sampler)
    errors = signed_errors(sampler, model.products(), max_skip=MAX_SKIP, times=times, gain=gain)
    assert errors.shape == (N, MAX_SKIP + 2, MAX_SKIP + 2, PROBES)
    tau = np.arange(N) if times is None else np.array(times)
    reference = model.run()[0]
    checked = 0
    for i in range(N):
        for j in range(i + 1, min(i + MAX_SKIP + 1, N) + 1):
            for p in (None, *range(max(i - MAX_SKIP - 1, 0), i)):
                replaced = {}
                for t in range(i + 1, j):
                    slope = 0.0 if p is None else gain * (tau[t] - tau[i]) / (tau[i] - tau[p])
                    replaced[t] = {i: 1 + slope} | ({} if p is None else {p: -slope})
                change = model.run(replaced)[0] - reference
                got = errors[i, 0 if p is None else i - p, j - i]
                np.testing.assert_allclose(got, model.directions @ change / SIZE**0.5, rtol=1e-9, atol=1e-12)
                checked += 1
    assert checked == np.isfinite(errors[..., 0]).sum()


def test_one_step_samplers_have_the_closed_form() -> None:
    sampler = table((0.9,), (-0.3,))
    gamma = output_adjoints(sampler, 2, 6)
    a = [row.latents[0] for row in sampler.rows[1:]]
    b = [row.outputs[0] for row in sampler.rows[1:]]
    for t in range(2, 6):
        assert gamma[t - 2, 6] == pytest.approx(b[t] * np.prod(a[t + 1 : 6]))
    assert (np.delete(gamma, 6, axis=1) == 0).all()


def random_errors(seed: int, n: int, max_skip: int) -> np.ndarray:
    """Any numbers where there are triples; [.., samples, probes]."""
    errors = np.full((n, max_skip + 2, max_skip + 2, 3, 2), np.nan)
    random = np.random.default_rng(seed)
    for i in range(n):
        for back in (0, *range(1, min(i, max_skip + 1) + 1)):
            for length in range(1, min(max_skip + 1, n - i) + 1):
                errors[i, back, length] = 0.0 if length == 1 else random.standard_normal((3, 2)) * length
    return errors


def value_of(errors: np.ndarray, steps: tuple[int, ...], doubt: float = DOUBT) -> float:
    """The objective by its definition."""
    segments = [
        errors[i, i - p if k else 0, j - i]
        for k, (p, i, j) in enumerate(zip((0, *steps), steps, (*steps[1:], len(errors))))
    ]
    squares = sum(segments) ** 2 + doubt * sum(each**2 for each in segments)
    return float(np.mean([np.log(np.mean(sample) + 1e-24) for sample in squares]))


@pytest.mark.parametrize("doubt", [0.0, 0.3, 2.0])
def test_objective_is_what_it_says(doubt: float) -> None:
    errors = random_errors(1, 9, 3)
    steps = (0, 2, 3, 7)
    found = signed_objective(plan_errors(errors, np.array([steps])), doubt)[0]
    assert found == pytest.approx(value_of(errors, steps, doubt))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_plans_never_leave_the_budget(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 14))
    max_skip = data.draw(st.integers(1, n - 1))
    budget = data.draw(st.integers(-(-n // (max_skip + 1)), n))
    errors = random_errors(data.draw(st.integers(0, 99)), n, max_skip)
    seeds = [uniform(n, budget)]
    plan = solve_signed(errors, budget, seeds=seeds, starts=3)
    assert plan.budget == budget and plan.num_steps == n
    assert all(j - i <= max_skip + 1 for i, j in plan.segments)
    if all(j - i <= max_skip + 1 for i, j in seeds[0].segments):
        assert value_of(errors, plan.full_steps) <= value_of(errors, seeds[0].full_steps) + 1e-9


@pytest.mark.parametrize("doubt", [0.0, DOUBT])
@pytest.mark.parametrize("seed", range(5))
def test_small_problems_are_solved(seed: int, doubt: float) -> None:
    errors = random_errors(seed, 9, 4)
    every = [(0, *rest) for rest in itertools.combinations(range(1, 9), 3)]
    allowed = [steps for steps in every if max(np.diff((*steps, 9))) <= 5]
    best = min(allowed, key=lambda steps: value_of(errors, steps, doubt))
    assert solve_signed(errors, 4, doubt=doubt).full_steps == best


def test_it_is_the_same_every_time_and_uses_its_seeds() -> None:
    errors = random_errors(3, 30, 6)
    assert solve_signed(errors, 9, starts=4) == solve_signed(errors, 9, starts=4)
    best = solve_signed(errors, 9, starts=40)
    assert solve_signed(errors, 9, starts=0, seeds=[best]) == best


def test_refusals() -> None:
    errors = random_errors(0, 9, 2)
    with pytest.raises(InfeasibleError, match="expected 3 … 9 full steps"):
        solve_signed(errors, 2)
    with pytest.raises(InputError, match="expected schedules with 4 of 9 steps, got one with 3 of 9"):
        solve_signed(errors, 4, seeds=[Schedule(num_steps=9, full_steps=(0, 3, 6))])
    sampler = table((0.9,), (-0.3,))
    for times in ((0.0,) * N, tuple(range(N - 1))):
        with pytest.raises(InputError, match=f"expected {N} strictly monotone numbers"):
            signed_errors(sampler, np.zeros((1, N + 1, N)), max_skip=2, times=times)


def products_of(**changes: Any) -> AdjointProducts:
    matrix = tuple(tuple(float(s + t) for t in range(2)) for s in range(3))
    arguments: dict[str, Any] = {
        "model": "toy",
        "revision": "0",
        "scheduler": "Toy",
        "sampler_digest": "0",
        "sampler_probe": (),
        "num_steps": 2,
        "dtype": "fp32",
        "guidance_scale": 1.0,
        "negative_prompt": "",
        "text_length": 4,
        "latent_shape": (1,),
        "samples": 2,
        "seed": 0,
        "prompts_digest": "0",
        "probes": 1,
        "products": ((matrix,), (matrix,)),
    }
    return AdjointProducts(**arguments | changes)


def test_products_round_trip_and_are_checked() -> None:
    value = products_of()
    assert value.array.shape == (2, 1, 3, 2)
    assert value_from_json(AdjointProducts, json_bytes(value), where="x") == value
    with pytest.raises(ValueError, match="products are of 2 samples, not 3"):
        products_of(samples=3)
    with pytest.raises(ValueError, match=r"products\[0\] has 1 probes, not 2"):
        products_of(probes=2)
    with pytest.raises(ValueError, match=r"products\[0\]\[0\] must have 4 rows of 3 numbers"):
        products_of(num_steps=3)
    with pytest.raises(ValueError, match=r"products\[1\]\[0\]\[1\] must be finite"):
        products_of(products=(value.products[0], (((0.0, 1.0), (0.0, float("nan")), (1.0, 1.0)),)))
