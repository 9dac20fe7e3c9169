"""The cut: whole equals uncut, and head ∘ (embedding + residual of the same step) equals whole."""

from __future__ import annotations

import pytest
import torch

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.models import Model
from lemica_trt.models.split import split_transformer

pytestmark = pytest.mark.cpu


def _inputs(model: Model) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn((2, *model.latent_shape), generator=generator)
    return model.transformer_inputs(sample, torch.full((2,), 500.5), model.embed(["a cat"], "bad"))


@torch.no_grad()
def test_full_is_the_transformer_and_skip_with_its_own_residual_is_full(model: Model) -> None:
    inputs = _inputs(model)
    uncut = model.pipeline.transformer(**inputs, return_dict=False)[0]
    output, residual = model.split.full(**inputs)
    assert torch.equal(output, uncut)
    assert residual.abs().mean() > 1e-3
    # h_in + (h_out − h_in) is rounded twice, and the epilogue's norm magnifies that; packed latents give 6.0e-7.
    packed = getattr(model.pipeline.transformer.config, "patch_size_t", None) is not None
    assert (model.split.skip(residual, **inputs) - uncut).abs().max() <= (1e-6 if packed else 5e-7)
    assert (model.split.skip(0 * residual, **inputs) - uncut).abs().max() > 1e-3
    assert torch.equal(model.pipeline.transformer(**inputs, return_dict=False)[0], uncut), "the cut left a hook behind"


def test_skip_has_no_weights_of_the_trunk(model: Model) -> None:
    weights = model.split.skip.state_dict()
    assert not any(name.split(".")[1] in model.family.block_lists for name in weights)
    shared = model.split.full.state_dict()
    assert all(weights[name].data_ptr() == shared[name].data_ptr() for name in weights)


@pytest.mark.parametrize(
    ("lists", "epilogue", "message"),
    [
        (("layers",), "norm_final", r"CogVideoXTransformer3DModel\.layers to be the list of blocks"),
        ((), "norm_final", "expected blocks"),
        (("transformer_blocks",), "norm_last", "'norm_last' behind its blocks"),
    ],
)
def test_wrong_names_are_refused(model_of, lists, epilogue, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        split_transformer(model_of("sincos").pipeline.transformer, lists, epilogue)


def test_a_cut_in_the_wrong_place_is_refused(model_of) -> None:
    model = model_of("sincos")
    wrong = split_transformer(model.pipeline.transformer, ("transformer_blocks",), "transformer_blocks.0.attn1.norm_q")
    wrong.full._cut = (torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(UnsupportedError, match="got 0 in all"):
        wrong.full(**_inputs(model))
