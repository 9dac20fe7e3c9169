"""What each graph of a bundle is called with and gives: names, dtypes and shapes, from a model and a step layout."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.graphs import COMBINE, TERM, Role, StepLayout, TensorDType, TensorSpec
from lemica_trt.models.model import Model
from lemica_trt.models.steps import step_modules

TORCH_DTYPES: dict[TensorDType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}


EXAMPLE_TOKENS, OTHER_TOKENS = 29, 47
"""Lengths of text axes where any would do: those that no other dimension is likely to have."""


def output_names(role: Role, model: Model, layout: StepLayout) -> tuple[str, ...]:
    """Output names of a graph, in order: a variant's end with the cache slots that it writes."""
    if role in model.ends:
        return model.ends[role].outputs
    kept = (TERM,) if layout.guidance_history else ()
    return ("latents", "output", *kept, *(() if role == COMBINE else layout.variant(role).writes))


def input_specs(role: Role, model: Model, layout: StepLayout, caches: dict[str, TensorSpec]) -> list[TensorSpec]:
    """What a graph's module is called with, in order; `batch` is b."""

    def latents(name: str) -> TensorSpec:
        return TensorSpec(name=name, dtype="fp32", shape=("batch", *layout.latent_shape))

    if role in model.ends:
        return list(model.ends[role].inputs)
    specs = [latents(f"latents_{j}") for j in range(layout.latent_history)]
    specs += [latents(f"outputs_{k}") for k in range(layout.output_history)]
    specs += [latents(f"guidance_terms_{k}") for k in range(layout.guidance_history)]
    if layout.stochastic:
        specs.append(latents("noise"))
    size = max(part.stop for part in layout.offsets.values())
    specs.append(TensorSpec(name="coefficients", dtype="fp32", shape=(size,)))
    if role == COMBINE:
        return specs
    if layout.guided:
        specs.append(TensorSpec(name="guidance", dtype="fp32", shape=("batch",)))
    specs += layout.conditions
    for slot in layout.variant(role).reads:
        specs += [msgspec.structs.replace(caches[slot], name=f"{slot}_{k}") for k in range(layout.depth(slot))]
    return specs


def cache_specs(model: Model, layout: StepLayout, *, split: bool = False) -> dict[str, TensorSpec]:
    """The cache slots of a layout as the model makes them, by name; shapes only, nothing is computed.

    Args:
        split: whether a process runs one branch of the guidance, see `steps.Branch`: it keeps the rows of that one.

    Raises:
        UnsupportedError: shapes within the transformer follow its data, so that no graph can be exported; or a slot has
            another shape for another prompt.
    """
    rows = "2*batch" if layout.guided and not split else "batch"
    found = {}
    modules = step_modules(model, layout)  # outside: constants that they keep must be real
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for variant in (variant for variant in layout.variants if variant.writes and not variant.reads):
            inputs = example_inputs(input_specs(variant.name, model, layout, {}), 1, model.device)
            try:
                result = other = modules[variant.name](inputs)
                if layout.text_axes:
                    specs = input_specs(variant.name, model, layout, {})
                    other = modules[variant.name](example_inputs(specs, 1, model.device, tokens=OTHER_TOKENS))
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise UnsupportedError(
                    f"{model.profile.source}: expected a transformer that torch can export, got one whose shapes "
                    f"follow its data ({error})"
                ) from error
            for slot in variant.writes:
                _, *shape = result[slot].shape
                if layout.text_axes and result[slot].shape != other[slot].shape:
                    raise UnsupportedError(
                        f"{model.profile.source}: expected cache slots of one shape, that of {slot} follows the length "
                        "of the prompt"
                    )
                found[slot] = TensorSpec(name=slot, dtype=model.profile.dtype, shape=(rows, *shape))
    return found


def example_inputs(
    specs: Sequence[TensorSpec], batch: int, device: torch.device, *, tokens: int = EXAMPLE_TOKENS
) -> dict[str, Tensor]:
    """Zeros of the given shapes at a batch; each text axis has a length of its own, near `tokens`."""
    axes = list(dict.fromkeys(axis for spec in specs for axis in spec.text_axes))
    return {
        spec.name: torch.zeros(
            spec.at(batch, tokens=tokens + sum(map(axes.index, spec.text_axes))),
            dtype=TORCH_DTYPES[spec.dtype],
            device=device,
        )
        for spec in specs
    }
