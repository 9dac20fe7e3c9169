"""Pipelines of other families, a few thousand random weights each; prompts are embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import torch

from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.pipelines.loop import Loop

TOKENS, WIDTH, POOLED = 6, 32, 16


class Case(NamedTuple):
    """A pipeline, what every call of it is given, and prompts."""

    pipe: Any
    call: Mapping[str, Any]
    prompts: list[dict[str, Any]]

    def __call__(self, number: int = 0, **more: Any) -> torch.Tensor:
        """Latents of a prompt, its number also the seed."""
        generator = torch.Generator("cpu").manual_seed(100 + number)
        call = {**self.call, **self.prompts[number], "generator": generator, "output_type": "latent", **more}
        found: torch.Tensor = self.pipe(**call, return_dict=False)[0]
        return found

    def table(self, steps: int) -> SamplerTable:
        """Of the pipeline's sampler, as the pipeline sets it."""
        with Loop(self.pipe, self.prompts, 0, {**self.call, "num_inference_steps": steps}) as loop:
            return loop.table()


def _embeds(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def _awake(module: torch.nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else parameter + 0.1
    return module.eval()


def flux(**scheduler: Any) -> Case:
    """FLUX.1: packed latents, timesteps/1000, embedded guidance, a shift that depends on the size."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **scheduler),
        transformer=_awake(transformer),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    prompts = [
        {"prompt_embeds": _embeds(s, TOKENS, WIDTH), "pooled_prompt_embeds": _embeds(50 + s, POOLED)} for s in range(8)
    ]
    return _quiet(Case(pipe, {"height": 64, "width": 64, "guidance_scale": 3.5}, prompts))


def sd3() -> Case:
    """Stable Diffusion 3: guidance by a doubled batch."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
    )  # fmt: skip
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=_awake(transformer),
        **dict.fromkeys(names),
    )
    prompts = [
        {
            "prompt_embeds": _embeds(s, TOKENS, WIDTH),
            "pooled_prompt_embeds": _embeds(50 + s, POOLED),
            "negative_prompt_embeds": _embeds(97, TOKENS, WIDTH),
            "negative_pooled_prompt_embeds": _embeds(98, POOLED),
        }
        for s in range(8)
    ]
    return _quiet(Case(pipe, {"height": 64, "width": 64, "guidance_scale": 3.0}, prompts))


def ltx() -> Case:
    """LTX-Video: packed latents of a video, sigmas that the pipeline makes, guidance by a doubled batch."""
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=_awake(transformer),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    prompts = [
        {
            "prompt_embeds": _embeds(s, TOKENS, WIDTH),
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": _embeds(97, TOKENS, WIDTH),
            "negative_prompt_attention_mask": mask,
        }
        for s in range(8)
    ]
    return _quiet(Case(pipe, {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0}, prompts))


def sd(**scheduler: Any) -> Case:
    """Stable Diffusion 1: a U-Net, latents in units of sigma that are scaled before it, guidance by a doubled batch."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, norm_num_groups=2, attention_head_dim=4,
    )  # fmt: skip
    names = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    pipe = diffusers.StableDiffusionPipeline(
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, **scheduler),
        unet=_awake(unet),
        requires_safety_checker=False,
        **dict.fromkeys(names),
    )
    prompts = [
        {"prompt_embeds": _embeds(s, TOKENS, WIDTH), "negative_prompt_embeds": _embeds(97, TOKENS, WIDTH)}
        for s in range(8)
    ]
    return _quiet(Case(pipe, {"height": 64, "width": 64, "guidance_scale": 3.0}, prompts))


CASES: dict[str, Callable[[], Case]] = {"flux": flux, "sd3": sd3, "ltx": ltx, "sd": sd}


def _quiet(case: Case) -> Case:
    case.pipe.set_progress_bar_config(disable=True)
    return case
