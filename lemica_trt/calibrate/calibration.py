"""A whole calibration by the method of a profile, what it costs, and whether one that was made elsewhere fits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lemica_trt.calibrate.cost import calibration_cost, rollouts_of
from lemica_trt.calibrate.estimate import calibrate_cheaply, cheap_measurement
from lemica_trt.calibrate.exact import measure, measurement_digest
from lemica_trt.calibrate.fit import Fitter, fit_measurement
from lemica_trt.calibrate.workers import Workers
from lemica_trt.core.errors import InputError
from lemica_trt.core.progress import Reporter
from lemica_trt.ir.calibration import Calibration, Provenance, Sensitivity
from lemica_trt.ir.profile import CalibrationSettings, Profile
from lemica_trt.ir.sampler import SAMPLER_TOLERANCE, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.step_model import StepModel
from lemica_trt.planning.planner import Fit


def calibrate(
    model: StepModel,
    settings: CalibrationSettings,
    table: SamplerTable,
    prompts: Sequence[str],
    *,
    journals: Path,
    trajectories: Path,
    reporter: Reporter,
    workers: Workers,
    sensitivity: Sensitivity | None = None,
) -> Calibration:
    """Measure or estimate the error graph of a model.

    Args:
        settings: how.
        model, table, prompts, workers: as in `exact.measure`.
        journals: folder of finished work, which is not done again.
        trajectories: folder where the uncached runs are kept, which must exist where the workers run; see
            `calibrate.trajectories`.
        sensitivity: of another calibration, where the method is `retargeted`.

    Raises:
        UsageError, InputError, UnsupportedError, VerificationError: as `exact.measure` and `estimate`.
    """
    wanted = calibration_cost(settings, table.num_steps)
    reporter.stage(
        "calibrate",
        f"{settings.method}: {settings.samples} samples, up to {settings.max_skip} steps skipped: "
        f"{wanted.samplings:.0f} samplings' work, {wanted.samplings / settings.samples:.1f} a sample",
    )
    common: dict[str, Any] = {"seed": settings.seed, "max_skip": settings.max_skip}
    running: dict[str, Any] = {"samples": settings.samples, "progress": reporter.advance, "workers": workers}
    if settings.method == "exact":
        journal = _journal(journals, measurement_digest(model, table, prompts, **common))
        exact = measure(model, table, prompts, journal=journal, **running, **common)
        return Calibration(graph=exact.graph, grams=exact.grams)
    common |= {"method": settings.method, "sensitivity": sensitivity}
    running |= {"rollouts": rollouts_of(settings), "trajectories": trajectories}
    journal = _journal(journals, cheap_measurement(model, table, prompts, **common).digest)
    found = calibrate_cheaply(model, table, prompts, journal=journal, **running, **common)
    reporter.note(
        f"{found.cost.full} full steps, {found.cost.skip} skipped steps were run: "
        f"{found.cost.samplings / settings.samples:.1f} samplings a sample"
    )
    return Calibration(graph=found.graph, grams=found.grams, sensitivity=sensitivity or found.sensitivity)


def _journal(folder: Path, digest: str) -> Path:
    return folder / f"journal-{digest[:16]}.jsonl"


def fit_by_model(
    model: Callable[[], StepModel],
    settings: CalibrationSettings,
    table: SamplerTable,
    prompts: Sequence[str],
    *,
    reference: SamplerTable | None,
    journals: Path,
    trajectories: Path,
    reporter: Reporter,
    target: StepModel | None = None,
) -> Fit | None:
    """Fits solvers to a model on the first samples of its calibration; None where the sampler draws noise.

    Args:
        model: opens it; called when there is something to fit.
        reference: the sampler at M steps, where plans are compared with that.
        journals: folder of finished fits.
        trajectories: folder of uncached runs.
        target: see `Fitter`.
    """
    if table.stochastic:
        return None
    finest, samples = reference or table, settings.fit_samples

    @functools.cache
    def fitter() -> Fitter:
        measurement = fit_measurement(model(), table, finest, prompts, samples, settings.seed, target)
        return Fitter(
            model(),
            table,
            finest,
            prompts,
            samples=samples,
            seed=settings.seed,
            journal=journals / f"fits-{measurement.digest[:16]}.jsonl",
            trajectories=trajectories,
            progress=reporter.advance,
            target=target,
        )

    def fit(schedule: Schedule) -> Any:
        evaluations = fitter().evaluations_for(schedule)
        reporter.stage(
            "fit",
            f"a solver for {schedule.budget} steps, on {samples} samples, to {finest.num_steps} steps: "
            f"{evaluations / table.num_steps:.1f} samplings' work",
        )
        return fitter()(schedule)

    return fit


def require_calibration_of(
    graph: Provenance,
    table: SamplerTable,
    profile: Profile,
    *,
    revision: str,
    latent_shape: tuple[int, ...],
    where: str,
) -> None:
    """Raise InputError unless a measurement is of this model, sampler and guidance."""
    for name, expected, got in (
        ("model revision", revision, graph.revision),
        ("sampler", table.digest, graph.sampler_digest),
        ("guidance scale", profile.sampling.guidance_scale, graph.guidance_scale),
        ("negative prompt", profile.sampling.negative_prompt, graph.negative_prompt),
        ("text length", profile.text_length, graph.text_length),
        ("latent shape", tuple(latent_shape), graph.latent_shape),
    ):
        if expected != got:
            raise InputError(
                f"{where}: expected a measurement of {name} {_short(expected)}, got {_short(got)}",
                fix="calibrate this model (leave --error-graph out)",
            )
    if not graph.is_of(table):
        raise InputError(
            f"{where}: expected a measurement of this {table.scheduler}, got one of the same settings whose "
            f"coefficients differ by more than {SAMPLER_TOLERANCE:g}",
            fix="calibrate with this release of diffusers (leave --error-graph out)",
        )


def _short(value: object) -> str:
    """Digests by their first 12 digits, everything else as it is."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
