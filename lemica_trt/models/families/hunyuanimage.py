"""HunyuanImage 2.1: text tokens stay where their encoders put them, those of the padding masked."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

from lemica_trt.models.families import Rewrite


class MaskedHunyuanImage(HunyuanImageTransformer2DModel):  # type: ignore[misc,unused-ignore]
    """Upstream moves the tokens of glyphs and prompt before all padding. Text tokens have no places in the rotary
    embedding, and attention masks keys alone, so that their order does not count."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep_r: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask_2: Tensor | None = None,
        guidance: Tensor | None = None,
        attention_kwargs: Any = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        """Latents [b, c, h, w] and what they are given → [b, c', h, w]."""
        b, _, *sizes = hidden_states.shape
        counts = [size // by for size, by in zip(sizes, self.config.patch_size)]
        rotary = self.rope(hidden_states)
        temb = self.time_guidance_embed(timestep, guidance=guidance, timestep_r=timestep_r)
        picture, mask = self.x_embedder(hidden_states), encoder_attention_mask.bool()
        text = self.context_embedder(encoder_hidden_states, timestep, mask)
        if self.context_embedder_2 is not None and encoder_hidden_states_2 is not None:
            assert encoder_attention_mask_2 is not None
            text = torch.cat([self.context_embedder_2(encoder_hidden_states_2), text], 1)
            mask = torch.cat([encoder_attention_mask_2.bool(), mask], 1)
        keys = functional.pad(mask, (picture.shape[1], 0), value=True)[:, None, None]
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            picture, text = block(picture, text, temb, attention_mask=keys, image_rotary_emb=rotary)
        picture = self.proj_out(self.norm_out(picture, temb))
        picture = picture.reshape(b, *counts, -1, *self.config.patch_size).permute(0, 3, 1, 4, 2, 5)
        return (picture.reshape(b, -1, *sizes),)


REWRITES = (
    Rewrite(
        MaskedHunyuanImage,
        upstream="models/transformers/transformer_hunyuanimage.py: HunyuanImageTransformer2DModel",
        reason="it takes tokens by masks: shapes follow its data",
    ),
)
