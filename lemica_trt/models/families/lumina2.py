"""Lumina 2: one sequence of all text tokens and the picture, those of the padding masked."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from lemica_trt.models.families import Rewrite


class MaskedLumina2(Lumina2Transformer2DModel):  # type: ignore[misc,unused-ignore]
    """Upstream puts the picture right behind the tokens of each prompt. Here it stands behind the padding, with the
    places, in the rotary embedding, that it has there. Attention does not know an order otherwise."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        attention_kwargs: Any = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        """Latents [b, c, h, w], timestep [b], text [b, t, width] with its mask [b, t] → [b, c, h, w]."""
        b, c, h, w = hidden_states.shape
        p = self.config.patch_size
        rows, columns = h // p, w // p
        temb, text = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
        mask = encoder_attention_mask.bool()
        places = self._places(mask, rows, columns)
        text_places, picture_places = torch.split(places, [mask.shape[1], rows * columns], 1)
        table = self._rotary
        picture = hidden_states.view(b, c, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        picture = self.x_embedder(picture)
        for layer in self.context_refiner:
            text = layer(text, mask, table(text_places))
        for layer in self.noise_refiner:
            picture = layer(picture, None, table(picture_places), temb)
        keys = torch.cat([mask, torch.ones_like(places[:, mask.shape[1] :, 0], dtype=torch.bool)], 1)
        tokens, rotary = torch.cat([text, picture], 1), table(places)
        for layer in self.layers:
            tokens = layer(tokens, keys, rotary, temb)
        found = self.norm_out(tokens[:, mask.shape[1] :], temb)
        found = found.view(b, rows, columns, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return (found.reshape(b, self.out_channels, h, w),)

    def adapt(self) -> None:
        """Rotary tables in single precision: engines have no doubles."""
        self.rope_embedder.freqs_cis = [table.to(torch.complex64) for table in self.rope_embedder.freqs_cis]

    def _rotary(self, places: Tensor) -> Tensor:
        """Rotary embedding of tokens [b, n, 3], complex [b, n, …]."""
        tables = [table.to(places.device) for table in self.rope_embedder.freqs_cis]
        return torch.cat([table[places[..., axis]] for axis, table in enumerate(tables)], -1)

    @staticmethod
    def _places(mask: Tensor, rows: int, columns: int) -> Tensor:
        """Where each token is, int64 [b, t + rows·columns, 3]; a token of the padding wherever."""
        (b, t), device = mask.shape, mask.device
        words = torch.arange(t, device=device)[None, :, None].expand(b, t, 1)
        text = torch.cat([words, torch.zeros_like(words), torch.zeros_like(words)], 2)
        grid = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        picture = torch.stack(grid, -1).flatten(0, 1)[None].expand(b, -1, 2)
        length = mask.sum(1)[:, None, None].expand(b, rows * columns, 1)
        return torch.cat([text, torch.cat([length, picture], 2)], 1)


REWRITES = (
    Rewrite(
        MaskedLumina2,
        upstream="models/transformers/transformer_lumina2.py: Lumina2RotaryPosEmbed, Lumina2Transformer2DModel",
        reason="it reads the length of each prompt by .tolist()",
    ),
)
