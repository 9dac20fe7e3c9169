"""The static step plan: what the runtime does, row by row, with every decision already taken.

A plan is a sampler table whose rows also say *which graph runs* and with which reuse coefficients:

    graph   latents x_i                    model output m_i
    ------  -----------------------------  ------------------------------------------------------------
    full    combination (see `sampler`)    the whole DiT; its trunk residual r joins the residual history
    skip    combination                    head(embed(x_i, t_i) + Σ_k residuals[k]·r_{f_k})
    none    combination                    Σ_k reuse[k]·m_{i−1−k}; in the last row nothing at all

f_k is the k-th last full row. LeMiCa (arXiv 2511.00090) reuses one residual as it is: residuals = (1.0,).
Histories count *rows*: where skipped steps are folded into the coefficients of the next row, a plan has fewer
rows than the sampler has steps, and the runtime does not notice.

Knows values only: nothing of torch, engines, or how a plan is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from lemica_trt.sampler import SamplerTable
from lemica_trt.schedule import Schedule
from lemica_trt.spec import StepLayout
from lemica_trt.values import Value, require, require_finite

FORMAT_VERSION = 1

Graph = Literal["full", "skip", "none"]


class PlanRow(Value, frozen=True):
    """One row; `latents`, `outputs`, `noise`, `timestep`, `in_scale`, `guidance` as in `SamplerRow`.

    Attributes:
        graph: which step graph runs on the combined latents.
        step: the denoising step, 0 … N, that the row stands for (N: the result).
        residuals: full and none: empty; skip: coefficient of the k-th last full row's residual.
        reuse: none: coefficient of m_{i−1−k}, empty in the last row; full and skip: empty.
    """

    graph: Graph
    step: int
    latents: tuple[float, ...]
    outputs: tuple[float, ...] = ()
    noise: float = 0.0
    timestep: float | None = None
    in_scale: float = 1.0
    guidance: tuple[float, float] = (0.0, 1.0)
    residuals: tuple[float, ...] = ()
    reuse: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("latents", "outputs", "residuals", "reuse", "guidance"):
            require_finite(getattr(self, name), name)
        require_finite((self.noise, self.in_scale, self.timestep or 0.0), "noise, in_scale, timestep")
        require(bool(self.residuals) == (self.graph == "skip"), f"step {self.step}: residuals belong to skip rows")
        require(not self.reuse or self.graph == "none", f"step {self.step}: reuse belongs to rows without a graph")
        require(self.graph == "none" or self.timestep is not None, f"step {self.step}: {self.graph} needs a timestep")


class StepPlan(Value, frozen=True):
    """A plan for one request: rows, and what they were made from.

    Attributes:
        name: what a request asks for (`default`, `fast`, …).
        num_steps: N, the sampler's number of steps.
        guidance_scale: default guidance scale g of a request.
        rows: see the module docstring; the last one has step N and gives the result.
        scheduler: diffusers scheduler class that the rows were lowered from.
        sampler_digest: digest of the `SamplerTable`.
        method: how the full steps were chosen (`lemica`, `uniform`, `least-sum`, `given`, `none`).
        error_graph_digest: digest of the `ErrorGraph` behind it; None where none was used.
        format_version: 1.
    """

    name: str
    num_steps: int
    guidance_scale: float
    rows: tuple[PlanRow, ...]
    scheduler: str
    sampler_digest: str
    method: str
    error_graph_digest: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        require(
            self.format_version == FORMAT_VERSION, f"format_version must be {FORMAT_VERSION}, got {self.format_version}"
        )
        require(
            self.name.replace("-", "").replace("_", "").isalnum(),
            f"name must be letters, digits, - and _, got {self.name!r}",
        )
        require_finite((self.guidance_scale,), "guidance_scale")
        require(len(self.rows) >= 2, f"a plan needs at least 2 rows, got {len(self.rows)}")
        previous, full = -1, 0
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
            require(len(row.outputs) <= i, f"{where}.outputs: {len(row.outputs)} given, {i} exist there")
            require(len(row.reuse) <= i, f"{where}.reuse: {len(row.reuse)} given, {i} exist there")
            require(
                len(row.residuals) <= full, f"{where}.residuals: {len(row.residuals)} given, {full} full rows before it"
            )
            require(
                (row.step == self.num_steps) == last, f"{where}: the last row, and only it, has step {self.num_steps}"
            )
            require(not last or (row.graph == "none" and not row.reuse), f"{where}: the last row only combines")
            require(last or row.graph != "none" or bool(row.reuse), f"{where}: a row without a graph needs reuse")
            previous, full = row.step, full + (row.graph == "full")
        require(self.rows[0].graph == "full", "rows[0].graph must be full: there is nothing to reuse yet")

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The denoising steps that run the whole DiT."""
        return tuple(row.step for row in self.rows if row.graph == "full")

    @property
    def budget(self) -> int:
        """B, the number of full steps."""
        return len(self.full_steps)

    @property
    def latent_history(self) -> int:
        return max(len(row.latents) for row in self.rows)

    @property
    def output_history(self) -> int:
        return max(max(len(row.outputs), len(row.reuse)) for row in self.rows)

    @property
    def residual_history(self) -> int:
        return max(len(row.residuals) for row in self.rows)

    @property
    def stochastic(self) -> bool:
        return any(row.noise != 0.0 for row in self.rows)


def plan_from_schedule(
    schedule: Schedule,
    table: SamplerTable,
    *,
    name: str,
    guidance_scale: float,
    method: str,
    error_graph_digest: str | None = None,
) -> StepPlan:
    """Join a schedule and a sampler: full rows where the schedule says so, LeMiCa's residual reuse elsewhere.

    Raises:
        ValueError: schedule and sampler have different numbers of steps.
    """
    require(
        schedule.num_steps == table.num_steps,
        f"the schedule is for {schedule.num_steps} steps, the sampler has {table.num_steps}",
    )
    full = set(schedule.full_steps)
    rows = []
    for i, row in enumerate(table.rows):
        graph: Graph = "none" if i == table.num_steps else "full" if i in full else "skip"
        rows.append(
            PlanRow(
                graph=graph,
                step=i,
                latents=row.latents,
                outputs=row.outputs,
                noise=row.noise,
                timestep=row.timestep,
                in_scale=row.in_scale,
                guidance=row.guidance,
                residuals=(1.0,) if graph == "skip" else (),
            )
        )
    return StepPlan(
        name=name,
        num_steps=table.num_steps,
        guidance_scale=guidance_scale,
        rows=tuple(rows),
        scheduler=table.scheduler,
        sampler_digest=table.digest,
        method=method,
        error_graph_digest=error_graph_digest,
    )


def layout_from_plans(plans: Sequence[StepPlan], *, latent_shape: tuple[int, ...], guided: bool) -> StepLayout:
    """The smallest step layout that can run these plans; every history at least 1 deep.

    Args:
        plans: at least one.
        latent_shape: shape of the latents of one sample, without batch.
        guided: whether each request runs two branches.
    """
    return StepLayout(
        latent_shape=latent_shape,
        latent_history=max(1, *(plan.latent_history for plan in plans)),
        output_history=max(1, *(plan.output_history for plan in plans)),
        residual_history=max(1, *(plan.residual_history for plan in plans)),
        stochastic=any(plan.stochastic for plan in plans),
        guided=guided,
    )


def coefficient_vector(row: PlanRow, layout: StepLayout) -> npt.NDArray[np.float32]:
    """The row's `coefficients` input for every step graph, zero-padded to the layout's histories.

    Returns:
        float32 [C]; see `StepLayout.offsets`.

    Raises:
        ValueError: the row reads further back than the layout's graphs can, or draws noise they do not take.
    """
    values = {
        "latents": row.latents,
        "outputs": row.outputs,
        "noise": (row.noise,),
        "in_scale": (row.in_scale,),
        "timestep": (0.0 if row.timestep is None else row.timestep,),
        "residuals": row.residuals,
        "reuse": row.reuse,
    }
    offsets = layout.offsets
    vector = np.zeros(max(part.stop for part in offsets.values()), np.float32)
    for name, numbers in values.items():
        part = offsets[name]
        require(
            len(numbers) <= part.stop - part.start,
            f"step {row.step}: {len(numbers)} {name} coefficients, the graphs take {part.stop - part.start}",
        )
        vector[part.start : part.start + len(numbers)] = numbers
    require(layout.stochastic or row.noise == 0.0, f"step {row.step} draws noise, the graphs take none")
    return vector
