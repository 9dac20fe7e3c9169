"""Pipelines of other families, a few thousand random weights each; prompts are embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import torch

from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.pipelines.loop import Loop

TOKENS, WIDTH, POOLED, PROMPTS = 6, 32, 16, 8

FlowMatch = diffusers.FlowMatchEulerDiscreteScheduler

IMAGE = {"height": 64, "width": 64}


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


def _case(
    kind: Any,
    scheduler: Any,
    network: torch.nn.Module,
    call: Mapping[str, Any],
    fixed: Mapping[str, Any],
    *,
    pooled: bool,
) -> Case:
    """A pipeline that has a network and a scheduler, and nothing to encode or decode with.

    Args:
        fixed: of every prompt.
        pooled: whether prompts have a pooled embedding too.
    """
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else parameter + 0.1
    missing = dict.fromkeys(set(kind._get_signature_keys(kind)[0]) - {"transformer", "unet", "scheduler"})
    name = "unet" if isinstance(network, diffusers.UNet2DConditionModel) else "transformer"
    options = {"requires_safety_checker": False} if name == "unet" else {}
    pipe = kind(**missing, **options, scheduler=scheduler, **{name: network.eval()})
    pipe.set_progress_bar_config(disable=True)
    prompts = []
    for seed in range(PROMPTS):
        prompt = {"prompt_embeds": _embeds(seed, TOKENS, WIDTH), **fixed}
        prompts.append(prompt | ({"pooled_prompt_embeds": _embeds(50 + seed, POOLED)} if pooled else {}))
    return Case(pipe, call, prompts)


def _embeds(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def _masked(suffix: str, dtype: torch.dtype, *, negative: bool = True) -> dict[str, Any]:
    """Masks of prompts, and a negative prompt."""
    mask = torch.ones(1, TOKENS, dtype=dtype)
    found = {f"prompt{suffix}": mask}
    if negative:
        found |= {"negative_prompt_embeds": _embeds(97, TOKENS, WIDTH), f"negative_prompt{suffix}": mask}
    return found


def flux() -> Case:
    """FLUX.1: packed latents, timesteps/1000, embedded guidance, a shift that depends on the size."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    call = {**IMAGE, "guidance_scale": 3.5}
    return _case(diffusers.FluxPipeline, FlowMatch(use_dynamic_shifting=True), transformer, call, {}, pooled=True)


def sd3() -> Case:
    """Stable Diffusion 3: guidance by a doubled batch."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
    )  # fmt: skip
    negative = {
        "negative_prompt_embeds": _embeds(97, TOKENS, WIDTH),
        "negative_pooled_prompt_embeds": _embeds(98, POOLED),
    }
    call = {**IMAGE, "guidance_scale": 3.0}
    return _case(diffusers.StableDiffusion3Pipeline, FlowMatch(shift=3.0), transformer, call, negative, pooled=True)


def ltx() -> Case:
    """LTX-Video: packed latents of a video, sigmas that the pipeline makes, guidance by a doubled batch."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    call, fixed = {**IMAGE, "num_frames": 9, "guidance_scale": 3.0}, _masked("_attention_mask", torch.bool)
    return _case(diffusers.LTXPipeline, FlowMatch(use_dynamic_shifting=True), transformer, call, fixed, pooled=False)


def hunyuan() -> Case:
    """HunyuanVideo: a video, embedded guidance."""
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=WIDTH, pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    call = {**IMAGE, "num_frames": 5, "guidance_scale": 4.0}
    fixed = _masked("_attention_mask", torch.long, negative=False)
    return _case(diffusers.HunyuanVideoPipeline, FlowMatch(shift=7.0), transformer, call, fixed, pooled=True)


def qwen() -> Case:
    """Qwen-Image: two calls a step, guidance whose result is rescaled: not linear in the outputs."""
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    call, fixed = {**IMAGE, "true_cfg_scale": 3.0}, _masked("_embeds_mask", torch.long)
    scheduler = FlowMatch(use_dynamic_shifting=True)
    return _case(diffusers.QwenImagePipeline, scheduler, transformer, call, fixed, pooled=False)


def pixart() -> Case:
    """PixArt-Σ: noise is predicted, with a variance that is cut off; DPM-Solver++."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
        in_channels=4, cross_attention_dim=24, out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    call = {**IMAGE, "guidance_scale": 3.0, "use_resolution_binning": False, "negative_prompt": None}
    fixed = _masked("_attention_mask", torch.long)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return _case(diffusers.PixArtSigmaPipeline, scheduler, transformer, call, fixed, pooled=False)


def sd() -> Case:
    """Stable Diffusion 1: a U-Net, latents in units of sigma that are scaled before it, guidance by a doubled batch."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, norm_num_groups=2, attention_head_dim=4,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1)
    call, negative = {**IMAGE, "guidance_scale": 3.0}, {"negative_prompt_embeds": _embeds(97, TOKENS, WIDTH)}
    return _case(diffusers.StableDiffusionPipeline, scheduler, unet, call, negative, pooled=False)


CASES: dict[str, Callable[[], Case]] = {case.__name__: case for case in (flux, sd3, ltx, hunyuan, qwen, pixart, sd)}


def is_euler(case: Case) -> bool:
    """Whether its sampler is flow matching's Euler."""
    return isinstance(case.pipe.scheduler, FlowMatch)
