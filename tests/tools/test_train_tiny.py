"""What training takes for the schedule, the scale and the text is what the pipelines do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lemica_trt.ir.resources import load_profile
from lemica_trt.models import family_from_name, load_model

pytestmark = pytest.mark.cpu

MODELS = ("cogvideox-tiny", "wan-tiny")


@pytest.fixture(scope="module")
def train_tiny():
    tools = str(Path(__file__).resolve().parents[2] / "tools")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tools)
        import train_tiny
    yield train_tiny
    for name in ("train_tiny", "shapes"):
        sys.modules.pop(name, None)


@pytest.fixture
def drawn():
    """(x0, noise, u), four of them."""
    random = torch.Generator().manual_seed(0)
    return (*torch.randn(2, 4, 16, 3, 8, 8, generator=random), torch.tensor([0.0, 0.3, 0.5, 0.999]))


def test_cogvideox_is_trained_on_its_own_schedule(train_tiny, drawn) -> None:
    x0, noise, u = drawn
    recipe = train_tiny.RECIPES["cogvideox-tiny"]
    x, timestep, target = recipe.noised(x0, noise, u)
    scheduler = recipe.build_scheduler()
    assert timestep.tolist() == [0, 300, 500, 999]
    torch.testing.assert_close(x, scheduler.add_noise(x0, noise, timestep))
    torch.testing.assert_close(target, scheduler.get_velocity(x0, noise, timestep))


def test_wan_is_trained_on_straight_lines(train_tiny, drawn) -> None:
    """One Euler step along the target leads to the clip, and to the noise, whatever the level."""
    x0, noise, u = drawn
    x, timestep, target = train_tiny.RECIPES["wan-tiny"].noised(x0, noise, u)
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(x - sigma * target, x0)
    torch.testing.assert_close(x + (1 - sigma) * target, noise)
    assert timestep[0] == 0 and 998 < timestep[-1] < 1000


@pytest.mark.parametrize("name", MODELS)
def test_decoding_undoes_the_normalisation(train_tiny, name) -> None:
    recipe, profile = train_tiny.RECIPES[name], load_profile(name)
    mean = 3 + 2 * torch.randn(5, 16, 3, 8, 8)
    latents = recipe.latents_from_posterior(mean)
    config = recipe.vae_config(latents)
    normal = recipe.normalise(latents, config)
    vae = SimpleNamespace(
        config=SimpleNamespace(temporal_compression_ratio=4, **config),
        dtype=torch.float32,
        decode=lambda z, return_dict=True: SimpleNamespace(sample=z) if return_dict else (z,),
    )
    back = family_from_name(profile.family).decode(vae, normal, profile.shape)
    torch.testing.assert_close(back, mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_embedded_as_the_pipeline_does(train_tiny, name) -> None:
    model = load_model(load_profile(name))
    prompts = ["a big red circle moves left", ""]
    ids = model.tokens(prompts)["input_ids"]
    with torch.no_grad():
        own = train_tiny.RECIPES[name].embed(model.pipeline.text_encoder, ids)
        reference, _ = model.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=train_tiny.TOKENS
        )
    torch.testing.assert_close(own, reference)
