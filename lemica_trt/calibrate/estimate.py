"""The error graph from a few samplings a sample instead of 180; and, from the same runs, Gram matrices.

The error of segment (i, j) is estimated as

    e_ij = ε_ij · c_j,    ε_ij = ‖Δ_ij‖₁/n

Δ_ij is the change of x_j by the segment's chain of skipped steps (under a multistep sampler: of all rows behind j that
read its history), seen without any further evaluation; c_j, the sensitivity, is what such a change does to the result:
exact error / ε on one segment (j − gap, j) for each of a few *knots* j, whose run is rolled out to the end, and between
them interpolated in log c over j. That is what costs, so that only some samples are rolled out, and the mean of their
log c serves all. (Each of them at all knots: from sample to sample c differs more than from knot to knot.)

Retargeted: ε on another grid or at another guidance scale; c from a calibration by secant that there is
(`planning.transfer`), so that nothing is rolled out.

All chains run beside the one uncached run (`Sample.trace`), which is kept (`trajectories`). A piece of work is one
sample; it depends on nothing else.

Held for a sample, in units of one latent and one residual (for CogVideoX-2B 4.5 MB in fp32 and 135 MB in bf16): K
residuals on the device, 2·N latents on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lemica_trt.calibrate.cost import KNOTS, Cost, knot_stops, sample_cost
from lemica_trt.calibrate.exact import (
    edge_error,
    error_graph,
    measurement_fields,
    output_products,
    provenance,
    require_measurable,
    trajectory_grams,
    usual_batch,
)
from lemica_trt.calibrate.journal import CheapMeasurement, Journal, Piece
from lemica_trt.calibrate.replay import Run, Stepper, Uncached, Visit, distance
from lemica_trt.calibrate.trajectories import Trajectories
from lemica_trt.calibrate.workers import InProcess, Progress, Workers, complete
from lemica_trt.core.errors import UsageError
from lemica_trt.ir.calibration import ErrorGraph, Sensitivity, TrajectoryGrams
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.step_model import Latents, StepModel
from lemica_trt.planning.transfer import knots_from_stops, require_retargetable

CheapMethod = Literal["secant", "retargeted"]

GAP = 5
"""Length of the segments that it is measured on, where K and j allow."""

Array = npt.NDArray[np.float64]


class Calibrated(NamedTuple):
    """What a cheap calibration gives.

    Attributes:
        graph: estimated errors.
        grams: of the same uncached runs.
        sensitivity: to retarget from; None where it was not measured.
        cost: of all samples, counted while they ran.
    """

    graph: ErrorGraph
    grams: TrajectoryGrams
    sensitivity: Sensitivity | None
    cost: Cost


def calibrate_cheaply(
    model: StepModel,
    table: SamplerTable,
    prompts: Sequence[str],
    *,
    method: CheapMethod,
    samples: int,
    seed: int,
    max_skip: int,
    journal: Path,
    rollouts: int | None = None,
    trajectories: Path | None = None,
    progress: Progress | None = None,
    batch: int | None = None,
    workers: Workers | None = None,
    sensitivity: Sensitivity | None = None,
) -> Calibrated:
    """Estimate the error graph; see the module docstring.

    Args:
        rollouts: samples whose sensitivity is measured, the first ones; None: all. None is where it is retargeted.
        trajectories: folder where the uncached runs are kept, by workers that see its parent; None: they are not.
        sensitivity: of another calibration; given exactly where the method is `retargeted`.
        model, table, prompts, samples, seed, max_skip, journal, progress, batch, workers: as in `measure`; a unit of
            the journal is a sample.

    Raises:
        UsageError, InputError, VerificationError: as `measure`.
        UnsupportedError: `sensitivity` does not hold here.
    """
    require_measurable(prompts, samples=samples, max_skip=max_skip, batch=batch)
    if (method == "retargeted") != (sensitivity is not None):
        raise UsageError(
            f"calibration by {method}: expected {'another' if sensitivity is None else 'no other'} calibration to use",
            fix="--calibration-from DIR, and no --calibration",
        )
    measurement = cheap_measurement(
        model, table, prompts, method=method, seed=seed, max_skip=max_skip, sensitivity=sensitivity
    )
    if sensitivity is not None:
        require_retargetable(sensitivity, measurement, table)
    book = Journal(journal, measurement, Piece)
    job = _Samples(measurement, table, tuple(prompts), batch or usual_batch(model), trajectories)
    rolled_out = 0 if sensitivity is not None else samples if rollouts is None else rollouts
    units = [(s, s < rolled_out) for s in range(samples)]
    costs = {unit: float(sample_cost(table.num_steps, unit[1], unit[0])) for unit in units}
    complete(book, costs, lambda unit: [unit], job, workers or InProcess(model), progress)
    return calibrated(measurement, table, [book.entries[unit] for unit in units], sensitivity)


def cheap_measurement(
    model: StepModel,
    table: SamplerTable,
    prompts: Sequence[str],
    *,
    method: CheapMethod,
    seed: int,
    max_skip: int,
    sensitivity: Sensitivity | None = None,
) -> CheapMeasurement:
    """What a journal of `calibrate_cheaply` is bound to; its digest names the file."""
    return CheapMeasurement(
        **measurement_fields(model, table, prompts, seed, max_skip),
        method=method,
        knots=KNOTS,
        gap=GAP,
        sensitivity=None if sensitivity is None else sensitivity.digest,
    )


class _Samples(NamedTuple):
    """The job of `calibrate_cheaply`; what is done at a time is a sample, which is rolled out or not."""

    measurement: CheapMeasurement
    table: SamplerTable
    prompts: tuple[str, ...]
    batch: int
    trajectories: Path | None

    def start(self, model: StepModel) -> Callable[[tuple[int, bool]], list[Piece]]:
        stepper, kept = Stepper(model, self.table, self.batch), Trajectories(self.trajectories)

        def work(unit: tuple[int, bool]) -> list[Piece]:
            number, rolled_out = unit
            prompt, seed = self.prompts[number % len(self.prompts)], self.measurement.seed + number
            sample = stepper.sample(f"sample {number}", prompt, seed)
            found, uncached = piece(sample, self.table, self.measurement, number, rolled_out=rolled_out)
            kept.keep(model, self.table, prompt, seed, uncached)
            return [found]

        return work


class Traced(Protocol):
    """A sample as it is measured; `replay.Sample` is one.

    Attributes:
        full_count, skip_count: evaluations made so far, counted for one latent.
    """

    full_count: int
    skip_count: int

    def trace(self, max_skip: int, visit: Visit) -> Uncached:
        """The uncached run with the chains of skipped steps of all starts beside it."""

    def roll_out(self, branches: Mapping[tuple[int, int], Run]) -> dict[tuple[int, int], Latents]:
        """Run branches in full to the end."""


def piece(
    sample: Traced, table: SamplerTable, measurement: CheapMeasurement, number: int, *, rolled_out: bool
) -> tuple[Piece, Uncached]:
    """What is measured on one sample, and its uncached run.

    Args:
        sample: before its first step.
        number: its number.
        rolled_out: whether its sensitivity is measured.

    Raises:
        VerificationError: NaN or infinity; names sample and edge.
    """
    stops = knot_stops(measurement.num_steps, measurement.knots, number) if rolled_out else []
    gap = min(measurement.gap, measurement.max_skip + 1)
    knots = {j: max(j - gap, measurement.begin_of(j - 1)) for j in stops}  # stop → start
    knots = {j: i for j, i in knots.items() if j > i + 1}
    changes: dict[tuple[int, int], float] = {}
    branches: dict[tuple[int, int], Run] = {}

    def visit(i: int, j: int, chain: Run, run: Run) -> None:
        changes[i, j] = distance_behind(table, j, chain, run)
        if knots.get(j) == i:
            branches[i, j] = chain

    uncached = sample.trace(measurement.max_skip, visit)
    finals = sample.roll_out(branches) if branches else {}
    exact = {j: distance(final, uncached.final) for (_, j), final in finals.items()}
    measured = {j: exact[j] / changes[i, j] for j, i in knots.items() if exact[j] > 0 and changes[i, j] > 0}
    found = Piece(
        sample=number,
        rolled_out=rolled_out,
        changes=tuple(edge_error(number, i, j, changes[i, j]) for i, j in measurement.segments),
        outputs=output_products(uncached),
        knots=tuple(sorted(measured.items())),
        full=sample.full_count,
        skip=sample.skip_count,
    )
    return found, uncached


def mean_sensitivity(pieces: Sequence[Piece], num_steps: int) -> Array:
    """c_0 … c_N of the samples that were rolled out, the geometric mean; 1 where there are none."""
    curves = [interpolate_sensitivity(dict(part.knots), num_steps) for part in pieces if part.rolled_out]
    curves = curves or [np.ones(num_steps + 1)]
    found: Array = np.exp(np.mean(np.log(curves), 0))
    return found


def interpolate_sensitivity(knots: Mapping[int, float], num_steps: int) -> Array:
    """c_0 … c_N from c_j = exact error / ε at the knots; 1 where there are none."""
    if not knots:
        return np.ones(num_steps + 1)
    stops, values = zip(*sorted(knots.items()))
    interpolated: Array = np.exp(np.interp(np.arange(num_steps + 1), stops, np.log(values)))
    return interpolated


def distance_behind(table: SamplerTable, stop: int, changed: Run, run: Run) -> float:
    """ε: the mean absolute change of what the histories behind which step `stop` begins put into rows `stop` and later.

    Args:
        changed, run: the histories of the chain, and of the uncached run.
    """
    latents = [a - b for a, b in zip(changed.latents, run.latents)]
    outputs = [a - b for a, b in zip(changed.outputs, run.outputs)]
    depth = max(table.latent_history, table.output_history)
    changes = []
    for age, row in enumerate(table.rows[stop : stop + depth]):
        terms = [c * d for c, d in zip(row.latents[age:], latents)]
        terms += [c * d for c, d in zip(row.outputs[age:], outputs)]
        changes.append(sum(terms, np.zeros_like(latents[0])))
    return float(np.abs(sum(changes[1:], changes[0])).mean(dtype=np.float64))


def calibrated(
    measurement: CheapMeasurement, table: SamplerTable, pieces: Sequence[Piece], known: Sensitivity | None = None
) -> Calibrated:
    """What all samples together give.

    Args:
        known: of another calibration; None: that of the samples that were rolled out, all alike where none was.
    """
    samples, common = len(pieces), provenance(measurement)
    full, skip = sum(part.full for part in pieces), sum(part.skip for part in pieces)
    cost = Cost.of(samples, full, skip, measurement.num_steps)
    curve = mean_sensitivity(pieces, measurement.num_steps) if known is None else known.at(table)
    errors = {
        (i, j): tuple(part.changes[k] * float(curve[j]) for part in pieces)
        for k, (i, j) in enumerate(measurement.segments)
    }
    knots = [knots_from_stops(dict(part.knots), table) for part in pieces if part.rolled_out]
    return Calibrated(
        graph=error_graph(
            measurement, errors, samples=samples, method=measurement.method, samplings=cost.samplings / samples
        ),
        grams=trajectory_grams(measurement, pieces),
        sensitivity=Sensitivity(**common, samples=len(knots), knots=tuple(knots)) if knots and all(knots) else None,
        cost=cost,
    )
