"""What a model says of itself, against the diffusers pipeline."""

from __future__ import annotations

import diffusers
import msgspec
import numpy as np
import pytest
import tokenizers
import torch

from lemica_trt.core.errors import InputError
from lemica_trt.models import Model, load_model

pytestmark = pytest.mark.cpu

PROMPTS = ["a cat", "x &amp;amp;   y "]


@torch.no_grad()
def test_embed_is_encode_prompt(model: Model) -> None:
    embeds, negatives = model.pipeline.encode_prompt(
        PROMPTS, ["no", "no"], do_classifier_free_guidance=True, max_sequence_length=model.profile.text_length
    )
    mine = model.embed(PROMPTS, "no")
    assert (
        torch.equal(mine, torch.cat([negatives, embeds])) or (mine - torch.cat([negatives, embeds])).abs().max() < 1e-6
    )
    unguided = msgspec.structs.replace(
        model.profile, sampling=msgspec.structs.replace(model.profile.sampling, guidance_scale=1.0)
    )
    assert load_model(unguided).embed(PROMPTS).shape == embeds.shape


def test_tokens_without_transformers(model: Model) -> None:
    spec = model.text_spec("tokenizer.json")
    ours = tokenizers.Tokenizer.from_str(model.tokenizer_json().decode())
    prompts = ["a cat", "", "a prompt that is longer than eight tokens"]
    tokens = model.tokens(prompts)
    for row, prompt in enumerate(prompts):
        ids = ours.encode(prompt).ids
        if len(ids) > spec.length:
            ids = [*ids[: spec.length - 1], spec.end_id]
        padded = ids + [spec.pad_id] * (spec.length - len(ids))
        assert tokens["input_ids"][row].tolist() == padded
        if spec.mask:
            assert tokens["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (spec.length - len(ids))


def test_noise_is_what_diffusers_draws(model: Model) -> None:
    shape = (1, *model.latent_shape)
    generator = torch.Generator("cpu").manual_seed(7)
    drawn = [diffusers.utils.torch_utils.randn_tensor(shape, generator=generator)[0] for _ in range(3)]
    noises = model.noises(7)
    assert all(torch.equal(next(noises), z) for z in drawn)
    assert torch.equal(model.noise(7), drawn[0])
    assert model.noise(7).dtype == torch.float32


def test_decode_is_the_pipelines_video(model: Model) -> None:
    noise = model.noise(0)[None]
    latents = model.reference(["a cat"], noise, negative="no")
    shape, sampling = model.profile.shape, model.profile.sampling
    arguments = model.family.call_arguments(model.profile, noise)
    video = model.pipeline(
        prompt=["a cat"], negative_prompt=["no"], num_frames=shape.frames, height=shape.height, width=shape.width,
        num_inference_steps=sampling.steps, guidance_scale=sampling.guidance_scale, output_type="pil",
        max_sequence_length=model.profile.text_length, **arguments,
    ).frames[0]  # fmt: skip
    frames = model.decode(latents)
    assert frames.shape == (1, shape.frames, shape.height, shape.width, 3)
    assert frames.dtype == torch.uint8
    assert np.array_equal(frames[0].numpy(), np.stack([np.asarray(frame) for frame in video]))


def test_sincos_positions_at_another_shape_are_diffusers_own(model_of) -> None:
    small = model_of("sincos")
    shape = msgspec.structs.replace(small.profile.shape, frames=17, height=48, width=64)
    model = load_model(msgspec.structs.replace(small.profile, shape=shape))
    assert model.latent_shape == (5, 4, 6, 8)
    embeds, sample = small.embed(["a cat"]), torch.randn(2, *model.latent_shape)
    outputs = [
        m.pipeline.transformer(sample, embeds, torch.tensor([3.0, 3.0]), return_dict=False)[0].detach()
        for m in (small, model)
    ]
    assert torch.equal(*outputs)
    assert model.pipeline.transformer.patch_embed.pos_embedding.shape[1] == model.profile.text_length + 5 * 3 * 4


def test_packed_latents_are_padded_in_front(model_of) -> None:
    assert model_of("rotary").latent_shape == (3, 4, 4, 4)
    packed = model_of("packed")
    assert packed.latent_shape == (4, 4, 4, 4)
    latents = torch.randn(1, *packed.latent_shape)
    other = latents.clone()
    other[:, 0] += 1
    assert torch.equal(packed.decode(latents), packed.decode(other))
    other[:, 1] += 1
    assert not torch.equal(packed.decode(latents), packed.decode(other))


def test_reference_wants_the_guidance_of_the_build(model_of) -> None:
    model = model_of("sincos")
    with pytest.raises(InputError, match="must exceed 1"):
        model.reference(["a"], model.noise(0)[None], guidance_scale=1.0)
