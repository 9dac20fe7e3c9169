"""The named models, as `lemica-trt models` prints them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from lemica_trt.ir.profile import NamedModel, Shape
from lemica_trt.report.summary import table

NOTHING = "nothing"
"""What was done with the weights of most models so far."""


def models_table(models: Sequence[NamedModel]) -> RenderableType:
    """A row a model; below, why some cannot be built and what a user should know of others."""
    rows = table("model", "weights", ">steps", ">guidance", "shape", "dtype", "builds", "run with its weights")
    for model in models:
        profile, card = model.profile, model.card
        rows.add_row(
            profile.name,
            profile.source,
            str(profile.sampling.steps),
            f"{profile.sampling.guidance_scale:g}",
            shape_text(profile.shape),
            profile.dtype,
            "no" if card.refused else "",
            "; ".join(card.ran) or NOTHING,
        )
    parts: list[RenderableType] = [rows, Text("")]
    parts += [Text(f"{model.profile.name}: {line}") for model in models for line in _notes(model)]
    return Group(*parts)


def _notes(model: NamedModel) -> list[str]:
    card = model.card
    return [*([f"cannot be built yet: {card.refused}"] if card.refused else []), *([card.note] if card.note else [])]


def shape_text(shape: Shape) -> str:
    """`49 frames 480×720`, or of an image `1024×1024`; height × width."""
    size = f"{shape.height}×{shape.width}"
    return size if shape.frames == 1 else f"{shape.frames} frames {size}"
