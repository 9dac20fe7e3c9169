"""Complete pipelines of a few thousand random weights, saved as folders, and profiles for them."""

from __future__ import annotations

import logging
from pathlib import Path

import diffusers
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from lemica_trt.ir.profile import Profile, Sampling, Shape

TEXT_LENGTH = 8
WIDTH = 32


def tokenizer() -> T5Tokenizer:
    """A real T5 tokenizer whose vocabulary is the lower-case letters."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    letters = [("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def _randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Fresh modules have zero biases and unit norms, which hide mistakes."""
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module.eval()


def tiny_cogvideox(folder: Path, *, rotary: bool = False, patch_size_t: int | None = None, layers: int = 2) -> Path:
    """CogVideoX at 9 frames of 32×32: `rotary` is the 5B's positions, with `patch_size_t` it is 1.5."""
    torch.manual_seed(0)
    tokens = tokenizer()
    diffusers.CogVideoXPipeline(
        tokenizer=tokens,
        text_encoder=_randomise(
            T5EncoderModel(
                T5Config(
                    vocab_size=len(tokens), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=layers, num_heads=4,
                    feed_forward_proj="gated-gelu",
                )
            )
        ),
        vae=_randomise(
            diffusers.AutoencoderKLCogVideoX(
                down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
                block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
                temporal_compression_ratio=4, scaling_factor=0.7,
            )
        ),
        transformer=_randomise(
            diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
                text_embed_dim=WIDTH, num_layers=layers, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
                patch_size_t=patch_size_t, patch_bias=patch_size_t is None, max_text_seq_length=TEXT_LENGTH,
                use_rotary_positional_embeddings=rotary,
            )
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_wan(folder: Path, *, layers: int = 2) -> Path:
    """Wan 2.1 at 5 frames of 32×32."""
    torch.manual_seed(0)
    tokens = tokenizer()
    diffusers.WanPipeline(
        tokenizer=tokens,
        text_encoder=_randomise(
            UMT5EncoderModel(
                UMT5Config(
                    vocab_size=len(tokens), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=layers, num_heads=4,
                    feed_forward_proj="gated-gelu",
                )
            )
        ),
        vae=_randomise(
            diffusers.AutoencoderKLWan(
                base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                temperal_downsample=[False, True, True],
            )
        ),
        transformer=_randomise(
            diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
                text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=32,
            )
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_profile(source: Path, family: str, *, frames: int, **changes: object) -> Profile:
    """The profile of a tiny pipeline; `changes` are fields of Profile, Shape or Sampling."""
    fields: dict[str, dict[str, object]] = {
        "profile": {"name": "tiny", "family": family, "source": str(source), "dtype": "fp32"},
        "shape": {"frames": frames, "height": 32, "width": 32, "max_batch": 2},
        "sampling": {"steps": 4, "guidance_scale": 3.0},
    }
    fields["profile"]["text_length"] = TEXT_LENGTH
    for name, value in changes.items():
        kind = "shape" if name in Shape.__struct_fields__ else "profile"
        fields["sampling" if name in Sampling.__struct_fields__ else kind][name] = value
    return Profile(**fields["profile"], shape=Shape(**fields["shape"]), sampling=Sampling(**fields["sampling"]))


def make_variant(variant: str, folder: Path, *, layers: int = 2) -> Profile:
    """The pipelines that most tests run on, by name: `sincos`, `rotary`, `packed` (CogVideoX 1.5), `wan`."""
    if variant == "wan":
        return tiny_profile(tiny_wan(folder, layers=layers), "wan", frames=5)
    packed = variant == "packed"
    tiny_cogvideox(folder, rotary=variant != "sincos", patch_size_t=2 if packed else None, layers=layers)
    return tiny_profile(folder, "cogvideox", frames=9)
