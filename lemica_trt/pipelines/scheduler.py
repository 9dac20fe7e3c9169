"""A step plan as a diffusers scheduler: a pipeline whose loop is `for t in timesteps: … scheduler.step(…)` runs it.

Its timesteps are those of the rows that run the transformer; `step` computes the next row's combination of the latents
and outputs so far (`ir.plan`). The pipeline's own scheduler stays inside: it is set as the pipeline asks (sigmas, mu),
and must come to the timesteps that the plan was made for.
"""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from lemica_trt.bundle.manifest import SAMPLER_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError, UnsupportedError, UsageError
from lemica_trt.core.values import read_value, value_from_json
from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.sampler import SAMPLER_TOLERANCE, SamplerTable, probes_agree
from lemica_trt.ir.timeline import plan_line
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.pipelines.branches import BranchOutputs
from lemica_trt.planning.fold import fold

PLAN_KEY, SAMPLER_KEY = "lemica_plan", "lemica_sampler"
"""Keys of the scheduler's config: the plan, and the class name of the pipeline's own scheduler."""

PlanSource = StepPlan | Bundle | str | os.PathLike[str]


def plan_from_source(source: PlanSource, name: str | None = None) -> tuple[StepPlan, SamplerTable | None]:
    """The plan that is meant, and its sampler where the source has it.

    Args:
        source: a plan, a plan's JSON file, a bundle or its folder.
        name: of a plan in a bundle; None: the default one.

    Raises:
        InputError: not a plan or bundle.
        UsageError: the bundle has no such plan; or a name without a bundle.
    """
    if isinstance(source, (str, os.PathLike)):
        source = Bundle.open(source) if Path(source).is_dir() else read_value(StepPlan, source)
    if isinstance(source, Bundle):
        table = value_from_json(SamplerTable, source.read_bytes(SAMPLER_FILE), where=SAMPLER_FILE)
        return source.plan(name), table
    if name is not None and name != source.name:
        raise UsageError(f"expected a bundle to take plan {name!r} from, got plan {source.name!r}")
    return source, None


class History:
    """Latents, outputs, guidance terms and draws of the rows of one request, newest first, fp32, on the device of the
    latents.

    Args:
        depths: of latents, of outputs and guidance terms, of draws.
    """

    def __init__(self, depths: tuple[int, int, int]) -> None:
        self._depths = depths
        self.latents: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.guidance_terms: list[Tensor] = []
        self.draws: list[Tensor] = []

    def push(
        self,
        latents: Tensor | None = None,
        output: Tensor | None = None,
        draw: Tensor | None = None,
        guidance_term: Tensor | None = None,
    ) -> None:
        """Put what is given in front, and let the oldest go."""
        kept = (self.latents, self.outputs, self.draws, self.guidance_terms)
        for history, new, depth in zip(kept, (latents, output, draw, guidance_term), (*self._depths, self._depths[1])):
            if new is not None:
                history.insert(0, new.float())
                del history[depth:]


def combination(
    row: PlanRow,
    latents: Sequence[Tensor],
    outputs: Sequence[Tensor],
    draws: Sequence[Tensor] = (),
    guidance_terms: Sequence[Tensor] = (),
) -> Tensor:
    """x of a row from what is behind it, each newest first."""
    terms = [*zip(row.latents, latents), *zip(row.outputs, outputs), *zip(row.noise, draws)]
    terms += zip(row.guidance_terms, guidance_terms)
    return sum((weight * tensor for weight, tensor in terms), torch.zeros_like(latents[0]))


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A step plan as a diffusers scheduler, for one request at a time.

        pipe.scheduler = PlanScheduler.from_plan("b15.json", scheduler=pipe.scheduler)
        pipe("a prompt", num_inference_steps=50)  # the plan's N steps are asked for, its B full steps run

    Its config is that of the pipeline's own scheduler, and the plan: `save_pretrained` and `from_pretrained` keep both.

    Args:
        plan: see `StepPlan`.
        scheduler: the pipeline's own; it is copied. None: the plan's sampler is believed to be the pipeline's.
        table: the plan's sampler, compared by its numbers where it is known.

    Attributes:
        plan: as given.
        timesteps: those of the rows that run the transformer.
        sigmas: theirs in the pipeline's own scheduler, and the last; without one timestep/1000, as in flow matching.
    """

    order = 1

    def __init__(self, plan: StepPlan, scheduler: Any = None, table: SamplerTable | None = None) -> None:
        self.plan = plan
        self._folded = fold(plan)
        self._rows = self._folded.rows  # each runs the transformer, except the last
        self._own, self._table, self._checked = copy.deepcopy(scheduler), table, False
        self._branches: BranchOutputs | None = None
        config = {} if scheduler is None else {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        name = None if scheduler is None else type(scheduler).__name__
        self.register_to_config(**config, **{PLAN_KEY: msgspec.to_builtins(plan), SAMPLER_KEY: name})
        self.init_noise_sigma = self._rows[0].latents[0]
        self.timesteps, self.sigmas = self._loop_values(self._rows[:-1], None)
        self.num_inference_steps: int | None = None
        self.requests = 0
        self._returned: Tensor | None = None
        self._history = self._begin()

    @classmethod
    def from_plan(cls, plan: PlanSource, *, name: str | None = None, scheduler: Any = None) -> PlanScheduler:
        """The scheduler of a plan; see `plan_from_source` and the class."""
        found, table = plan_from_source(plan, name)
        return cls(found, scheduler, table)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler with this config, as diffusers' `from_pretrained` needs it."""
        if not isinstance(config, Mapping) or PLAN_KEY not in config:
            raise InputError(
                "expected the config of a PlanScheduler, got another one", fix="use PlanScheduler.from_plan"
            )
        try:
            plan = msgspec.convert(config[PLAN_KEY], StepPlan)
        except msgspec.ValidationError as error:
            raise InputError(f"{PLAN_KEY}: expected a valid StepPlan, got: {error}") from None
        own: Any = None
        kind = getattr(diffusers, config.get(SAMPLER_KEY) or "", None)
        if inspect.isclass(kind) and hasattr(kind, "from_config"):
            own = kind.from_config({k: v for k, v in config.items() if k not in (PLAN_KEY, SAMPLER_KEY)})
        found = cls(plan, own)
        return (found, kwargs) if return_unused_kwargs else found

    def __repr__(self) -> str:
        return f"<PlanScheduler {plan_line(self.plan)}>"

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))

    def see_branches(self, branches: BranchOutputs) -> None:
        """Take guidance terms from a pipeline's hooks; plans that weigh them cannot run without."""
        self._branches = branches

    @property
    def steps_to_ask(self) -> int:
        """What a call gives as `num_inference_steps`: N, or less where a step of the own scheduler is several calls."""
        order = getattr(self._own, "order", 1)
        return (self.plan.num_steps + order - 1) // order

    @property
    def position(self) -> tuple[int, int]:
        """Number of the request, and of the row that runs."""
        return self.requests, self._row

    @property
    def row(self) -> PlanRow:
        """The row that runs."""
        return self._rows[self._row]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Begin a request.

        Args:
            num_inference_steps: `steps_to_ask`.
            device: of `timesteps`.
            timesteps, sigmas, mu, kwargs: for the pipeline's own scheduler.

        Raises:
            UsageError: another number of steps.
            InputError: the pipeline's sampler is not the plan's.
            UnsupportedError: it cannot be compared, since it is not linear.
        """
        steps, own = num_inference_steps, self._own
        if own is not None:
            given = {"num_inference_steps": steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu} | kwargs
            own = copy.deepcopy(own)
            own.set_timesteps(**{name: value for name, value in given.items() if value is not None})
            steps = len(own.timesteps)
        elif steps is None and (timesteps is not None or sigmas is not None):
            steps = len(sigmas if timesteps is None else timesteps)
        if steps != self.plan.num_steps:
            raise UsageError(
                f"plan {self.plan.name} stands in for {self.plan.num_steps} steps, got {steps}",
                fix=f"num_inference_steps={self.steps_to_ask}: {self.plan.budget} of the steps run in full",
            )
        if own is not None:
            self._check(own)
        found = self._loop_values(self._rows[:-1], own)
        self.timesteps, self.sigmas = found[0].to(device), found[1]
        self.num_inference_steps = steps
        self.requests += 1
        self._history = self._begin()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Plans begin at the beginning.

        Raises:
            UnsupportedError: another index.
        """
        if begin_index:
            raise UnsupportedError(
                f"a plan begins at step 0, got {begin_index}", fix="use it where the loop begins with pure noise"
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the transformer gets for the latents."""
        scale = self.row.in_scale
        return sample if scale == 1.0 else sample * scale

    def add_noise(self, *args: Any, **kwargs: Any) -> Any:
        """Of loops that begin with noise on something else.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a plan begins with pure noise", fix="use the pipeline's own scheduler here")

    scale_noise = add_noise

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The latents of the next row.

        Args:
            model_output: guided, as the pipeline gives it to any scheduler; any float type.
            timestep: of the row that ran.
            sample: its latents. Where they are what the last step returned, their fp32 values are used.
            eta: 0.
            generator: of the noise, for plans that draw any.

        Returns:
            `prev_sample`, in the dtype of `sample`.

        Raises:
            UsageError: no `set_timesteps` before; another thread's request is under way; eta is not 0.
            UnsupportedError: the loop is at another timestep than the plan.
        """
        self._check_step(timestep, eta)
        history = self._history
        if self._row == 0 and not history.latents:
            history.push(sample.float() / self.init_noise_sigma)
        if sample is not self._returned:  # else the fp32 latents are there
            if self._row and self._returned is not None:
                del history.latents[0]
            history.push(sample)
        term = self._branches.guidance_term(model_output) if self._branches is not None else None
        history.push(output=model_output, guidance_term=term)
        row = self._next_row()
        for _ in range(row.draws):
            history.push(draw=randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype))
        latents = combination(row, history.latents, history.outputs, history.draws, history.guidance_terms)
        history.push(latents)
        self._row += 1
        self._returned = latents.to(sample.dtype)
        return SchedulerOutput(prev_sample=self._returned) if return_dict else (self._returned,)

    def _next_row(self) -> PlanRow:
        """The row behind the one that ran."""
        return self._rows[self._row + 1]

    def _begin(self) -> History:
        """The history of a new request."""
        plan = self._folded
        if self._branches is not None:
            self._branches.clear()
        self._row, self._returned, self._thread = 0, None, threading.get_ident()
        return History((max(plan.latent_history, 1), max(plan.output_history, 1), max(plan.noise_history, 1)))

    def _check_step(self, timestep: Any, eta: float) -> None:
        if self.num_inference_steps is None or self._row >= len(self.timesteps):
            raise UsageError("PlanScheduler: expected set_timesteps before each request", fix="call it")
        if self.plan.guidance_history and self._branches is None:
            raise UsageError(
                f"plan {self.plan.name} weighs the branches of the guidance apart, which a scheduler does not see",
                fix="lemica_trt.apply(pipe, plan) puts it on the pipeline",
            )
        if self._thread != threading.get_ident():
            raise UsageError(
                "PlanScheduler: another thread's request is under way",
                fix="give each thread a pipeline of its own: type(pipe)(**pipe.components)",
            )
        if eta:
            raise UsageError(f"plan {self.plan.name} was made for eta 0, got {eta}", fix="leave eta out")
        expected, given = self.timesteps[self._row], torch.as_tensor(timestep).flatten()
        # The same storage is the same number; to look into it would wait for the device.
        if given.data_ptr() != expected.data_ptr() and float(given[0]) != float(expected):
            raise UnsupportedError(
                f"the plan is at timestep {float(expected):g}, the loop at {float(given[0]):g}",
                fix="use it where the loop begins with pure noise, and calls step once a timestep",
            )

    def _check(self, own: Any) -> None:
        """Raise InputError unless the pipeline's scheduler, its timesteps set, is the plan's sampler."""
        plan, fix = self.plan, "load the scheduler that the plan was made for, or fit a plan: lemica_trt.fit"
        if not self._checked:
            if hasattr(own, "set_begin_index"):
                own.set_begin_index(0)
            table = sampler_table(own, dynamic_guidance=is_dynamic(plan.rows))
            if table.digest != plan.sampler_digest:
                changed = ", ".join(f"{name}={value}" for name, value in table.settings.items()) or "all defaults"
                raise InputError(
                    f"plan {plan.name} is for {plan.scheduler} with {plan.num_steps} steps and settings of its own, "
                    f"the pipeline has {table.scheduler} ({changed})",
                    fix=fix,
                )
            if self._table is not None and not probes_agree(self._table.probe, table.probe):
                raise InputError(f"plan {plan.name}: the coefficients of the pipeline's sampler are others", fix=fix)
            self._checked = True
        there = [float(t) for t in own.timesteps]
        apart = SAMPLER_TOLERANCE * max(map(abs, there))
        if plan.reference_steps is not None:  # rows stand at the nearest steps of a finer grid
            apart = max(abs(a - b) for a, b in pairwise(there))
        for row in plan.rows:
            if row.timestep is not None and row.variant and abs(row.timestep - there[row.step]) > apart:
                raise InputError(
                    f"plan {plan.name} has timestep {row.timestep:g} at step {row.step}, the pipeline's sampler "
                    f"{there[row.step]:g}: another shift, or another size of the latents",
                    fix="fit a plan for this size: lemica_trt.fit",
                )

    @staticmethod
    def _loop_values(rows: Sequence[PlanRow], own: Any) -> tuple[Tensor, Tensor]:
        """Timesteps and sigmas of the loop, in the dtypes of the pipeline's own scheduler."""
        values = [row.timestep for row in rows]
        timesteps = torch.tensor(values, dtype=torch.float64)
        kind = torch.float32 if own is None else own.timesteps.dtype
        whole = bool((timesteps == timesteps.round()).all())
        timesteps = timesteps.to(kind if kind.is_floating_point or whole else torch.float32)
        sigmas = None if own is None else getattr(own, "sigmas", None)
        if isinstance(sigmas, Tensor) and sigmas.ndim == 1 and own is not None and len(sigmas) > len(own.timesteps):
            return timesteps, sigmas[[*(row.step for row in rows), len(own.timesteps)]]
        return timesteps, torch.cat([timesteps.float() / 1000, torch.zeros(1)])


def is_dynamic(rows: Sequence[PlanRow]) -> bool:
    """Whether the rows are for CogVideoX's `use_dynamic_cfg`."""
    return any(row.guidance != (0.0, 1.0) for row in rows)
