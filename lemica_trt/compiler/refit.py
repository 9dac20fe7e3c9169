"""A finished bundle calibrated and planned again, on its own engines and with prompts of the user's: no PyTorch.

The stages `calibrate` and `plan`, as a build runs them, where the bundle stands for the work folder. Finished samples
and fits are kept in the journals of the work folder beside it. The plan that the bundle has of a budget is tried beside
the new one, and stays where that is clearly worse. Plans of quantised engines are fitted to the uncached runs of the
engines that those were made from, and compared with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import msgspec

from lemica_trt.bundle.contents import read_from
from lemica_trt.bundle.manifest import (
    ERROR_GRAPH_FILE,
    FRONT_FILE,
    GRAMS_FILE,
    PROMPTS_FILE,
    SAMPLER_FILE,
    SELECTION_FILE,
    SENSITIVITY_FILE,
)
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import Workspace, work_folder
from lemica_trt.bundle.writing import change_plans
from lemica_trt.compiler import estimates
from lemica_trt.compiler.bundle_plans import note_signatures, reference_of
from lemica_trt.compiler.bundle_stages import facts_of
from lemica_trt.compiler.context import Context
from lemica_trt.compiler.estimates import Forecast
from lemica_trt.compiler.plan_stages import calibrated, make_plans
from lemica_trt.compiler.quantized import unquantized
from lemica_trt.compiler.requests import BuildRequest, Inputs, PlanResult, profile_with_samples, prompts_of
from lemica_trt.core.errors import UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.core.values import json_bytes
from lemica_trt.evaluate.step_timer import StepTimer, runnable_backend
from lemica_trt.ir.budget import StepTimes
from lemica_trt.ir.calibration import Calibration
from lemica_trt.ir.graphs import StepLayout
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.step_model import StepModel
from lemica_trt.ir.trials import TrialTables
from lemica_trt.planning.budget import front_rows
from lemica_trt.planning.search import PlanSet, budget_outcomes


class BundleContext(Context):
    """What `calibrate` and `plan` are given of a bundle.

    Args:
        bundle: opened; stays as it is.
        inputs: profile, request and prompts of the refit.
        reporter: told what happens.
    """

    def __init__(self, bundle: Bundle, inputs: Inputs, reporter: Reporter) -> None:
        super().__init__(Workspace(work_folder(bundle.path)), inputs, reporter, output=bundle.path)
        self._bundle = bundle
        self.made: Calibration | None = None

    @cached_property
    def table(self) -> SamplerTable:
        return read_from(self._bundle, SamplerTable, SAMPLER_FILE)

    @cached_property
    def reference(self) -> SamplerTable | None:
        return reference_of(self._bundle, self.table, self.inputs.request.reference_steps)

    @property
    def layout(self) -> StepLayout:
        return self._bundle.manifest.graphs.layout

    @cached_property
    def timer(self) -> StepTimer:
        """Of the bundle's steps and plans."""
        return StepTimer(self._bundle, self.reporter)

    @property
    def times(self) -> StepTimes | None:
        return self.timer.steps if self.inputs.request.is_timed else None

    @property
    def calibration(self) -> Calibration | None:
        return self.made

    @property
    def known(self) -> Sequence[StepPlan]:
        if self.inputs.profile.calibration.validation_samples == 0:  # nothing to compare on
            return ()
        plans = [self._bundle.plan(name) for name in self._bundle.plans]
        reference = None if self.reference is None else self.reference.num_steps
        return [plan for plan in plans if plan.budget < plan.num_steps and plan.reference_steps == reference]

    @property
    def solves(self) -> bool:
        """Only where a stock solver is named: they take diffusers, which need not be here."""
        return any(method.startswith("stock:") for method in self.inputs.request.methods)

    @cached_property
    def step_model(self) -> StepModel:
        return self.open_engines(self._bundle)

    @cached_property
    def target(self) -> StepModel | None:
        """Of quantised engines those that they were made from."""
        backend, _ = runnable_backend(self._bundle)
        return self.open_engines(unquantized(self._bundle)) if self._bundle.engine(backend).quantized else None


def refit(
    bundle: Bundle,
    request: BuildRequest,
    reporter: Reporter,
    *,
    samples: str | None = None,
    default: str | None = None,
) -> PlanResult:
    """Calibrate on the engines of a bundle that run here, fit and try plans, and put them into the bundle.

    Args:
        request: budgets (none: those that the bundle has plans of), methods, prompts.
        samples: of the calibration, in all or `+K` more than the bundle has; None: as many.
        default: name of the new default plan; None: as before.

    Raises:
        UsageError: a schedule is given; `samples` is no number; the engines have no graph that is needed.
        MissingDependencyError: none of the engines run here.
        LemicaError: as calibration, planners and `bundle.writing.change_plans`.
    """
    bundle.check()
    inputs = _inputs(bundle, request, samples)
    _require_default(default, bundle, inputs.request)
    forecast = Forecast.of_inputs(inputs, None)
    todo = [*(estimates.calibrate(forecast) if inputs.request.needs_calibration else ()), *estimates.plan(forecast)]
    reporter.expect([(found.name, found.full_steps) for found in todo])
    with BundleContext(bundle, inputs, reporter) as context, context.work.locked():
        if inputs.request.needs_calibration:
            context.made = calibrated(context)
        made = make_plans(context)
        times = context.times
        speeds = context.timer.speeds(made.plans, times) if times is not None else {}
    for plan in made.plans:
        reporter.stage("plan", f"{plan.name}: {plan.method}; full steps {' '.join(map(str, plan.full_steps))}")
    note_signatures(bundle, reporter)
    found = change_plans(
        bundle, made.plans, default=default, profile=inputs.profile, files=_files(bundle, inputs, context.made, made)
    )
    return PlanResult(
        plans=tuple(found.plan(name) for name in found.plans),
        outcomes=budget_outcomes(inputs.request.budgets, made, times, speeds),
        front=() if made.front is None else front_rows(made.front, times),
    )


def _require_default(default: str | None, bundle: Bundle, request: BuildRequest) -> None:
    """Raise UsageError unless there will be a plan of this name, as far as that is known before plans are made."""
    budgets = [budget for budget in request.budgets if isinstance(budget, int)]
    names = [*bundle.plans, *(f"b{budget}" for budget in budgets)]
    if default is not None and default not in names and len(budgets) == len(request.budgets):
        raise UsageError(f"the bundle has no plan {default!r}", fix=f"use one of: {', '.join(dict.fromkeys(names))}")


def _inputs(bundle: Bundle, request: BuildRequest, samples: str | None) -> Inputs:
    profile = bundle.manifest.profile
    if profile.calibration.method == "retargeted":  # there is no other calibration to carry over
        settings = msgspec.structs.replace(profile.calibration, method="secant")
        profile = msgspec.structs.replace(profile, calibration=settings)
    if samples is not None:
        profile = profile_with_samples(profile, samples)
    if request.schedule is not None:
        raise UsageError("--schedule calibrates nothing", fix="leave out --calibrate-on")
    if not request.budgets:
        plans = [bundle.plan(name) for name in dict.fromkeys((bundle.manifest.default_plan, *bundle.plans))]
        budgets = tuple(dict.fromkeys(plan.budget for plan in plans if plan.budget < plan.num_steps))
        if not budgets:
            raise UsageError("the bundle has no plan to fit again", fix="say how many full steps: --budget")
        request = msgspec.structs.replace(request, budgets=budgets)
    request.check(None, validation_samples=profile.calibration.validation_samples)
    return Inputs(profile=profile, request=request, prompts=prompts_of(profile, request.prompts), held_out=())


def _files(
    bundle: Bundle, inputs: Inputs, calibration: Calibration | None, made: PlanSet
) -> Mapping[str, bytes | None]:
    """What the bundle knows of its calibration from now on; qualities of plans that are gone it forgets."""
    found: dict[str, bytes | None] = {FRONT_FILE: None, SELECTION_FILE: None}
    if calibration is not None:
        sensitivity = calibration.sensitivity
        found |= {
            ERROR_GRAPH_FILE: json_bytes(calibration.graph),
            GRAMS_FILE: None if calibration.grams is None else json_bytes(calibration.grams),
            SENSITIVITY_FILE: None if sensitivity is None else json_bytes(sensitivity),
            PROMPTS_FILE: json_bytes(facts_of(inputs, bundle.manifest.encoders, bundle)),
        }
    if made.front is not None:
        found[FRONT_FILE] = json_bytes(made.front)
    if made.tables:
        found[SELECTION_FILE] = json_bytes(TrialTables(tables=made.tables))
    return found
