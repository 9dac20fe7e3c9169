"""The static step plan: what the runtime does, row by row, with every decision already taken.

A plan is a sampler table whose rows also say *how the DiT runs*:

    row                       latents x_i                    model output m_i
    ------------------------  -----------------------------  ----------------------------------------------------
    variant, no caches        combination (see `sampler`)    the whole DiT; fills the cache slots that it writes
    variant, with caches      combination                    the variant, Σ_k weights[k]·(slot of the k-th last row that
                                                             wrote it) in place of what it does not compute
    no variant                combination                    Σ_k reuse[k]·m_{i−1−k}; in the last row nothing at all

LeMiCa (arXiv 2511.00090) reads the last trunk residual as it is: one slot, weights (1.0,).
Where the two branches of the guidance are weighed apart, the combination has a third sum, Σ_k guidance_terms[k]·
e_{i−1−k}, of the guidance terms e_i = m_i − c_i = (g_i − 1)·(c_i − u_i): what guidance adds to the conditional output.
In this form one weight stands for all guidance scales. A row without a variant weighs them by `reuse`, as m.
Histories count *rows*, that of the noise counts *draws*: where skipped steps are folded into the coefficients of the
next row (see `fold`), a plan has fewer rows than the sampler has steps, a row may draw several times, and the runtime
does not notice. Each step's noise is drawn in the same order, so that one seed means one video however it is run.

Knows values only: nothing of torch, engines, or how a plan is found.
"""

from __future__ import annotations

import hashlib
import html
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import InputError
from lemica_trt.core.values import Value, json_bytes, require, require_finite, write_value
from lemica_trt.ir.graphs import (
    COMBINE,
    DEFAULT_EXPERT,
    GraphSet,
    StepLayout,
    TensorSpec,
    kind_of_variant,
    step_layout,
    trunk_name,
)
from lemica_trt.ir.timeline import plan_line, timeline_svg, timeline_text

DEFAULT = "default"
"""What a request may say for the default plan; no plan is called so."""

UNCACHED = "uncached"
"""Name, and method, of the plan that runs every step in full; every bundle has it: others are measured against it."""

PLAN_FORMAT = 4


GUIDANCE_RANGE = (0.5, 1.75)
"""Guidance scales, in that of the runs that a plan was made from, which a request may have (docs/calibration.md)."""

FITTED_GUIDANCE_RANGE = (0.5, 1.25)
"""The same for solvers that were fitted at one scale: they fall fast above it (docs/calibration.md)."""


class CacheRead(Value, frozen=True):
    """What a row reads from a cache slot: `weights[k]` of what the k-th last row that wrote the slot left there."""

    slot: str
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        require(bool(self.weights), f"cache slot {self.slot} is read without weights")
        require_finite(self.weights, f"weights of cache slot {self.slot}")


def trunk_reads(*weights: float, kind: int = 0) -> tuple[CacheRead, ...]:
    """The `caches` of a row that reads the last trunk residuals of its kind with these weights, and nothing else."""
    return (CacheRead(slot=trunk_name(kind), weights=weights),)


class PlanRow(Value, frozen=True, omit_defaults=True):
    """One row; `latents`, `outputs`, `timestep`, `in_scale`, `guidance` as in `SamplerRow`.

    Attributes:
        variant: name of the layout's variant that runs on the combined latents; None: the DiT does not run.
        step: the denoising step, 0 … N, that the row stands for (N: the result).
        draws: how often fresh noise is drawn before the row.
        noise: coefficient of the k-th last draw at index k, this row's draws being the last.
        caches: what is read from cache slots; empty where everything is computed.
        guidance_terms: coefficient of the guidance term of m_{i−1−k} at index k.
        reuse: coefficient of m_{i−1−k} in rows without a variant; empty in the last row.
    """

    step: int
    latents: tuple[float, ...]
    variant: str | None = None
    outputs: tuple[float, ...] = ()
    draws: int = 0
    noise: tuple[float, ...] = ()
    timestep: float | None = None
    in_scale: float = 1.0
    guidance: tuple[float, float] = (0.0, 1.0)
    caches: tuple[CacheRead, ...] = ()
    reuse: tuple[float, ...] = ()
    guidance_terms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("latents", "outputs", "noise", "reuse", "guidance", "guidance_terms"):
            require_finite(getattr(self, name), name)
        require_finite((self.in_scale, self.timestep or 0.0), "in_scale, timestep")
        require(self.draws >= 0, f"step {self.step}: draws must not be negative, got {self.draws}")
        runs = self.variant is not None
        require(runs or not self.caches, f"step {self.step}: caches belong to rows with a variant")
        require(not (runs and self.reuse), f"step {self.step}: reuse belongs to rows without a variant")
        require(not runs or self.timestep is not None, f"step {self.step}: variant {self.variant} needs a timestep")
        slots = [read.slot for read in self.caches]
        require(len(set(slots)) == len(slots), f"step {self.step}: a cache slot is read twice")

    @property
    def full(self) -> bool:
        """Whether the row runs the DiT and computes everything."""
        return self.variant is not None and not self.caches

    @property
    def cached(self) -> bool:
        """Whether the row runs the DiT and reads caches."""
        return self.variant is not None and bool(self.caches)

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the noise that the row adds, with the sign of the newest draw's coefficient."""
        return math.copysign(math.hypot(*self.noise), self.noise[0]) if self.noise else 0.0

    @property
    def noise_weights(self) -> tuple[float, ...]:
        """Weights that mix the draws into one standard normal z, `noise_scale`·z being the noise added."""
        scale = self.noise_scale
        return tuple(c / scale for c in self.noise) if scale else ()


class StepPlan(Value, frozen=True):
    """A plan for one request: rows, and what they were made from.

    Attributes:
        name: what a request asks for (`default`, `fast`, …).
        num_steps: N, the sampler's number of steps.
        guidance_scale: default guidance scale g of a request.
        rows: see the module docstring; the last one has step N and gives the result.
        scheduler: diffusers scheduler class of the N-step sampler that the plan stands in for.
        sampler_digest: digest of that sampler's `SamplerTable`.
        method: name of the planner that made it (`lemica`, `fitted`, `stock:unipc`, …; see `planning.planners`);
            `given` of the user's own steps, `uncached` where nothing is skipped.
        error_graph_digest: digest of the `ErrorGraph` that it was made from; None where none was used.
        reference_steps: M > N, where the plan is compared with the sampler at M steps: what it was fitted to and
            chosen by. None: with the N steps.
        guidance_range: lowest and highest guidance scale of a request; None: any.
        format_version: 4.
    """

    name: str
    num_steps: int
    guidance_scale: float
    rows: tuple[PlanRow, ...]
    scheduler: str
    sampler_digest: str
    method: str
    error_graph_digest: str | None = None
    reference_steps: int | None = None
    guidance_range: tuple[float, float] | None = None
    format_version: int = PLAN_FORMAT

    def __post_init__(self) -> None:
        require(self.format_version == PLAN_FORMAT, f"format_version must be {PLAN_FORMAT}, got {self.format_version}")
        require(
            self.name.replace("-", "").replace("_", "").isalnum(),
            f"name must be letters, digits, - and _, got {self.name!r}",
        )
        require_finite((self.guidance_scale, *(self.guidance_range or ())), "guidance_scale, guidance_range")
        low, high = self.guidance_range or (self.guidance_scale, self.guidance_scale)
        require(
            low <= self.guidance_scale <= high,
            f"guidance_range must hold guidance_scale {self.guidance_scale:g}, is {low:g} … {high:g}",
        )
        require(len(self.rows) >= 2, f"a plan needs at least 2 rows, got {len(self.rows)}")
        previous, full, draws = -1, 0, 0
        for i, row in enumerate(self.rows):
            where = f"rows[{i}]"
            last = i == len(self.rows) - 1
            require(
                previous < row.step <= self.num_steps,
                f"{where}.step must rise from 0 to {self.num_steps}, got {row.step} after {previous}",
            )
            require(
                1 <= len(row.latents) <= i + 1 or (not row.latents and i > 0),
                f"{where}.latents: {len(row.latents)} given, {i + 1} exist there",
            )
            for name in ("outputs", "guidance_terms", "reuse"):
                given = len(getattr(row, name))
                require(given <= i, f"{where}.{name}: {given} given, {i} exist there")
            for read in row.caches:
                given = len(read.weights)
                require(given <= full, f"{where}: reads {read.slot} {given} full rows back, {full} are before it")
            draws += row.draws
            require(len(row.noise) <= draws, f"{where}.noise: {len(row.noise)} given, {draws} draws until there")
            require(
                (row.step == self.num_steps) == last, f"{where}: the last row, and only it, has step {self.num_steps}"
            )
            require(not last or (row.variant is None and not row.reuse), f"{where}: the last row only combines")
            require(last or row.variant is not None or bool(row.reuse), f"{where}: a row without a variant needs reuse")
            previous, full = row.step, full + row.full
        require(self.rows[0].full, "rows[0] must compute everything: there is nothing to reuse yet")

    def __repr__(self) -> str:
        return f"<StepPlan {plan_line(self)}: {timeline_text(self, 100)}>"

    def _repr_html_(self) -> str:
        return f"<div>{html.escape(plan_line(self))}<br>{timeline_svg(self)}</div>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON: what `lemica_trt.apply` and `PlanScheduler.from_plan` read."""
        write_value(self, path)

    @property
    def rows_digest(self) -> str:
        """SHA-256 (hex) of the rows: what is computed, by whatever name."""
        return hashlib.sha256(json_bytes(self.rows)).hexdigest()

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The denoising steps that run the whole DiT."""
        return tuple(row.step for row in self.rows if row.full)

    @property
    def budget(self) -> int:
        """B, the number of full steps."""
        return len(self.full_steps)

    def require_guidance(self, scale: float) -> None:
        """Raise InputError unless the plan holds for a request's guidance scale."""
        if self.guidance_range is not None and not self.guidance_range[0] <= scale <= self.guidance_range[1]:
            low, high = self.guidance_range
            raise InputError(
                f"plan {self.name} holds for guidance_scale {low:g} … {high:g}, got {scale:g}",
                fix=f"use the plan that skips nothing, or build with --guidance-scale {scale:g}, or --guidance-range",
            )

    @property
    def latent_history(self) -> int:
        return max(len(row.latents) for row in self.rows)

    @property
    def output_history(self) -> int:
        return max(max(len(row.outputs), len(row.reuse), len(row.guidance_terms)) for row in self.rows)

    @property
    def guidance_history(self) -> int:
        """How many rows back guidance terms are read; those of rows that reuse outputs are mixed of their terms."""
        weighed = any(row.guidance_terms for row in self.rows)
        return max(max(len(row.guidance_terms), len(row.reuse)) for row in self.rows) if weighed else 0

    @property
    def cache_depths(self) -> dict[str, int]:
        """Cache slot → how many rows back it is read at most."""
        depths: dict[str, int] = {}
        for read in (read for row in self.rows for read in row.caches):
            depths[read.slot] = max(depths.get(read.slot, 0), len(read.weights))
        return depths

    @property
    def noise_history(self) -> int:
        return max(len(row.noise) for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise is drawn."""
        return any(row.draws for row in self.rows)


def guidance_range(guidance_scale: float, *, fitted: bool = False) -> tuple[float, float] | None:
    """Where a plan holds that was made from runs at this guidance scale; None: they were not guided, there is none.

    Args:
        fitted: whether the runs were what its weights were fitted to.
    """
    if guidance_scale <= 1.0:
        return None
    low, high = FITTED_GUIDANCE_RANGE if fitted else GUIDANCE_RANGE
    return low * guidance_scale, high * guidance_scale


def layout_from_plans(
    plans: Sequence[StepPlan],
    *,
    latent_shape: tuple[int, ...],
    guided: bool,
    conditions: tuple[TensorSpec, ...] = (),
    experts: Sequence[str] = (),
) -> StepLayout:
    """The smallest step layout that can run these plans; histories at least 1 deep.

    Where no plan reads trunk residuals, none are given away, and there is no variant that reads them.

    Args:
        plans: at least one.
        latent_shape: shape of the latents of one sample, without batch.
        guided: whether each request runs two branches.
        conditions: see `StepLayout`; empty where only the rows are of interest.
        experts: for each kind of steps the component that it runs; empty where only the rows are of interest.
    """
    variants = {row.variant for plan in plans for row in plan.rows if row.variant is not None}
    kinds = 1 + max(map(kind_of_variant, variants))
    return step_layout(
        latent_shape=latent_shape,
        latent_history=max(1, *(plan.latent_history for plan in plans)),
        output_history=max(1, *(plan.output_history for plan in plans)),
        conditions=conditions,
        trunk_depth=max(depth for plan in plans for depth in (0, *plan.cache_depths.values())),
        stochastic=any(plan.stochastic for plan in plans),
        guided=guided,
        guidance_history=max(plan.guidance_history for plan in plans),
        experts=[*experts, *[DEFAULT_EXPERT] * (kinds - len(experts))],
    )


def coefficient_vector(row: PlanRow, layout: StepLayout) -> npt.NDArray[np.float32]:
    """The row's `coefficients` input for every step graph, zero-padded to the layout's histories.

    The graphs take one noise, the row's draws mixed by `noise_weights`; its coefficient is `noise_scale`.

    Returns:
        float32 [C]; see `StepLayout.offsets`.

    Raises:
        ValueError: the row reads further back than the layout's graphs can, or draws noise they do not take.
    """
    values = {
        "latents": row.latents,
        "outputs": row.outputs,
        "guidance_terms": row.guidance_terms,
        "noise": (row.noise_scale,),
        "in_scale": (row.in_scale,),
        "timestep": (0.0 if row.timestep is None else row.timestep,),
        "reuse": row.reuse,
        **{read.slot: read.weights for read in row.caches},
    }
    offsets = layout.offsets
    unknown = sorted(set(values) - set(offsets))
    require(not unknown, f"step {row.step} reads cache slots that the graphs do not have: {', '.join(unknown)}")
    vector = np.zeros(max(part.stop for part in offsets.values()), np.float32)
    for name, numbers in values.items():
        part = offsets[name]
        require(
            len(numbers) <= part.stop - part.start,
            f"step {row.step}: {len(numbers)} {name} coefficients, the graphs take {part.stop - part.start}",
        )
        vector[part.start : part.start + len(numbers)] = numbers
    require(layout.stochastic or not row.noise, f"step {row.step} draws noise, the graphs take none")
    return vector


def check_plan(plan: StepPlan, graphs: GraphSet) -> None:
    """Raise InputError unless these graphs can run the plan: their histories are deep enough and none is missing."""
    roles = {graph.role for graph in graphs.graphs}
    needed = {COMBINE} | {row.variant for row in plan.rows if row.variant is not None}
    if not needed <= roles:
        raise InputError(
            f"plan {plan.name} needs the graphs {', '.join(sorted(needed))}, the bundle has {', '.join(sorted(roles))}",
            fix="rebuild the bundle for this plan",
        )
    written: Counter[str] = Counter()
    try:
        for row in plan.rows:
            coefficient_vector(row, graphs.layout)
            if row.variant is not None:
                variant = graphs.layout.variant(row.variant)
                asked = tuple(read.slot for read in row.caches)
                require(
                    sorted(asked) == sorted(variant.reads),
                    f"step {row.step}: {row.variant} reads {variant.reads or 'no cache'}, the row gives weights of "
                    f"{asked}",
                )
                for read in row.caches:
                    require(
                        len(read.weights) <= written[read.slot],
                        f"step {row.step} reads {read.slot} {len(read.weights)} rows back, {written[read.slot]} before "
                        "it write that",
                    )
                written.update(variant.writes)
    except (KeyError, ValueError) as error:
        raise InputError(f"plan {plan.name}: {error}", fix="rebuild the bundle for this plan") from None


def uncached_of(plans: Iterable[StepPlan]) -> StepPlan | None:
    """The uncached plan among some: the one of that name, or else one of all steps in full; None: there is none."""
    known = {plan.name: plan for plan in plans}
    whole = (plan for plan in known.values() if plan.budget == plan.num_steps)
    return known[UNCACHED] if UNCACHED in known else next(whole, None)
