"""Other ways of spending the full steps of a plan, which it is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from lemica_trt.core.errors import InfeasibleError, UnsupportedError
from lemica_trt.ir.calibration import Calibration, ErrorGraph
from lemica_trt.ir.plan import StepPlan
from lemica_trt.models import Model
from lemica_trt.planning.planner import Problem, planners
from lemica_trt.planning.step_plan import uncached_plan

FEWER_STEPS = "fewer-steps"
"""Baseline: the sampler itself with B steps."""


def baselines(
    plan: StepPlan, model: Model, graph: ErrorGraph | None, names: Sequence[str] = ("lemica", "uniform")
) -> dict[str, StepPlan]:
    """Method → its plan of the same budget; those that there are, without any that is the plan itself.

    lemica         the paper: minimax steps of the same error graph, residual reuse
    uniform        full steps at equal distances, residual reuse
    fewer-steps    the sampler itself with B steps; in any case

    Args:
        names: which of the others.
    """
    table = model.table()
    calibration = None if graph is None or not graph.is_of(table) else Calibration(graph=graph)
    problem = Problem(table=table, guidance_scale=plan.guidance_scale, calibration=calibration)
    known, found = planners(), dict[str, StepPlan]()
    for name in names:
        if known[name].needs <= problem.has:
            with contextlib.suppress(InfeasibleError):
                found[name] = known[name](problem, plan.budget)
    with contextlib.suppress(UnsupportedError):  # few steps are beyond some samplers
        few = model.table(plan.budget)
        # Heun and PNDM call the model more than once a step: their B steps are no baseline of B calls.
        if few.num_steps == plan.budget:
            found[FEWER_STEPS] = uncached_plan(few, guidance_scale=plan.guidance_scale)
    return {name: other for name, other in found.items() if other.rows != plan.rows}
