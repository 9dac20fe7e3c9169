"""A plan on a pipeline, and off again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.ir.graphs import kind_of_variant
from lemica_trt.pipelines.branches import BranchOutputs
from lemica_trt.pipelines.residuals import ResidualReuse, reuses_residuals
from lemica_trt.pipelines.scheduler import PlanScheduler, PlanSource, is_dynamic


class Applied:
    """What `apply` gives: a context manager, and `remove`.

    Attributes:
        pipe: the pipeline that the plan is on.
        scheduler: what it runs with; `scheduler.plan` is the plan.
    """

    def __init__(self, pipe: Any, scheduler: PlanScheduler) -> None:
        self.pipe, self.scheduler = pipe, scheduler
        self._before = pipe.scheduler
        self._kind = type(pipe)
        self._hooks: list[ResidualReuse | BranchOutputs] = []
        if reuses_residuals(scheduler.plan):
            transformer = getattr(pipe, "transformer", None)
            self._hooks.append(ResidualReuse(self._kind.__name__, transformer, scheduler))
        if scheduler.plan.guidance_history:
            branches = BranchOutputs(pipe)
            scheduler.see_branches(branches)
            self._hooks.append(branches)
        pipe.scheduler = scheduler
        pipe.__class__ = _with_plan(self._kind, scheduler)
        self._is_on = True

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        plan = self.scheduler.plan
        state = "on" if self._is_on else "removed from"
        return f"<plan {plan.name} ({plan.budget} of {plan.num_steps} steps) {state} {self._kind.__name__}>"

    def remove(self) -> None:
        """Give the pipeline its own scheduler and class back. May be called twice."""
        if self._is_on:
            self._is_on = False
            self.pipe.__class__ = self._kind
            self.pipe.scheduler = self._before
            for hooks in self._hooks:
                hooks.remove()


def apply(pipe: Any, plan: PlanSource, *, name: str | None = None) -> Applied:
    """Run a diffusers pipeline by a plan.

        with lemica_trt.apply(pipe, "b15.json"):
            pipe("a prompt")

    The pipeline is called as before: with the plan's N steps, or with none given. B of them run. Weights, compiled
    modules, LoRA and offload hooks are not touched. One thread at a time, as for any pipeline.

    Args:
        pipe: a diffusers pipeline whose loop calls `scheduler.step` once a step.
        plan: a plan, a plan's JSON file, a bundle or its folder.
        name: of a plan in a bundle; None: the default one.

    Raises:
        UsageError: a plan is on the pipeline already; the bundle has no such plan.
        InputError: not a plan. When the pipeline is called: its sampler or guidance is not the plan's.
        UnsupportedError: the plan is of a model of several experts; or it reuses residuals, and the trunk of this
            pipeline is not known. When the pipeline is called: the plan weighs the branches of the guidance apart, and
            they are not to be seen.
    """
    require_plain(pipe)
    scheduler = PlanScheduler.from_plan(plan, name=name, scheduler=pipe.scheduler)
    if any(kind_of_variant(row.variant) for row in scheduler.plan.rows if row.variant):
        raise UnsupportedError(
            f"plan {scheduler.plan.name} is of a model of several experts, which runs from a bundle alone",
            fix="lemica_trt.load(BUNDLE)",
        )
    return Applied(pipe, scheduler)


def require_plain(pipe: Any) -> None:
    """Raise UsageError unless a pipeline has a scheduler, and one of its own."""
    scheduler = getattr(pipe, "scheduler", None)
    if isinstance(scheduler, PlanScheduler):
        raise UsageError(
            f"plan {scheduler.plan.name} is on this pipeline already", fix="leave its with block, or remove() it"
        )
    if scheduler is None or not callable(pipe):
        raise UsageError(f"expected a diffusers pipeline with a scheduler, got {type(pipe).__name__}")


def call_arguments(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a call of a pipeline has by these keywords, and by the defaults of its signature."""
    parameters = inspect.signature(kind.__call__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults | dict(arguments)


def _with_plan(kind: Any, scheduler: PlanScheduler) -> Any:
    """A subclass by the same name that asks for the plan's steps, and refuses what the plan does not hold for.

    `pipe(…)` looks `__call__` up in the class: nothing else can stand before it.
    """
    plan = scheduler.plan

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(kind.__call__).bind(self, *args, **kwargs)
        given = call_arguments(kind, bound.arguments)
        if "num_inference_steps" in given and given.get("timesteps") is None and given.get("sigmas") is None:
            asked = bound.arguments.get("num_inference_steps")
            bound.arguments["num_inference_steps"] = scheduler.steps_to_ask if asked is None else asked
        if given.get("guidance_scale") is not None:
            plan.require_guidance(float(given["guidance_scale"]))
        if bool(given.get("use_dynamic_cfg")) != is_dynamic(plan.rows):
            raise UsageError(
                f"plan {plan.name} was made {'with' if is_dynamic(plan.rows) else 'without'} use_dynamic_cfg",
                fix=f"use_dynamic_cfg={is_dynamic(plan.rows)}",
            )
        return kind.__call__(*bound.args, **bound.kwargs)

    def progress_bar(self: Any, iterable: Any = None, total: int | None = None) -> Any:
        return kind.progress_bar(self, iterable, len(scheduler.timesteps) if total == scheduler.steps_to_ask else total)

    names = {"__call__": call, "progress_bar": progress_bar, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names)
