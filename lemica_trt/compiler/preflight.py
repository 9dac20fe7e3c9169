"""What can be refused before a build begins: from flags, profile and machine, and a model's configuration."""

from __future__ import annotations

import importlib.util

from lemica_trt.compiler.context import require_build_libraries
from lemica_trt.compiler.requests import Inputs
from lemica_trt.core.errors import MissingDependencyError
from lemica_trt.planning.minimax import require_feasible
from lemica_trt.planning.schedules import given


def require_possible(inputs: Inputs) -> None:
    """Refuse what could only fail behind a download; weights are not touched.

    Raises:
        MissingDependencyError: PyTorch, diffusers, Ray or the device is not here, or the disk is too small.
        InfeasibleError: no plan has such a budget.
        UsageError, UnsupportedError, InputError: as `models.preflight.require_configuration`; or a schedule is none.
    """
    require_build_libraries()
    from lemica_trt.models.load import usable_device
    from lemica_trt.models.preflight import require_configuration

    request, steps = inputs.request, inputs.profile.sampling.steps
    if request.ray is None:
        usable_device(request.device)
    elif importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("--ray needs Ray, which is not here", fix="pip install 'lemica-trt[ray]'")
    _require_budgets(inputs, 2 * steps)  # some samplers call the model twice a step
    rows = require_configuration(inputs.profile)
    if rows is not None:
        _require_budgets(inputs, rows)


def _require_budgets(inputs: Inputs, most: int) -> None:
    """Raise InfeasibleError or UsageError unless the budgets, or the schedule, can be of a sampler of so many steps."""
    request = inputs.request
    if request.schedule is not None:
        steps = inputs.profile.sampling.steps
        given(request.schedule, most if max(request.schedule, default=0) >= steps else steps)
        return
    max_skip = most
    if request.needs_calibration:
        calibration = inputs.given.calibration
        max_skip = inputs.profile.calibration.max_skip if calibration is None else calibration.graph.max_skip
    budgets = [budget for budget in request.budgets if isinstance(budget, int)]
    if any(budget < 1 or budget > most for budget in budgets):
        require_feasible(min(most, inputs.profile.sampling.steps), max_skip, budgets)
    elif most != 2 * inputs.profile.sampling.steps:
        require_feasible(most, max_skip, budgets)
