"""Planners of other papers: their schedules are the best of all by brute force, priced as the papers read, from
trajectories rather than Gram matrices; and what they do in a skipped step is what the papers say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from lemica_trt.core.errors import InfeasibleError, UsageError
from lemica_trt.ir.calibration import Calibration
from lemica_trt.ir.graphs import TensorSpec
from lemica_trt.ir.plan import PlanRow, StepPlan, trunk_reads
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.extrapolation import linear_weights
from lemica_trt.planning.layout import layout_for_methods, misfit
from lemica_trt.planning.planner import Problem, planners
from lemica_trt.planning.planners.dpcache import FORCED
from lemica_trt.planning.planners.l2p import OUTPUTS, learned_weights
from lemica_trt.planning.planners.mean_velocity import GAMMA, mean_velocity_table
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.step_plan import plan_from_solver
from lemica_trt.planning.threshold import schedule_by_threshold
from lemica_trt.testing.interpreter import interpret
from lemica_trt.testing.values import N, flow_table, grams_of, graph_of, problem_of, recurrence, samples_of

pytestmark = pytest.mark.null

Array = npt.NDArray[np.float64]

MAX_SKIP = 4
Price = Callable[[Sequence[int], int, int], float]
"""Earlier full steps and i itself, i, j → what the segment costs."""


def trajectories(seed: int) -> Array:
    """Outputs [samples, N, size], rough enough that schedules differ."""
    smooth = samples_of(seed, smooth=8)
    return smooth + 0.1 * np.abs(smooth).mean() * np.random.default_rng(seed).standard_normal(smooth.shape)


def normalised(samples: Array) -> Array:
    return samples / np.sqrt((samples**2).sum((1, 2), keepdims=True) / N)


def problem(table: SamplerTable, outputs: Array) -> Problem:
    calibration = Calibration(graph=graph_of(table, max_skip=MAX_SKIP), grams=grams_of(outputs, table))
    return problem_of(table, calibration=calibration)


def size(errors: Array) -> float:
    """Root mean square over samples of ‖error‖, errors [samples, size]."""
    return float(np.sqrt(np.square(errors).sum(1).mean()))


def total(steps: Sequence[int], price: Price) -> float:
    ends = [*steps[1:], N]
    if any(j - i - 1 > MAX_SKIP for i, j in zip(steps, ends)):
        return np.inf
    return sum(price(steps[: k + 1], i, j) for k, (i, j) in enumerate(zip(steps, ends)))


def best(budget: int, forced: int, price: Price) -> float:
    first = tuple(range(forced))
    every = (first + rest for rest in combinations(range(forced, N), budget - forced))
    return min(total(steps, price) for steps in every)


@pytest.mark.parametrize("seed", [0, 1])
def test_dpcache_is_the_least_sum_of_all(seed: int) -> None:
    outputs = trajectories(seed)
    m = normalised(outputs)

    def price(steps: Sequence[int], i: int, j: int) -> float:
        p = steps[-2] if len(steps) > 1 else None
        errors = []
        for t in range(i + 1, j):
            slope = np.zeros_like(m[:, i]) if p is None else (m[:, i] - m[:, p]) / (i - p)
            errors.append(size(m[:, t] - m[:, i] - (t - i) * slope))
        return sum(errors)

    for budget in (5, 6, 8):
        plan = planners()["dpcache"](problem(flow_table(), outputs), budget)
        assert plan.full_steps[:FORCED] == tuple(range(FORCED))
        assert total(plan.full_steps, price) == pytest.approx(best(budget, FORCED, price), rel=1e-9)
    assert plan.full_steps != uniform(N, budget).full_steps


def test_dpcache_forces_fewer_steps_where_the_budget_is_short() -> None:
    assert planners()["dpcache"](problem(flow_table(), trajectories(0)), 4).full_steps == (0, 1, 6, 11)
    with pytest.raises(InfeasibleError, match="expected 4 … 16"):
        planners()["dpcache"](problem(flow_table(), trajectories(0)), 3)


def velocity_error(table: SamplerTable, m: Array, r: int | None, t: int, s: int) -> float:
    """‖u(t, s) − û(t, s)‖ on trajectories m that explicit Euler has walked."""
    assert table.levels is not None
    sigma = np.array(table.levels.noise)
    z = np.concatenate([np.zeros_like(m[:, :1]), np.cumsum(m * np.diff(sigma)[:, None], axis=1)], axis=1)
    u = (z[:, s] - z[:, t]) / (sigma[s] - sigma[t])
    if r is None:
        return size(u - m[:, t])
    jvp = (z[:, t] - z[:, r] - (sigma[t] - sigma[r]) * m[:, r]) / (sigma[t] - sigma[r]) ** 2
    return size(u - m[:, t] - (sigma[s] - sigma[t]) * jvp)


@pytest.mark.parametrize("seed", [0, 1])
def test_mean_velocity_is_the_peak_suppressed_shortest_path(seed: int) -> None:
    table, outputs = flow_table(), trajectories(seed)
    m = normalised(outputs)
    known: dict[tuple[int | None, int, int], float] = {}

    def error(r: int | None, t: int, s: int) -> float:
        if (r, t, s) not in known:
            known[r, t, s] = velocity_error(table, m, r, t, s)
        return known[r, t, s]

    def price(steps: Sequence[int], t: int, s: int) -> float:
        ways = [error(None, t, s), *([error(steps[-3], t, s)] if len(steps) > 2 else [])]
        return min(ways) ** GAMMA

    for budget in (5, 7):
        plan = planners()["mean-velocity"](problem(table, outputs), budget)
        assert total(plan.full_steps, price) == pytest.approx(best(budget, 1, price), rel=1e-6)


def test_mean_velocity_needs_noise_levels_and_no_standard_solver() -> None:
    """So that a finished bundle takes it, where there is no diffusers."""
    planner, table, m = planners()["mean-velocity"], flow_table(), trajectories(0)
    bare = problem_of(table, solver=None, calibration=problem(table, m).calibration)
    assert planner(bare, 6).rows == planner(problem(table, m), 6).rows
    unknown = msgspec.structs.replace(table, levels=None)
    with pytest.raises(UsageError, match="mean-velocity needs a sampler whose noise levels are known"):
        planner(problem(unknown, m), 6)


class Velocity:
    """v = −0.7·z + cos(5·level), alike for every number."""

    def full(self, row: PlanRow, sample: Array) -> tuple[Array, Array]:
        assert row.timestep is not None
        return -0.7 * sample + np.cos(5 * row.timestep / 1000), sample

    def head(self, row: PlanRow, sample: Array, residual: Array) -> Array:
        raise AssertionError("nothing is skipped inside a folded plan")


def test_mean_velocity_jumps_by_the_mean_velocity() -> None:
    """The latents of the plan are those of the paper's update, written out."""
    table = flow_table()
    assert table.levels is not None
    sigma, steps, corrections = np.array(table.levels.noise), (0, 1, 3, 6, 9, 13), (None, None, 0, 1, None, 6)
    solver = mean_velocity_table(table, steps, corrections)
    plan = plan_from_solver(
        Schedule(num_steps=N, full_steps=steps), table, solver, name="b6", guidance_scale=4.0, method="mean-velocity"
    )
    z, v = [np.ones(3)], list[Array]()
    for k, (t, s, r) in enumerate(zip(steps, [*steps[1:], N], corrections)):
        v.append(-0.7 * z[k] + np.cos(5 * sigma[t]))
        mean = v[k]
        if r is not None:
            ago, there = sigma[t] - sigma[r], steps.index(r)
            mean = v[k] + (sigma[s] - sigma[t]) * (z[k] - z[there] - ago * v[there]) / ago**2
        z.append(z[k] + (sigma[s] - sigma[t]) * mean)
    found = [x for _, x in interpret(plan, Velocity(), np.ones(3))]
    np.testing.assert_allclose(found, z, rtol=1e-12)


def test_l2p_is_least_squares_on_uncached_runs() -> None:
    outputs = trajectories(2)
    m, schedule = normalised(outputs), uniform(N, 5)
    weights = learned_weights(grams_of(outputs, flow_table()), schedule)
    linear = linear_weights(schedule)
    for t in range(N):
        read = [step for step in schedule.full_steps if step < t][::-1][:OUTPUTS]
        if t in schedule.full_steps:
            assert weights[t] == ()
            continue
        basis, target = m[:, read].transpose(0, 2, 1).reshape(-1, len(read)), m[:, t].reshape(-1)
        expected = np.linalg.lstsq(basis, target, rcond=None)[0]
        np.testing.assert_allclose(weights[t], expected, atol=1e-5)
        held, extrapolated = m[:, t] - m[:, read[0]], target - basis[:, : len(linear[t])] @ np.array(linear[t])
        left = np.square(target - basis @ np.array(weights[t])).sum()
        assert left <= min(np.square(held).sum(), np.square(extrapolated).sum()) * (1 + 1e-6)


def test_l2p_reuses_an_output_that_never_changes() -> None:
    still = np.repeat(samples_of(0)[:, :1], N, axis=1)
    for row in learned_weights(grams_of(still, flow_table()), Schedule(num_steps=N, full_steps=(0, 4, 8))):
        assert not row or sum(row) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_teacache_has_the_least_largest_sum_of_changes_that_it_skips(seed: int) -> None:
    """Of all schedules of as many full steps whose last step is full: so does the walk under the least threshold."""
    outputs = trajectories(seed)
    m = normalised(outputs)
    changes = [0.0, *(size(m[:, t] - m[:, t - 1]) / size(m[:, t - 1]) for t in range(1, N))]

    def largest(steps: Sequence[int]) -> float:
        return max(sum(changes[i + 1 : j]) for i, j in zip(steps, [*steps[1:], N]))

    for budget in range(2, N):
        steps = planners()["teacache"](problem(flow_table(), outputs), budget).full_steps
        assert len(steps) == budget and steps[-1] == N - 1
        least = min(largest((0, *rest, N - 1)) for rest in combinations(range(1, N - 1), budget - 2))
        assert largest(steps) == pytest.approx(least, rel=1e-9)
    assert planners()["teacache"](problem(flow_table(), outputs), 1).full_steps == (0,)


def test_magcache_is_the_walk_of_the_paper_under_some_threshold() -> None:
    growing = np.exp(np.cumsum(0.1 * np.random.default_rng(3).random(N)))
    outputs = samples_of(0)[:, :1] * growing[:, None]
    ratios = [1.0, *(growing[1:] / growing[:-1])]

    def walked(threshold: float, first: int) -> tuple[int, ...]:
        steps, product, error, skipped = list(range(first)), 1.0, 0.0, 0
        for t in range(first, N):
            product *= ratios[t]
            error, skipped = error + abs(1 - product), skipped + 1
            if error >= threshold or skipped > MAX_SKIP:
                steps.append(t)
                product, error, skipped = 1.0, 0.0, 0
        return tuple(steps)

    differs = False
    for budget in range(5, 13):
        steps = planners()["magcache"](problem(flow_table(), outputs), budget).full_steps
        first = -(-budget // 5)
        assert len(steps) == budget and steps[:first] == tuple(range(first))
        assert steps in {walked(threshold, first) for threshold in np.linspace(0, 3, 30_001)}
        differs |= steps != uniform(N, budget).full_steps
    assert differs
    with pytest.raises(InfeasibleError, match="expected 4 … 16"):
        planners()["magcache"](problem(flow_table(), outputs), 3)
    assert len(planners()["magcache"](problem(flow_table(), outputs), 4).full_steps) == 4


def test_where_nothing_changes_a_threshold_still_has_all_its_full_steps() -> None:
    for budget in range(1, N):
        schedule = schedule_by_threshold(np.zeros((N, N)), budget, max_skip=N)
        assert schedule.budget == budget


@pytest.mark.parametrize("name", ["teacache", "magcache"])
def test_a_threshold_reuses_residuals(name: str) -> None:
    plan = planners()[name](problem(flow_table(), trajectories(0)), 6)
    assert {trunk_reads(1.0) == row.caches for row in plan.rows[:-1] if row.step not in plan.full_steps} == {True}
    assert len(plan.rows) == N + 1


@pytest.mark.parametrize("name", ["dpcache", "mean-velocity", "l2p", "teacache", "magcache"])
@pytest.mark.parametrize("table", [flow_table(50), recurrence(50, outputs=3, latents=2)], ids=["one step", "multistep"])
def test_graphs_that_are_exported_first_run_the_plans(name: str, table: SamplerTable) -> None:
    planner = planners()[name]
    found = problem_of(table)
    if not planner.needs <= found.has:
        assert table.levels is None and "levels" in planner.needs
        return
    layout = layout_for_methods(
        found,
        [planner],
        latent_shape=(4,),
        guided=True,
        branches=False,
        conditions=(TensorSpec(name="prompt_embeds", dtype="fp32", shape=("2*batch", 4)),),
    )
    plans: list[StepPlan] = [planner(found, budget) for budget in (12, 17, 31)]
    assert [misfit(plan, layout) for plan in plans] == [None] * 3
