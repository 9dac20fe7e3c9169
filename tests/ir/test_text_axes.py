"""Text axes of tensors: dimensions as long as a prompt."""

from __future__ import annotations

import pytest

from lemica_trt.ir.graphs import TensorSpec, longest_text, step_layout, text_axis

pytestmark = pytest.mark.null


def test_shapes_of_a_text_axis() -> None:
    spec = TensorSpec(name="x", dtype="fp32", shape=("2*batch", text_axis(512), 32))
    assert spec.shape[1] == "tokens_512"
    assert spec.at(3) == (6, 512, 32)
    assert spec.at(1, tokens=7) == (2, 7, 32)
    assert spec.at(1, tokens=9999) == (2, 512, 32)
    assert spec.at_batch(1) == (2, "tokens_512", 32)
    assert spec.text_axes == {"tokens_512": 512}


def test_a_layout_knows_the_axes_of_its_conditions() -> None:
    conditions = (
        TensorSpec(name="c", dtype="fp32", shape=("batch", text_axis(64), 8)),
        TensorSpec(name="negative_c", dtype="fp32", shape=("batch", text_axis(64, negative=True), 8)),
        TensorSpec(name="pooled", dtype="fp32", shape=("2*batch", 8)),
    )
    layout = step_layout(latent_shape=(4,), latent_history=1, output_history=1, conditions=conditions)
    assert layout.text_axes == {"tokens_64": 64, "negative_tokens_64": 64}


@pytest.mark.parametrize("dim", [7, "batch", "2*batch", "tokens", "tokens_0", "tokens_-1", "other_tokens_5", ""])
def test_other_dimensions_are_none(dim: int | str) -> None:
    assert longest_text(dim) is None


def test_a_dimension_that_is_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a multiple of batch"):
        TensorSpec(name="x", dtype="fp32", shape=("tokens_0", 4)).at(1)
