"""Pipeline, budget, prompts → a step plan, on the pipeline that is loaded; nothing is exported or written.

Records the pipeline's own loop on some samples; measures how errors of skipped steps grow up to the result; plans the
full steps; fits the rows closed loop, all samples side by side. The method is that of `lemica-trt build --method
fitted` (`planning.planners.fitted`, `calibrate.estimate`, `calibrate.fit`); skipped steps reuse outputs, not residuals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from lemica_trt.calibrate.cost import KNOTS, sample_cost
from lemica_trt.calibrate.estimate import GAP, calibrated, piece
from lemica_trt.calibrate.fit import OUTPUTS, fit_rows, fitted_plan, targets_of
from lemica_trt.calibrate.journal import CheapMeasurement, Piece
from lemica_trt.calibrate.prompts import prompts_digest
from lemica_trt.core.errors import InputError, UnsupportedError, UsageError
from lemica_trt.core.progress import Expected, Reporter
from lemica_trt.ir.calibration import Calibration
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import DType
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.step_model import Latents
from lemica_trt.models.family import DTYPES
from lemica_trt.pipelines.applied import call_arguments, require_plain
from lemica_trt.pipelines.branches import BranchOutputs
from lemica_trt.pipelines.loop import DrivenRun, Loop, NoMiddle, RecordedSample
from lemica_trt.planning.extrapolation import linear_plan
from lemica_trt.planning.minimax import require_feasible
from lemica_trt.planning.planner import Problem, planners
from lemica_trt.planning.step_plan import assign_steps, uncached_plan

SAMPLES = 8
"""Samples of a fit, where there are not more prompts."""

ROLLOUTS = 2
"""Samples on which it is measured how much an error at a step does to the result."""

MAX_SKIP, SPREAD = 9, 3
"""K: at least the first; at least the second times N/B, so that the full steps may be that uneven."""

METHODS = ("fitted", "fitted-flat")
"""Planners whose steps are tried; the plan that ends nearest to the uncached runs is kept."""

Prompt = str | Mapping[str, Any]


def fit(
    pipe: Any,
    budget: int,
    prompts: str | Sequence[Prompt],
    *,
    samples: int | None = None,
    seed: int = 0,
    max_skip: int | None = None,
    branches: bool = True,
    reporter: Reporter | None = None,
    **call: Any,
) -> StepPlan:
    """Fit a step plan to a diffusers pipeline: B steps that end where all N of its sampler would.

        plan = lemica_trt.fit(pipe, budget=15, prompts=["a prompt", "another"], num_inference_steps=50)
        plan.save("b15.json")

    Args:
        pipe: as in `apply`; any device and dtype, compiled, quantised or offloaded.
        budget: B.
        prompts: texts, or mappings of keywords of the call (`prompt_embeds` and the like).
        samples: (prompt, seed) pairs; None: 8, or as many as there are prompts.
        seed: of sample 0; sample s has seed + s, and prompt s mod len(prompts).
        max_skip: K, the most steps that are skipped in a row; None: 9, or 3·N/B.
        branches: False: a plan that `PlanScheduler` runs by itself, the branches of the guidance not weighed apart.
        reporter: told what is done; None: the pipeline's progress bars.
        call: keywords of every call (`num_inference_steps`, `guidance_scale`, `height`, …), as they will be used.

    Returns:
        A plan named `bB`, for this sampler, N and size of the latents, and guidance scales around the one given.

    Raises:
        InputError: no prompts.
        UsageError: a budget that is not 1 … N − 1; a plan is on the pipeline.
        InfeasibleError: the budget is too small for `max_skip`.
        UnsupportedError: the sampler is not linear, or draws noise.
        VerificationError: a run is not finite.
    """
    require_plain(pipe)
    if not prompts:
        raise InputError("prompts: expected at least one, got none")
    given = _arguments(prompts)
    count = samples or max(SAMPLES, len(given))
    told = reporter or PipelineBars(pipe)
    with Loop(pipe, [given[s % len(given)] for s in range(count)], seed, call) as loop, contextlib.closing(told):
        table = loop.table()
        n, scale = table.num_steps, call_arguments(type(pipe), call).get("guidance_scale")
        if not 1 <= budget < n:
            raise UsageError(f"budget: expected 1 … {n - 1} of the {n} steps, got {budget}")
        if table.stochastic:
            raise UnsupportedError(
                f"{table.scheduler} draws noise at each step: a solver can be fitted to one path only",
                fix="set a deterministic scheduler",
            )
        skip = max(MAX_SKIP, -(-SPREAD * n // budget)) if max_skip is None else max_skip
        require_feasible(n, skip, [budget])
        fitter = _Fitter(loop, table, float(1.0 if scale is None else scale), count, told, branches=branches)
        measurement = _measurement(pipe, table, fitter.guidance_scale, given, seed, min(skip, n - 1), call)
        problem = Problem(table, fitter.guidance_scale, fitter.calibrate(measurement), fit=fitter)
        return max((planners()[name](problem, budget) for name in METHODS), key=fitter.quality)


def _arguments(prompts: str | Sequence[Prompt]) -> list[dict[str, Any]]:
    """What each prompt is to the pipeline's call."""
    several = [prompts] if isinstance(prompts, str) else prompts
    return [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in several]


class _Fitter:
    """What a problem needs to be planned for: calibrates, and fits plans to schedules (`planning.planner.Fit`)."""

    def __init__(
        self,
        loop: Loop,
        table: SamplerTable,
        guidance_scale: float,
        samples: int,
        reporter: Reporter,
        *,
        branches: bool,
    ) -> None:
        self._loop, self._table, self.guidance_scale, self._reporter = loop, table, guidance_scale, reporter
        plan = uncached_plan(table, guidance_scale=guidance_scale)
        self._done = self._total = 0
        self._samples = [RecordedSample(loop, s, plan, table, self._ran) for s in range(samples)]
        self._plans: dict[tuple[int, ...], StepPlan] = {}
        self._apart: bool | None = None if branches and guidance_scale > 1.0 else False
        self._decibels: dict[tuple[int, ...], float] = {}

    def calibrate(self, measurement: CheapMeasurement) -> Calibration:
        """Record all samples; see `calibrate.estimate`. Where the pipeline cannot begin in the middle, errors are taken
        to grow alike everywhere."""
        n, rollouts, pieces = self._table.num_steps, ROLLOUTS, list[Piece]()
        self._stage("record", sum(sample_cost(n, s < rollouts, s) for s in range(len(self._samples))))
        for s, sample in enumerate(self._samples):
            try:
                found = piece(sample, self._table, measurement, s, rolled_out=s < rollouts)[0]
            except NoMiddle as error:
                self._reporter.note(f"{error}: the sensitivity of the result to each step is not measured")
                rollouts = 0
                found = piece(sample, self._table, measurement, s, rolled_out=False)[0]
            pieces.append(found)
            sample.drop_outputs()
        made = calibrated(measurement, self._table, pieces)
        return Calibration(graph=made.graph, grams=made.grams, sensitivity=made.sensitivity)

    def __call__(self, schedule: Schedule) -> StepPlan:
        """The plan of the solver fitted for a schedule."""
        if schedule.full_steps not in self._plans:
            self._plans[schedule.full_steps] = self._fitted(schedule)
        return self._plans[schedule.full_steps]

    def quality(self, plan: StepPlan) -> float:
        """Signal-to-noise ratio of the latents at the end of the fit, mean over samples, dB."""
        return self._decibels[plan.full_steps]

    def _fitted(self, schedule: Schedule) -> StepPlan:
        start = linear_plan(schedule, self._table, guidance_scale=self.guidance_scale, name="fitted", method="fitted")
        self._stage("fit", len(self._samples) * schedule.budget)
        depths = max(start.latent_history, 1), min(max(OUTPUTS, start.output_history), schedule.budget)
        paths = [sample.path for sample in self._samples]
        with contextlib.ExitStack() as stack:
            runs, branches = [], self._loop.branches()
            stack.callback(branches.remove)
            apart = branches if self._sees(branches, start) else None
            for s in range(len(self._samples)):
                runs.append(DrivenRun(self._loop, s, start, depths, apart))
                stack.callback(runs[-1].close)
            fitted = fit_rows(start, runs, targets_of(schedule, paths), lambda row: self._ran() if row.full else None)
            ends = [run.latents[0] for run in runs]
        self._decibels[schedule.full_steps] = float(
            np.mean([decibels(end, path[-1]) for end, path in zip(ends, paths)])
        )
        return assign_steps(fitted_plan(start, fitted), schedule, self._table)

    def _sees(self, branches: BranchOutputs, start: StepPlan) -> bool:
        """Whether the branches of the guidance can be weighed apart; found out by one evaluation, once."""
        if self._apart is None:
            run = DrivenRun(self._loop, 0, start, (1, 1), branches)
            try:
                run(start.rows[0])
                self._apart = bool(run.guidance_terms[0].any())
            except UnsupportedError:
                self._apart = False
            finally:
                run.close()
        return self._apart

    def _stage(self, name: str, total: int) -> None:
        self._done, self._total = 0, total
        self._reporter.stage(name, f"{total} evaluations of the transformer")

    def _ran(self) -> None:
        self._done += 1
        self._reporter.advance(min(self._done, self._total), self._total)


class PipelineBars:
    """A reporter with the pipeline's own progress bars, as `set_progress_bar_config` has set them."""

    def __init__(self, pipe: Any) -> None:
        self._open: Callable[[float], Any] = _bar_opener(pipe)
        self._name = ""
        self._bar: Any = None

    def expect(self, stages: Expected) -> None: ...

    def stage(self, name: str, detail: str) -> None:
        self.close()
        self._name = name

    def advance(self, done: float, total: float) -> None:
        if self._bar is None:
            self._bar = self._open(total)
            self._bar.set_description(self._name)
        self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bar_opener(pipe: Any) -> Callable[[float], Any]:
    """Total → a bar with the settings that the pipeline has now, not those that it has then."""
    settings = dict(getattr(pipe, "_progress_bar_config", {}))

    def opened(total: float) -> Any:
        then = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(**settings)
        try:
            return pipe.progress_bar(total=total)
        finally:
            pipe.set_progress_bar_config(**then)

    return opened


def decibels(latents: Latents, exact: Latents) -> float:
    """10·log₁₀(‖x‖² / ‖x̂ − x‖²)."""
    error = float(np.square((latents - exact).astype(np.float64)).sum())
    return float(10 * np.log10(float(np.square(exact.astype(np.float64)).sum()) / max(error, np.finfo(float).tiny)))


def _measurement(
    pipe: Any,
    table: SamplerTable,
    guidance_scale: float,
    prompts: Sequence[Mapping[str, Any]],
    seed: int,
    max_skip: int,
    call: Mapping[str, Any],
) -> CheapMeasurement:
    dtypes: dict[torch.dtype, DType] = {dtype: name for name, dtype in DTYPES.items()}
    return CheapMeasurement(
        model=type(pipe).__name__,
        revision="",
        dtype=dtypes.get(getattr(pipe, "dtype", torch.float32), "fp32"),
        scheduler=table.scheduler,
        sampler_digest=table.digest,
        sampler_probe=table.probe,
        num_steps=table.num_steps,
        guidance_scale=guidance_scale,
        negative_prompt=str(call.get("negative_prompt") or ""),
        text_length=0,
        latent_shape=(),
        seed=seed,
        prompts_digest=prompts_digest([str(prompt.get("prompt")) for prompt in prompts]),
        versions={"diffusers": version("diffusers"), "torch": str(torch.__version__)},
        max_skip=max_skip,
        method="secant",
        knots=KNOTS,
        gap=GAP,
    )
