"""STDiT3, the transformer of Open-Sora 1.2: blocks over the tokens of a frame and over the frames of a token, in turns.

Written from `opensora/models/stdit/stdit3.py` and `opensora/models/layers/blocks.py` of github.com/hpcaitech/Open-Sora,
tag v1.2.0 (Apache License 2.0). Parameters have the names and shapes of hpcai-tech/OpenSora-STDiT-v3.

Two things are computed in another way, to the same numbers: padding of a text is masked where upstream packs the tokens
of all rows into one (so that no shape follows the data), and attention is torch's own. Angles of positions are fp32 in
half precision too; upstream rounds them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256
"""Width of sinusoidal embeddings of numbers."""

EPS = 1e-6
"""Of all norms."""


class STDiT3(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """See the module docstring; tokens are (frame, row, column), C is `hidden_size`.

    Args:
        input_sq_size: square root of the pixels that positions have the scale of.
        in_channels: of the latents.
        patch_size: frames, rows and columns of latents that are a token.
        hidden_size: C; a multiple of 4 and of `num_heads`.
        depth: pairs of a spatial and a temporal block.
        num_heads: of all attentions.
        mlp_ratio: hidden width of the blocks' MLPs, in C.
        pred_sigma: whether the output has a second half of channels, which no sampler reads.
        caption_channels: width of the text encoder's output.
        model_max_length: tokens of the null embedding.
        qk_norm: whether queries and keys of self-attention are normed.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        pred_sigma: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        self.out_channels = in_channels * (2 if pred_sigma else 1)
        self.rope = Rotation(hidden_size // num_heads)
        self.x_embedder = Patches(in_channels, hidden_size, patch_size)
        self.t_embedder = NumberEmbedder(hidden_size)
        self.fps_embedder = NumberEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)

        def blocks() -> nn.ModuleList:
            width = int(hidden_size * mlp_ratio)
            return nn.ModuleList([Block(hidden_size, num_heads, width, qk_norm=qk_norm) for _ in range(depth)])

        self.spatial_blocks = blocks()
        self.temporal_blocks = blocks()
        self.final_layer = FinalLayer(hidden_size, math.prod(patch_size) * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        fps: float,
        height: int,
        width: int,
        return_dict: bool = True,
    ) -> Any:
        """The velocity from noise to video, and the half that is not read.

        Args:
            hidden_states: latents [R, in_channels, frames, rows, columns].
            timestep: [R], 1000 … 0; rounded to the dtype of the model, as upstream does.
            encoder_hidden_states: [R, L, caption_channels].
            encoder_attention_mask: [R, L], 0 behind the text. A row without any 1 is masked as its other branch, half
                of the rows away: so upstream masks the null embedding.
            fps: frames a second.
            height, width: pixels.

        Returns:
            [R, out_channels, frames, rows, columns] in the dtype of the model.
        """
        dtype = self.x_embedder.proj.weight.dtype
        frames, rows, columns = hidden_states.shape[2:]
        x = self.x_embedder(hidden_states.to(dtype))  # [R, C, T, H, W]
        grid = (x.shape[2], x.shape[3], x.shape[4])
        scale = math.sqrt(height * width) / self.config["input_sq_size"]
        places = grid_embedding(x.shape[1], grid[1], grid[2], scale=scale, device=x.device).to(dtype)
        x = x.flatten(3).permute(0, 2, 3, 1) + places  # [R, T, S, C]
        x = x.flatten(1, 2)

        speed = torch.full((1,), float(fps), device=x.device)
        t = self.t_embedder(timestep.to(dtype)) + self.fps_embedder(speed.to(dtype))
        modulation = self.t_block(t).unflatten(1, (6, -1))
        y = self.y_embedder.y_proj(encoder_hidden_states.to(dtype))
        mask = branch_mask(encoder_attention_mask)[:, None, None]

        angles = self.rope(grid[0])
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            x = spatial(x, y, modulation, mask, grid[0], None)
            x = temporal(x, y, modulation, mask, grid[0], angles)
        x = self.final_layer(x, t)
        x = unpatched(x, grid, tuple(self.config["patch_size"]))[:, :, :frames, :rows, :columns]
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def branch_mask(mask: Tensor) -> Tensor:
    """Which tokens are read, bool [R, L]: of a row without any those of its other branch, else all."""
    mask = mask.bool()
    for instead in (mask.roll(mask.shape[0] // 2, 0), torch.ones_like(mask)):
        mask = torch.where(mask.any(1, keepdim=True), mask, instead)
    return mask


def grid_embedding(width: int, rows: int, columns: int, *, scale: float, device: torch.device) -> Tensor:
    """Sinusoidal positions of the tokens of a frame, fp32 [rows·columns, width]: of the column, then of the row.

    Args:
        scale: of the video, where 1 has `input_sq_size` pixels a side.
    """
    frequencies = 10000.0 ** -(torch.arange(0, width // 2, 2, device=device, dtype=torch.float32) / (width // 2))
    base = round(math.sqrt(rows * columns))
    down, right = (torch.arange(n, device=device, dtype=torch.float32) * (base / n / scale) for n in (rows, columns))
    parts = []
    for places in (right.repeat(rows), down.repeat_interleave(columns)):
        angles = places[:, None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, 1)


def unpatched(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, ...]) -> Tensor:
    """[R, T·H·W, patch·channels] → [R, channels, frames, rows, columns]."""
    x = x.reshape(x.shape[0], *grid, *patch, -1)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(*x.shape[:2], *(n * p for n, p in zip(grid, patch)))


class Patches(nn.Module):
    """Latents → tokens [R, C, T, H, W]; zeros at the far ends where a patch is not whole."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, tuple(patch), tuple(patch))  # type: ignore[arg-type]  # a list, from JSON

    def forward(self, x: Tensor) -> Tensor:
        ends = [(0, -size % patch) for size, patch in zip(x.shape[2:], self.proj.kernel_size)]
        return self.proj(F.pad(x, [n for end in reversed(ends) for n in end]))  # type: ignore[no-any-return]


class NumberEmbedder(nn.Module):
    """Numbers [R] → [R, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, numbers: Tensor) -> Tensor:
        embedded = get_timestep_embedding(numbers, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(embedded.to(self.mlp[0].weight.dtype))  # type: ignore[no-any-return]


class CaptionEmbedder(nn.Module):
    """The text encoder's output → C; and what stands for no text."""

    def __init__(self, channels: int, width: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = MLP(channels, width, width)
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)


class MLP(nn.Module):
    """Two linear layers, GELU by tanh between them."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class Rotation(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of neighbouring elements; the frequencies are stored."""

    def __init__(self, head: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** -(torch.arange(0, head, 2)[: head // 2].float() / head)
        self.freqs = nn.Parameter(frequencies, requires_grad=False)

    def forward(self, length: int) -> Tensor:
        """Angles fp32 [length, head]; both of a pair have the same."""
        places = torch.arange(length, device=self.freqs.device, dtype=torch.float32)
        return (places[:, None] * self.freqs.float()).repeat_interleave(2, 1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of the last dimension of [..., length, head], each turned by its angle; computed in fp32."""
    wide = x.float()
    one, other = wide.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    across = torch.stack([-other, one], -1).flatten(-2)
    return (wide * angles.cos() + across * angles.sin()).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention within sequences, with normed queries and keys."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads, EPS) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads, EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        """[sequences, length, C] → the same; angles of rotary positions, or none."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Attention of all tokens to the text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """x [R, N, C], y [R, L, C], mask bool [R, 1, 1, L] → [R, N, C]."""
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Self-attention, cross-attention and an MLP, the first and the last modulated by the timestep."""

    def __init__(self, width: int, heads: int, hidden: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS, elementwise_affine=False)
        self.attn = SelfAttention(width, heads, qk_norm=qk_norm)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPS, elementwise_affine=False)
        self.mlp = MLP(width, hidden, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: Tensor, y: Tensor, modulation: Tensor, mask: Tensor, frames: int, angles: Tensor | None
    ) -> Tensor:
        """One block.

        Args:
            x: [R, T·S, C].
            modulation: [R, 6, C].
            frames: T.
            angles: of the frames: attention runs over these; None: over the tokens of a frame.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + modulation).chunk(6, 1)
        z = (self.norm1(x) * (1 + scale) + shift).unflatten(1, (frames, -1))  # [R, T, S, C]
        if angles is not None:
            z = z.transpose(1, 2)
        z = self.attn(z.flatten(0, 1), angles).unflatten(0, z.shape[:2])
        if angles is not None:
            z = z.transpose(1, 2)
        x = x + gate * z.flatten(1, 2)
        x = x + self.cross_attn(x, y, mask)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """The head: norm, modulation, patches."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [R, N, C], t [R, C] → [R, N, out]."""
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, 1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)  # type: ignore[no-any-return]
