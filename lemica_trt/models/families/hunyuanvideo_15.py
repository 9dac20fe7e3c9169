"""HunyuanVideo 1.5: text tokens stay where their encoders put them, those of the padding masked as keys alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from lemica_trt.models.families import Rewrite


class MaskedHunyuanVideo15(HunyuanVideo15Transformer3DModel):  # type: ignore[misc,unused-ignore]
    """Upstream moves the tokens of prompt, glyphs and image before all padding, and takes an image of zeros for none.
    Text tokens have no places in the rotary embedding, so that their order does not count. A token of the padding sees
    others here where it sees none there; none sees it."""

    def adapt(self) -> None:
        """Attention by keys alone: a row of which all is masked is no number in most engines."""
        for block in self.transformer_blocks:
            block.attn.processor = KeyMask()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep_r: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask_2: Tensor | None = None,
        image_embeds: Tensor | None = None,
        attention_kwargs: Any = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        """Latents and what they are given [b, c, f, h, w] → [b, c', f, h, w]."""
        assert encoder_hidden_states_2 is not None and encoder_attention_mask_2 is not None
        assert image_embeds is not None
        b, _, *sizes = hidden_states.shape
        patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
        rotary = self.rope(hidden_states)
        temb = self.time_embed(timestep, timestep_r=timestep_r)
        video = self.x_embedder(hidden_states)
        masks = [encoder_attention_mask.bool(), encoder_attention_mask_2.bool()]
        image = self.image_embedder(image_embeds)
        has_image = (image_embeds != 0).any()
        masks.append(has_image.expand(image.shape[:2]))
        kinds = [
            self._refined(encoder_hidden_states, timestep, masks[0]),
            self.context_embedder_2(encoder_hidden_states_2),
            image,
        ]
        kinds = [
            torch.where(mask[..., None], tokens + self.cond_type_embed.weight[number], torch.zeros_like(tokens))
            for number, (tokens, mask) in enumerate(zip(kinds, masks))
        ]
        text, mask = torch.cat(kinds, 1), torch.cat(masks, 1)
        for block in self.transformer_blocks:
            video, text = block(video, text, temb, mask, rotary)
        video = self.proj_out(self.norm_out(video, temb))
        counts = [size // by for size, by in zip(sizes, patch)]
        video = video.reshape(b, *counts, -1, *patch).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return (video.reshape(b, -1, *sizes),)

    def _refined(self, text: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        """What the token refiner makes of a prompt, tokens of the padding masked as keys alone."""
        refiner = self.context_embedder
        weights = mask.float()[..., None]
        pooled = ((text * weights).sum(dim=1) / weights.sum(dim=1)).to(text.dtype)
        temb = refiner.time_text_embed(timestep, pooled)
        text = refiner.proj_in(text)
        for block in refiner.token_refiner.refiner_blocks:
            text = block(text, temb, mask[:, None, None])
        return text


class KeyMask:
    """As `HunyuanVideo15AttnProcessor2_0`, whose mask is of queries too."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the video [b, n, width] and of the text [b, t, width], mask [b, t] → both, of the same shapes."""

        def heads(tokens: Tensor, norm: Any = None) -> Tensor:
            split: Tensor = torch.unflatten(tokens, 2, (attn.heads, -1))
            return split if norm is None else norm(split)

        query, key = heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.to_k(hidden_states), attn.norm_k)
        query, key = (apply_rotary_emb(tokens, image_rotary_emb, sequence_dim=1) for tokens in (query, key))
        query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], 1)
        key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], 1)
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], 1)
        n = hidden_states.shape[1]
        keys = functional.pad(attention_mask, (n, 0), value=True)[:, None, None]
        found = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=keys
        )
        video, words = torch.split(found.transpose(1, 2).flatten(2), [n, encoder_hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(words)


REWRITES = (
    Rewrite(
        MaskedHunyuanVideo15,
        upstream="models/transformers/transformer_hunyuan_video15.py: HunyuanVideo15Transformer3DModel",
        reason="it asks in Python whether an image is zero, and takes tokens by masks: shapes follow its data",
    ),
)
