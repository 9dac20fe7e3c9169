"""The error graph of a model under a sampler: all samples, all segments, resumable; and the Grams of the same runs.

A unit of the journal is one start of one sample. They are run in waves of neighbouring starts, so that small models
get large batches. Errors depend in their last digits on which runs share a call of the DiT (matrix products round
differently in another batch); who shares one with whom follows from `batch` alone, never from what was finished
before, or by whom. So an interrupted measurement that goes on gives the very bytes of one that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from lemica_trt.calibrate.inner_products import inner_products, matrix
from lemica_trt.calibrate.journal import Journal, Measurement, Piece, Unit
from lemica_trt.calibrate.prompts import prompts_digest
from lemica_trt.calibrate.replay import Sample, Stepper, Uncached
from lemica_trt.calibrate.workers import InProcess, Progress, Workers, complete
from lemica_trt.core.errors import InputError, UnsupportedError, UsageError, VerificationError
from lemica_trt.ir.calibration import Edge, ErrorGraph, Matrix, TrajectoryGrams, gram_from_samples
from lemica_trt.ir.profile import CalibrationMethod
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.step_model import StepModel

BATCH_ELEMENTS = 2**16
"""Latent elements in one DiT call by default. The DiT of a video model is busy with one latent, the tiny one wants
about 20; measured on it, time per latent is flat from 8 to 32 on a CPU."""


class Measured(NamedTuple):
    """What a measurement gives.

    Attributes:
        graph: exact errors.
        grams: of the uncached runs.
    """

    graph: ErrorGraph
    grams: TrajectoryGrams


def measure(
    model: StepModel,
    table: SamplerTable,
    prompts: Sequence[str],
    *,
    samples: int,
    seed: int,
    max_skip: int,
    journal: Path,
    progress: Progress | None = None,
    batch: int | None = None,
    workers: Workers | None = None,
) -> Measured:
    """Measure the error graph by LeMiCa's eq. 4 (see `replay`), and the Gram matrices of the same uncached runs.

    Args:
        model: on its device, in the dtype that is deployed; its profile gives guidance scale and negative prompt.
        table: the model's sampler.
        prompts: sample s uses prompt s mod len(prompts), and seed + s for all its noise.
        samples: (prompt, seed) pairs.
        seed: of sample 0.
        max_skip: K; more than N − 1 means N − 1.
        journal: file that keeps finished units. Called again with it, the measurement goes on, also with more
            samples; with fewer, only those are used.
        progress: told what is done.
        batch: the most latents in one call of the DiT, bounded by memory; None: `BATCH_ELEMENTS`' worth.
        workers: do the work; None: this process.

    Returns:
        The graph, its edges sorted, and the Grams. On one kind of machine they depend on the other arguments alone,
        byte for byte;
        where a journal is gone on with under another `batch`, in the last digits on both.

    Raises:
        UsageError: samples, max_skip or batch below 1.
        InputError: no prompts, or the journal is of another measurement.
        VerificationError: NaN or infinity, in the uncached run or in an error; names sample and edge.
    """
    require_measurable(prompts, samples=samples, max_skip=max_skip, batch=batch)
    measurement = _measurement(model, table, prompts, seed, max_skip)
    book = Journal(journal, measurement, Unit)
    batch = batch or usual_batch(model)
    width = max(batch // measurement.max_skip, 1)
    waves = [measurement.starts[a : a + width] for a in range(0, len(measurement.starts), width)]
    costs = {
        (s, wave): float(sum(1 + sum(table.num_steps - j for j in measurement.stops(i)) for i in wave))
        for s in range(samples)
        for wave in waves
    }
    job = _Waves(measurement, table, tuple(prompts), batch)
    complete(book, costs, lambda unit: [(unit[0], i) for i in unit[1]], job, workers or InProcess(model), progress)
    first = [book.entries[s, measurement.starts[0]] for s in range(samples)]
    return Measured(
        graph=_graph(measurement, book, samples),
        grams=trajectory_grams(measurement, first),
    )


def measurement_digest(
    model: StepModel, table: SamplerTable, prompts: Sequence[str], *, seed: int, max_skip: int
) -> str:
    """SHA-256 (hex) of everything that a journal is bound to; who names journals by it never meets another's."""
    return _measurement(model, table, prompts, seed, max_skip).digest


def require_measurable(prompts: Sequence[str], *, samples: int, max_skip: int, batch: int | None) -> None:
    """Check the arguments of `measure`.

    Raises:
        UsageError, InputError: see there.
    """
    for name, number in (("samples", samples), ("max_skip", max_skip), ("batch", 1 if batch is None else batch)):
        if number < 1:
            raise UsageError(f"{name}: expected at least 1, got {number}")
    if not prompts:
        raise InputError("prompts: expected at least one, got none")


def usual_batch(model: StepModel) -> int:
    """`BATCH_ELEMENTS` in latents."""
    return min(max(BATCH_ELEMENTS // math.prod(model.latent_shape), 1), 64)


class _Waves(NamedTuple):
    """The job of `measure`; what is done at a time is a wave of starts of one sample."""

    measurement: Measurement
    table: SamplerTable
    prompts: tuple[str, ...]
    batch: int

    def start(self, model: StepModel) -> Callable[[tuple[int, tuple[int, ...]]], list[Unit]]:
        stepper = Stepper(model, self.table, self.batch)

        @lru_cache(maxsize=1)  # waves of one sample follow each other
        def begun(s: int) -> tuple[Sample, Uncached]:
            sample = stepper.sample(f"sample {s}", self.prompts[s % len(self.prompts)], self.measurement.seed + s)
            return sample, sample.uncached()

        def work(unit: tuple[int, tuple[int, ...]]) -> list[Unit]:
            s, wave = unit
            sample, uncached = begun(s)
            units = _units(self.measurement, s, sample.errors(uncached, wave, self.measurement.max_skip))
            if wave[0] == self.measurement.starts[0]:
                units[0] = msgspec.structs.replace(units[0], outputs=output_products(uncached))
            return units

        return work


def provenance_of(model: StepModel, table: SamplerTable, prompts: Sequence[str], seed: int) -> dict[str, Any]:
    """The fields of a `Provenance`."""
    profile = model.profile
    return {
        "model": profile.name,
        "revision": model.revision,
        "dtype": profile.dtype,
        "scheduler": table.scheduler,
        "sampler_digest": table.digest,
        "sampler_probe": table.probe,
        "num_steps": table.num_steps,
        "guidance_scale": float(profile.sampling.guidance_scale),
        "negative_prompt": profile.sampling.negative_prompt,
        "text_length": profile.text_length,
        "latent_shape": tuple(model.latent_shape),
        "seed": seed,
        "prompts_digest": prompts_digest(prompts),
        "versions": model.libraries,
    }


def measurement_fields(
    model: StepModel, table: SamplerTable, prompts: Sequence[str], seed: int, max_skip: int
) -> dict[str, Any]:
    """The fields of a `Measurement`.

    Raises:
        UnsupportedError: no two steps in a row are of one kind.
    """
    kinds = table.kinds
    if all(one != other for one, other in pairwise(kinds)):
        raise UnsupportedError(
            f"no two of the {len(kinds)} steps that follow each other are of one kind: there is nothing to reuse",
            fix="more --denoising-steps, or a --method that needs no calibration",
        )
    return {
        **provenance_of(model, table, prompts, seed),
        "max_skip": min(max_skip, table.num_steps - 1),
        "switches": table.switches or UNSET,
    }


def _measurement(
    model: StepModel, table: SamplerTable, prompts: Sequence[str], seed: int, max_skip: int
) -> Measurement:
    return Measurement(**measurement_fields(model, table, prompts, seed, max_skip))


def edge_error(sample: int, start: int, stop: int, value: float) -> float:
    """The error of an edge as it is.

    Raises:
        VerificationError: NaN or infinity; names sample and edge.
    """
    if not math.isfinite(value):
        raise VerificationError(
            f"sample {sample}, edge ({start}, {stop}): expected a finite error, got {value}",
            fix="calibrate in another dtype (fp32 or bf16), or with a smaller max_skip",
        )
    return value


def _units(measurement: Measurement, sample: int, errors: dict[int, list[float]]) -> list[Unit]:
    """Errors of a wave as units."""
    return [
        Unit(
            sample=sample,
            start=i,
            errors=tuple(edge_error(sample, i, j, value) for j, value in zip(measurement.stops(i), values)),
        )
        for i, values in errors.items()
    ]


def _graph(measurement: Measurement, book: Journal[Unit], samples: int) -> ErrorGraph:
    errors = {
        (i, j): tuple(book.entries[s, i].errors[k] for s in range(samples))
        for i in measurement.starts
        for k, j in enumerate(measurement.stops(i))
    }
    return error_graph(measurement, errors, samples=samples, method="exact")


def error_graph(
    measurement: Measurement,
    errors: Mapping[tuple[int, int], tuple[float, ...]],
    *,
    samples: int,
    method: CalibrationMethod,
    samplings: float | UnsetType = UNSET,
) -> ErrorGraph:
    """Errors by segment, sorted, as a graph."""
    return ErrorGraph(
        **provenance(measurement),
        max_skip=measurement.max_skip,
        samples=samples,
        edges=tuple(Edge(start=i, stop=j, errors=each) for (i, j), each in errors.items()),
        method=method,
        samplings=samplings,
    )


def trajectory_grams(measurement: Measurement, samples: Sequence[Unit | Piece]) -> TrajectoryGrams:
    """The Grams of samples, from the inner products of each."""
    outputs = gram_from_samples([np.array(part.outputs) for part in samples])
    return TrajectoryGrams(**provenance(measurement), samples=len(samples), outputs=outputs)


def output_products(uncached: Uncached) -> Matrix:
    """Inner products of the guided outputs m_0 … m_{N−1} of an uncached run."""
    outputs = [run.outputs[0] for run in uncached.runs[1:]]
    return matrix(inner_products(outputs, outputs))


def provenance(measurement: Measurement) -> dict[str, Any]:
    """What every result says of where it comes from, beside the number of samples."""
    names = set(Measurement.__struct_fields__) - {"max_skip", "switches", "format_version"}
    return {name: getattr(measurement, name) for name in names}
