"""Plans in pipelines need PyTorch and diffusers: where they are missing, their tests are not collected."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from torch_threads import one_thread

__all__ = ["models", "one_thread"]

collect_ignore_glob = [] if find_spec("torch") and find_spec("diffusers") else ["*.py"]


@pytest.fixture(scope="session")
def models() -> Any:
    """The bundled models by name, each loaded once; tests leave their pipelines as they were."""
    import functools

    from lemica_trt.ir.resources import load_profile
    from lemica_trt.models import load_model

    return functools.cache(lambda name: load_model(load_profile(name)))
