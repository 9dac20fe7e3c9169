"""Random tiny models, loaded once a session."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny

from lemica_trt.models import Model, load_model

VARIANTS = ("sincos", "rotary", "packed", "wan")


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Name of a variant → its model, always the same one."""
    models: dict[str, Model] = {}

    def get(variant: str) -> Model:
        if variant not in models:
            models[variant] = load_model(tiny.make_variant(variant, tmp_path_factory.mktemp(variant)))
        return models[variant]

    return get


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, model_of: Callable[[str], Model]) -> Model:
    """Each variant in turn."""
    return model_of(request.param)
