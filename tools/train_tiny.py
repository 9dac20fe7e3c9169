"""Trains the bundled models of `lemica_trt/zoo` from nothing on a CPU.

Stages, in order; each reads what the one before left in `--work` (build/MODEL); training
resumes from its last checkpoint, also with a larger `--steps`:

    vae          shapes -> autoencoder                                     vae.pt
    latents      shapes -> encoder -> latents, one file of 1000 clips each latents-*.pt
    transformer  latents, captions -> transformer and text encoders        transformer.pt
    distill      transformer -> one that is given the guidance scale       distilled.pt
    export       all of it, fp16 -> a diffusers folder, and the prompt files
    sheet        the folder -> a contact sheet (PNG) through the real pipeline

    torchrun --nproc-per-node 2 tools/train_tiny.py vae --model wan-tiny --steps 1120
    torchrun --nproc-per-node 2 tools/train_tiny.py latents --model wan-tiny --clips 4000
    torchrun --nproc-per-node 2 tools/train_tiny.py transformer --model wan-tiny --steps 3800
    python tools/train_tiny.py export --model wan-tiny
    python tools/train_tiny.py sheet --model wan-tiny --out sheet.png

`latte-tiny` and `flux-tiny` have one autoencoder: `vae.pt` of the one is copied to the other.
Only `flux-tiny` is distilled.

No weights of `latte-tiny` ship yet: 480 steps with 10 clips each (loss 1.01 to 0.25) draw no shapes.

The commands, times and losses of the published weights are in each folder's README.md.
What differs between the models is a `Recipe`: the modules, how latents are normalised, and the
noise schedule. 10 % of the captions are dropped for classifier-free guidance (Ho & Salimans 2022).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LattePipeline,
    LatteTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "lemica_trt" / "zoo"
PROMPTS = ROOT / "calibration"

TOKENS = 16  # text tokens a prompt is padded to: max_sequence_length
SHARD = 1000  # clips in one latents-*.pt
STEPS = 50  # of the sampler, on contact sheets
CHANNELS = 8  # of the latents of the autoencoder of images

# Data-parallel training under torchrun, one thread a process: on two busy cores it is about
# twice as fast as two threads, which wait for each other at every small operation.
PROCESSES, RANK = (int(os.environ.get(key, n)) for key, n in (("WORLD_SIZE", 1), ("RANK", 0)))


# ---------------------------------------------------------------- tokenizers


def build_tokenizer(words: tuple[str, ...] = shapes.WORDS) -> T5Tokenizer:
    """A T5 tokenizer (unigram) with one token a word; letters are lower-cased.

    The lower-casing is a SentencePiece character map, compiled here from a table, since that is
    the one normaliser that a T5Tokenizer keeps when transformers saves and loads it.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    return T5Tokenizer(
        vocab=special + [(f"\u2581{word}", -3.0) for word in words],
        extra_ids=0,
        model_max_length=TOKENS,
        _spm_precompiled_charsmap=lower_case_map(),
    )


def lower_case_map() -> bytes:
    """SentencePiece's compiled character map A-Z -> a-z, and `. , ! ?` -> a space."""
    import io
    import tempfile

    import sentencepiece

    rules = {chr(c): chr(c + 32) for c in range(ord("A"), ord("Z") + 1)}
    rules |= dict.fromkeys(".,!?", " ")
    table = "".join(f"{ord(a):X}\t{ord(b):X}\n" for a, b in rules.items())
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        file.write(table)
        file.flush()
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(map(str, shapes.CAPTIONS)),
            model_writer=model,
            vocab_size=64,
            hard_vocab_limit=False,
            normalization_rule_tsv=file.name,
            minloglevel=2,
        )
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    return proto.normalizer_spec.precompiled_charsmap


def build_clip_tokenizer(words: tuple[str, ...]) -> CLIPTokenizer:
    """A CLIP tokenizer (byte pairs) with one token a word, and single letters for what it does not know."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    learned = Tokenizer(models.BPE(unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learned.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=SHARD, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    letters = [a + b for a in sorted(pre_tokenizers.ByteLevel.alphabet()) for b in ("", "</w>")]
    tokens = dict.fromkeys([*letters, *(a + b for a, b in merges), start, end])
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


# ---------------------------------------------------------------- what differs between the models


class Recipe:
    """One model: its modules, the layout and scale of its latents, its noise schedule.

    Attributes:
        name: of the model and of its folder.
        pipeline: diffusers class.
        captions: what it draws.
        prompts: folder of its calibration prompts.
        arguments: of the pipeline's call, for a contact sheet.
        vae_stride: of the frames that train the autoencoder.
        distilled: whether the stage `distill` follows training.
    """

    name: str
    pipeline: type[DiffusionPipeline]
    captions = shapes.CAPTIONS
    prompts = "cogvideox-tiny"
    arguments: dict[str, Any] = {
        "num_frames": shapes.FRAMES,
        "max_sequence_length": TOKENS,
        "guidance_scale": 4.0,
    }
    vae_stride = 1
    distilled = False

    def build_vae(self) -> nn.Module:
        """Of 8 x 8 latents.

        The posterior starts narrow (log-variance -6): from 0, its noise drowns the early signal.
        """
        raise NotImplementedError

    def build_transformer(self) -> nn.Module:
        """Blocks of 4 heads x 32; modulations and head start near zero.

        So each block starts as the identity (Peebles & Xie 2023, section 3.2, "adaLN-Zero").
        """
        raise NotImplementedError

    def build_tokenizers(self) -> dict[str, Any]:
        """Component of the pipeline -> tokenizer."""
        return {"tokenizer": build_tokenizer()}

    def build_text_encoders(self, tokenizers: dict[str, Any]) -> dict[str, nn.Module]:
        """Component of the pipeline -> two layers of width 64 over the small vocabulary."""
        return {"text_encoder": T5EncoderModel(T5Config(vocab_size=len(tokenizers["tokenizer"]), **T5_SIZES))}

    def build_scheduler(self) -> Any:
        """The pipeline's sampler."""
        raise NotImplementedError

    def embed(self, text_encoders: dict[str, nn.Module], ids: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
        """What the pipeline gives the transformer of prompts.

        Args:
            ids: tokenizer -> int64 `[n, TOKENS]`.
            lengths: int64 `[n]`: tokens of the prompts, also where `ids` are those of the empty prompt.
        """
        return {"encoder_hidden_states": text_encoders["text_encoder"](ids["tokenizer"])[0]}

    def for_vae(self, video: Tensor) -> Tensor:
        """`[n, 3, frames, h, w]` -> what the autoencoder takes."""
        return video

    def latents_from_posterior(self, mean: Tensor) -> Tensor:
        """Latents of the autoencoder -> the transformer's layout, `[n, ...]`."""
        raise NotImplementedError

    def vae_config(self, latents: Tensor) -> dict[str, Any]:
        """What the autoencoder's config says of the scale of latents, measured on these."""
        return {"scaling_factor": round(1 / latents.std().item(), 4)}

    def normalise(self, latents: Tensor, config: dict[str, Any]) -> Tensor:
        """Latents of about unit variance; the pipeline undoes it before it decodes."""
        return latents * config["scaling_factor"]

    def noised(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The transformer's input, its timestep, and the target; `u` in [0, 1) is the place in the schedule."""
        raise NotImplementedError

    def predict(self, transformer: nn.Module, x: Tensor, timestep: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The transformer's output, as the pipeline calls it."""
        return transformer(hidden_states=x, timestep=timestep, **text, return_dict=False)[0]


def velocity_of(scheduler: Any, x0: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Recipe.noised` of v-prediction."""
    alphas = scheduler.alphas_cumprod.float()[timestep]  # [n]
    a, s = (x.sqrt().view(-1, *[1] * (x0.dim() - 1)) for x in (alphas, 1 - alphas))
    return a * x0 + s * noise, timestep, a * noise - s * x0


def flow_of(x0: Tensor, noise: Tensor, u: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """`Recipe.noised` of rectified flow: the straight line from a clip to noise, and its velocity (Liu et al. 2023)."""
    sigma = shift * u / (1 + (shift - 1) * u)
    mix = sigma.view(-1, *[1] * (x0.dim() - 1))
    return (1 - mix) * x0 + mix * noise, sigma * 1000, noise - x0


class CogVideoXTiny(Recipe):
    """v-prediction with zero terminal SNR.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.
    """

    name = "cogvideox-tiny"
    pipeline = CogVideoXPipeline

    def build_vae(self) -> AutoencoderKLCogVideoX:
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(8, 16, 32, 64),
            latent_channels=16,
            layers_per_block=1,
            norm_num_groups=4,
            temporal_compression_ratio=4,
            sample_height=shapes.HEIGHT,
            sample_width=shapes.WIDTH,
        )
        nn.init.constant_(vae.encoder.conv_out.conv.bias[16:], -6.0)
        return vae

    def build_transformer(self) -> CogVideoXTransformer3DModel:
        model = CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=16,
            out_channels=16,
            time_embed_dim=64,
            text_embed_dim=64,
            num_layers=6,
            sample_width=8,
            sample_height=8,
            sample_frames=shapes.FRAMES,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=TOKENS,
            spatial_interpolation_scale=1.0,
            temporal_interpolation_scale=1.0,
        )
        for block in model.transformer_blocks:
            start_near_zero(block.norm1.linear, block.norm2.linear)
        start_near_zero(model.norm_out.linear, model.proj_out)
        return model

    def build_scheduler(self) -> CogVideoXDDIMScheduler:
        """CogVideoX-2B's schedule, less its SNR shift: 8 x 8 latents need less noise than 60 x 90."""
        return CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.0120,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=True,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
        )

    def latents_from_posterior(self, mean: Tensor) -> Tensor:
        return mean.permute(0, 2, 1, 3, 4)

    def noised(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return velocity_of(self.build_scheduler(), x0, noise, (u * 1000).long().clamp(max=999))


class WanTiny(Recipe):
    """Rectified flow.

    Sampling shifts noise levels by 3, as Wan does for 480p; training by 2, so that it also sees
    the lower ones, where shapes get their edges.
    """

    name = "wan-tiny"
    pipeline = WanPipeline

    def build_vae(self) -> AutoencoderKLWan:
        """Its first halving of space is pixels to channels (Wan 2.2's option): cheap on a CPU."""
        vae = AutoencoderKLWan(
            base_dim=16,
            decoder_base_dim=16,
            z_dim=16,
            dim_mult=[1, 2, 3],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            patch_size=2,
            in_channels=12,
            out_channels=12,
        )
        nn.init.constant_(vae.quant_conv.bias[16:], -6.0)
        return vae

    def build_transformer(self) -> WanTransformer3DModel:
        model = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=16,
            out_channels=16,
            text_dim=64,
            freq_dim=64,
            ffn_dim=256,
            num_layers=5,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        )
        start_near_zero(model.condition_embedder.time_proj, model.proj_out)
        for block in model.blocks:
            nn.init.zeros_(block.scale_shift_table)
        return model

    def build_text_encoders(self, tokenizers: dict[str, Any]) -> dict[str, nn.Module]:
        return {"text_encoder": UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizers["tokenizer"]), **T5_SIZES))}

    def build_scheduler(self) -> UniPCMultistepScheduler:
        """Wan 2.1's own, shift of 480p."""
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)

    def embed(self, text_encoders: dict[str, nn.Module], ids: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
        mask = ids["tokenizer"] > 0  # 0 is <pad>; the pipeline zeroes the embeddings behind the mask
        states = text_encoders["text_encoder"](ids["tokenizer"], mask.long())[0]
        return {"encoder_hidden_states": states * mask[..., None]}

    def latents_from_posterior(self, mean: Tensor) -> Tensor:
        return mean

    def vae_config(self, latents: Tensor) -> dict[str, Any]:
        dims = (0, 2, 3, 4)
        return {
            "latents_mean": [round(x, 4) for x in latents.mean(dims).tolist()],
            "latents_std": [round(x, 4) for x in latents.std(dims).tolist()],
        }

    def normalise(self, latents: Tensor, config: dict[str, Any]) -> Tensor:
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (latents - mean) / std

    def noised(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flow_of(x0, noise, u, shift=2.0)


class OfFrames(Recipe):
    """An autoencoder of images, which takes each frame for itself: [3, 64, 64] <-> [8, 8, 8]."""

    vae_stride = 4  # neighbours are nearly alike

    def build_vae(self) -> AutoencoderKL:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 48, 48),
            latent_channels=CHANNELS,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=shapes.HEIGHT,
        )
        nn.init.constant_(vae.quant_conv.bias[CHANNELS:], -6.0)
        return vae.to(memory_format=torch.channels_last)  # three times as fast on a CPU

    def for_vae(self, video: Tensor) -> Tensor:
        return video.transpose(1, 2).flatten(0, 1)


class LatteTiny(OfFrames):
    """v-prediction with zero terminal SNR, as CogVideoXTiny; Latte predicts noise, which was not tried.

    The noise schedule is Latte's own. Training sees more of its lower half, where shapes get their edges.
    """

    name = "latte-tiny"
    pipeline = LattePipeline
    arguments = {"video_length": shapes.FRAMES, "guidance_scale": 4.0}

    def build_transformer(self) -> LatteTransformer3DModel:
        model = LatteTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,  # the second half are variances in Latte; DDIM reads none
            num_layers=3,
            cross_attention_dim=128,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=64,
            video_length=shapes.FRAMES,
        )
        start_near_zero(model.adaln_single.linear, model.proj_out)
        nn.init.zeros_(model.scale_shift_table)
        for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
            nn.init.zeros_(block.scale_shift_table)
        return model

    def build_scheduler(self) -> DDIMScheduler:
        return DDIMScheduler(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="linear",
            clip_sample=False,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        )

    def embed(self, text_encoders: dict[str, nn.Module], ids: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
        """Each prompt has its own tokens, and the empty one as many as the prompt that it stands beside."""
        most = int(lengths.max())
        tokens = ids["tokenizer"][:, :most]
        states = text_encoders["text_encoder"](tokens, attention_mask=(tokens > 0).long())[0]
        behind = torch.arange(most) >= lengths[:, None]
        bias = (behind * -10000.0)[:, None].repeat_interleave(shapes.FRAMES, dim=0)
        return {"encoder_hidden_states": states, "encoder_attention_mask": bias}

    def latents_from_posterior(self, mean: Tensor) -> Tensor:
        return mean.unflatten(0, (-1, shapes.FRAMES)).transpose(1, 2)

    def noised(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return velocity_of(self.build_scheduler(), x0, noise, (u**1.5 * 1000).long().clamp(max=999))

    def predict(self, transformer: nn.Module, x: Tensor, timestep: Tensor, text: dict[str, Tensor]) -> Tensor:
        return super().predict(transformer, x, timestep, text).chunk(2, dim=1)[0]


class FluxTiny(OfFrames):
    """Still pictures by rectified flow; then, as FLUX.1 dev, distilled to take the guidance scale as an input.

    Before that the scale that it is given is 1. Its sampler shifts noise levels by 1.58 for 16 tokens.
    """

    name = "flux-tiny"
    pipeline = FluxPipeline
    captions = shapes.STILLS
    prompts = "flux-tiny"
    arguments = {"max_sequence_length": TOKENS, "guidance_scale": 3.5}
    vae_stride = 1
    distilled = True
    words = shapes.words_of(shapes.PLACES)

    def build_transformer(self) -> FluxTransformer2DModel:
        model = FluxTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=3,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        for block in model.transformer_blocks:
            start_near_zero(block.norm1.linear, block.norm1_context.linear)
        start_near_zero(*(block.norm.linear for block in model.single_transformer_blocks))
        start_near_zero(model.norm_out.linear, model.proj_out)
        return model

    def build_tokenizers(self) -> dict[str, Any]:
        return {"tokenizer": build_clip_tokenizer(self.words), "tokenizer_2": build_tokenizer(self.words)}

    def build_text_encoders(self, tokenizers: dict[str, Any]) -> dict[str, nn.Module]:
        clip = tokenizers["tokenizer"]
        config = CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
        return {
            "text_encoder": CLIPTextModel(config),
            "text_encoder_2": T5EncoderModel(T5Config(vocab_size=len(tokenizers["tokenizer_2"]), **T5_SIZES)),
        }

    def build_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """FLUX.1 dev's own."""
        return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)

    def embed(self, text_encoders: dict[str, nn.Module], ids: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
        return {
            "pooled_projections": text_encoders["text_encoder"](ids["tokenizer"]).pooler_output,
            "encoder_hidden_states": text_encoders["text_encoder_2"](ids["tokenizer_2"])[0],
        }

    def latents_from_posterior(self, mean: Tensor) -> Tensor:
        return FluxPipeline._pack_latents(mean, *mean.shape)

    def vae_config(self, latents: Tensor) -> dict[str, Any]:
        return {"shift_factor": round(latents.mean().item(), 4), **super().vae_config(latents)}

    def normalise(self, latents: Tensor, config: dict[str, Any]) -> Tensor:
        return (latents - config["shift_factor"]) * config["scaling_factor"]

    def noised(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flow_of(x0, noise, u, shift=1.5)

    def predict(self, transformer: nn.Module, x: Tensor, timestep: Tensor, text: dict[str, Tensor]) -> Tensor:
        places = FluxPipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)
        given = {"guidance": torch.ones(len(x)), **text}
        return transformer(
            hidden_states=x,
            timestep=timestep / 1000,
            img_ids=places,
            txt_ids=torch.zeros(TOKENS, 3),
            return_dict=False,
            **given,
        )[0]


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (CogVideoXTiny(), WanTiny(), LatteTiny(), FluxTiny())}

T5_SIZES = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
    "decoder_start_token_id": 0,
}


def start_near_zero(*linears: nn.Linear) -> None:
    """Small weights, no bias."""
    for linear in linears:
        nn.init.normal_(linear.weight, std=1e-3)
        nn.init.zeros_(linear.bias)


# ---------------------------------------------------------------- the optimiser


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz for matrices (Jordan et al. 2024, "Muon").

    Convolution kernels count as matrices [out, in * kernel]. Matrices of one shape go through
    the iteration together, in one batch: small ones cost little that way.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                update = update.reshape(len(p), -1)
                by_shape.setdefault(tuple(update.shape), []).append((p, update))
            for shape, pairs in by_shape.items():
                updates = orthogonal_from_matrices(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update.reshape(p.shape), alpha=-scale)


def orthogonal_from_matrices(g: Tensor, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factor of each matrix, fp32 `[n, rows, columns]`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Trainer:
    """Two optimisers, one linear-decay schedule, an exponential moving average, one file."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        file: Path,
        steps: int,
        muon_lr: float,
        adam_lr: float,
        decay: float,
        ema: float,
    ) -> None:
        self.modules, self.file, self.steps, self.decay, self.ema = modules, file, steps, decay, ema
        named = [(n, p) for m in modules.values() for n, p in m.named_parameters()]
        is_matrix = {  # more than one row and column; embeddings are tables of vectors
            n: min(len(p), p.numel() // len(p)) > 1 and not re.search(r"(^|\.)(shared|embed)", n) for n, p in named
        }
        self.optimizers = [
            Muon([p for n, p in named if is_matrix[n]], lr=muon_lr),
            torch.optim.AdamW(
                [p for n, p in named if not is_matrix[n]],
                lr=adam_lr,
                betas=(0.9, 0.98),
                weight_decay=0.0,
            ),
        ]
        self.base_lrs = [muon_lr, adam_lr]
        self.average = {k: [p.detach().clone() for p in m.parameters()] for k, m in modules.items()}
        self.step = 0
        self.seconds = 0.0
        if file.exists():
            state = torch.load(file, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.average, self.step = state["average"], state["step"]
            self.seconds = state["seconds"]
            print(f"resumed {file.name} at step {self.step}", flush=True)

    def update(self, loss: Tensor) -> None:
        """One step: backward, mean over processes, clip, both optimisers, average."""
        loss.backward()
        if PROCESSES > 1:
            grads = [p.grad for m in self.modules.values() for p in m.parameters()]
            flat = torch.cat([g.flatten() for g in grads])
            distributed.all_reduce(flat)
            parts = flat.div_(PROCESSES).split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
        rate = min(1.0, (self.step + 1) / 100, (self.steps - self.step) / (self.decay * self.steps))
        for optimizer, lr in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * max(rate, 0.0)
        nn.utils.clip_grad_norm_([p for m in self.modules.values() for p in m.parameters()], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.ema, self.step / (self.step + 10))
        for key, module in self.modules.items():
            torch._foreach_lerp_(self.average[key], [p.detach() for p in module.parameters()], 1 - keep)

    def seed(self, seed: int) -> None:
        """Randomness of the coming step: by seed, step and process, so a resumed run is the same."""
        torch.manual_seed((seed * 1_000_003 + self.step) * 64 + RANK)

    def save(self) -> None:
        if RANK:
            return
        state = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)


def load_average(module: nn.Module, file: Path, key: str) -> nn.Module:
    """The module with the averaged weights of a checkpoint, for inference."""
    state = torch.load(file, weights_only=True)
    module.load_state_dict(state["modules"][key])
    for p, average in zip(module.parameters(), state["average"][key], strict=True):
        p.data.copy_(average)
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------- vae


def video_from_clips(clips: np.ndarray) -> Tensor:
    """uint8 `[n, frames, h, w, 3]` -> fp32 `[n, 3, frames, h, w]` in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def crops_from_video(video: Tensor, size: int = 32) -> Tensor:
    """One random window a clip, placed where something moves: cheap early training."""
    windows = []
    for clip in video:
        motion = (clip[:, -1] - clip[:, 0]).abs().sum(0).flatten()
        centre = int(torch.multinomial(motion + 1e-3, 1))
        y, x = (
            min(max(c - size // 2 + int(torch.randint(-8, 9, ())), 0), n - size)
            for c, n in zip(divmod(centre, clip.shape[3]), clip.shape[2:], strict=True)
        )
        windows.append(clip[:, :, y : y + size, x : x + size])
    return torch.stack(windows)


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 and squared error on values, and L1 on differences of neighbours: colour, sharp edges."""
    edges = sum(F.l1_loss(y.diff(dim=dim), x.diff(dim=dim)) for dim in (-2, -1))
    return 2.0 * F.l1_loss(y, x) + 8.0 * F.mse_loss(y, x) + 0.5 * edges


def train_vae(recipe: Recipe, work: Path, steps: int, seed: int, batch: int) -> None:
    """The first 95 % of the steps on 9 x 32 x 32 windows; the rest on whole clips, half the batch.

    (The batch is that of all processes together.)
    """
    torch.manual_seed(seed)
    vae = recipe.build_vae().train()
    trainer = Trainer({"vae": vae}, work / "vae.pt", steps, muon_lr=6e-3, adam_lr=3e-3, decay=0.5, ema=0.98)
    mean = 0.0
    while trainer.step < steps:
        tick = time.time()
        trainer.seed(seed)
        windows = trainer.step < 0.95 * steps
        own = (batch if windows else batch // 2) // PROCESSES
        x = video_from_clips(shapes.draw_clips(own, torch.initial_seed())[0])
        x = recipe.for_vae((crops_from_video(x) if windows else x)[:, :, :: recipe.vae_stride])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        reconstruction = reconstruction_loss(y, x)
        kl = posterior.kl().sum() / posterior.mean.numel()  # nats an element
        trainer.update(reconstruction + 2.5e-5 * kl)
        trainer.seconds += time.time() - tick
        mean = reconstruction.item() if trainer.step % 20 == 1 else mean + reconstruction.item()
        if trainer.step % 20 == 0 and RANK == 0:
            psnr = -10 * math.log10(F.mse_loss(y.detach(), x).item() / 4)
            print(
                f"vae step {trainer.step} loss {mean / 20:.4f} psnr {psnr:.1f} dB kl {kl.item():.2f}"
                f" {'windows' if windows else 'clips'} {trainer.seconds:.0f} s",
                flush=True,
            )
        if trainer.step % 100 == 0:
            trainer.save()
    trainer.save()


# ---------------------------------------------------------------- latents


@torch.no_grad()
def make_latents(recipe: Recipe, work: Path, count: int, seed: int) -> None:
    """Posterior means, fp16 `[1000, ...]` a file, not normalised, and the captions."""
    vae = load_average(recipe.build_vae(), work / "vae.pt", "vae")
    for shard in range(math.ceil(count / SHARD)):
        file = work / f"latents-{shard:03d}.pt"
        if file.exists() or shard % PROCESSES != RANK:
            continue
        clips, captions = shapes.draw_clips(SHARD, seed + 1 + shard, captions=recipe.captions)
        parts = [vae.encode(recipe.for_vae(video_from_clips(c))).latent_dist.mode() for c in np.split(clips, 125)]
        latents = recipe.latents_from_posterior(torch.cat(parts)).half()
        torch.save({"latents": latents, "captions": [str(c) for c in captions]}, file)
        print(f"{file.name}: std {latents.float().std():.3f}", flush=True)


def load_latents(recipe: Recipe, work: Path) -> tuple[Tensor, list[str]]:
    """All shards, normalised, fp32, and the captions."""
    shards = [torch.load(f, weights_only=True) for f in sorted(work.glob("latents-*.pt"))]
    if not shards:
        raise SystemExit(f"no latents-*.pt in {work}: run the stage `latents` first")
    latents = torch.cat([s["latents"] for s in shards]).float()
    return recipe.normalise(latents, vae_config(recipe, work)), [caption for s in shards for caption in s["captions"]]


def vae_config(recipe: Recipe, work: Path) -> dict[str, Any]:
    """Scale of the latents, by the first shard."""
    return recipe.vae_config(torch.load(work / "latents-000.pt", weights_only=True)["latents"].float())


# ---------------------------------------------------------------- transformer


class Batches:
    """Noised latents and prompts.

    Attributes:
        own: how many of a batch are this process's.
    """

    def __init__(self, recipe: Recipe, work: Path, batch: int) -> None:
        self.recipe, self.own = recipe, batch // PROCESSES
        self._latents, captions = load_latents(recipe, work)
        prompts = ["", *sorted(set(captions))]
        self._ids = {
            name: tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
            for name, tokenizer in recipe.build_tokenizers().items()
        }
        self._lengths = torch.tensor([len(prompt.split()) + 1 for prompt in prompts])  # a token a word, and the end
        self._prompts = torch.tensor([prompts.index(c) for c in captions])

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The transformer's input, its timestep, the target, and which prompts."""
        index = torch.randint(0, len(self._latents), (self.own,))
        x0 = self._latents[index]
        # stratified: one place in each of `own` equal parts of the schedule
        u = (torch.arange(self.own) + torch.rand(self.own)) / self.own
        return (*self.recipe.noised(x0, torch.randn_like(x0), u), self._prompts[index])

    def embed(self, text_encoders: dict[str, nn.Module], prompts: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Of prompts, or where they are not kept of the empty prompt, which is 0."""
        ids = {name: its[prompts * kept] for name, its in self._ids.items()}
        return self.recipe.embed(text_encoders, ids, self._lengths[prompts])


def run_steps(name: str, trainer: Trainer, seed: int, loss_of: Callable[[], Tensor]) -> None:
    """The steps that are left, a line for each 50, a checkpoint for each 200."""
    mean = 0.0
    while trainer.step < trainer.steps:
        tick = time.time()
        trainer.seed(seed)
        loss = loss_of()
        trainer.update(loss)
        trainer.seconds += time.time() - tick
        mean = loss.item() if trainer.step % 50 == 1 else mean + loss.item()
        if trainer.step % 50 == 0 and RANK == 0:
            print(f"{name} step {trainer.step} loss {mean / 50:.4f} {trainer.seconds:.0f} s", flush=True)
        if trainer.step % 200 == 0:
            trainer.save()
    trainer.save()


def train_transformer(recipe: Recipe, work: Path, steps: int, seed: int, batch: int, decay: float) -> None:
    """Loss is the mean squared error of the recipe's target, over its whole noise schedule."""
    batches = Batches(recipe, work, batch)
    torch.manual_seed(seed)
    transformer = recipe.build_transformer().train()
    encoders = {k: m.train() for k, m in recipe.build_text_encoders(recipe.build_tokenizers()).items()}

    def loss_of() -> Tensor:
        x, timestep, target, prompts = batches.draw()
        text = batches.embed(encoders, prompts, torch.rand(batches.own) >= 0.1)
        return F.mse_loss(recipe.predict(transformer, x, timestep, text), target)

    trainer = Trainer(
        {"transformer": transformer, **encoders},
        work / "transformer.pt",
        steps,
        muon_lr=4e-3,
        adam_lr=1.5e-3,
        decay=decay,
        ema=0.995,
    )
    run_steps("transformer", trainer, seed, loss_of)


def distill(recipe: Recipe, work: Path, steps: int, seed: int, batch: int, decay: float) -> None:
    """A transformer that is given the guidance scale, 1 to 6, learns what guidance makes of two calls.

    Meng et al. 2023, "On Distillation of Guided Diffusion Models", section 3.1; the loss is in parts of the scale.
    """
    if not recipe.distilled:
        raise SystemExit(f"{recipe.name} has guidance of two calls: nothing to distill")
    batches = Batches(recipe, work, batch)
    encoders = {
        key: load_average(module, work / "transformer.pt", key)
        for key, module in recipe.build_text_encoders(recipe.build_tokenizers()).items()
    }
    teacher, student = (load_average(recipe.build_transformer(), work / "transformer.pt", "transformer") for _ in "ab")
    student.train().requires_grad_(True)

    def loss_of() -> Tensor:
        x, timestep, _, prompts = batches.draw()
        scale = 1 + 5 * torch.rand(batches.own)
        with torch.no_grad():
            text, empty = (batches.embed(encoders, prompts, torch.full_like(prompts, kept)) for kept in (1, 0))
            with_text, without = (recipe.predict(teacher, x, timestep, its) for its in (text, empty))
            factor = scale.view(-1, *[1] * (x.dim() - 1))
            target = without + factor * (with_text - without)
        output = recipe.predict(student, x, timestep, {**text, "guidance": scale})
        return F.mse_loss(output / factor.sqrt(), target / factor.sqrt())

    trainer = Trainer(
        {"transformer": student}, work / "distilled.pt", steps, muon_lr=2e-3, adam_lr=1e-3, decay=decay, ema=0.99
    )
    run_steps("distill", trainer, seed, loss_of)


# ---------------------------------------------------------------- export and contact sheet


def export(recipe: Recipe, work: Path, folder: Path) -> None:
    """Averaged weights in fp16 -> the diffusers folder, put in place by one rename."""
    tokenizers = recipe.build_tokenizers()
    vae = load_average(recipe.build_vae(), work / "vae.pt", "vae")
    vae.register_to_config(**vae_config(recipe, work))
    trained = work / ("distilled.pt" if recipe.distilled else "transformer.pt")
    encoders = {
        key: load_average(module, work / "transformer.pt", key)
        for key, module in recipe.build_text_encoders(tokenizers).items()
    }
    pipeline = recipe.pipeline(
        **tokenizers,
        **encoders,
        vae=vae.to(memory_format=torch.contiguous_format),
        transformer=load_average(recipe.build_transformer(), trained, "transformer"),
        scheduler=recipe.build_scheduler(),
    )
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(new)
    # transformers loads in the dtype that its config names, diffusers in fp32: name fp32, so that
    # a plain from_pretrained gives one dtype throughout.
    for config in (new / key / "config.json" for key in encoders):
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for file in new.rglob("*.safetensors"):  # written as 0600: a package must be readable
        file.chmod(0o644)
    if folder.exists():
        card = folder / "README.md"
        if card.exists():
            shutil.copy(card, new / "README.md")
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    prompts = PROMPTS / recipe.prompts
    prompts.mkdir(parents=True, exist_ok=True)
    for split in ("calibration", "held_out"):
        (prompts / f"{split}.txt").write_text(shapes.prompt_file_of(split, recipe.prompts, recipe.captions))
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder.name}: {size / 1e6:.2f} MB", flush=True)


def drawn_by(recipe: Recipe, folder: Path, prompts: Sequence[str], seed: int) -> np.ndarray:
    """Clips or stills in fp32 by the real pipeline; prompt s has seed + s; uint8 `[n, frames, h, w, 3]`."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    clips = []
    for i, prompt in enumerate(prompts):
        made = pipeline(
            prompt,
            height=shapes.HEIGHT,
            width=shapes.WIDTH,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed + i),
            output_type="np",
            **recipe.arguments,
        )
        clips.append(np.asarray(made.frames[0] if hasattr(made, "frames") else made.images))
    return (np.stack(clips) * 255).round().astype(np.uint8)


def sheet(recipe: Recipe, folder: Path, out: Path, seed: int, count: int, split: str) -> None:
    """`count` prompts, a clip a row, or 9 stills a row; upscaled twice."""
    from PIL import Image

    prompts = [str(c) for c in shapes.captions_of(split, recipe.captions)[:count]]
    frames = drawn_by(recipe, folder, prompts, seed)
    frames = frames.reshape(-1, shapes.FRAMES, *frames.shape[2:])  # [rows, 9, h, w, 3]
    image = Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in frames]))
    out.parent.mkdir(parents=True, exist_ok=True)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(out)
    print("\n".join(f"{i}: {p}" for i, p in enumerate(prompts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "latents", "transformer", "distill", "export", "sheet"))
    parser.add_argument("--model", choices=tuple(RECIPES), default="cogvideox-tiny")
    parser.add_argument("--work", type=Path, help="checkpoints; build/MODEL")
    parser.add_argument("--folder", type=Path, help="the diffusers folder; lemica_trt/zoo/MODEL")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="the contact sheet")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, help="of all processes; vae 4 windows, transformer 48")
    parser.add_argument("--decay", type=float, default=0.45, help="part of the transformer's steps with a falling rate")
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=8, help="prompts on the sheet")
    parser.add_argument("--split", default="held_out", help="whose prompts the sheet shows")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads // PROCESSES)
    if PROCESSES > 1:
        distributed.init_process_group("gloo")
    recipe = RECIPES[args.model]
    work, folder = args.work or ROOT / "build" / recipe.name, args.folder or ZOO / recipe.name
    work.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        train_vae(recipe, work, args.steps, args.seed, args.batch or 4)
    elif args.stage == "latents":
        make_latents(recipe, work, args.clips, args.seed)
    elif args.stage == "transformer":
        train_transformer(recipe, work, args.steps, args.seed, args.batch or 48, args.decay)
    elif args.stage == "distill":
        distill(recipe, work, args.steps, args.seed, args.batch or 48, args.decay)
    elif args.stage == "export":
        export(recipe, work, folder)
    else:
        sheet(recipe, folder, args.out, args.seed, args.count, args.split)


if __name__ == "__main__":
    main()
