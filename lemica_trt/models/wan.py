"""Wan 2.1 (and 2.2 models of one transformer without per-token timesteps), text to video. diffusers: `WanPipeline`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.profile import Profile, Shape
from lemica_trt.models.family import Family, require_multiple


class Wan(Family):
    """See the module docstring. Latents are [C, F, H, W].

    The pipeline runs the two branches of guidance one after the other, this tool as one batch.
    """

    name = "wan"
    pipeline_class = "WanPipeline"
    block_lists = ("blocks",)
    epilogue = "norm_out"
    text_mask = True
    clean = "ftfy"
    vae_dtype = "fp32"

    def check(self, pipeline: Any, profile: Profile) -> None:
        super().check(pipeline, profile)
        if pipeline.transformer is None or pipeline.transformer_2 is not None:
            raise UnsupportedError("expected one transformer, got a two-stage Wan 2.2 pipeline")
        if pipeline.config.expand_timesteps:
            raise UnsupportedError("expected one timestep for all tokens, got a Wan 2.2 TI2V pipeline")

    def latent_shape(self, pipeline: Any, shape: Shape) -> tuple[int, ...]:
        config = pipeline.transformer.config
        ratio, scale = pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial
        _, patch_height, patch_width = config.patch_size
        require_multiple(shape, frames=ratio, height=scale * patch_height, width=scale * patch_width)
        frames = (shape.frames - 1) // ratio + 1
        return config.in_channels, frames, shape.height // scale, shape.width // scale

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps, device="cpu")
        scheduler.set_begin_index(0)

    def decode(self, vae: Any, latents: Tensor, shape: Shape) -> Tensor:
        """As the end of `WanPipeline.__call__`: undo the normalisation of each channel."""
        latents = latents.to(vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latents)
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latents)
        video: Tensor = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
        return video
