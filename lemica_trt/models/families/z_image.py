"""Z-Image: each request of a batch alone, its prompt padded by arithmetic, and the head of the picture's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

from lemica_trt.models.families import Rewrite

MULTIPLE = 32
"""Tokens of a prompt and of a picture are padded to a multiple of it with a learned token, which is attended."""


class SingleZImage(ZImageTransformer2DModel):  # type: ignore[misc,unused-ignore]
    """Upstream pads the requests of a batch to one length and masks that; a request alone needs neither. The head sees
    the tokens of pictures alone, so that what it is given has the same shape for all prompts."""

    def adapt(self) -> None:
        """Attention without sizes that follow from others: torch.export cannot tell that they divide."""
        for layer in (*self.noise_refiner, *self.context_refiner, *self.layers):
            layer.attention.processor = Attend()

    def forward(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        cap_feats: Sequence[Tensor],
        return_dict: bool = True,
        patch_size: int = 2,
        f_patch_size: int = 1,
        **_: Any,
    ) -> tuple[list[Tensor]]:
        """Latents [c, f, h, w] and prompts [tokens, width], one of a request each, timestep [b] → [c, f, h, w] each."""
        name = f"{patch_size}-{f_patch_size}"
        temb = self.t_embedder(t * self.t_scale).type_as(x[0])
        found = []
        for i, (latents, prompt) in enumerate(zip(x, cap_feats)):
            patches, size, grid = self._patchify_image(latents, patch_size, f_patch_size)
            count, added = patches.shape[0], -patches.shape[0] % MULTIPLE
            words, rotary_of_words = self._words(prompt)
            row = temb[i : i + 1]
            picture = self.all_x_embedder[name](patches)
            picture = torch.cat([picture, self.x_pad_token.expand(added, -1)])[None]
            rotary = self._picture_rotary(grid, added, words.shape[1] + 1)
            for layer in self.noise_refiner:
                picture = layer(picture, None, rotary, row)
            for layer in self.context_refiner:
                words = layer(words, None, rotary_of_words)
            tokens, rotary = torch.cat([picture, words], 1), torch.cat([rotary, rotary_of_words], 1)
            for layer in self.layers:
                tokens = layer(tokens, None, rotary, row)
            found.append((tokens[:, :count], size))
        made = self.all_final_layer[name](torch.cat([tokens for tokens, _ in found]), c=temb)
        return (self.unpatchify(list(made.unbind(0)), [size for _, size in found], patch_size, f_patch_size),)

    def _words(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """A prompt's tokens [1, n, width], with the learned ones behind it, and their rotary embedding [1, n, …]."""
        count = prompt.shape[0]
        whole = (count + MULTIPLE - 1) // MULTIPLE * MULTIPLE
        words = functional.pad(self.cap_embedder(prompt), (0, 0, 0, whole - count))
        padding = torch.arange(whole, device=prompt.device)[:, None] >= count
        places = torch.arange(1, whole + 1, device=prompt.device)
        zeros = torch.zeros_like(places)
        rotary = self.rope_embedder(torch.stack([places, zeros, zeros], 1))
        return torch.where(padding, self.cap_pad_token, words)[None], rotary[None]

    def _picture_rotary(self, grid: tuple[int, int, int], added: int, start: int) -> Tensor:
        """Rotary embedding of a picture's tokens behind a prompt, [1, n, …]; of what is added behind it, place 0."""
        device = self.x_pad_token.device
        axes = [torch.arange(count, device=device) for count in grid]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        first = torch.tensor([1, 0, 0], device=device)
        places = functional.pad(places + first * start, (0, 0, 0, added))
        return self.rope_embedder(places)[None]  # type: ignore[no-any-return]


class Attend:
    """As `ZSingleStreamAttnProcessor`, without masks."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None, attention_mask: None, freqs_cis: Tensor
    ) -> Tensor:
        """Tokens [1, n, width] and their rotary embedding, complex [1, n, …] → [1, n, width]."""
        query, key, value = (
            torch.unflatten(part(hidden_states), -1, (attn.heads, -1)) for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        query, key = (_rotated(part, freqs_cis).transpose(1, 2) for part in (query, key))
        found = functional.scaled_dot_product_attention(query, key, value.transpose(1, 2))
        return attn.to_out[0](found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _rotated(part: Tensor, rotary: Tensor) -> Tensor:
    pairs = torch.view_as_complex(torch.unflatten(part.float(), -1, (part.shape[-1] // 2, 2)))
    return torch.view_as_real(pairs * rotary[:, :, None]).flatten(3).to(part.dtype)


REWRITES = (
    Rewrite(
        SingleZImage,
        upstream="models/transformers/transformer_z_image.py: ZImageTransformer2DModel",
        reason="it asks in Python whether a prompt is padded, and its head sees the prompt: shapes follow its length",
    ),
)
