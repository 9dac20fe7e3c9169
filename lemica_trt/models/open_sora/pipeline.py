"""The pipeline of Open-Sora 1.2: T5, the loop of rectified flow, guidance away from the null embedding.

Written from `scripts/inference.py`, `opensora/schedulers/rf/` and `opensora/models/text_encoder/t5.py` of
github.com/hpcaitech/Open-Sora, tag v1.2.0 (Apache License 2.0).

Upstream's sampler is Euler on velocities from noise to video, with timesteps that are later for larger videos,

    t' = r·t / (1 + (r − 1)·t),  r = √(pixels / 512²) · √(latent frames).

That is diffusers' `FlowMatchEulerDiscreteScheduler` with the linear shift r, on velocities from video to noise: the
model's output with its sign turned. Other schedulers for flow matching may take its place.

Height and width are multiples of 8. Upstream's sizes need not be: it tells the transformer that a video of "240p" is
426 pixels wide, and decodes 424 of them.

Prompts are lower-cased. Upstream's script also strikes links, markup and the like out of them (`clean_caption`), and
puts " aesthetic score: 6.5." behind each: write that into the prompt to get the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from lemica_trt.models.open_sora.transformer import STDiT3
from lemica_trt.models.open_sora.vae import OpenSoraVAE

BASE_PIXELS = 512 * 512
"""Of the video whose timesteps are not shifted; it has one latent frame."""

IMAGE_FPS = 120
"""What the model is told where there is one frame."""

SCHEDULER = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
"""Settings of the scheduler: the linear shift is what its `set_timesteps` is given."""


@dataclass
class OpenSoraOutput(BaseOutput):  # type: ignore[misc]
    """Videos, one for each prompt: of the output type that was asked for."""

    frames: Any


class OpenSoraPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text to video; see the module docstring."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        transformer: STDiT3,
        vae: OpenSoraVAE,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )

    def encode_prompt(self, texts: Sequence[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
        """What the transformer reads of texts.

        Args:
            max_sequence_length: L; longer texts are cut.

        Returns:
            Embeddings [b, L, width] in the transformer's dtype and a mask int64 [b, L]. A text without words is the
            transformer's null embedding, and its mask is 0: `STDiT3` then masks it like the other branch.
        """
        device = self._execution_device
        tokens = self.tokenizer(
            [text.lower().strip() for text in texts],
            max_length=max_sequence_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(device)
        null = self.transformer.y_embedder.y_embedding[:max_sequence_length]
        embeds = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].to(null.dtype)
        written = mask.sum(1, keepdim=True) > 1  # there is an end token
        return torch.where(written[:, :, None], embeds, null), mask * written

    def timesteps(self, num_inference_steps: int, height: int, width: int, num_frames: int) -> Tensor:
        """Set the scheduler; the timesteps of a loop, falling from 1000. A scheduler that does not use dynamic shifting
        keeps the shift that it has."""
        scheduler, device = self.scheduler, self._execution_device
        taken = inspect.signature(scheduler.set_timesteps).parameters
        shift = math.sqrt(height * width / BASE_PIXELS) * math.sqrt(self._shifting_frames(num_frames))
        dynamic = scheduler.config.get("use_dynamic_shifting", False)
        if dynamic and {"sigmas", "mu"} <= taken.keys():
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
            scheduler.set_timesteps(sigmas=sigmas, mu=shift, device=device)
        else:
            if dynamic:  # DPM-Solver++ takes no sigmas
                scheduler.register_to_config(flow_shift=shift)
            scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler.timesteps  # type: ignore[no-any-return]

    def _shifting_frames(self, num_frames: int) -> int:
        """Latents of the whole pieces of a video, as upstream counts; of all of it where it is shorter than one."""
        size: int = self.vae.config["micro_frame_size"] or num_frames
        whole: int = num_frames // size * self.vae.latent_frames(size)
        return whole or int(self.vae.latent_frames(num_frames))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int = 240,
        width: int = 424,
        num_frames: int = 51,
        fps: float = 24,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        max_sequence_length: int = 300,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        """Make videos.

        Args:
            prompt: of each.
            negative_prompt: None or without words: the null embedding, what the model was trained with.
            height, width: pixels, multiples of 8.
            fps: frames a second that the model is told of.
            guidance_scale: 1 or less: the prompt's branch alone.
            latents: noise [b, channels, latent frames, rows, columns]; drawn with `generator` where there is none.
            max_sequence_length: tokens of a prompt, at most those of the null embedding.
            output_type: `latent`, or what diffusers' `VideoProcessor` takes.

        Returns:
            (frames,), or an output with `frames`.

        Raises:
            ValueError: the prompts do not match, have more tokens than the null embedding, or there is no such size.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given = negative_prompt or ""
        negatives = [given] * len(prompts) if isinstance(given, str) else list(given)
        self._require_possible(len(prompts), len(negatives), height, width, max_sequence_length)
        embeds, mask = self.encode_prompt(prompts, max_sequence_length)
        if guidance_scale > 1:
            null, null_mask = self.encode_prompt(negatives, max_sequence_length)
            embeds, mask = torch.cat([null, embeds]), torch.cat([null_mask, mask])
        else:  # no row is another one's branch
            mask = torch.where(mask.any(1, keepdim=True), mask, torch.ones_like(mask))
        factor = self.vae.spatial_factor
        if latents is None:
            shape = (self.vae.latent_frames(num_frames), height // factor, width // factor)
            size = (len(prompts), self.transformer.config["in_channels"], *shape)
            latents = randn_tensor(size, generator=generator, device=self._execution_device, dtype=torch.float32)
        timesteps = self.timesteps(num_inference_steps, height, width, num_frames)
        told = {"fps": fps if num_frames > 1 else IMAGE_FPS, "height": height, "width": width}
        frames: Any = self._denoised(latents, timesteps, embeds, mask, guidance_scale, told)
        if output_type != "latent":
            video = self.vae.decode(frames.to(self.vae.dtype), num_frames, return_dict=False)[0]
            frames = VideoProcessor(vae_scale_factor=factor).postprocess_video(video, output_type=output_type)
        self.maybe_free_model_hooks()
        return OpenSoraOutput(frames=frames) if return_dict else (frames,)

    def _require_possible(self, prompts: int, negatives: int, height: int, width: int, length: int) -> None:
        if negatives != prompts:
            raise ValueError(f"expected a negative prompt for each of {prompts} prompts, got {negatives}")
        most, factor = self.transformer.config["model_max_length"], self.vae.spatial_factor
        if not 1 <= length <= most:
            raise ValueError(f"expected prompts of 1 to {most} tokens, got max_sequence_length {length}")
        if height % factor or width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, got {height} and {width}")

    def _denoised(
        self, x: Tensor, timesteps: Tensor, embeds: Tensor, mask: Tensor, scale: float, told: dict[str, Any]
    ) -> Tensor:
        """The loop, in fp32; the negative prompts' rows are the first where there are twice as many as of x."""
        x = x.to(self._execution_device, torch.float32)
        branches = len(embeds) // len(x)
        with self.progress_bar(total=len(timesteps)) as bar:
            for t in timesteps:
                rows = torch.cat([x] * branches)
                output = self.transformer(rows, t.expand(len(rows)), embeds, mask, **told, return_dict=False)[0]
                velocity = output.float()[:, : x.shape[1]]
                if branches == 2:
                    away, towards = velocity.chunk(2)
                    velocity = away + scale * (towards - away)
                x = self.scheduler.step(-velocity, t, x, return_dict=False)[0]
                bar.update()
        return x
