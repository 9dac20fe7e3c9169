"""What training takes for the schedule, the scale and the text is what the pipelines do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lemica_trt.ir.resources import load_profile, zoo_path
from lemica_trt.models import family_from_name

pytestmark = pytest.mark.cpu

MODELS = ("cogvideox-tiny", "wan-tiny")
TRACED = ("flux-tiny",)
PROMPT = {"flux-tiny": "a big red circle on the left"}


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


@pytest.mark.parametrize("name", [*MODELS, *TRACED])
def test_the_transformer_is_called_as_the_pipeline_calls_it(train_tiny, name) -> None:
    """Both branches of a run's first step, by the recipe: shapes, timestep, and what becomes of the prompts."""
    recipe, prompt = train_tiny.RECIPES[name], PROMPT.get(name, "a big red circle moves left")
    pipeline = recipe.pipeline.from_pretrained(zoo_path(name))
    pipeline.set_progress_bar_config(disable=True)
    calls = []

    def keep(module, args, kwargs, output) -> None:
        calls.append((kwargs, output[0]))

    with pipeline.transformer.register_forward_hook(keep, with_kwargs=True):
        pipeline(
            prompt, height=64, width=64, num_inference_steps=1, output_type="latent",
            generator=torch.Generator().manual_seed(0), **recipe.arguments,
        )  # fmt: skip
    tokenizers = {key: component for key, component in pipeline.components.items() if key.startswith("tokenizer")}
    encoders = {key: component for key, component in pipeline.components.items() if key.startswith("text_encoder")}
    rows = [(given["hidden_states"][i], given["timestep"].flatten()[-1], output[i])
            for given, output in calls for i in range(len(output))]  # fmt: skip
    texts = (prompt, "") if len(calls) == 2 else ("", prompt)[-len(rows) :]
    for (x, timestep, reference), text in zip(rows, texts, strict=True):
        ids = {
            key: its(text, padding="max_length", max_length=train_tiny.TOKENS, return_tensors="pt").input_ids
            for key, its in tokenizers.items()
        }
        with torch.no_grad():
            given = recipe.embed(encoders, ids, torch.tensor([len(prompt.split()) + 1]))
            if name == "flux-tiny":  # which is given the scale, and a timestep in parts of 1000
                given, timestep = {**given, "guidance": calls[0][0]["guidance"]}, timestep * 1000
            output = recipe.predict(pipeline.transformer, x[None], timestep[None], given)[0]
        torch.testing.assert_close(output, reference[: len(output)], atol=1e-4, rtol=1e-4)
