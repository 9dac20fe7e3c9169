"""HiDream-I1: experts of a token, the size of a picture, and rotary embeddings."""

from __future__ import annotations

import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageEmbedND, MOEFeedForwardSwiGLU
from torch import Tensor

from lemica_trt.models.families import Rewrite


class DenseExperts(MOEFeedForwardSwiGLU):  # type: ignore[misc,unused-ignore]
    """Upstream sorts tokens by expert, and runs each expert on its own. Here each runs on all tokens, with weight 0
    where it is not chosen: as many times the work as there are experts to one that is chosen (4 of which 2)."""

    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        """Tokens [n, width], for each k experts [n·k] and their weights [n·k, 1] → [n, width]."""
        chosen = flat_expert_indices.view(x.shape[0], -1)
        weights = flat_expert_weights.view(x.shape[0], -1)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = torch.where(chosen == number, weights, torch.zeros_like(weights)).sum(1, keepdim=True)
            total = total + expert(x) * weight
        return total


class SizedHiDream(HiDreamImageTransformer2DModel):  # type: ignore[misc,unused-ignore]
    """Upstream writes a picture's size to a tensor, and reads it from there."""

    def patchify(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None, list[tuple[int, int]], Tensor]:
        """Latents [b, c, h, w] → tokens, their mask or none, rows and columns of each picture, places of tokens."""
        tokens, mask, _, places = super().patchify(hidden_states)
        b, _, h, w = hidden_states.shape
        size = self.config.patch_size
        return tokens, mask, [(h // size, w // size)] * b, places


class SinglePrecisionRotary(HiDreamImageEmbedND):  # type: ignore[misc,unused-ignore]
    """Upstream multiplies places in single precision by frequencies in double precision, which no graph can."""

    def forward(self, ids: Tensor) -> Tensor:
        """Places [b, n, axes] → rotations [b, n, 1, pairs, 2, 2]."""
        found = []
        for axis, width in enumerate(self.axes_dim):
            scale = torch.arange(0, width, 2, dtype=torch.float32, device=ids.device) / width
            angles = ids[..., axis, None].float() * (1.0 / self.theta**scale)
            cos, sin = torch.cos(angles), torch.sin(angles)
            found.append(torch.unflatten(torch.stack([cos, -sin, sin, cos], -1), -1, (2, 2)))
        return torch.cat(found, -3).unsqueeze(2)


REWRITES = (
    Rewrite(
        DenseExperts,
        upstream="models/transformers/transformer_hidream_image.py: MOEFeedForwardSwiGLU.moe_infer",
        reason="it counts the tokens of each expert in numpy",
    ),
    Rewrite(
        SinglePrecisionRotary,
        upstream="models/transformers/transformer_hidream_image.py: HiDreamImageEmbedND",
        reason="its product has factors of two precisions",
    ),
    Rewrite(
        SizedHiDream,
        upstream="models/transformers/transformer_hidream_image.py: HiDreamImageTransformer2DModel.patchify",
        reason="it reads a picture's size from a tensor",
    ),
)
