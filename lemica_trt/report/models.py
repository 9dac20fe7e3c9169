"""The named models, as `lemica-trt models` prints them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from lemica_trt.ir.profile import NamedModel, Shape
from lemica_trt.report.summary import table


def models_table(models: Sequence[NamedModel]) -> RenderableType:
    """By model: its weights, what its card says, whether it was run with them or cannot be built."""
    rows = table("model", "weights, settings, what was run")
    for model in models:
        profile = model.profile
        settings = (
            f"{profile.sampling.steps} steps, guidance {profile.sampling.guidance_scale:g}, "
            f"{shape_text(profile.shape)}, {profile.dtype}"
        )
        rows.add_row(profile.name, "\n".join([profile.source, settings, *_notes(model)]))
    return Group(rows, Text("No other model was run with its weights."))


def _notes(model: NamedModel) -> list[str]:
    card = model.card
    return [
        *(["; ".join(card.ran)] if card.ran else []),
        *([f"cannot be built yet: {card.refused}"] if card.refused else []),
        *([card.note] if card.note else []),
    ]


def shape_text(shape: Shape) -> str:
    """`49 frames 480×720`, or of an image `1024×1024`; height × width."""
    size = f"{shape.height}×{shape.width}"
    return size if shape.is_image else f"{shape.frames} frames {size}"
