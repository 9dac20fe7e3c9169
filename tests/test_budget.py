"""Budgets in any unit: what a time affords, the least that reaches a quality, and the front of both."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemica_trt.core.errors import InfeasibleError
from lemica_trt.evaluate.timing import shortened
from lemica_trt.ir.budget import (
    Budget,
    Front,
    Latency,
    MinPsnr,
    Point,
    Speedup,
    StepBudget,
    StepTimes,
    format_budget,
    latency_from_text,
    min_psnr_from_text,
    skipped_steps,
    speedup_from_text,
)
from lemica_trt.ir.graphs import StepLayout, step_layout
from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.budget import dominated, front_budgets, front_rows, least_reaching, max_full_steps
from lemica_trt.planning.extrapolation import linear_plan
from lemica_trt.planning.minimax import least_budget
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.step_plan import plan_from_schedule, uncached_plan
from lemica_trt.testing.values import flow_table

pytestmark = pytest.mark.null

N, K = 20, 5
TABLE = flow_table(N)

step_times = st.builds(
    lambda full, share, rest: StepTimes(full=full, skipped=None if share is None else share * full, rest=rest),
    st.floats(1e-3, 10),
    st.none() | st.floats(0, 1),
    st.floats(0, 1),
)


def plan(budget: int, *, folds: bool) -> StepPlan:
    schedule = uniform(N, budget)
    made = linear_plan if folds else plan_from_schedule
    return made(schedule, TABLE, name=f"b{budget}", guidance_scale=4.0, method="linear" if folds else "uniform")


quick = settings(max_examples=50, deadline=None)

PLANS = {(budget, folds): plan(budget, folds=folds) for budget in range(1, N + 1) for folds in (True, False)}


# --- units ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected", "words"),
    [
        (speedup_from_text("3"), Speedup(factor=3.0), "speed-up 3×"),
        (speedup_from_text(" 2.5x"), Speedup(factor=2.5), "speed-up 2.5×"),
        (latency_from_text("2.5s"), Latency(seconds=2.5), "latency 2.5 s"),
        (latency_from_text("800ms"), Latency(seconds=0.8), "latency 800 ms"),
        (latency_from_text("1.5 min"), Latency(seconds=90.0), "latency 90 s"),
        (min_psnr_from_text("35dB"), MinPsnr(decibels=35.0), "PSNR 35 dB"),
        (15, 15, "15 full steps"),
    ],
)
def test_budgets_are_read(found: Budget, expected: Budget, words: str) -> None:
    assert found == expected and format_budget(found) == words


@pytest.mark.parametrize(
    ("read", "text", "word"),
    [
        (speedup_from_text, "0.5", "at least 1"),
        (speedup_from_text, "fast", "for example 3"),
        (speedup_from_text, "nan", "for example 3"),
        (latency_from_text, "2.5", "with its unit"),
        (latency_from_text, "-2s", "with its unit"),
        (latency_from_text, "0s", "more than 0"),
        (min_psnr_from_text, "0", "more than 0"),
        (min_psnr_from_text, "100", "less than 100"),
        (min_psnr_from_text, "35s", "PSNR in dB"),
    ],
)
def test_what_is_no_budget_is_refused(read: type, text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        read(text)


# --- time ----------------------------------------------------------------------------------------------------------


@quick
@given(times=step_times)
def test_time_never_falls_with_the_budget(times: StepTimes) -> None:
    for folds in (True, False) if times.skipped is not None else (True,):
        seconds = [times.of(PLANS[budget, folds]) for budget in range(1, N + 1)]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(seconds))
        assert times.speedup(PLANS[N, folds]) == 1.0


@quick
@given(times=step_times, share=st.floats(0.01, 1.2), folds=st.booleans(), skips=st.booleans())
def test_a_time_affords_the_most_that_keeps_it(times: StepTimes, share: float, folds: bool, skips: bool) -> None:
    """What a latency allows meets the latency by the formula, one step more does not; else nothing feasible does."""
    uncached = times.total(N)
    budget = Latency(seconds=share * uncached)
    kinds = [kind for kind, wanted in ((True, folds), (False, skips and times.skipped is not None)) if wanted]
    feasible = [
        (b, kind) for kind in kinds for b in range(1, N + 1) if times.of(PLANS[b, kind]) <= budget.seconds
    ]  # fmt: skip
    least = least_budget(N, K)
    if share >= 1:
        assert max_full_steps(budget, times, N, K, folds=folds, skips=skips) == StepBudget(folded=N, skipping=N)
    elif max((b for b, _ in feasible), default=0) < least:
        with pytest.raises(InfeasibleError):
            max_full_steps(budget, times, N, K, folds=folds, skips=skips)
    else:
        found = max_full_steps(budget, times, N, K, folds=folds, skips=skips)
        for kind, most in ((True, found.folded), (False, found.skipping)):
            expected = max((b for b, k in feasible if k is kind), default=0)
            assert (most or 0) == (expected if expected >= least else 0)
        for key, made in PLANS.items():
            if found.admits(made) and key[1] in kinds:
                assert times.of(made) <= budget.seconds


@quick
@given(times=step_times, factor=st.floats(1, N))
def test_a_speedup_is_a_latency(times: StepTimes, factor: float) -> None:
    asked = Speedup(factor=factor), Latency(seconds=times.total(N) / factor)
    results = []
    for budget in asked:
        try:
            results.append(max_full_steps(budget, times, N, None))
        except InfeasibleError:
            results.append(None)
    assert results[0] == results[1]


def test_ways_that_fold_afford_more_full_steps() -> None:
    found = max_full_steps(Latency(seconds=10.0), StepTimes(full=1.0, skipped=0.2, rest=0.0), N, K)
    assert found == StepBudget(folded=10, skipping=7) and found.budgets == (10, 7)
    assert found.admits(PLANS[10, True]) and found.admits(PLANS[7, False])
    assert not found.admits(PLANS[7, True]) and not found.admits(PLANS[10, False])


@pytest.mark.parametrize(
    ("budget", "kinds", "words"),
    [
        (
            Latency(seconds=2.5),
            {},
            "latency 2.5 s.* 2 full steps .* at least 4 are needed where at most 5 .* is 4.01 s",
        ),
        (Speedup(factor=9), {}, r"speed-up 9×.* is 4.99×"),
        (Latency(seconds=6.0), {"folds": False}, "at least 4 .* is 7.21 s"),
    ],
)
def test_what_is_not_affordable_names_the_nearest_that_is(budget: Latency, kinds: dict[str, bool], words: str) -> None:
    times = StepTimes(full=1.0, skipped=0.2, rest=0.002)
    with pytest.raises(InfeasibleError, match=words) as caught:
        max_full_steps(budget, times, N, K, **kinds)
    nearest = str(caught.value.fix).rsplit(" is ", 1)[1].split(";")[0]
    again = speedup_from_text(nearest) if nearest.endswith("×") else latency_from_text(nearest)
    assert least_budget(N, K) in max_full_steps(again, times, N, K, **kinds).budgets


def test_no_skip_graph_affords_no_plan_that_runs_it() -> None:
    times = StepTimes(full=1.0, skipped=None, rest=0.0)
    assert max_full_steps(Latency(seconds=5.0), times, N, K) == StepBudget(folded=5, skipping=None)
    with pytest.raises(InfeasibleError, match="skip graph"):
        max_full_steps(Latency(seconds=5.0), times, N, K, folds=False)


@pytest.mark.parametrize(("full", "skipped", "rest"), [(0.0, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.1, -0.1)])
def test_times_that_cannot_be_are_refused(full: float, skipped: float, rest: float) -> None:
    with pytest.raises(ValueError):
        StepTimes(full=full, skipped=skipped, rest=rest)


def _layout(skips: bool) -> StepLayout:
    return step_layout(latent_shape=(4,), latent_history=1, output_history=1, trunk_depth=int(skips))


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("steps", [2, 3, 20])
@pytest.mark.parametrize("full", [1, 4])
def test_the_plan_that_steps_are_timed_on_is_short(steps: int, skips: bool, full: int) -> None:
    table = flow_table(steps)
    short = shortened(uncached_plan(table, guidance_scale=4.0), _layout(skips), full=full)
    assert 1 <= short.budget <= full and skipped_steps(short) <= 4
    assert bool(skipped_steps(short)) == skips and len(short.rows) - 1 == short.budget + skipped_steps(short)


# --- quality -------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 20), st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(-1, 200))
def test_bisection_is_exhaustive_search_where_quality_rises(least: int, gains: list[int], wanted: int) -> None:
    budgets = range(least, least + len(gains))
    quality = dict(zip(budgets, itertools.accumulate(gains)))
    asked = []

    def reaches(budget: int) -> bool:
        asked.append(budget)
        return quality[budget] >= wanted

    found = least_reaching(budgets, reaches)
    assert found == next((b for b in budgets if quality[b] >= wanted), budgets[-1])
    assert len(asked) == len(set(asked)) <= len(budgets).bit_length() and budgets[-1] not in asked


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bisection_finds_an_edge_where_quality_does_not_rise(reached: list[bool]) -> None:
    found = least_reaching(range(len(reached)), reached.__getitem__)
    assert found == len(reached) - 1 or reached[found]
    assert found == 0 or not reached[found - 1]


@quick
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_that_of_all_pairs(points: list[tuple[int, int]]) -> None:
    costs, qualities = map(list, zip(*points))
    expected = [
        any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]
    assert dominated(costs, qualities) == expected


def front() -> Front:
    """Three budgets; the plan of 8 full steps runs the skip graph and is worse than that of 7."""
    points = []
    for budget, folds, psnr in ((5, True, (30.0, 34.0)), (7, True, (39.0, 41.0)), (8, False, (38.0, 41.0))):
        points.append(Point(plan=PLANS[budget, folds], psnr=psnr))
    return Front(points=tuple(points))


def test_the_least_stored_budget_that_reaches_a_psnr() -> None:
    assert [front().least(MinPsnr(decibels=d)).budget for d in (20, 32, 32.1, 40)] == [5, 5, 7, 7]
    with pytest.raises(InfeasibleError, match=r"40\.0 dB with 7 full steps .* ask for 40 dB"):
        front().least(MinPsnr(decibels=40.1))


def test_rows_of_a_front() -> None:
    rows = front_rows(front(), StepTimes(full=1.0, skipped=0.1, rest=0.0))
    assert [row.dominated for row in rows] == [False, False, True]
    assert [row.seconds for row in rows] == pytest.approx([5.0, 7.0, 9.2])
    assert [row.speedup for row in rows] == pytest.approx([4.0, 20 / 7, 20 / 9.2])
    low = rows[0].psnr_low
    assert low == pytest.approx(32 - 12.71 * np.std([30, 34], ddof=1) / np.sqrt(2)) and rows[0].psnr_p5 == 30.2
    for times in (None, StepTimes(full=1.0, skipped=None, rest=0.0)):  # one of the plans has no time
        assert all(row.seconds is row.speedup is None for row in front_rows(front(), times))
    single = Point(plan=PLANS[5, True], psnr=(30.0,))
    assert single.low is None and single.mean == single.p5 == 30.0


def test_budgets_of_a_front() -> None:
    assert front_budgets(50, 9) == (5, 6, 7, 8, 9, 10, 12, 14, 16, 19, 22, 25)
    assert front_budgets(8, 3) == (2, 3, 4) and front_budgets(4, 1) == (2,) and front_budgets(3, 1) == (2,)
    assert front_budgets(50, None)[0] == 1 and len(front_budgets(1000, 9)) == 12
