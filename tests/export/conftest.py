"""The random tiny models of tests/models, exported once a session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import tiny

from lemica_trt.export import export_graphs
from lemica_trt.ir.graphs import GraphSet, StepLayout, step_layout
from lemica_trt.models import Model, load_model


class Exported(NamedTuple):
    model: Model
    layout: StepLayout
    folder: Path
    graphs: GraphSet


CASES = {
    "sincos": ("sincos", "fp32", 2, ("combine", "full", "skip", "text_encoder", "vae_decoder")),
    "rotary": ("rotary", "fp32", 1, ("full", "skip")),
    "wan": ("wan", "fp32", 2, ("full", "skip", "vae_decoder")),
    "wan-fp16": ("wan", "fp16", 1, ("full", "skip", "text_encoder")),
}


def layout_of(model: Model) -> StepLayout:
    """More history than any of these schedulers needs."""
    return step_layout(
        latent_shape=model.latent_shape, latent_history=2, output_history=2, trunk_depth=2, stochastic=True,
        guided=model.guided, conditions=model.conditions,
    )  # fmt: skip


@pytest.fixture(scope="session")
def exported_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Name of a case → its model and graphs, exported when first asked for."""
    done: dict[str, Exported] = {}

    def get(case: str) -> Exported:
        if case not in done:
            variant, dtype, max_batch, roles = CASES[case]
            profile = tiny.make_variant(variant, tmp_path_factory.mktemp(case) / "pipeline", layers=1)
            shape = msgspec.structs.replace(profile.shape, max_batch=max_batch)
            model = load_model(msgspec.structs.replace(profile, shape=shape, dtype=dtype))
            folder = tmp_path_factory.mktemp(f"{case}-bundle")
            done[case] = Exported(
                model, layout_of(model), folder, export_graphs(model, layout_of(model), folder, roles=roles)
            )
        return done[case]

    return get
