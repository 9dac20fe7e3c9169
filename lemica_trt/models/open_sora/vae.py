"""The autoencoder of Open-Sora 1.2, in two stages: images to latents 8 × 8 times smaller, then frames 4 times fewer.

Written from `opensora/models/vae/vae.py` and `opensora/models/vae/vae_temporal.py` of github.com/hpcaitech/Open-Sora,
tag v1.2.0 (Apache License 2.0). Parameters have the names and shapes of hpcai-tech/OpenSora-VAE-v1.2. The first stage
is diffusers' `AutoencoderKL`; the second is built of convolutions that are causal in time (MAGVIT-v2, arXiv
2310.05737).

Frames are coded in pieces of 17, which are 5 latents: 20 frames, of which the first 3 are padding. As in training a
piece knows nothing of the one before.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from torch.nn import functional as F

SCALING = 0.18215
"""Of the first stage's latents, whatever its own config says."""

DOWNSAMPLE = (False, True, True)
"""Behind which of the second stage's levels, but the last, frames are halved."""

FACTOR = 2 ** sum(DOWNSAMPLE)
"""Frames to a latent."""

MULTIPLIERS = (1, 2, 2, 4)
"""Channels of its levels."""

SHIFT, SCALE = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)
"""Mean and deviation of its latents, by channel, as published."""


class OpenSoraVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """See the module docstring.

    Args:
        spatial: config of the first stage (`AutoencoderKL`).
        filters: channels of the second stage's first level.
        res_blocks: residual blocks of each of its levels.
        norm_num_groups: of its norms.
        micro_frame_size: frames of a piece; None: all.
        micro_batch_size: images that the first stage codes at once; None: all.
        latent_shift, latent_scale: of the latents, by channel; the weights have them too (`shift`, `scale`).
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        spatial: Mapping[str, Any],
        filters: int = 128,
        res_blocks: int = 4,
        norm_num_groups: int = 32,
        micro_frame_size: int | None = 17,
        micro_batch_size: int | None = 4,
        latent_shift: Sequence[float] = SHIFT,
        latent_scale: Sequence[float] = SCALE,
    ) -> None:
        super().__init__()
        self.spatial_vae = _Spatial(AutoencoderKL.from_config(dict(spatial)))
        channels = self.spatial_vae.module.config["latent_channels"]
        self.temporal_vae = _Temporal(channels, filters, res_blocks, norm_num_groups)
        for name, numbers in (("shift", latent_shift), ("scale", latent_scale)):
            self.register_buffer(name, torch.tensor(numbers)[None, :, None, None, None])

    def latent_frames(self, frames: int) -> int:
        """Latents of so many frames."""
        return sum(-(-size // FACTOR) for size in self._pieces(frames))

    @property
    def spatial_factor(self) -> int:
        """Pixels to a latent."""
        levels: int = len(self.spatial_vae.module.config["block_out_channels"])
        return 1 << (levels - 1)

    def _pieces(self, frames: int) -> list[int]:
        size = self.config["micro_frame_size"] or frames
        return [min(size, frames - start) for start in range(0, frames, size)]

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Frames [b, 3, frames, height, width], −1 … 1 → a distribution of latents before shift and scale.

        The first stage's latents are the means of its distributions; upstream draws them.
        """
        flat = [self.spatial_vae.module.encode(part).latent_dist.mode() * SCALING for part in self._images(x)]
        latents = _as_video(torch.cat(flat), x.shape[0])
        pieces = torch.split(latents, self._pieces(x.shape[2]), 2)
        moments = [self.temporal_vae.moments(piece) for piece in pieces]
        posterior = DiagonalGaussianDistribution(torch.cat(moments, 2))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, num_frames: int, return_dict: bool = True) -> Any:
        """Latents as the transformer has them → frames.

        Args:
            z: [b, channels, `latent_frames(num_frames)`, rows, columns].

        Returns:
            [b, 3, num_frames, 8·rows, 8·columns], about −1 … 1.

        Raises:
            ValueError: z has not as many latents.
        """
        if z.shape[2] != self.latent_frames(num_frames):
            raise ValueError(f"{num_frames} frames are {self.latent_frames(num_frames)} latents, got {z.shape[2]}")
        z = z * self.scale.to(z.dtype) + self.shift.to(z.dtype)
        sizes = self._pieces(num_frames)
        parts = torch.split(z, [-(-size // FACTOR) for size in sizes], 2)
        latents = torch.cat([self.temporal_vae.decode(part, size) for part, size in zip(parts, sizes)], 2)
        images = [self.spatial_vae.module.decode(part / SCALING).sample for part in self._images(latents)]
        frames = _as_video(torch.cat(images), z.shape[0])
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def _images(self, x: Tensor) -> tuple[Tensor, ...]:
        """[b, channels, frames, …] → batches of images."""
        images = x.transpose(1, 2).flatten(0, 1)
        return torch.split(images, self.config["micro_batch_size"] or len(images))


def _as_video(images: Tensor, batch: int) -> Tensor:
    """[b·frames, channels, …] → [b, channels, frames, …]."""
    return images.reshape(batch, -1, *images.shape[1:]).transpose(1, 2)


class _Spatial(nn.Module):
    """The first stage, below its published name."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


class CausalConv3d(nn.Module):
    """A convolution that reads no later frame: in time all padding is in front.

    Args:
        stride: in time.
    """

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        around = kernel // 2
        self._padding = (around, around, around, around, kernel - stride, 0)
        self.conv = nn.Conv3d(channels, out, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self._padding))  # type: ignore[no-any-return]


class _ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, out)
        self.conv1, self.conv2 = CausalConv3d(channels, out, 3, bias=False), CausalConv3d(out, out, 3, bias=False)
        if channels != out:
            self.conv3 = CausalConv3d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.conv3(x) if hasattr(self, "conv3") else x)  # type: ignore[no-any-return]


def _res_blocks(channels: int, out: int, count: int, groups: int) -> nn.ModuleList:
    widths = [channels, *[out] * count]
    return nn.ModuleList([_ResBlock(*pair, groups) for pair in itertools.pairwise(widths)])


def _through(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class _Encoder(nn.Module):
    """Latents of images → moments, of every `FACTOR` frames."""

    def __init__(self, channels: int, moments: int, filters: int, count: int, groups: int) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in MULTIPLIERS]
        self.conv_in = CausalConv3d(channels, filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            [_res_blocks(*pair, count, groups) for pair in itertools.pairwise([filters, *widths])]
        )
        self.conv_blocks = nn.ModuleList(
            [CausalConv3d(n, n, 3, stride=2) if halves else nn.Identity() for n, halves in zip(widths, DOWNSAMPLE)]
        )
        self.res_blocks = _res_blocks(widths[-1], widths[-1], count, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], moments, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, down in itertools.zip_longest(self.block_res_blocks, self.conv_blocks):
            x = _through(level, x)
            x = x if down is None else down(x)
        x = _through(self.res_blocks, x)
        return self.conv2(F.silu(self.norm1(x)))  # type: ignore[no-any-return]


class _Decoder(nn.Module):
    """Latents → latents of images, `FACTOR` for each; the lists are in the encoder's order, and run backwards."""

    def __init__(self, channels: int, latents: int, filters: int, count: int, groups: int) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in MULTIPLIERS]
        self.conv1 = CausalConv3d(latents, widths[-1], 3)
        self.res_blocks = _res_blocks(widths[-1], widths[-1], count, groups)
        self.block_res_blocks = nn.ModuleList(
            [_res_blocks(above, own, count, groups) for above, own in zip([*widths[1:], widths[-1]], widths)]
        )
        self.conv_blocks = nn.ModuleList(
            [CausalConv3d(n, 2 * n, 3) if doubles else nn.Identity() for n, doubles in zip(widths[1:], DOWNSAMPLE)]
        )
        self.norm1 = nn.GroupNorm(groups, filters)
        self.conv_out = CausalConv3d(filters, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = _through(self.res_blocks, self.conv1(x))
        for i in reversed(range(len(MULTIPLIERS))):
            x = _through(self.block_res_blocks[i], x)
            if i and DOWNSAMPLE[i - 1]:
                x = self.conv_blocks[i - 1](x).unflatten(1, (-1, 2))  # [b, channels, 2, frames, …]
                x = x.transpose(2, 3).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))  # type: ignore[no-any-return]


class _Temporal(nn.Module):
    """The second stage."""

    def __init__(self, channels: int, filters: int, count: int, groups: int) -> None:
        super().__init__()
        self.encoder = _Encoder(channels, 2 * channels, filters, count, groups)
        self.quant_conv = CausalConv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = CausalConv3d(channels, channels, 1)
        self.decoder = _Decoder(channels, channels, filters, count, groups)

    def moments(self, x: Tensor) -> Tensor:
        """A piece of latents of images → moments; zeros in front fill it up to a multiple of `FACTOR`."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % FACTOR, 0))
        return self.quant_conv(self.encoder(x))  # type: ignore[no-any-return]

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """A piece of latents → latents of so many images, the last ones."""
        return self.decoder(self.post_quant_conv(z))[:, :, -frames % FACTOR :]  # type: ignore[no-any-return]
