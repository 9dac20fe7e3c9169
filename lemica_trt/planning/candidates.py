"""The ways to spend B full steps that are worth a trial, and which of them won it.

A way is a schedule, and what stands in for the steps that it skips:

    schedule    minimax (LeMiCa), least sum, signed, for predicted outputs; equal distances or a published list where
                asked for
    skipped     residual reuse or prediction; output reuse or extrapolation, folded (`predict`, `fold`)
    solver      nothing is skipped: a standard solver set to the schedule's own steps, or one fitted for them

Which is best depends on the model, and the errors that made a schedule do not tell: `auto` has all of them run whole,
on prompts that fitted nothing, by successive halving – each round doubles the samples and halves the ways.

Knows plans and numbers only; `calibrate.trials` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.core.values import Value, require
from lemica_trt.ir.calibration import TrajectoryGrams
from lemica_trt.ir.plan import FITTED, PlanRow, StepPlan
from lemica_trt.ir.prediction import Predictor
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.trials import PAPER, Selection, Tried, way
from lemica_trt.planning.fold import fold, integrate_finely
from lemica_trt.planning.prediction import predict
from lemica_trt.planning.step_plan import plan_from_schedule, plan_from_solver

Planner = Literal["lemica", "least-sum", "signed", "predicted", "uniform", "published", "given"]


Reuse = Literal["auto", "residual", "output", "none"]


Predict = Literal["auto", "none", "linear", "lsq2", "lsq3"]


StockSolver = Literal["first-order", "dpmsolver++", "unipc"]


Solver = Literal[StockSolver, "fitted"]


SolverTable = Callable[[Schedule, StockSolver], SamplerTable]
"""A solver set to the steps of a schedule: `lower.solver_table`."""


FittedPlans = Callable[[Sequence[Schedule]], Sequence[StepPlan]]
"""Plans of the solvers fitted for schedules, those that there are: `calibrate.Fitter`."""


STOCK_SOLVERS: tuple[StockSolver, ...] = ("first-order", "dpmsolver++", "unipc")


FIRST_ROUND = 2
"""Samples of the first round. All ways run the same samples, so that few tell the worse half: of eleven selections
that began with 4 samples, each would have had the same winner."""


class Ways(Value, frozen=True):
    """Which ways are allowed; a field left out is `auto`, but for a named method alone: that is the paper's reuse.

    Attributes:
        method: how the full steps are chosen.
        reuse: what a skipped step takes from full ones: their trunk residuals, their outputs, or nothing at all.
        predict: how: the last one as it is (`none`), extrapolated, or by least squares on the last two or three.
        solver: which solver, where nothing is reused.
    """

    method: Planner | Literal["auto"] | None = None
    reuse: Reuse | None = None
    predict: Predict | None = None
    solver: Solver | Literal["auto"] | None = None

    @property
    def paper(self) -> bool:
        """LeMiCa's residual reuse, because nothing else was said."""
        return self.method not in (None, "auto") and self.reuse is self.predict is self.solver is None

    def __post_init__(self) -> None:
        require(
            self.reuse != "none" or self.predict in (None, "auto", "none"),
            f"where nothing is reused there is nothing to predict by {self.predict}",
        )
        require(
            self.solver is None or self.reuse in (None, "auto", "none"), f"a solver reuses nothing: not {self.reuse}"
        )

    @property
    def predictors_of(self) -> tuple[Literal["residual", "output"], ...]:
        """What may be predicted."""
        if self.paper or self.reuse == "residual":
            return ("residual",)
        if self.reuse == "output":
            return ("output",)
        if self.reuse == "none" or self.solver not in (None, "auto"):
            return ()
        return ("residual", "output")

    @property
    def solvers(self) -> tuple[Solver, ...]:
        """Solvers that may run the schedule's steps."""
        if self.paper or self.reuse in ("residual", "output") or self.predict not in (None, "auto"):
            return ()
        return (*STOCK_SOLVERS, "fitted") if self.solver is None or self.solver == "auto" else (self.solver,)

    @property
    def folds(self) -> bool:
        """Whether some way runs no skip graph."""
        return "output" in self.predictors_of or bool(self.solvers)

    @property
    def skips(self) -> bool:
        """Whether some way runs the skip graph."""
        return "residual" in self.predictors_of

    @property
    def needs_graph(self) -> bool:
        """Whether a method searches an error graph."""
        return not set(self.methods) <= {"uniform", "published", "given"}

    @property
    def methods(self) -> tuple[Planner, ...]:
        """Ways to choose the steps."""
        if self.method is None or self.method == "auto":
            return ("lemica", "least-sum", "signed", "predicted")
        return (self.method,)


def predictors(ways: Ways, table: SamplerTable, grams: TrajectoryGrams | None) -> list[Predictor]:
    """Recipes that are allowed and can be fitted; the plainest first."""
    wanted = "none" if ways.paper else ways.predict or "auto"
    found = []
    for of in ways.predictors_of:
        fits = grams is not None and (of == "output" or bool(grams.residuals))
        if wanted in ("auto", "none"):
            found.append(Predictor(of=of))
        if wanted in ("auto", "linear"):
            variables: tuple[Literal["step", "log-snr"], ...] = ("step",)
            if of == "output" and table.levels is not None:
                variables = ("step", "log-snr")
            for variable in variables:
                found.append(Predictor(of=of, method="linear", variable=variable))
                if fits and of == "output":
                    found.append(Predictor(of=of, method="linear", variable=variable, gains=True))
        for method in ("lsq2", "lsq3"):
            if wanted == method or (wanted == "auto" and fits):
                found.append(Predictor(of=of, method=method))
    return found


def candidates(
    ways: Ways,
    schedules: Mapping[Planner, Sequence[Schedule]],
    table: SamplerTable,
    *,
    name: str,
    guidance_scale: float,
    grams: TrajectoryGrams | None = None,
    solver: SolverTable | None = None,
    fitted: FittedPlans | None = None,
    fine: SamplerTable | None = None,
    error_graph_digest: str | None = None,
) -> list[StepPlan]:
    """Plans of one budget, each a way; of equal plans the first.

    Fitting costs runs of the plan: of several methods only one has its schedules fitted, `predicted` where it is there;
    of that one's schedules all but the first are for fitted solvers alone.

    Args:
        ways: what is allowed.
        schedules: by how they were chosen.
        table: the sampler.
        name, guidance_scale, error_graph_digest: of the plans.
        grams: for fitted predictors; None: those are left out, unless they alone are allowed.
        solver: makes the tables of planned solvers; None: they are left out.
        fitted: makes the plans of fitted solvers; None: they are left out.
        fine: the same sampler at more steps, where the plans are held against that: output predictors that are not
            fitted are integrated on it (see `fold.integrate_finely`).

    Raises:
        UsageError: nothing that is allowed is left.
        UsageError, InputError, UnsupportedError: as `predict` and `integrate_finely`, where a recipe was asked for by
            name.
    """
    if ways.solver == FITTED and table.stochastic:
        raise UnsupportedError(
            f"{table.scheduler} draws noise at each step: a solver can be fitted to one path only",
            fix="use a deterministic sampler (--scheduler), or leave --solver out",
        )
    found: dict[tuple[PlanRow, ...], StepPlan] = {}
    common: dict[str, Any] = {
        "name": name,
        "error_graph_digest": error_graph_digest,
        "reference_steps": None if fine is None else fine.num_steps,
    }

    def add(method: Planner, plan: StepPlan) -> None:
        found.setdefault(plan.rows, msgspec.structs.replace(plan, method=method, **common))

    unnamed: dict[str, Any] = {"name": name, "guidance_scale": guidance_scale, "method": ""}
    for method, chosen in schedules.items():
        for schedule in chosen[:1] if method == "predicted" else chosen:
            if schedule.budget == schedule.num_steps:
                add(method, plan_from_schedule(schedule, table, **unnamed))
                continue
            for predictor in predictors(ways, table, grams):
                if method == "predicted" and predictor.of == "residual" and ways.method != method:
                    continue  # its steps were planned for outputs
                if fine is not None and predictor.of == "output" and not predictor.fitted:
                    add(method, integrate_finely(schedule, table, fine, predictor, **unnamed))
                    continue
                prediction = predict(predictor, schedule, table, grams=grams)
                add(method, fold(plan_from_schedule(schedule, table, prediction=prediction, **unnamed)))
            if solver is not None and table.levels is not None:
                for kind in STOCK_SOLVERS:
                    if kind in ways.solvers:
                        add(method, plan_from_solver(schedule, table, solver(schedule, kind), **unnamed))
    if fitted is not None and FITTED in ways.solvers and not table.stochastic:
        method = "predicted" if "predicted" in schedules else next(iter(schedules))
        wanted = [schedule for schedule in schedules[method] if schedule.budget < schedule.num_steps]
        for plan in fitted(wanted) if wanted else ():
            add(method, plan)
    if not found:
        raise UsageError(
            "no way to make a plan is left by --method, --reuse, --predict and --solver together",
            fix="leave one of them out",
        )
    return list(found.values())


Run = Callable[[Sequence[StepPlan], range], Sequence[Sequence[float]]]
"""Plans, samples → dB of each plan on each sample."""


def rounds(plans: int, samples: int) -> list[tuple[range, int]]:
    """The rounds of `select`: which samples are new, and how many plans run on them."""
    found, done, until = [], 0, min(FIRST_ROUND, samples)
    while done < samples:
        found.append((range(done, until), plans))
        done, until, plans = until, min(2 * until, samples), min(max(2, -(-plans // 2)), plans)
    return found


def trial_runs(plans: int, samples: int) -> int:
    """Runs of plans that `select` makes, but for LeMiCa's own way where that is not among the better half."""
    return sum(len(new) * alive for new, alive in rounds(plans, samples))


def select(plans: Sequence[StepPlan], samples: int, run: Run) -> tuple[StepPlan, Selection]:
    """The plan that does best, by successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943).

    The first round tries every plan on `FIRST_ROUND` samples; each further round keeps the better half, at least 2,
    and doubles the samples. LeMiCa's own way stays to the end if it is there, so that every gain is seen against it.

    Args:
        plans: of one budget or one time, at least one; of equals the first wins.
        samples: of the last round.
        run: tries plans.
    """
    scores: list[list[float]] = [[] for _ in plans]

    def mean(index: int) -> float:
        return float(np.mean(scores[index]))

    alive = list(range(len(plans)))
    for new, count in rounds(len(plans), samples):
        if scores[0]:
            kept = sorted(alive, key=mean, reverse=True)[:count]
            alive = [index for index in alive if index in kept or way(plans[index]) == PAPER]
        for index, found in zip(alive, run([plans[index] for index in alive], new)):
            scores[index] += found
    order = sorted(range(len(plans)), key=lambda index: (-len(scores[index]), -mean(index)))
    tried = [
        Tried(way=way(plans[index]), full_steps=plans[index].full_steps, snr=tuple(scores[index])) for index in order
    ]
    return plans[order[0]], Selection(budget=plans[order[0]].budget, samples=samples, tried=tuple(tried))
