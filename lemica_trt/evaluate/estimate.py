"""What a model costs on this machine, before anything is run: for `build --dry-run`.

Floating-point operations of a step are counted on fake tensors, and divided by the speed of a matrix product that is
measured here. Estimates: within a factor of about two for models that are busy with matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lemica_trt.ir.graphs import full_name, skip_name, step_layout
from lemica_trt.models import Model
from lemica_trt.models.graph_specs import cache_specs, example_inputs, input_specs
from lemica_trt.models.steps import step_modules

EXPORT_SECONDS, EXPORT_SPEED = 8.0, 17e6
"""What an export takes at least, and bytes of weights a second beyond: the bundled models took 6 to 10 s, CogVideoX-5B
at its true size (12.0 GB) 12 min."""

PROCESS_MEMORY = 700_000_000
"""Bytes of a process that has imported PyTorch and diffusers; measured on Linux."""


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Attention on a CPU, of which PyTorch's counter knows nothing: half of a step and more, with many tokens."""


class ExportCost(NamedTuple):
    """Seconds and bytes of an export.

    Attributes:
        weights: all components, as they are stored.
    """

    weights: int

    @property
    def seconds(self) -> float:
        """`EXPORT_SECONDS` and its bytes at `EXPORT_SPEED`."""
        return EXPORT_SECONDS + self.weights / EXPORT_SPEED

    @property
    def memory(self) -> int:
        """Peak; 1.15 times the weights was measured for CogVideoX-2B."""
        return PROCESS_MEMORY + round(1.15 * self.weights)


class Estimate(NamedTuple):
    """Seconds and bytes.

    Attributes:
        full_step, skipped_step: one request, both branches of the guidance.
        latent: one latent in fp32.
        run_memory: peak while the model runs.
        export: of the export.
    """

    full_step: float
    skipped_step: float
    latent: int
    run_memory: int
    export: ExportCost


def estimate(model: Model) -> Estimate:
    """Count a full and a skipped step, measure the machine."""
    parts = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    full, skipped = _operations(model, model.table().kinds)
    speed = _speed(model.dtype)
    return Estimate(
        full_step=full / speed,
        skipped_step=skipped / speed,
        latent=4 * math.prod(model.latent_shape),
        run_memory=PROCESS_MEMORY + round(1.5 * weights),
        export=ExportCost(weights),
    )


def _operations(model: Model, kinds: Sequence[int]) -> tuple[float, float]:
    """Floating-point operations of a full and of a skipped step: the mean over the kinds of all steps."""
    layout = step_layout(
        latent_shape=tuple(model.latent_shape),
        latent_history=1,
        output_history=1,
        conditions=model.conditions,
        guided=model.guided,
        experts=model.experts,
    )
    modules, caches = step_modules(model, layout), cache_specs(model, layout)
    counts: dict[str, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for variant in layout.variants:
            inputs = example_inputs(input_specs(variant.name, model, layout, caches), 1, model.device)
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                modules[variant.name](inputs)
            counts[variant.name] = counter.get_total_flops()
    return fmean(counts[full_name(kind)] for kind in kinds), fmean(counts[skip_name(kind)] for kind in kinds)


def _speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product, best of three."""
    size = 768
    matrix = torch.ones(size, size, dtype=dtype)
    matrix @ matrix
    best = float("inf")
    for _ in range(3):
        start = perf_counter()
        matrix @ matrix
        best = min(best, perf_counter() - start)
    return 2 * size**3 / best
