"""Budgets in any unit → plans, and how well they keep what was asked.

Times are measured before anything is planned: by a finished bundle's engines (`Clock`), or, in a build, by engines of
the same graphs that are made for it first (`probe`). Qualities are found by running plans on the model (`Scout`).
"""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lemica_trt.backends.builders import build as build_engine
from lemica_trt.backends.builders import options_by_backend
from lemica_trt.bundle.manifest import FRONT_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.compiler.stages import assemble, export, export_key, verifiable
from lemica_trt.compiler.work import Findings, Work
from lemica_trt.core.errors import InfeasibleError, MissingDependencyError, UsageError
from lemica_trt.core.progress import Quiet, Reporter
from lemica_trt.core.values import json_bytes, read_value, write_value
from lemica_trt.evaluate.timing import (
    backend_name,
    machine,
    measure_steps,
    measure_total,
    store_steps,
    stored_steps,
)
from lemica_trt.ir.budget import (
    Afforded,
    Budget,
    Front,
    Latency,
    MinPsnr,
    Point,
    Speedup,
    StepTimes,
    said,
    said_seconds,
)
from lemica_trt.ir.engine import Option
from lemica_trt.ir.plan import StepPlan, layout_from_plans
from lemica_trt.ir.report import Answer, Measured, Pace
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.trials import TrialTable
from lemica_trt.planning.budget import afforded, front_budgets, front_rows, least_reaching
from lemica_trt.planning.minimax import least_budget
from lemica_trt.planning.planner import planners_named, trial_runs
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.step_plan import plan_from_schedule, uncached_plan
from lemica_trt.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from lemica_trt.evaluate.evaluator import PlanEvaluator
    from lemica_trt.ir.report import VerifyReport
    from lemica_trt.models import Model

DEFAULT_BUDGETS: tuple[Budget, ...] = (15,)

FINALISTS = 3
"""The best methods of a budget, which near budgets try."""

NEAR = 2.0
"""Budgets within this factor of one that tried every method are near it."""


def timed(budget: Budget) -> bool:
    """Whether a budget is in a unit of time."""
    return isinstance(budget, (Speedup, Latency))


def require_searchable(budgets: Sequence[Budget], pareto: bool, methods: Sequence[str]) -> None:
    """Raise UsageError where budgets have to be searched and the method has only its own."""
    if "published" in methods and (pareto or not all(isinstance(budget, int) for budget in budgets)):
        raise UsageError("published schedules have budgets of their own", fix="name one of them with --budget")


def afforded_by(
    budgets: Sequence[Budget], times: StepTimes | None, methods: Sequence[str], num_steps: int, max_skip: int | None
) -> list[int | Afforded | MinPsnr]:
    """Budgets, those in units of time as full steps.

    Args:
        times: of the steps; needed where a budget is in a unit of time.

    Raises:
        InfeasibleError: as `budget.afforded`.
    """
    found: list[int | Afforded | MinPsnr] = []
    kinds = {planner.folds for planner in planners_named(methods)}
    for budget in budgets:
        if isinstance(budget, (Speedup, Latency)):
            assert times is not None
            found.append(afforded(budget, times, num_steps, max_skip, folds=True in kinds, skips=False in kinds))
        else:
            found.append(budget)
    return found


# ---------------------------------------------------------------- time


class Clock:
    """Times the steps and plans of a bundle on the first of its backends that runs here.

    Args:
        bundle: what to time.
        backend: which engines; None: the first that run here.
    """

    def __init__(self, bundle: Bundle, reporter: Reporter, *, backend: str | None = None) -> None:
        self._bundle, self._reporter, self._named = bundle, reporter, backend

    @functools.cached_property
    def _backend(self) -> str:
        """Raises MissingDependencyError: nothing runs here."""
        backend, reasons = (self._named, {}) if self._named is not None else verifiable(self._bundle)
        if backend is None:
            raise MissingDependencyError(
                "a time needs engines that run on this machine, got "
                + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
                fix="plan where they run, or give full steps: --budget",
            )
        return backend

    @functools.cached_property
    def _pipe(self) -> Pipeline:
        return Pipeline(self._bundle, backend=self._backend, roles=self._bundle.manifest.graphs.layout.step_graphs)

    @property
    def name(self) -> str:
        """The backend, its version and target."""
        return backend_name(self._bundle.engine(self._backend).key)

    @functools.cached_property
    def steps(self) -> StepTimes:
        """Step times: those in the bundle's reports if they are of this machine, else measured now and put there.

        Raises:
            MissingDependencyError: none of the bundle's engines run here.
        """
        found = stored_steps(self._bundle, self.name)
        if found is None:
            found = measure_steps(self._pipe)
            store_steps(self._bundle, Measured(machine=machine(), backend=self.name, steps=found))
        skipped = "" if found.skipped is None else f", a skipped one {said_seconds(found.skipped)}"
        self._reporter.stage("time", f"a full step takes {said_seconds(found.full)}{skipped}; {self.name}, {machine()}")
        return found

    def paces(self, plans: Sequence[StepPlan], times: StepTimes) -> dict[str, Pace]:
        """Whole plans that fit the bundle's graphs, measured now; what the uncached plan takes is from its steps."""
        found = {}
        for plan in plans:
            seconds = measure_total(self._pipe, plan)
            found[plan.name] = Pace(seconds=seconds, speedup=times.total(plan.num_steps) / seconds)
        return found


def probe(
    model: Model,
    table: SamplerTable,
    work: Work,
    methods: Sequence[str],
    backends: Sequence[str],
    options: dict[str, Option],
    reporter: Reporter,
) -> StepTimes:
    """Step times of engines of the model's graphs, before there is any plan.

    Graphs are exported for plans of the simplest kind, engines built of them, and their steps timed. The graphs are
    those of the bundle but for how far back they read, so that its export and engines are often these. Times are kept:
    the same command on the same machine affords the same again.

    Raises:
        MissingDependencyError: no backend runs here.
    """
    guidance = model.profile.sampling.guidance_scale
    plans = [uncached_plan(table, guidance_scale=guidance)]
    if any(not planner.folds for planner in planners_named(methods)):
        schedule = uniform(table.num_steps, -(-table.num_steps // 2))
        plans.append(plan_from_schedule(schedule, table, name="reuse", guidance_scale=guidance, method="uniform"))
    layout = layout_from_plans(plans, latent_shape=model.latent_shape, guided=model.guided, conditions=model.conditions)
    key = {
        "graphs": export_key(model.profile, model.revision, layout),
        "backends": list(backends),
        "options": options,
        "machine": machine(),
    }
    file = work.step_times(hashlib.sha256(json_bytes(key)).hexdigest())
    if file.is_file():
        times = read_value(Measured, file).steps
        reporter.stage("time", f"unchanged: a full step takes {said_seconds(times.full)}")
        return times
    exported = export(model, layout, work, reporter)
    reasons: dict[str, str] = {}
    for backend, chosen in options_by_backend(backends, options).items():
        reporter.stage("engine", f"{backend}, to time its steps")
        entry = build_engine(backend, exported.graphs, work.export, work.root, chosen, reporter)
        folder = work.root / "probe"
        shutil.rmtree(folder, ignore_errors=True)  # of a killed build
        bundle = assemble(model.profile, table, Findings(), plans, exported, [entry], work, folder, Quiet())
        found, why = verifiable(bundle)
        if found is not None:
            clock = Clock(bundle, reporter, backend=backend)
            times = clock.steps
            shutil.rmtree(folder)
            write_value(Measured(machine=machine(), backend=clock.name, steps=times), file)
            return times
        shutil.rmtree(folder)
        reasons.update(why)
    raise MissingDependencyError(
        "a time needs engines that run on this machine, got " + "; ".join(f"{k}: {v}" for k, v in reasons.items()),
        fix="build with --budget here, and plan the bundle by time where its engines run: lemica-trt plan BUNDLE",
    )


# ---------------------------------------------------------------- quality


class Planned(NamedTuple):
    """What came of the budgets of one command.

    Attributes:
        plans: of different names, in the order asked for.
        names: the plan of each budget.
        selections: how plans did, one for each budget that tried several.
        front: the quality of every plan whose frames were looked at; None: of none.
    """

    plans: list[StepPlan]
    names: tuple[str, ...]
    selections: tuple[TrialTable, ...]
    front: Front | None


Make = Callable[..., tuple[list[StepPlan], tuple[TrialTable, ...]]]
"""`make_plans` but for its `budgets` and `choose`."""


class Scout:
    """Plans of any number of budgets, and the quality of each on validation clips.

    A budget that a plan is asked for tries every method. One that is only looked at – along the front, or by bisection
    – does so if none within the factor `NEAR` did; else it tries the best `FINALISTS` of that one.

    Args:
        make: makes a plan.
        evaluator: tries plans, and looks at their frames.
    """

    def __init__(self, make: Make, evaluator: PlanEvaluator) -> None:
        self._make, self._evaluator = make, evaluator
        self._plans: dict[int, StepPlan] = {}
        self._whole: dict[int, TrialTable] = {}
        self._points: dict[int, Point] = {}
        self.selections: dict[int, TrialTable] = {}

    @property
    def front(self) -> Front | None:
        """All points so far."""
        return Front(points=tuple(self._points[b] for b in sorted(self._points))) if self._points else None

    def plan(self, budget: int | Afforded) -> StepPlan:
        """The best plan of a budget; every method is tried."""
        (plan,), selections = self._make(budgets=[budget], choose=self._evaluator)
        self._plans[plan.budget] = plan
        for selection in selections:
            self._whole[plan.budget] = self.selections[plan.budget] = selection
        return plan

    def point(self, budget: int, reporter: Reporter) -> Point:
        """A plan of a budget, and the PSNR of its frames."""
        if budget not in self._points:
            plan = self._plans.get(budget) or self._looked_at(budget)
            reporter.stage("quality", f"{plan.name}: {plan.method}")
            point = Point(plan=plan, psnr=self._evaluator.psnr(plan))
            self._points[budget] = point
            reporter.note(f"{point.mean:.1f} dB")
        return self._points[budget]

    def _looked_at(self, budget: int) -> StepPlan:
        near = [tried for tried in self._whole if is_near(tried, budget)]
        if not near:
            return self.plan(budget)
        best = self._whole[min(near, key=lambda tried: abs(tried - budget))].trials[:FINALISTS]
        labels = {trial.label for trial in best}

        def choose(plans: Sequence[StepPlan]) -> tuple[StepPlan, TrialTable]:
            kept = [plan for plan in plans if plan.method in labels]
            return self._evaluator(kept or plans)

        (plan,), selections = self._make(budgets=[budget], choose=choose)
        for selection in selections:
            self.selections[budget] = selection
        self._plans[budget] = plan
        return plan


def is_near(tried: int, budget: int) -> bool:
    """Whether two budgets may share what is known of methods."""
    return max(tried, budget) <= NEAR * min(tried, budget)


def plan_budgets(
    budgets: Sequence[int | Afforded | MinPsnr],
    scout: Scout,
    reporter: Reporter,
    *,
    pareto: bool,
    num_steps: int,
    max_skip: int | None,
) -> Planned:
    """A plan for each budget, and the front if it is asked for: its budgets, and those of the plans.

    Raises:
        InfeasibleError: as `make_plans`; no number of full steps has the PSNR that is asked for.
    """
    chosen: list[StepPlan] = []
    for budget in budgets:
        if isinstance(budget, MinPsnr):
            feasible = range(least_budget(num_steps, max_skip), num_steps + 1)
            reporter.stage("search", f"the fewest of {feasible[0]} … {num_steps} full steps that have {budget}")
            wanted = budget.decibels
            least = least_reaching(feasible, lambda b, wanted=wanted: scout.point(b, reporter).mean >= wanted)  # type: ignore[misc]
            point = scout.point(least, reporter)
            if point.mean < wanted:  # against more steps than N even N full ones may not have it
                raise InfeasibleError(
                    f"{budget}: {least} of {num_steps} full steps have {point.mean:.1f} dB",
                    fix=f"the nearest that is feasible is {math.floor(point.mean * 10) / 10:g}",
                )
            chosen.append(point.plan)
        else:
            chosen.append(scout.plan(budget))
    if pareto:
        for count in sorted({*front_budgets(num_steps, max_skip), *(plan.budget for plan in chosen)}):
            scout.point(count, reporter)
    return Planned(
        plans=list({plan.name: plan for plan in chosen}.values()),
        names=tuple(plan.name for plan in chosen),
        selections=tuple(scout.selections[budget] for budget in sorted(scout.selections)),
        front=scout.front,
    )


def scouting_cost(budgets: Sequence[int], num_steps: int, methods: int, samples: int) -> int:
    """Full steps of looking at budgets in order, but for the uncached runs: about."""
    total, whole = 0, list[int]()
    for budget in budgets:
        tried = min(methods, FINALISTS)
        if not any(is_near(other, budget) for other in whole):
            whole.append(budget)
            tried = methods
        runs = trial_runs(tried, samples) if tried > 1 else 0
        total += budget * (runs + samples)
    return total + samples * num_steps


# ---------------------------------------------------------------- what came of it


def answers(
    budgets: Sequence[Budget],
    planned: Planned,
    times: StepTimes | None,
    measured: Mapping[str, Pace],
) -> tuple[Answer, ...]:
    """What was asked for beside what came of it, for every budget that is no number of full steps.

    Args:
        times: of the steps; None: not known.
        measured: by plan.
    """
    plans = {plan.name: plan for plan in planned.plans}
    rows = {} if planned.front is None else {row.plan: row for row in front_rows(planned.front, times)}
    found = []
    for budget, name in zip(budgets, planned.names):
        if isinstance(budget, int):
            continue
        plan, pace, row = plans[name], measured.get(name), rows.get(name)
        predicted = None
        if times is not None:
            predicted = Pace(seconds=times.of(plan), speedup=times.speedup(plan))
        kept = None
        if isinstance(budget, MinPsnr):
            kept = None if row is None else row.psnr >= budget.decibels
        elif pace is not None:
            kept = pace.seconds <= budget.seconds if isinstance(budget, Latency) else pace.speedup >= budget.factor
        found.append(
            Answer(
                asked=said(budget),
                plan=name,
                full_steps=plan.budget,
                predicted=predicted,
                measured=pace,
                quality=row,
                kept=kept,
            )
        )
    return tuple(found)


def paces_of(report: VerifyReport | None) -> dict[str, Pace]:
    """What a verification measured of each plan."""
    timings = () if report is None else report.timing
    return {t.plan: Pace(seconds=t.total, speedup=t.speedup) for t in timings if t.speedup is not None}


def carried_front(bundle: Bundle) -> Front:
    """The front that a bundle was built with.

    Raises:
        UsageError: it was built without.
    """
    if FRONT_FILE not in bundle.manifest.files:
        raise UsageError(
            "the bundle has no stored qualities: nothing here knows how good a plan would be",
            fix="build it with --pareto or --min-psnr, which runs plans on the model",
        )
    return read_value(Front, bundle.file(FRONT_FILE))
