"""A standard solver with B steps at equal distances of the sampler's grid: what one would do without this tool.

    stock:first-order   DDIM (Song et al. 2021, eq. 12 with η = 0), which for flow matching is explicit Euler
    stock:dpmsolver++   DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095)
    stock:unipc         UniPC of order 2 with its corrector (Zhao et al. 2023, arXiv 2302.04867)

diffusers' solvers, given the noise levels and timesteps of the sampler itself (`models.scheduler.solver_table`).
"""

from __future__ import annotations

from lemica_trt.ir.plan import StepPlan
from lemica_trt.planning.planner import Planner, Problem, StockSolver
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.step_plan import plan_from_solver


def make(problem: Problem, budget: int, solver: StockSolver) -> StepPlan:
    """Raises UnsupportedError: the solver cannot be set to these steps."""
    assert problem.solver is not None
    schedule = uniform(problem.table.num_steps, budget)
    return plan_from_solver(
        schedule,
        problem.table,
        problem.solver(schedule, solver),
        name="stock",
        guidance_scale=problem.guidance_scale,
        method=f"stock:{solver}",
    )


def stock(solver: StockSolver, title: str) -> Planner:
    return Planner(
        name=f"stock:{solver}",
        summary=f"{title} with B steps at equal distances; needs no calibration",
        needs=frozenset({"solver"}),
        folds=True,
        make=lambda problem, budget: make(problem, budget, solver),
    )


PLANNERS = (
    stock("first-order", "DDIM, or Euler for flow matching,"),
    stock("dpmsolver++", "DPM-Solver++ 2M"),
    stock("unipc", "UniPC"),
)
