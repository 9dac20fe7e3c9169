"""What stages would take, before anything is computed: `build --dry-run`. From the beginning, as if no journal were."""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lemica_trt.backends.build import estimate as estimate_engine
from lemica_trt.bundle.workspace import Workspace
from lemica_trt.compiler.context import Context, open_model
from lemica_trt.compiler.requests import Inputs
from lemica_trt.core.errors import InfeasibleError
from lemica_trt.core.progress import Quiet
from lemica_trt.ir.budget import Budget, MinPsnr, StepTimes, format_budget
from lemica_trt.ir.report import StageEstimate
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.planning.budget import front_budgets, max_full_steps
from lemica_trt.planning.minimax import least_budget
from lemica_trt.planning.planner import AUTO, planners_named, trial_runs
from lemica_trt.planning.search import search_full_steps

if TYPE_CHECKING:
    from lemica_trt.evaluate.estimate import Estimate
    from lemica_trt.models import Model


class DryContext(Context):
    """A context that writes nothing: the model is opened on the CPU, its sampler lowered when asked for."""

    def __init__(self, work: Workspace, inputs: Inputs, output: Path) -> None:
        super().__init__(work, inputs, Quiet(), output=output)

    @cached_property
    def model(self) -> Model:
        return open_model(self.inputs.profile, Quiet(), device="cpu")

    @cached_property
    def table(self) -> SamplerTable:  # computed once, where the base reads a file
        from lemica_trt.models.scheduler import sampler_table

        return sampler_table(self.model.scheduler(), dynamic_guidance=self.model.profile.sampling.dynamic_guidance)

    @property
    def reference(self) -> None:
        return None

    @cached_property
    def step(self) -> Estimate:
        """What a step costs on this machine, by PyTorch."""
        from lemica_trt.evaluate.estimate import estimate

        return estimate(self.model)

    @cached_property
    def budgets(self) -> list[int]:
        """The full steps that budgets come to, as far as an estimate can tell."""
        request = self.inputs.request
        if request.schedule is not None:
            return [len(request.schedule)]
        return [self._full_steps(budget) for budget in request.budgets]

    @property
    def max_skip(self) -> int | None:
        """K; None where nothing is searched."""
        return self.inputs.profile.calibration.max_skip if self.inputs.request.needs_calibration else None

    @property
    def reference_steps(self) -> int:
        """M."""
        return self.inputs.request.reference_steps or self.table.num_steps

    def _full_steps(self, budget: Budget) -> int:
        if isinstance(budget, int):
            return budget
        if isinstance(budget, MinPsnr):
            return self.table.num_steps // 2
        times = StepTimes(full=self.step.full_step, skipped=self.step.skipped_step, rest=0.0)
        with contextlib.suppress(InfeasibleError):  # by the engines it may be feasible
            return max_full_steps(budget, times, self.table.num_steps, self.max_skip).budgets[0]
        return least_budget(self.table.num_steps, self.max_skip)

    def of_steps(self, name: str, what: str, full_steps: float, *, models: int = 1) -> StageEstimate:
        """A stage that runs full steps in PyTorch, on so many copies of the model."""
        seconds, memory = full_steps * self.step.full_step, models * self.step.run_memory
        return StageEstimate(name=name, what=f"{what} {full_steps:.0f} full steps", seconds=seconds, memory=memory)


def lower(dry: DryContext) -> list[StageEstimate]:
    return [StageEstimate(name="lower", what=dry.table.scheduler, seconds=1.0)]


def layout(dry: DryContext) -> list[StageEstimate]:
    return [StageEstimate(name="layout", what=", ".join(dry.inputs.request.methods), seconds=1.0)]


def export(dry: DryContext) -> list[StageEstimate]:
    profile = dry.inputs.profile
    what = f"step graphs, text encoder, VAE decoder to ONNX, opset {profile.opset}, {profile.dtype}"
    return [StageEstimate(name="export", what=what, disk=dry.step.weights, memory=dry.step.export_memory)]


def engine(dry: DryContext) -> list[StageEstimate]:
    built = {name: estimate_engine(name, dry.step.weights) for name in dry.inputs.request.backends}
    return [StageEstimate(name="engine", what=name, seconds=e.seconds, memory=e.memory) for name, e in built.items()]


def time(dry: DryContext) -> list[StageEstimate]:
    return [dry.of_steps("time", "on the engines; what follows is by PyTorch's time:", 40)]


def calibrate(dry: DryContext) -> list[StageEstimate]:
    from lemica_trt.calibrate.calibration import calibration_cost

    if dry.inputs.given.calibration is not None:
        return [StageEstimate(name="calibrate", what="the error graph that was given", seconds=0.0)]
    settings = dry.inputs.profile.calibration
    calls = calibration_cost(settings, dry.table.num_steps)
    what = (
        f"{settings.method}, {settings.samples} samples: {calls.skip} skipped steps, {calls.samplings:.0f} samplings' "
        "work at most,"
    )
    return [dry.of_steps("calibrate", what, calls.full)]


def plan(dry: DryContext) -> list[StageEstimate]:
    """Fits, trials, and the quality of other budgets; one line each."""
    request, settings, budgets = dry.inputs.request, dry.inputs.profile.calibration, dry.budgets
    given = dry.inputs.given.calibration
    fits = not dry.table.stochastic and (given is None or given.grams is not None)
    methods = [name for m in request.methods for name in (AUTO if m == "auto" and fits else (m,))]
    tried = [] if request.schedule is not None else planners_named(methods)
    fitted, found = sum("fit" in planner.needs for planner in tried), list[StageEstimate]()
    if fitted:
        what = f"{fitted} solvers for each budget, to {dry.reference_steps} steps on {settings.samples} samples:"
        full = settings.samples * (dry.reference_steps + fitted * sum(budgets))
        found.append(dry.of_steps("fit", what, full))
    if len(tried) > 1:
        runs = trial_runs(len(tried), settings.validation_samples)
        full = settings.validation_samples * dry.reference_steps + runs * sum(budgets)
        found.append(dry.of_steps("select", f"up to {len(tried)} plans of each budget compared:", full))
    if request.schedule is None and (request.pareto or any(isinstance(b, MinPsnr) for b in request.budgets)):
        front = front_budgets(dry.table.num_steps, dry.max_skip)
        full = search_full_steps(front, dry.table.num_steps, len(tried), settings.validation_samples)
        full += fitted * settings.samples * sum(front)
        found.append(dry.of_steps("quality", f"{len(front)} budgets of {front[0]} … {front[-1]} looked at:", full))
    plans = "given schedule" if request.schedule is not None else ", ".join(map(format_budget, request.budgets))
    what = f"{', '.join(request.methods)}; {plans}"
    return [*found, StageEstimate(name="plan", what=what, seconds=0.1, disk=20_000)]


def bundle(dry: DryContext) -> list[StageEstimate]:
    return [StageEstimate(name="bundle", what=str(dry.output), disk=dry.step.weights)]


def verify(dry: DryContext) -> list[StageEstimate]:
    """Plans and what they are compared with, and their timing."""
    samples, full = dry.inputs.request.verify_samples, sum(dry.budgets)
    count = samples * (dry.reference_steps + 3 * full) + 8 * (dry.table.num_steps + full)
    return [dry.of_steps("verify", f"{samples} held-out clips:", count, models=2)]
