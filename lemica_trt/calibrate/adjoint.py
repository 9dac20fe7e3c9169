"""Adjoints of an uncached run: how the result moves with each latent, for a few directions of the result at once.

For a direction v of x_N, a_t = (d⟨v, x_N⟩/dx_t) through all full steps from t on: u_t = J_{t→N}ᵀ·v. With the sampler's
table (`lemica_trt.sampler`) and D_t, the Jacobian of the guided DiT at step t, one sweep from N backwards gives all:

    a_N = v,    b_t = Σ_k outputs_{t+1+k}[k]·a_{t+1+k},    a_t = Σ_k latents_{t+1+k}[k]·a_{t+1+k} + D_tᵀ·b_t

b_t is the adjoint of the output m_t. A sampler that reads several rows back is as good as any other. What moves the
histories behind step j by Δ moves ⟨v, x_N⟩ by Σ_s ⟨a_s, Δ_s⟩, where Δ_s, s ≥ j, is what they put into x_s (`impulses`).

Graphs live for one step at a time; in a large DiT each block keeps only its input and runs again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lemica_trt.calibrate.replay import Run, Sample, Uncached
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.models.model import Model

CHECKPOINT_PARAMETERS = 100_000_000
"""DiTs with more parameters run under gradient checkpointing: one more run of the trunk for each backward pass."""


def impulses(table: SamplerTable, stop: int, changed: Run, run: Run) -> list[Tensor]:
    """Δ_s for s = stop, stop + 1, … : what `changed` puts into x_s beyond what `run` does; one, for one-step samplers.

    Args:
        changed, run: histories behind which step `stop` begins.
    """
    latents = [a - b for a, b in zip(changed.latents, run.latents)]
    outputs = [a - b for a, b in zip(changed.outputs, run.outputs)]
    depth = max(table.latent_history, table.output_history)
    found = []
    for age, row in enumerate(table.rows[stop : stop + depth]):
        terms = [c * d for c, d in zip(row.latents[age:], latents)]
        terms += [c * d for c, d in zip(row.outputs[age:], outputs)]
        found.append(sum(terms, torch.zeros_like(latents[0])))
    return found


def adjoints(table: SamplerTable, directions: Tensor, vjp: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """a_0 … a_N.

    Args:
        directions: v, [R, …].
        vjp: t, b_t [R, …] → D_tᵀ·b_t [R, …].
    """
    end = table.num_steps
    later = {end: directions}
    for t in reversed(range(end)):
        rows = list(enumerate(table.rows[t + 1 :]))  # k, row t + 1 + k
        through = [row.outputs[k] * later[t + 1 + k] for k, row in rows if k < len(row.outputs)]
        beside = [row.latents[k] * later[t + 1 + k] for k, row in rows if k < len(row.latents)]
        blank = torch.zeros_like(directions)
        later[t] = sum(beside, blank) + vjp(t, sum(through, blank))
    return [later[t] for t in range(end + 1)]


def sample_adjoints(sample: Sample, uncached: Uncached, directions: Tensor) -> list[Tensor]:
    """a_0 … a_N of a sample's uncached run, fp32 [R, *latent_shape].

    N evaluations and R·N backward passes. Held on the device: R·(N + 1) latents, and the graph of one step.
    """
    with _differentiable(sample.model) as checkpointed:
        return adjoints(
            sample.table, directions, lambda t, b: sample.vjp(t, uncached.runs[t], b, checkpointed=checkpointed)
        )


def checkpoints(model: Model) -> bool:
    """Whether the DiT is large enough for gradient checkpointing, and can do it."""
    transformer = model.pipeline.transformer
    count = sum(p.numel() for p in transformer.parameters())
    return count > CHECKPOINT_PARAMETERS and getattr(transformer, "_supports_gradient_checkpointing", False)


@contextmanager
def _differentiable(model: Model) -> Iterator[bool]:
    """No gradients of weights, and checkpointing where `checkpoints` says so; everything as before at the end."""
    transformer = model.pipeline.transformer
    trained = [p for p in transformer.parameters() if p.requires_grad]
    checkpointed = checkpoints(model)
    switch = checkpointed and not transformer.is_gradient_checkpointing
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        if switch:
            transformer.enable_gradient_checkpointing()
        yield checkpointed
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        if switch:
            transformer.disable_gradient_checkpointing()
