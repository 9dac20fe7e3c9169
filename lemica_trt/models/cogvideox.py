"""CogVideoX 2B (sincos positions), 5B and 1.5 (rotary positions), text to video. diffusers: `CogVideoXPipeline`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lemica_trt.ir.profile import Profile, Shape
from lemica_trt.models.family import DTYPES, Family, require_multiple


class CogVideoX(Family):
    """See the module docstring. Latents are [F, C, H, W]."""

    name = "cogvideox"
    pipeline_class = "CogVideoXPipeline"
    block_lists = ("transformer_blocks",)
    epilogue = "norm_final"
    dynamic_guidance = True

    def latent_shape(self, pipeline: Any, shape: Shape) -> tuple[int, ...]:
        """CogVideoX 1.5 packs `patch_size_t` latent frames: the pipeline pads in front and drops them at decoding.

        The VAE decodes latent frames in pairs behind the first one; an even number of them gives no 4k + 1 frames.
        """
        config = pipeline.transformer.config
        ratio, scale = pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial
        unit = scale * config.patch_size
        require_multiple(shape, frames=2 * ratio, height=unit, width=unit)
        frames = (shape.frames - 1) // ratio + 1
        packed = config.patch_size_t or 1
        frames = -(-frames // packed) * packed
        return frames, config.in_channels, shape.height // scale, shape.width // scale

    def prepare(self, pipeline: Any, profile: Profile, latent_shape: tuple[int, ...]) -> None:
        """Sincos positions: compute them for this shape once, rather than in every forward.

        `CogVideoXPatchEmbed.forward` computes the same ones on the fly where the shape is not its config's; traced,
        that would put the computation into the graph. The text part of the table is zero at any length.
        """
        embed = pipeline.transformer.patch_embed
        if not embed.use_positional_embeddings or embed.use_learned_positional_embeddings:
            return
        frames, _, height, width = latent_shape
        wanted = (height, width, (frames - 1) * embed.temporal_compression_ratio + 1, profile.text_length)
        if wanted == (embed.sample_height, embed.sample_width, embed.sample_frames, embed.max_text_seq_length):
            return
        embed.sample_height, embed.sample_width, embed.sample_frames, embed.max_text_seq_length = wanted
        embed.pos_embedding = embed._get_positional_embeddings(*wanted[:3], device=pipeline.device)

    def constants(self, pipeline: Any, shape: Shape, latent_shape: tuple[int, ...]) -> dict[str, Tensor]:
        if not pipeline.transformer.config.use_rotary_positional_embeddings:
            return {}
        cos, sin = pipeline._prepare_rotary_positional_embeddings(
            shape.height, shape.width, latent_shape[0], pipeline.device
        )
        return {"rotary_cos": cos, "rotary_sin": sin}

    def transformer_inputs(
        self, hidden_states: Tensor, timestep: Tensor, prompt_embeds: Tensor, constants: dict[str, Tensor]
    ) -> dict[str, Any]:
        rotary = (constants["rotary_cos"], constants["rotary_sin"]) if constants else None
        inputs = super().transformer_inputs(hidden_states, timestep, prompt_embeds, constants)
        return {**inputs, "image_rotary_emb": rotary}

    def call_arguments(self, profile: Profile, noise: Tensor) -> dict[str, Any]:
        """The pipeline keeps its latents in the dtype of the text embeddings and does not convert given ones."""
        return {"latents": noise.to(DTYPES[profile.dtype]), "use_dynamic_cfg": profile.sampling.dynamic_guidance}

    def decode(self, vae: Any, latents: Tensor, shape: Shape) -> Tensor:
        """As `decode_latents`: drop the frames padded in front, to channels first, undo the scaling."""
        frames = (shape.frames - 1) // vae.config.temporal_compression_ratio + 1
        latents = latents[:, latents.shape[1] - frames :].permute(0, 2, 1, 3, 4)
        latents = 1 / vae.config.scaling_factor * latents
        video: Tensor = vae.decode(latents.to(vae.dtype)).sample
        return video
