"""Our own plans by `lemica_trt.apply`: what the bundle was built with, and other planners at the same budgets."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from peer import Attach, Peer, Task

import lemica_trt
from lemica_trt.bundle.contents import calibration_in
from lemica_trt.compiler.context import solver_tables
from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.planner import Problem, planners

NAMES = ("lemica", "stock:dpmsolver++", "stock:unipc", "dpcache", "l2p", "mean-velocity", "teacache", "magcache")
"""Planners to be compared with."""


def attach(plan: StepPlan) -> Attach:
    def on(pipe: object) -> None:
        lemica_trt.apply(pipe, plan)

    return on


def of_bundle(task: Task) -> Mapping[str, Attach]:
    """Its plans, by budget."""
    plans = [task.bundle.plan(name) for name in task.bundle.plans]
    cached = sorted((plan for plan in plans if plan.budget < plan.num_steps), key=lambda plan: plan.budget)
    return {f"B = {plan.budget}, {plan.method}": attach(plan) for plan in cached}


def of_planner(task: Task, name: str) -> Mapping[str, Attach]:
    """The planner's plans at the budgets of the bundle."""
    table = task.model.table()
    problem = Problem(
        table=table,
        guidance_scale=task.model.profile.sampling.guidance_scale,
        calibration=calibration_in(task.bundle),
        solver=solver_tables(table),
    )
    budgets = sorted({task.bundle.plan(plan).budget for plan in task.bundle.plans} - {task.steps})
    return {f"B = {budget}": attach(planners()[name](problem, budget)) for budget in budgets}


PEERS = (
    Peer("lemica-trt", "the plan", of_bundle),
    *(Peer("lemica-trt", name, functools.partial(of_planner, name=name)) for name in NAMES),
)
