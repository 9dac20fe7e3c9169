"""The interface of the step graphs, before there is any plan: as deep as any plan of some methods may read back.

Coefficients are an input of the graphs, so that depth which a plan does not use is a weight of 0. Depths are found on
plans that are made for the purpose, with many different distances between full steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.graphs import StepLayout, TensorSpec
from lemica_trt.ir.plan import StepPlan, coefficient_vector, layout_from_plans
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.planning.extrapolation import linear_plan
from lemica_trt.planning.planner import Planner, Problem, plan_given
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.step_plan import uncached_plan

OUTPUT_HISTORY = 6
"""Outputs that every layout can read back: what a fitted solver reads (`calibrate.fit.OUTPUTS`)."""


def layout_for_methods(
    problem: Problem,
    planners: Sequence[Planner],
    *,
    latent_shape: tuple[int, ...],
    guided: bool,
    branches: bool,
    conditions: tuple[TensorSpec, ...],
    experts: Sequence[str] = (),
) -> StepLayout:
    """The layout of graphs on which the plans of some planners run, of any number of full steps.

    Args:
        problem: sampler, reference and solvers; a calibration is not needed.
        planners: none where full steps are given by the user, which reuse what is cached.
        latent_shape, guided, conditions: as in `StepLayout`.
        experts: as in `layout_from_plans`.
        branches: whether the model's steps give guidance terms (`Model.branches`); kept where a solver may be fitted.
    """
    scale = problem.guidance_scale
    plans = [uncached_plan(problem.table, guidance_scale=scale)]
    for table in (problem.table, *([] if problem.reference is None else [problem.reference])):
        for budget in _budgets(table):
            plans.append(linear_plan(uniform(table.num_steps, budget), table, guidance_scale=scale))
    for planner in planners:
        if planner.needs == {"solver"} <= problem.has:
            plans += _solver_plans(planner, problem)
    if not planners or any(not planner.folds for planner in planners):
        plans.append(plan_given(problem, (0, *problem.table.switches)))  # reuses the cache in every other step
    layout = layout_from_plans(plans, latent_shape=latent_shape, guided=guided, conditions=conditions, experts=experts)
    depth = max(OUTPUT_HISTORY, layout.output_history)
    weighed = branches and any("fit" in planner.needs for planner in planners)
    return msgspec.structs.replace(
        layout,
        latent_history=max(layout.latent_history, *(planner.latent_history for planner in planners), 1),
        output_history=depth,
        guidance_history=depth if weighed else 0,
    )


def _budgets(table: SamplerTable) -> list[int]:
    n = table.num_steps
    return sorted({budget for budget in (*range(1, 8), n // 5, n // 3, n // 2, n - 1) if 1 <= budget < n})


def _solver_plans(planner: Planner, problem: Problem) -> list[StepPlan]:
    try:
        return [planner(problem, budget) for budget in _budgets(problem.table)]
    except UnsupportedError:  # not for this sampler; `auto` leaves it out, too
        return []


def misfit(plan: StepPlan, layout: StepLayout) -> str | None:
    """Why a plan does not run on graphs of a layout; None: it does."""
    try:
        for row in plan.rows:
            coefficient_vector(row, layout)
    except ValueError as error:
        return str(error)
    return None
