"""Folding against the plan itself: the same latents at every row that stays, for any linear sampler and any plan."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.ir.plan import PlanRow, StepPlan, trunk_reads
from lemica_trt.ir.sampler import SamplerTable, require_levels
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.extrapolation import linear_plan, linear_weights
from lemica_trt.planning.fold import fold, nearest_steps
from lemica_trt.planning.solvers import first_order_table
from lemica_trt.planning.step_plan import OutputWeights, plan_from_schedule
from lemica_trt.testing.interpreter import deviation, run_plan
from lemica_trt.testing.values import flow_table, plan_of, recurrence, schedule_of

pytestmark = pytest.mark.null


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """Histories of all kinds up to 3 deep, several draws a row, any mix of full, skipped and folded rows."""
    weight = st.integers(-8, 8).map(lambda number: number / 8)

    def weights(least: int, most: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(weight, min_size=min(least, most), max_size=most)))

    rows, full, draws = list[PlanRow](), 0, 0
    number = draw(st.integers(2, 12))
    for i in range(number):
        last = i == number - 1
        variant = None if last else "full" if i == 0 else draw(st.sampled_from(["full", "skip", None, None]))
        fresh = draw(st.integers(0, 2))
        draws += fresh
        rows.append(
            PlanRow(
                variant=variant,
                step=i,
                latents=weights(1, min(i + 1, 3)) if i else (1.0,),
                outputs=weights(0, min(i, 3)),
                draws=fresh,
                noise=weights(0, min(draws, 3)),
                timestep=None if variant is None else 100.0 * i,
                in_scale=draw(weight),
                caches=trunk_reads(*weights(1, min(full, 3))) if variant == "skip" else (),
                reuse=weights(1, min(i, 3)) if variant is None and not last else (),
            )
        )
        full += variant == "full"
    return plan_of(*rows)


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 100))
def test_folded_plans_run_as_the_plans_they_come_from(plan: StepPlan, seed: int) -> None:
    folded = fold(plan)
    kept = [row.variant for row in plan.rows[:-1] if row.variant is not None]
    assert [row.variant for row in folded.rows[:-1]] == kept
    assert folded.full_steps == plan.full_steps
    assert sum(row.draws for row in folded.rows) == sum(row.draws for row in plan.rows)
    assert deviation(run_plan(folded, seed), run_plan(plan, seed)) <= 1e-12
    assert fold(folded) == folded


def unfolded(table: SamplerTable, weights: Callable[[Schedule], OutputWeights], *full: int) -> StepPlan:
    schedule = schedule_of(table.num_steps, *full)
    return plan_from_schedule(
        schedule, table, name="test", guidance_scale=1.0, method="given", output_weights=weights(schedule)
    )


def reused(schedule: Schedule) -> OutputWeights:
    """The last full step's output as it is."""
    return [() if t in schedule.full_steps else (1.0,) for t in range(schedule.num_steps)]


@pytest.mark.parametrize("latents", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_histories_of_folded_plans_are_short(latents: int, noise: float) -> None:
    """However long the plan: a window of rows, not of all that was."""
    table = recurrence(40, outputs=latents, latents=latents, noise=noise)
    plan = unfolded(table, linear_weights, 0, 1, 4, 9, 14, 16, 22, 28, 33, 37)
    folded = fold(plan)
    assert len(folded.rows) == 11
    assert folded.latent_history <= latents + 1
    assert folded.output_history <= latents + 2
    assert deviation(run_plan(folded), run_plan(plan)) <= 1e-12
    assert deviation(run_plan(folded, dtype=np.float32), run_plan(plan)) <= 1e-5


def test_first_order_folds_to_one_latent_and_as_many_outputs_as_are_predicted_from() -> None:
    table, full = flow_table(50), (0, 1, 4, 9, 20, 35)
    folded = fold(unfolded(table, linear_weights, *full))
    assert (folded.latent_history, folded.output_history, folded.noise_history) == (1, 2, 0)
    schedule = schedule_of(50, *full)
    weights = tuple(() if t in full else (3.0, -3.0, 1.0)[: sum(f < t for f in full)] for t in range(50))
    plan = plan_from_schedule(schedule, table, name="a", guidance_scale=1.0, method="given", output_weights=weights)
    assert (fold(plan).latent_history, fold(plan).output_history) == (1, 3)
    assert deviation(run_plan(fold(plan)), run_plan(plan)) <= 1e-12


def test_linear_plans_are_folded() -> None:
    table, full = recurrence(40, outputs=2, latents=2), (0, 1, 4, 9, 14, 22, 33)
    schedule = schedule_of(40, *full)
    folded = linear_plan(schedule, table, guidance_scale=1.0, name="test", method="given")
    assert folded == fold(unfolded(table, linear_weights, *full))
    assert [row.step for row in folded.rows] == [*full, 40]


def test_folding_by_hand() -> None:
    """x1 = x0 − m0/2, m1 = 2·m0; x2 = x1 − m1/2 + 3·z: so x2 = x0 − 3/2·m0 + 3·z."""
    plan = plan_of(
        PlanRow(variant="full", step=0, latents=(1.0,), timestep=1.0),
        PlanRow(variant=None, step=1, latents=(1.0,), outputs=(-0.5,), reuse=(2.0,), draws=1, noise=(3.0,)),
        PlanRow(variant="full", step=2, latents=(1.0,), outputs=(-0.5,), timestep=0.5, draws=1, noise=(4.0,)),
        PlanRow(variant=None, step=3, latents=(1.0,), outputs=(-0.5,)),
    )
    assert fold(plan).rows[1:] == (
        PlanRow(variant="full", step=2, latents=(1.0,), outputs=(-1.5,), timestep=0.5, draws=2, noise=(4.0, 3.0)),
        PlanRow(variant=None, step=3, latents=(1.0,), outputs=(-0.5,)),
    )


def test_draws_that_do_not_count_are_drawn_all_the_same() -> None:
    plan = plan_of(
        PlanRow(variant="full", step=0, latents=(1.0,), timestep=1.0),
        PlanRow(variant=None, step=1, latents=(1.0,), reuse=(1.0,), draws=1, noise=(3.0,)),
        PlanRow(variant="full", step=2, latents=(0.0,), outputs=(1.0,), timestep=0.5, draws=1, noise=(4.0,)),
        PlanRow(variant=None, step=3, latents=(1.0,), draws=1, noise=(1.0,)),
    )
    row = fold(plan).rows[1]
    assert (row.draws, row.noise) == (2, (4.0,))
    assert deviation(run_plan(fold(plan)), run_plan(plan)) <= 1e-15


def test_skipped_rows_stay() -> None:
    plan = plan_from_schedule(schedule_of(6, 0, 2, 3), recurrence(6), name="a", guidance_scale=1.0, method="given")
    assert fold(plan) == plan


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 19)), st.integers(0, 9))
def test_output_reuse_under_euler_is_euler_on_the_full_steps(full: set[int], seed: int) -> None:
    """The identity of design: plain reuse of the velocity is a schedule of fewer sigmas."""
    table, steps = flow_table(20), sorted({0} | full)
    solver = first_order_table(table, steps)
    every = schedule_of(len(steps), *range(len(steps)))
    alone = plan_from_schedule(every, solver, name="test", guidance_scale=1.0, method="given")
    assert deviation(run_plan(fold(unfolded(table, reused, *steps)), seed), run_plan(alone, seed)) <= 1e-12


def test_first_order_on_all_steps_is_the_sampler() -> None:
    table = flow_table(20)
    again = first_order_table(table, range(20))
    for a, b in zip(again.rows, table.rows):
        assert (*a.latents, *a.outputs) == pytest.approx((*b.latents, *b.outputs), abs=1e-14)
        assert (a.timestep, a.in_scale, a.guidance) == (b.timestep, b.in_scale, b.guidance)
    assert again.levels == table.levels


def test_first_order_needs_a_signal_and_levels() -> None:
    with pytest.raises(UnsupportedError, match="its table has none"):
        first_order_table(recurrence(4), [0, 2])
    table = flow_table(4)
    blind = msgspec.structs.replace(table, levels=msgspec.structs.replace(require_levels(table), target="epsilon"))
    with pytest.raises(UnsupportedError, match="step 0 of FlowToy has no signal"):
        first_order_table(blind, [0, 2])


# --- a finer grid ---------------------------------------------------------------------------------------------------


def test_the_nearest_steps_of_a_finer_grid() -> None:
    assert nearest_steps(flow_table(10), flow_table(40)) == tuple(range(0, 40, 4))


@pytest.mark.parametrize(
    ("fine", "says"),
    [
        (flow_table(10), "more reference steps than 10"),
        (flow_table(8), "more reference steps than 10"),
        (recurrence(40, noise=0.1), "Toy draws noise at each step"),
    ],
)
def test_a_finer_grid_is_refused(fine: SamplerTable, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        nearest_steps(flow_table(10), fine)
