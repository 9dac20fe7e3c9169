"""What a family of diffusion transformers is: the few facts that differ, each with diffusers' own way of it.

A new family is one file with one subclass, and its name in `load.FAMILIES`; nothing else asks what a model is called.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.core.text import Cleaning
from lemica_trt.ir.profile import DType, Profile, Shape

DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Family:
    """One architecture. The methods take diffusers objects, untyped upstream.

    Attributes:
        name: what a profile's `family` says.
        pipeline_class: `_class_name` in `model_index.json`.
        block_lists, epilogue: the ends of the trunk, see `split`.
        text_mask: whether the text encoder is given an attention mask, and padding is zeroed behind it.
        clean: how a prompt is cleaned before it is tokenised, see `TextSpec`.
        vae_dtype: precision that users run the VAE in; None: that of the DiT.
        dynamic_guidance: whether the pipeline has CogVideoX's `use_dynamic_cfg`.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    block_lists: ClassVar[tuple[str, ...]]
    epilogue: ClassVar[str]
    text_mask: ClassVar[bool] = False
    clean: ClassVar[Cleaning] = "none"
    vae_dtype: ClassVar[DType | None] = None
    dynamic_guidance: ClassVar[bool] = False

    def check(self, pipeline: Any, profile: Profile) -> None:
        """Refuse what the family's class can be but this tool cannot build.

        Raises:
            UnsupportedError: says what.
        """
        if profile.sampling.dynamic_guidance and not self.dynamic_guidance:
            raise UnsupportedError(
                f"{self.pipeline_class} has no dynamic guidance", fix="remove dynamic_guidance from the profile"
            )

    def latent_shape(self, pipeline: Any, shape: Shape) -> tuple[int, ...]:
        """Shape of the latents of one sample, without batch.

        Raises:
            InputError: the model cannot make frames of this shape.
        """
        raise NotImplementedError

    def prepare(self, pipeline: Any, profile: Profile, latent_shape: tuple[int, ...]) -> None:
        """Change the loaded pipeline, in place, so that the shape's constants are baked; must not change results."""

    def constants(self, pipeline: Any, shape: Shape, latent_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Tensors that every call of the transformer is given at this shape."""
        return {}

    def transformer_inputs(
        self, hidden_states: Tensor, timestep: Tensor, prompt_embeds: Tensor, constants: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Keyword arguments of the diffusers transformer.

        Args:
            hidden_states: DiT dtype [R, *latent_shape].
            timestep: fp32 [R].
            prompt_embeds: DiT dtype [R, text_length, width].
            constants: from `constants`.
        """
        return {"hidden_states": hidden_states, "timestep": timestep, "encoder_hidden_states": prompt_embeds}

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Make the scheduler ready for `steps` steps exactly as the pipeline does."""
        scheduler.set_timesteps(steps, device="cpu")

    def call_arguments(self, profile: Profile, noise: Tensor) -> dict[str, Any]:
        """What the pipeline's call takes beyond the arguments that all pipelines have.

        Args:
            noise: fp32 [b, *latent_shape], standard normal; returned as `latents`, in the dtype that it must have.
        """
        return {"latents": noise}

    def decode(self, vae: Any, latents: Tensor, shape: Shape) -> Tensor:
        """Decode as the pipeline does, including its scaling.

        Args:
            latents: fp32 [b, *latent_shape].

        Returns:
            VAE dtype [b, 3, frames, height, width], about −1 … 1.
        """
        raise NotImplementedError


class TextEncoder(nn.Module):
    """Token ids → prompt embeddings, as diffusers' `encode_prompt` has them; the text encoder graph."""

    def __init__(self, encoder: nn.Module, *, mask: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask = mask
        self.dtype = dtype

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encode.

        Args:
            inputs: `input_ids` int64 [rows, text_length], and with a mask `attention_mask` int64 of the same shape.

        Returns:
            `prompt_embeds`: DiT dtype [rows, text_length, width]; zero behind the mask.
        """
        if not self.mask:
            return {"prompt_embeds": self.encoder(inputs["input_ids"])[0].to(self.dtype)}
        mask = inputs["attention_mask"]
        embeds = self.encoder(inputs["input_ids"], mask)[0].to(self.dtype)
        return {"prompt_embeds": torch.where(mask[:, :, None] > 0, embeds, torch.zeros_like(embeds))}


class VideoDecoder(nn.Module):
    """Latents → 8-bit frames: decode, postprocess and round as diffusers' PIL output does; the VAE decoder graph."""

    def __init__(self, family: Family, vae: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.vae = vae
        self._family = family
        self._shape = shape

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decode.

        Args:
            inputs: `latents` fp32 [b, *latent_shape].

        Returns:
            `frames`: uint8 [b, frames, height, width, 3].
        """
        video = self._family.decode(self.vae, inputs["latents"], self._shape).float()
        pixels = ((video * 0.5 + 0.5).clamp(0, 1) * 255).round()
        return {"frames": pixels.permute(0, 2, 3, 4, 1).to(torch.uint8)}


def require_multiple(shape: Shape, *, frames: int, height: int, width: int) -> None:
    """Check a shape bucket against what a model can make.

    Args:
        shape: the bucket.
        frames: frames − 1 must be a multiple of this.
        height, width: must be multiples of these.

    Raises:
        InputError: otherwise; names the nearest that works.
    """
    if (shape.frames - 1) % frames:
        nearest = (shape.frames - 1) // frames * frames + 1
        raise InputError(
            f"frames must be a multiple of {frames} plus 1 for this model, got {shape.frames}",
            fix=f"use {nearest} or {nearest + frames}",
        )
    for name, value, unit in (("height", shape.height, height), ("width", shape.width, width)):
        if value % unit:
            raise InputError(
                f"{name} must be a multiple of {unit} for this model, got {value}",
                fix=f"use {max(value // unit, 1) * unit}",
            )
