"""Tiny text-to-video pipelines."""

from __future__ import annotations

from typing import Any

import diffusers

from lemica_trt.ir.trace import TraceRequest
from lemica_trt.models.open_sora.pipeline import SCHEDULER, OpenSoraPipeline
from lemica_trt.models.open_sora.transformer import STDiT3
from lemica_trt.models.open_sora.vae import OpenSoraVAE
from lemica_trt.testing.pipelines import parts
from lemica_trt.testing.pipelines.images import HEADS, ROPE, kandinsky_transformer
from lemica_trt.testing.pipelines.parts import (
    WIDTH,
    Case,
    chat_tokenizer,
    clip,
    clip_tokenizer,
    flow,
    kl,
    language_model,
    qwen_vl,
    random,
    shifting_flow,
    t5,
    tokenizer,
    unipc,
    wan_vae,
)

VIDEO = TraceRequest(height=32, width=48, frames=9)


def cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(), text_encoder=t5(),
        vae=random(
            diffusers.AutoencoderKLCogVideoX(
                down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
                block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            )
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        transformer=random(
            diffusers.CogVideoXTransformer3DModel(
                in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=WIDTH, num_layers=2, sample_width=6,
                sample_height=4, sample_frames=9, use_rotary_positional_embeddings=True, **HEADS,
            )
        ),
    )  # fmt: skip


def wan_transformer(**changes: Any) -> Any:
    return random(
        diffusers.WanTransformer3DModel(
            text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32, num_attention_heads=2,
            attention_head_dim=12, **changes,
        )
    )  # fmt: skip


def wan() -> Any:
    return diffusers.WanPipeline(
        tokenizer=tokenizer(), text_encoder=t5("UMT5"), vae=wan_vae(), scheduler=unipc(), transformer=wan_transformer()
    )


def hunyuan_vae() -> Any:
    return random(
        diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
    )


def hunyuanvideo() -> Any:
    return diffusers.HunyuanVideoPipeline(
        text_encoder=language_model("Llama"), tokenizer=tokenizer(length=4096, ends="<s> $A"), vae=hunyuan_vae(),
        scheduler=flow(shift=7.0), text_encoder_2=clip(), tokenizer_2=clip_tokenizer(),
        transformer=random(
            diffusers.HunyuanVideoTransformer3DModel(
                in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1,
                text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=ROPE, **HEADS,
            )
        ),
    )  # fmt: skip


def hunyuanvideo_15() -> Any:
    pipeline = diffusers.HunyuanVideo15Pipeline(
        text_encoder=qwen_vl(text_only=True), tokenizer=chat_tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
        vae=random(
            diffusers.AutoencoderKLHunyuanVideo15(
                latent_channels=4, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1
            )
        ),
        scheduler=flow(shift=7.0), guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        transformer=random(
            diffusers.HunyuanVideo15Transformer3DModel(
                in_channels=9, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=WIDTH,
                text_embed_2_dim=WIDTH, image_embed_dim=8, rope_axes_dim=ROPE, target_size=64, task_type="t2v", **HEADS,
            )
        ),
    )  # fmt: skip
    pipeline.tokenizer_max_length, pipeline.vision_num_semantic_tokens = 128, 16
    return pipeline


def kandinsky5() -> Any:
    return diffusers.Kandinsky5T2VPipeline(
        scheduler=flow(shift=5.0), vae=hunyuan_vae(), text_encoder=qwen_vl(), tokenizer=chat_tokenizer(),
        text_encoder_2=clip(), tokenizer_2=clip_tokenizer(), transformer=kandinsky_transformer(),
    )  # fmt: skip


def ltx() -> Any:
    return diffusers.LTXPipeline(
        scheduler=shifting_flow(), text_encoder=t5(), tokenizer=tokenizer(),
        vae=random(
            diffusers.AutoencoderKLLTXVideo(
                latent_channels=8, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
                layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
            )
        ),
        transformer=random(
            diffusers.LTXVideoTransformer3DModel(
                in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=2, caption_channels=WIDTH, **HEADS
            )
        ),
    )  # fmt: skip


def mochi() -> Any:
    return diffusers.MochiPipeline(
        scheduler=flow(), text_encoder=t5(), tokenizer=tokenizer(),
        vae=random(
            diffusers.AutoencoderKLMochi(
                encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
                layers_per_block=(1,) * 5, add_attention_block=(False,) * 5,
            )
        ),
        transformer=random(
            diffusers.MochiTransformer3DModel(
                num_layers=2, pooled_projection_dim=16, in_channels=12, text_embed_dim=WIDTH, time_embed_dim=16, **HEADS
            )
        ),
    )  # fmt: skip


def allegro() -> Any:
    return diffusers.AllegroPipeline(
        tokenizer=tokenizer(), text_encoder=t5(),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(beta_end=0.02, beta_schedule="linear"),
        vae=random(
            diffusers.AutoencoderKLAllegro(
                block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, sample_size=160
            )
        ),
        transformer=random(
            diffusers.AllegroTransformer3DModel(
                num_layers=2, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, sample_height=20,
                sample_width=30, sample_frames=6, caption_channels=WIDTH,
            )
        ),
    )  # fmt: skip


def latte() -> Any:
    return diffusers.LattePipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=kl(4),
        scheduler=diffusers.DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        transformer=random(
            diffusers.LatteTransformer3DModel(
                in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, attention_bias=True, sample_size=4,
                patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
                norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=WIDTH, video_length=4, **HEADS,
            )
        ),
    )  # fmt: skip


def easyanimate() -> Any:
    return diffusers.EasyAnimatePipeline(
        vae=random(
            diffusers.AutoencoderKLMagvit(
                latent_channels=4, block_out_channels=[4, 4, 4, 4], layers_per_block=1, norm_num_groups=2
            )
        ),
        text_encoder=qwen_vl(), tokenizer=chat_tokenizer(), scheduler=flow(shift=5.0),
        transformer=random(
            diffusers.EasyAnimateTransformer3DModel(
                in_channels=4, out_channels=4, patch_size=2, num_layers=2, mmdit_layers=1, time_embed_dim=16,
                text_embed_dim=WIDTH, sample_width=6, sample_height=4, add_norm_text_encoder=True, **HEADS,
            )
        ),
    )  # fmt: skip


def sana_video() -> Any:
    return diffusers.SanaVideoPipeline(
        tokenizer=tokenizer(ends="<s> $A"), text_encoder=language_model("Gemma2"), vae=wan_vae(),
        scheduler=parts.dpm(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=random(
            diffusers.SanaVideoTransformer3DModel(
                in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2,
                num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
                caption_channels=WIDTH, rope_max_seq_len=32,
            )
        ),
    )  # fmt: skip


def wan22() -> Any:
    """Two experts: one for the noisy steps, one for the rest."""
    given = wan().components
    given["transformer_2"] = wan_transformer()
    return diffusers.WanPipeline(**{**given, "boundary_ratio": 0.875})


def wan22_i2v() -> Any:
    """Two experts, which are given the image as channels alone."""
    given = wan().components
    networks = {name: wan_transformer(in_channels=36) for name in ("transformer", "transformer_2")}
    return diffusers.WanImageToVideoPipeline(**{**given, **networks, "boundary_ratio": 0.9})


def wan22_ti2v() -> Any:
    """A timestep a token."""
    return diffusers.WanPipeline(**{**wan().components, "expand_timesteps": True})


PICTURE_TOKENS = 5
"""Of a picture of 32x32 in patches of 16, and its class."""


def wan_i2v() -> Any:
    import transformers

    vision = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4, image_size=32,
            patch_size=16,
        )
    ).eval()  # fmt: skip
    size = {"height": 32, "width": 32}
    given = wan().components
    given["transformer"] = wan_transformer(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=24)
    processor = transformers.CLIPImageProcessor(size=size, crop_size=size)
    return diffusers.WanImageToVideoPipeline(**{**given, "image_encoder": vision, "image_processor": processor})


def wan_flf2v() -> Any:
    """Its network has places for the tokens of two pictures: a call without the last one fails."""
    given = wan_i2v().components
    given["transformer"] = wan_transformer(
        in_channels=36, image_dim=WIDTH, added_kv_proj_dim=24, pos_embed_seq_len=2 * PICTURE_TOKENS
    )
    return diffusers.WanImageToVideoPipeline(**given)


def cogvideox_i2v() -> Any:
    given = cogvideox().components
    given["transformer"] = random(
        diffusers.CogVideoXTransformer3DModel(
            in_channels=8, out_channels=4, time_embed_dim=16, text_embed_dim=WIDTH, num_layers=2, sample_width=6,
            sample_height=4, sample_frames=9, use_rotary_positional_embeddings=True, **HEADS,
        )
    )  # fmt: skip
    return diffusers.CogVideoXImageToVideoPipeline(**given)


def cogvideox_dpm() -> Any:
    given = cogvideox().components
    given["scheduler"] = diffusers.CogVideoXDPMScheduler.from_config(given["scheduler"].config)
    return diffusers.CogVideoXPipeline(**given)


def ltx_i2v() -> Any:
    return diffusers.LTXImageToVideoPipeline(**ltx().components)


def ltx2() -> Any:
    """Video and audio: two states."""
    import transformers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    text = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={
                "vocab_size": parts.SIZE, "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": parts.PAD,
            },
            vision_config={
                "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
            mm_tokens_per_image=4, image_token_index=parts.SIZE - 1, boi_token_index=parts.SIZE - 2,
            eoi_token_index=parts.SIZE - 3,
        )
    ).eval()  # fmt: skip
    heads = {
        "video_connector_num_attention_heads": 2, "video_connector_attention_head_dim": 16,
        "audio_connector_num_attention_heads": 2, "audio_connector_attention_head_dim": 16,
    }  # fmt: skip
    return diffusers.LTX2Pipeline(
        scheduler=shifting_flow(), text_encoder=text, tokenizer=tokenizer(length=4096, ends="<s> $A"),
        connectors=random(
            LTX2TextConnectors(
                caption_channels=WIDTH, text_proj_in_factor=3, video_connector_num_layers=1,
                video_connector_num_learnable_registers=8, audio_connector_num_layers=1,
                audio_connector_num_learnable_registers=8, **heads,
            )
        ),
        vae=random(
            diffusers.AutoencoderKLLTX2Video(
                latent_channels=4, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(8, 16, 32),
                layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32,
                temporal_compression_ratio=8,
            )
        ),
        audio_vae=random(
            diffusers.AutoencoderKLLTX2Audio(
                base_channels=8, ch_mult=(1, 2, 4), num_res_blocks=1, latent_channels=2, mel_bins=16, resolution=32
            )
        ),
        vocoder=random(
            LTX2Vocoder(
                in_channels=32, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
                resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
            )
        ),
        transformer=random(
            diffusers.LTX2VideoTransformer3DModel(
                in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
                audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
                audio_cross_attention_dim=16, num_layers=2, caption_channels=WIDTH,
            )
        ),
    )  # fmt: skip


def open_sora() -> Any:
    vae = OpenSoraVAE(
        spatial=dict(kl(shift_factor=None, scaling_factor=0.13025).config), filters=4, res_blocks=1, norm_num_groups=2,
        micro_frame_size=5,
    )  # fmt: skip
    return OpenSoraPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=random(vae), scheduler=flow(**SCHEDULER),
        transformer=random(
            STDiT3(
                hidden_size=24, depth=2, num_heads=2, mlp_ratio=2.0, caption_channels=WIDTH, model_max_length=64,
            )
        ),
    )  # fmt: skip


SHORT = TraceRequest(height=32, width=48, frames=9, max_sequence_length=64)

CASES = {
    "allegro": Case(allegro, TraceRequest(height=160, width=240, frames=24, max_sequence_length=64)),
    "cogvideox": Case(cogvideox, SHORT),
    "cogvideox-dpm": Case(
        cogvideox_dpm,
        TraceRequest(height=32, width=48, frames=9, max_sequence_length=64, arguments={"use_dynamic_cfg": True}),
    ),
    "cogvideox-i2v": Case(cogvideox_i2v, SHORT),
    "easyanimate": Case(easyanimate, VIDEO),
    "hunyuanvideo": Case(hunyuanvideo, VIDEO),
    "hunyuanvideo-1.5": Case(hunyuanvideo_15, TraceRequest(height=64, width=96, frames=9)),
    "kandinsky5": Case(kandinsky5, VIDEO),
    "latte": Case(latte, TraceRequest(height=32, width=32, frames=4)),
    "ltx": Case(ltx, TraceRequest(height=32, width=64, frames=9)),
    "ltx-i2v": Case(ltx_i2v, TraceRequest(height=32, width=64, frames=9, image=True)),
    "ltx2": Case(ltx2, TraceRequest(height=64, width=64, frames=9, max_sequence_length=64)),
    "mochi": Case(mochi, TraceRequest(height=32, width=48, frames=7)),
    "open-sora": Case(open_sora, SHORT),
    "sana-video": Case(sana_video, TraceRequest(height=32, width=64, frames=9)),
    "wan": Case(wan, SHORT),
    # Its network takes all tokens but the last 512 for those of the image.
    "wan-i2v": Case(wan_i2v, TraceRequest(height=32, width=48, frames=9, max_sequence_length=512), needs="ftfy"),
    "wan-flf2v": Case(wan_flf2v, TraceRequest(height=32, width=48, frames=9, max_sequence_length=512), needs="ftfy"),
    "wan2.2": Case(wan22, SHORT),
    "wan2.2-i2v": Case(wan22_i2v, SHORT, needs="ftfy"),
    "wan2.2-ti2v": Case(wan22_ti2v, SHORT),
}
