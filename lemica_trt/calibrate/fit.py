"""A multistep solver fitted to the model: B steps of its own that end where the reference ends.

A plan may weigh whatever latents and outputs its rows have made (see `plan`), with other weights in every row: the
non-stationary solvers of Shaul et al. 2024 (arXiv 2403.01329), of which every linear multistep solver, DPM-Solver++ and
UniPC among them, is one, and every folded plan. The weights are fitted row by row while the plan itself runs on some
samples: row k gets those with which its latents come closest to the reference's there,

    x̂_k = Σ_j latents[j]·x̂_{k−1−j} + Σ_l outputs[l]·m̂_{k−1−l} + Σ_l guidance_terms[l]·ê_{k−1−l},

    minimising Σ_s log ‖x̂_k − x_k‖²  over samples s,

where ê is the guidance term of m̂ (`ir.plan`): the two branches of the guidance have weights of their own, at no
evaluation more. The run goes on from x̂_k, so that the next row sees and corrects what this one left. (Shaul et al.
optimise all rows at once by gradient descent; row by row it takes B evaluations a sample, no backward pass, and least
squares.)
The logarithm is what the score of a plan has, dB: no single chaotic sample decides. Each row begins with the
linearly extrapolated, folded one, and never fits worse than that one would, from the same latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, UnsetType

from lemica_trt.calibrate.exact import provenance_of
from lemica_trt.calibrate.inner_products import inner_products
from lemica_trt.calibrate.journal import Header, Journal
from lemica_trt.calibrate.replay import Stepper
from lemica_trt.calibrate.trajectories import Trajectories
from lemica_trt.calibrate.workers import Progress
from lemica_trt.core.errors import InputError, UnsupportedError, VerificationError
from lemica_trt.core.values import Value, require_finite
from lemica_trt.ir.graphs import StepLayout
from lemica_trt.ir.plan import PlanRow, StepPlan, layout_from_plans
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.step_model import AtGuidance, Latents, StepInput, StepModel
from lemica_trt.planning.extrapolation import linear_plan
from lemica_trt.planning.fold import nearest_steps
from lemica_trt.planning.step_plan import assign_steps

OUTPUTS = 6
"""Model outputs that a row reads back, where there are as many; and at least what the extrapolated row reads."""

RIDGE = 1e-7
"""Least squares: penalty on the distance from the extrapolated row, in units of each term's own power. With a
hundredth of it rounding changes weights by 6 % (wan-tiny, two samples), with this by 0.02 %."""

ROUNDS = 8
"""Times that the samples are weighed anew, each by 1/its error: what makes least squares minimise the logarithm."""

FLOOR = 1e-13
"""Errors below this part of a sample's power are rounding: none counts for more because it has less of it."""

Array = npt.NDArray[np.float64]


class FitMeasurement(Header, frozen=True, kw_only=True):
    """What a journal of fits is bound to.

    Attributes:
        samples: number of (prompt, seed) pairs that are fitted to.
        reference: digest of the reference's sampler table.
        outputs, ridge, rounds: see the constants.
        branches: whether guidance terms are weighed.
        scales: guidance scale of each sample, where they are not all the default.
        target: what computed the reference's runs, where that is another model.
    """

    samples: int
    reference: str
    outputs: int = OUTPUTS
    ridge: float = RIDGE
    rounds: int = ROUNDS
    branches: bool = False
    scales: tuple[float, ...] = ()
    target: dict[str, str] | UnsetType = UNSET


class FittedRow(Value, frozen=True):
    """Weights of one row, as in `PlanRow`."""

    latents: tuple[float, ...]
    outputs: tuple[float, ...]
    guidance_terms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("latents", "outputs", "guidance_terms"):
            require_finite(getattr(self, name), name)

    def of(self, row: PlanRow) -> PlanRow:
        """A row with these weights."""
        return msgspec.structs.replace(
            row, latents=self.latents, outputs=self.outputs, guidance_terms=self.guidance_terms
        )


class Fit(Value, frozen=True):
    """One fitted solver.

    Attributes:
        full_steps: of the N; what it was fitted for.
        rows: one for each full step but the first, and the last row.
    """

    full_steps: tuple[int, ...]
    rows: tuple[FittedRow, ...]

    @property
    def key(self) -> tuple[int, ...]:
        return self.full_steps

    def mismatch(self, measurement: FitMeasurement) -> str | None:
        """What is wrong with it as an entry."""
        if len(self.rows) == len(self.full_steps):
            return None
        return f"expected {len(self.full_steps)} rows, got {len(self.rows)}"


class Run(Protocol):
    """A sample under way: each call takes it one row of a plan further. `SampleRun` is one.

    Attributes:
        latents, outputs, guidance_terms: of the rows so far, newest first, as deep as rows may read, fp32; no guidance
            terms where the branches are not weighed apart.
    """

    @property
    def latents(self) -> Sequence[Latents]: ...

    @property
    def outputs(self) -> Sequence[Latents]: ...

    @property
    def guidance_terms(self) -> Sequence[Latents]: ...

    def __call__(self, row: PlanRow) -> object: ...


class SampleRun:
    """A request under way on a model, by rows that compute everything and the last.

    Args:
        layout: histories deep enough for the rows to come.

    Attributes:
        latents, outputs, guidance_terms: as in `Run`.
    """

    def __init__(self, model: StepModel, layout: StepLayout, prompt: str, seed: int, *, guidance_scale: float) -> None:
        begun = model.begin(prompt, seed)
        self._layout, self._conditions, self._scale = layout, begun.conditions, guidance_scale
        self._take = model.steps(layout)
        self.latents: list[Latents] = [next(begun.noises)]
        self.outputs: list[Latents] = []
        self.guidance_terms: list[Latents] = []

    def __call__(self, row: PlanRow) -> None:
        """Run a row."""
        given = StepInput(self._conditions, self.latents, self.outputs, self.guidance_terms)
        (result,) = self._take(row, [given], self._scale)
        layout = self._layout
        self.latents = [result.latents, *self.latents][: layout.latent_history]
        self.outputs = [result.output, *self.outputs][: layout.output_history]
        if result.guidance_term is not None:
            self.guidance_terms = [result.guidance_term, *self.guidance_terms][: layout.guidance_history]


class Fitter:
    """Fits solvers to a model, on numbered samples.

    Args:
        model: in PyTorch, or on engines; of its profile the guidance scales of the samples.
        table: the sampler, N steps; it draws no noise.
        reference: what the fitted runs shall end where it ends: the same table, or the sampler with more steps.
        prompts: sample s uses prompt s mod len(prompts), and seed + s for its noise.
        samples: how many.
        seed: of sample 0.
        journal: file of finished fits; a fit under way is lost with its process.
        trajectories: folder of the reference's runs, see there; None: they are made here, and not kept.
        progress: told what is done, in evaluations of the DiT.
        target: whose runs of the reference the fitted ones shall end where they end, of the same latents and
            conditions; None: the model's own. Of a quantised model, the one that it was made from.

    Raises:
        UnsupportedError: the sampler draws noise.
        UsageError: as `nearest_steps`, where the reference is not the table.
        InputError: no prompts, or the journal is of something else.

    Attributes:
        samples: how many.
        evaluations: of the DiT for one latent that were made so far.
    """

    def __init__(
        self,
        model: StepModel,
        table: SamplerTable,
        reference: SamplerTable,
        prompts: Sequence[str],
        *,
        samples: int,
        seed: int,
        journal: Path,
        trajectories: Path | None = None,
        progress: Progress | None = None,
        target: StepModel | None = None,
    ) -> None:
        if table.stochastic:
            raise UnsupportedError(
                f"{table.scheduler} draws noise at each step: a solver can be fitted to one path only",
                fix="use a deterministic sampler (--scheduler), or another --method",
            )
        if not prompts:
            raise InputError("prompts: expected at least one, got none")
        self._model, self._table, self._reference = model, table, reference
        self._target = model if target is None else target
        self._steps = tuple(range(table.num_steps))
        if reference.digest != table.digest:
            self._steps = nearest_steps(table, reference)
        self.samples, self._prompts, self._seed = samples, prompts, seed
        self._progress = progress
        self._book = Journal(journal, fit_measurement(model, table, reference, prompts, samples, seed, target), Fit)
        self._trajectories = Trajectories(trajectories)
        self._scales = model.profile.sampling.fit_scales(samples)
        self._paths: list[Sequence[Latents]] = []
        self.evaluations = 0

    def __call__(self, schedule: Schedule) -> StepPlan:
        """The plan that runs the schedule's full steps under the solver fitted for them, and nothing else.

        Raises:
            VerificationError: a run is not finite.
        """
        start = self._start(schedule)
        if schedule.full_steps not in self._book.entries:
            self._book.add([Fit(full_steps=schedule.full_steps, rows=tuple(self._fit(start, schedule)))])
        reference_steps = self._reference.num_steps
        plan = msgspec.structs.replace(
            fitted_plan(start, self._book.entries[schedule.full_steps].rows),
            reference_steps=reference_steps if reference_steps > self._table.num_steps else None,
        )
        return assign_steps(plan, schedule, self._table)

    def evaluations_for(self, schedule: Schedule) -> int:
        """Evaluations of the DiT that a call would make now: none where the journal has the fit; else the reference,
        the first time, and the plan, each on every sample."""
        if schedule.full_steps in self._book.entries:
            return 0
        todo = range(len(self._paths), self.samples)
        found = [self._trajectories.files(self._at(s), self._reference, *self._sample(s)) for s in todo]
        paths = sum(not files for files in found)
        return paths * self._reference.num_steps + self.samples * schedule.budget

    def _sample(self, s: int) -> tuple[str, int]:
        """Prompt and seed."""
        return self._prompts[s % len(self._prompts)], self._seed + s

    def _at(self, s: int) -> StepModel:
        """The target at the guidance scale of a sample."""
        default = self._target.profile.sampling.guidance_scale
        return self._target if self._scales[s] == default else AtGuidance(self._target, self._scales[s])

    def _start(self, schedule: Schedule) -> StepPlan:
        """The extrapolated plan that the fit begins with, in steps of the reference, folded."""
        finely = Schedule(
            num_steps=self._reference.num_steps, full_steps=tuple(self._steps[f] for f in schedule.full_steps)
        )
        guidance_scale = self._model.profile.sampling.guidance_scale
        return linear_plan(finely, self._reference, guidance_scale=guidance_scale, name="fitted", method="fitted")

    def _fit(self, start: StepPlan, schedule: Schedule) -> list[FittedRow]:
        """Run the plan on all samples, row by row, each row fitted before it runs."""
        before, todo = self.evaluations, self.evaluations_for(schedule)

        def tell() -> None:
            if self._progress is not None:
                self._progress(self.evaluations - before, todo)

        tell()
        for s in range(len(self._paths), self.samples):
            self._paths.append(self._path(s))
            tell()
        layout = layout_from_plans([start], latent_shape=self._model.latent_shape, guided=self._model.guided)
        depth = min(max(OUTPUTS, layout.output_history), schedule.budget)
        layout = msgspec.structs.replace(
            layout, output_history=depth, guidance_history=depth if self._model.branches else 0
        )
        runs = [
            SampleRun(self._model, layout, *self._sample(s), guidance_scale=scale)
            for s, scale in enumerate(self._scales)
        ]

        def ran(row: PlanRow) -> None:
            self.evaluations += row.full
            tell()

        return fit_rows(start, runs, targets_of(schedule, self._paths), ran)

    def _path(self, s: int) -> Sequence[Latents]:
        """The reference's latents at each of the N steps and at the end: fp32 latent_shape."""
        model, (prompt, seed) = self._at(s), self._sample(s)
        found = self._trajectories.find(model, self._reference, prompt, seed)
        if found is None:
            stepper = Stepper(model, self._reference, batch=1)
            found = self._trajectories.run(stepper, prompt, seed, f"sample {s}")
            self.evaluations += self._reference.num_steps
        return list(found[[*self._steps, self._reference.num_steps]])


def fit_rows(
    start: StepPlan, runs: Sequence[Run], targets: Sequence[Sequence[Latents]], ran: Callable[[PlanRow], None]
) -> list[FittedRow]:
    """Run a plan on all samples, row by row, each row fitted before it runs.

    Args:
        start: B full rows and the last; what the weights begin with.
        runs: one a sample, before its first row.
        targets: targets[s][k]: the latents of sample s that row k + 1 shall reach.
        ran: called behind each row of each sample.

    Returns:
        The weights of all rows but the first.

    Raises:
        VerificationError: a run is not finite.
    """
    fitted: list[FittedRow] = []
    for number, row in enumerate(start.rows):
        if number > 0:
            weights = _fitted_row(row, [(run, target[number - 1]) for run, target in zip(runs, targets)])
            row = weights.of(row)
            fitted.append(weights)
        for s, run in enumerate(runs):
            run(row)
            _require_finite(run.latents[0], f"sample {s}, the fitted run at step {row.step}")
            ran(row)
    return fitted


def targets_of(schedule: Schedule, paths: Sequence[Sequence[Latents]]) -> list[list[Latents]]:
    """`targets` of `fit_rows`.

    Args:
        paths: of each sample the reference's latents at each of the N steps and at the end.
    """
    stops = [*schedule.full_steps[1:], schedule.num_steps]
    return [[path[stop] for stop in stops] for path in paths]


def fitted_plan(start: StepPlan, fitted: Sequence[FittedRow]) -> StepPlan:
    """The plan that a fit began with, with the weights that it found."""
    rows = [weights.of(row) for row, weights in zip(start.rows[1:], fitted)]
    return msgspec.structs.replace(start, rows=(start.rows[0], *rows))


def fit_measurement(
    model: StepModel,
    table: SamplerTable,
    reference: SamplerTable,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    target: StepModel | None = None,
) -> FitMeasurement:
    """What a journal of fits is bound to; its digest names the file."""
    return FitMeasurement(
        **provenance_of(model, table, prompts, seed),
        samples=samples,
        reference=reference.digest,
        branches=model.branches,
        scales=() if model.profile.sampling.guidance_range is None else model.profile.sampling.fit_scales(samples),
        target=UNSET if target is None else target.libraries,
    )


def closest_combination(grams: Array, start: Array, *, ridge: float = RIDGE, rounds: int = ROUNDS) -> Array:
    """Weights c of some vectors b_0 … b_{n−1} whose sum comes closest to a vector t, over several samples.

    Minimises Σ_s log(‖t − Σ_i c_i·b_i‖²_s + FLOOR·‖t‖²_s) by least squares under weights that are 1/these errors, time
    and again (majorisation: the logarithm lies below its tangents), drawn to `start` by the ridge. The best of all
    rounds, the start among them.

    Args:
        grams: inner products of b_0 … b_{n−1}, t: float64 [samples, n + 1, n + 1].
        start: float64 [n].
        ridge: penalty on (c_i − start_i)², in units of the weighed ‖b_i‖².

    Returns:
        float64 [n].
    """
    basis, along, power = grams[:, :-1, :-1], grams[:, :-1, -1], grams[:, -1, -1]

    def errors(weights: Array) -> Array:
        squares = power - 2 * along @ weights + np.einsum("i,sij,j->s", weights, basis, weights)
        found: Array = np.maximum(squares, 0.0) + FLOOR * power
        return found

    best, least = start, float(np.log(errors(start)).sum())
    current = start
    for _ in range(rounds):
        inverse = 1 / errors(current)
        matrix = np.einsum("s,sij->ij", inverse, basis)
        penalty = ridge * np.diag(matrix)
        right = inverse @ along + penalty * start
        current = np.linalg.lstsq(matrix + np.diag(penalty), right, rcond=None)[0]
        reached = float(np.log(errors(current)).sum())
        if reached < least:
            best, least = current, reached
    return best


def _fitted_row(row: PlanRow, runs: Sequence[tuple[Run, Latents]]) -> FittedRow:
    """The weights with which a row comes closest to the target of each run, from the histories that the runs have."""
    products, count = [], max(1, len(row.latents))
    for run, target in runs:
        vectors = [*run.latents[:count], *run.outputs, *run.guidance_terms, target]
        products.append(inner_products(vectors, vectors))
    grams, terms = np.array(products), count + len(runs[0][0].outputs)
    found = np.zeros(grams.shape[1] - 1)
    found[: len(row.latents)] = row.latents
    found[count : count + len(row.outputs)] = row.outputs
    joined = [*range(terms), -1]  # without the guidance terms
    found[:terms] = closest_combination(grams[:, joined][:, :, joined], found[:terms])
    if terms < len(found):  # begun with the branches joined, so that apart they are never farther
        found = closest_combination(grams, found)
    weights = tuple(found.tolist())
    return FittedRow(latents=weights[:count], outputs=weights[count:terms], guidance_terms=weights[terms:])


def _require_finite(latents: Latents, where: str) -> None:
    if not np.isfinite(latents).all():
        raise VerificationError(f"{where}: expected finite latents", fix="build with another --dtype, or --method")
