"""What stages would take, before anything is computed, counted in full steps of the DiT; from the beginning, as if no
journal were. For `build --dry-run`, and for the time that is left while a build runs.

Needs neither weights nor PyTorch. Where the model is on this machine, steps become seconds (`evaluate.estimate`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lemica_trt.backends.build import estimate as estimate_engine
from lemica_trt.bundle.manifest import MANIFEST
from lemica_trt.bundle.workspace import Workspace
from lemica_trt.compiler.context import Context
from lemica_trt.compiler.requests import Inputs
from lemica_trt.core.errors import InfeasibleError
from lemica_trt.core.progress import Quiet, count
from lemica_trt.evaluate.timing import TIMED_BESIDE, TIMED_STEPS
from lemica_trt.ir.budget import Budget, MinPsnr, StepTimes, format_budget
from lemica_trt.ir.report import StageEstimate
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.planning.budget import front_budgets, max_full_steps
from lemica_trt.planning.minimax import least_budget, require_feasible
from lemica_trt.planning.planner import Planner, auto_methods, planners_named, trial_runs
from lemica_trt.planning.search import tried_budgets

if TYPE_CHECKING:
    from lemica_trt.evaluate.estimate import Estimate, ExportCost
    from lemica_trt.models import Model

SKIPPED_STEP = 0.01
"""A skipped step in full ones, of a large model; of the bundled ones it is four times that."""


MOMENT = 1.0
"""Seconds of a stage that computes next to nothing."""


class DryContext(Context):
    """A context that writes nothing: the model is opened without its weights, its sampler lowered when asked for."""

    def __init__(self, work: Workspace, inputs: Inputs, output: Path) -> None:
        super().__init__(work, inputs, Quiet(), output=output)

    @cached_property
    def model(self) -> Model:
        """Without its weights.

        Raises:
            WeightsNeededError: it cannot be looked at without.
            LemicaError: as `load_model`.
        """
        from lemica_trt.models import load_model
        from lemica_trt.models.load import limit_threads

        limit_threads()
        return load_model(self.inputs.profile, weights=False)

    @cached_property
    def is_understood(self) -> bool:
        """Whether the model is here, and can be looked at without its weights."""
        if not self.has_model:
            return False
        from lemica_trt.models.stand_ins import WeightsNeededError

        try:
            return self.model is not None
        except WeightsNeededError:
            return False

    @cached_property
    def table(self) -> SamplerTable:  # computed once, where the base reads a file
        return self.model.table()

    @property
    def reference(self) -> None:
        return None

    def digest(self, name: str) -> str:
        """As `Context.digest`; weights that are not here are of no known revision, so that nothing is unchanged."""
        if name in ("weights", "libraries") and not self.has_model:
            return ""
        return super().digest(name)

    @cached_property
    def has_model(self) -> bool:
        """Whether weights and libraries are on this machine."""
        try:
            from lemica_trt.models.load import is_here
        except ImportError:
            return False
        return is_here(self.inputs.profile)

    @cached_property
    def forecast(self) -> Forecast:
        """By the model's own sampler and size, where the model is here; by the size of its weights alone, where they
        must be run to understand it."""
        if not self.has_model:
            return Forecast.of_inputs(self.inputs, self.output)
        from lemica_trt.evaluate.estimate import ExportCost, estimate
        from lemica_trt.models.load import stored_weights

        if not self.is_understood:
            export = ExportCost(stored_weights(self.inputs.profile))
            return replace(Forecast.of_inputs(self.inputs, self.output), export=export)
        cost = estimate(self.model)
        return Forecast(self.inputs, self.output, self.table.num_steps, self.table.stochastic, cost, export=cost.export)


@dataclass(frozen=True)
class Forecast:
    """What stages are estimated from.

    Attributes:
        inputs, output: of the build.
        num_steps: N.
        stochastic: whether the sampler draws noise.
        cost: of the model on this machine, by PyTorch; None: not known.
        export: of the export of its weights; None: not known.
    """

    inputs: Inputs
    output: Path | None
    num_steps: int
    stochastic: bool
    cost: Estimate | None
    export: ExportCost | None = None

    @classmethod
    def of_inputs(cls, inputs: Inputs, output: Path | None) -> Forecast:
        """Without the model: of N steps as the profile has it, deterministic."""
        return cls(inputs, output, inputs.profile.sampling.steps, False, None)

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
        if not self.inputs.request.needs_calibration:
            return None
        given = self.inputs.given.calibration
        return self.inputs.profile.calibration.max_skip if given is None else given.graph.max_skip

    @property
    def reference_steps(self) -> int:
        """M."""
        return self.inputs.request.reference_steps or self.num_steps

    @property
    def reuses_runs(self) -> bool:
        """Whether the calibration leaves the uncached runs that fits and trials compare with."""
        inputs = self.inputs
        calibrates = inputs.request.needs_calibration and inputs.given.calibration is None
        return calibrates and inputs.profile.calibration.method != "exact" and self.reference_steps == self.num_steps

    @property
    def tried(self) -> list[Planner]:
        """The planners that are asked."""
        request, given = self.inputs.request, self.inputs.given.calibration
        if request.schedule is not None:
            return []
        fits = not self.stochastic and (given is None or given.grams is not None)
        auto = auto_methods(self.num_steps, fits=fits)
        names = [name for method in request.methods for name in (auto if method == "auto" else (method,))]
        found = [planner for planner in planners_named(names) if fits or "fit" not in planner.needs]
        return found if self.inputs.profile.calibration.validation_samples else found[:1]

    def _full_steps(self, budget: Budget) -> int:
        if isinstance(budget, int):
            return budget
        if isinstance(budget, MinPsnr) or self.cost is None:
            return self.num_steps // 2
        times = StepTimes(full=self.cost.full_step, skipped=self.cost.skipped_step, rest=0.0)
        with contextlib.suppress(InfeasibleError):  # by the engines it may be feasible
            return max_full_steps(budget, times, self.num_steps, self.max_skip).budgets[0]
        return least_budget(self.num_steps, self.max_skip)

    def stage(
        self, name: str, what: str, full_steps: float = 0.0, *, models: int = 1, disk: int | None = None
    ) -> StageEstimate:
        """A stage that runs full steps in PyTorch, on so many copies of the model; without any it takes a moment."""
        found = StageEstimate(
            name=name, what=what, full_steps=full_steps, samplings=full_steps / self.num_steps, disk=disk
        )
        if not full_steps:
            return msgspec.structs.replace(found, seconds=MOMENT)
        if self.cost is None:
            return found
        seconds, memory = full_steps * self.cost.full_step, models * self.cost.run_memory
        return msgspec.structs.replace(found, seconds=seconds, memory=memory)


def require_counts(forecast: Forecast) -> None:
    """Refuse budgets that no schedule of N steps has, without the model.

    Raises:
        InfeasibleError: which, and what is feasible.
    """
    budgets = [budget for budget in forecast.inputs.request.budgets if isinstance(budget, int)]
    if forecast.inputs.request.schedule is None:
        require_feasible(forecast.num_steps, forecast.max_skip or forecast.num_steps, budgets)


def lower(forecast: Forecast) -> list[StageEstimate]:
    return [forecast.stage("lower", f"{forecast.num_steps} steps")]


def layout(forecast: Forecast) -> list[StageEstimate]:
    return [forecast.stage("layout", ", ".join(forecast.inputs.request.methods))]


def export(forecast: Forecast) -> list[StageEstimate]:
    profile, cost = forecast.inputs.profile, forecast.export
    what = f"step graphs, text encoder, VAE decoder to ONNX, opset {profile.opset}, {profile.dtype}"
    if cost is None:
        return [StageEstimate(name="export", what=what)]
    return [StageEstimate(name="export", what=what, seconds=cost.seconds, disk=cost.weights, memory=cost.memory)]


def engine(forecast: Forecast) -> list[StageEstimate]:
    found = []
    for name in forecast.inputs.request.backends:
        built = None if forecast.export is None else estimate_engine(name, forecast.export.weights)
        found.append(
            StageEstimate(name="engine", what=name)
            if built is None
            else StageEstimate(name="engine", what=name, seconds=built.seconds or 0.0, memory=built.memory)
        )
    return found


def time(forecast: Forecast) -> list[StageEstimate]:
    return [forecast.stage("time", "a few steps on the engines", TIMED_STEPS)]


def draft(forecast: Forecast) -> list[StageEstimate]:
    """Of one clip: the uncached plan on engines and in PyTorch, one of the first budget on engines."""
    if forecast.output is not None and (forecast.output / MANIFEST).is_file():
        return [forecast.stage("draft", f"there is a bundle: {forecast.output}")]
    verified = forecast.inputs.request.verify_samples > 0
    steps = 2 * forecast.num_steps + forecast.budgets[0] % forecast.num_steps + TIMED_BESIDE
    what = "engines and a plan that takes no calibration, until there is a better one"
    return [forecast.stage("draft", what, steps * verified, models=2)]


def early(forecast: Forecast) -> list[StageEstimate]:
    """The first samples of the calibration, a fit to one, and a run of the plan."""
    samples = forecast.inputs.early_samples
    return [
        forecast.stage("early", f"a fitted plan for the draft, from {count(samples, 'sample')}", early_steps(forecast))
    ]


def early_steps(forecast: Forecast) -> float:
    """Full steps of `early`; none where it finds a bundle instead of a draft, or no solver can be fitted."""
    return _first_samples(forecast) + 2 * forecast.budgets[0] if _first_samples(forecast) else 0.0


def _first_samples(forecast: Forecast) -> float:
    """Full steps of the calibration that `early` makes."""
    from lemica_trt.calibrate.cost import calibration_cost

    there = forecast.output is not None and (forecast.output / MANIFEST).is_file()
    samples = 0 if there or forecast.stochastic else forecast.inputs.early_samples
    if not samples:
        return 0.0
    settings = msgspec.structs.replace(forecast.inputs.profile.calibration, samples=samples)
    cost = calibration_cost(settings, forecast.num_steps)
    return cost.full + SKIPPED_STEP * cost.skip


def calibrate(forecast: Forecast) -> list[StageEstimate]:
    from lemica_trt.calibrate.cost import calibration_cost, rollouts_of

    if forecast.inputs.given.calibration is not None:
        return [forecast.stage("calibrate", "the error graph that was given")]
    settings = forecast.inputs.profile.calibration
    calls, rollouts = calibration_cost(settings, forecast.num_steps), rollouts_of(settings)
    what = f"{settings.method}: {count(settings.samples, 'sample')}" + (f", {rollouts} rolled out" if rollouts else "")
    latents = settings.samples * (forecast.num_steps + 1)  # of the uncached runs, which are kept
    kept = forecast.cost.latent * latents if forecast.cost is not None and settings.method != "exact" else None
    steps = calls.full + SKIPPED_STEP * calls.skip - _first_samples(forecast)
    return [forecast.stage("calibrate", what, steps, disk=kept)]


def plan(forecast: Forecast) -> list[StageEstimate]:
    """Fits, trials, and the quality of other budgets; one line each."""
    request, settings = forecast.inputs.request, forecast.inputs.profile.calibration
    tried, budgets = forecast.tried, [budget for budget in forecast.budgets if budget < forecast.num_steps]
    searches = request.schedule is None and (request.pareto or any(isinstance(b, MinPsnr) for b in request.budgets))
    front = front_budgets(forecast.num_steps, forecast.max_skip) if searches else ()
    planned = list(dict.fromkeys([*budgets, *front]))
    complete = tried_budgets(planned, try_all=request.tries_all(forecast.num_steps))
    found = []
    fits = sum(
        sum("fit" in planner.needs for planner in (tried if budget in complete else tried[:1])) * budget
        for budget in planned
    )
    if fits:
        what = f"solvers on {count(settings.fit_samples, 'sample')}, to {forecast.reference_steps} steps"
        sampling = forecast.inputs.profile.sampling
        elsewhere = sum(scale != sampling.guidance_scale for scale in sampling.fit_scales(settings.fit_samples))
        made_anew = elsewhere if forecast.reuses_runs else settings.fit_samples
        steps = made_anew * forecast.reference_steps + settings.fit_samples * fits
        found.append(forecast.stage("fit", what, steps))
    runs = trial_runs(len(tried), settings.validation_samples) if len(tried) > 1 else 0
    if runs:
        known = forecast.reuses_runs and settings.fit_samples < settings.samples
        references = 0 if known else settings.validation_samples * forecast.reference_steps
        what = f"{len(tried)} plans compared on {count(settings.validation_samples, 'sample')}"
        found.append(forecast.stage("select", what, references + runs * sum(complete)))
    if front:
        what = f"{len(front)} budgets of {front[0]} … {front[-1]} looked at"
        found.append(forecast.stage("quality", what, max(settings.validation_samples, 1) * sum(front)))
    plans = "given schedule" if request.schedule is not None else ", ".join(map(format_budget, request.budgets))
    what = f"{', '.join(request.methods)}; {plans}"
    return [*found, StageEstimate(name="plan", what=what, seconds=0.1, disk=20_000)]


def bundle(forecast: Forecast) -> list[StageEstimate]:
    disk = None if forecast.export is None else forecast.export.weights
    return [forecast.stage("bundle", str(forecast.output), disk=disk)]


def verify(forecast: Forecast) -> list[StageEstimate]:
    """Agreement of one run of each plan, and the held-out clips: plans, and baselines of the first."""
    request, budgets = forecast.inputs.request, forecast.budgets
    finer = forecast.reference_steps if forecast.reference_steps != forecast.num_steps else 0
    agreement = forecast.num_steps + sum(set(budgets) - {forecast.num_steps}) + TIMED_BESIDE
    first, *others = [budget if budget < forecast.num_steps else 0 for budget in budgets]
    clips = request.verify_samples * (forecast.num_steps + finer + 3 * first) + request.further_samples * sum(others)
    known = draft(forecast)[0].full_steps > 0 and request.has_draft  # the uncached plan's runs
    steps = agreement + clips * any([first, *others]) - 2 * forecast.num_steps * known
    return [forecast.stage("verify", count(request.verify_samples, "held-out clip"), steps, models=2)]
