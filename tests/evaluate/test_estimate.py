"""What a dry run counts of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel

from lemica_trt.evaluate.estimate import _operations
from lemica_trt.models import load_model


@pytest.mark.cpu
def test_attention_is_counted(tmp_path: Path) -> None:
    """As its two matrix products, of which an implementation is made whose operators PyTorch counts itself."""
    model = load_model(tiny.make_variant("sincos", tmp_path))
    counted = _operations(model, (0,))
    with sdpa_kernel(SDPBackend.MATH):
        by_products = _operations(model, (0,))
    assert counted == by_products and counted[0] > counted[1]
