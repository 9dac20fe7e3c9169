"""Mochi: attention over all text tokens, those of the padding masked."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttention
from torch import Tensor
from torch.nn import functional

from lemica_trt.models.families import Rewrite


class MaskedAttention(MochiAttention):  # type: ignore[misc,unused-ignore]
    """Upstream takes the tokens of each prompt out of the padding, and pads what attention gives with zeros."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the video [b, n, width] and of the text [b, t, width], mask [b, t] → both, of the same shapes."""
        text = attention_mask.bool()

        def heads(tokens: Tensor, norm: Any = None) -> Tensor:
            split: Tensor = torch.unflatten(tokens, 2, (self.heads, -1))
            return split if norm is None else norm(split)

        query = heads(self.to_q(hidden_states), self.norm_q)
        key = heads(self.to_k(hidden_states), self.norm_k)
        if image_rotary_emb is not None:
            query, key = (_rotated(tokens, *image_rotary_emb) for tokens in (query, key))
        query = torch.cat([query, heads(self.add_q_proj(encoder_hidden_states), self.norm_added_q)], 1)
        key = torch.cat([key, heads(self.add_k_proj(encoder_hidden_states), self.norm_added_k)], 1)
        value = torch.cat([heads(self.to_v(hidden_states)), heads(self.add_v_proj(encoder_hidden_states))], 1)
        keys = functional.pad(text, (hidden_states.shape[1], 0), value=True)[:, None, None]
        found = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=keys
        )
        video, words = torch.split(found.transpose(1, 2).flatten(2), [hidden_states.shape[1], text.shape[1]], 1)
        words = torch.where(text[..., None], words, torch.zeros_like(words))
        video = self.to_out[1](self.to_out[0](video))
        return video, self.to_add_out(words) if hasattr(self, "to_add_out") else words


def _rotated(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = tokens[..., 0::2].float(), tokens[..., 1::2].float()
    pairs = [(even * cos - odd * sin).to(tokens.dtype), (even * sin + odd * cos).to(tokens.dtype)]
    return torch.stack(pairs, dim=-1).flatten(-2)


REWRITES = (
    Rewrite(
        MaskedAttention,
        upstream="models/attention_processor.py: MochiAttnProcessor2_0",
        reason="it takes tokens by torch.nonzero of the mask: shapes follow its data",
    ),
)
