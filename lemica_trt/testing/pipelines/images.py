"""Tiny text-to-image pipelines."""

from __future__ import annotations

from typing import Any

import diffusers

from lemica_trt.ir.trace import TraceRequest
from lemica_trt.testing.pipelines import parts
from lemica_trt.testing.pipelines.parts import (
    WIDTH,
    Case,
    chat_tokenizer,
    clip,
    clip_tokenizer,
    dpm,
    flow,
    kl,
    language_model,
    qwen_vl,
    random,
    shifting_flow,
    t5,
    tokenizer,
)

IMAGE = TraceRequest(height=32, width=48)
SHORT = TraceRequest(height=32, width=48, max_sequence_length=64)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = (4, 4, 8)
"""Widths of the rotary axes of a head of 16."""


def flux() -> Any:
    return diffusers.FluxPipeline(
        scheduler=shifting_flow(), vae=kl(4), text_encoder=clip(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5(), tokenizer_2=tokenizer(),
        transformer=random(
            diffusers.FluxTransformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=ROPE, **HEADS,
            )
        ),
    )  # fmt: skip


def flux2() -> Any:
    """With a tokenizer where published weights have a processor of text and images (which needs torchvision): the
    pipeline asks either for its chat template alone."""
    given = flux2_klein().components
    return diffusers.Flux2Pipeline(
        scheduler=given["scheduler"], vae=given["vae"], tokenizer=given["tokenizer"], text_encoder=parts.mistral_3(),
        transformer=random(
            diffusers.Flux2Transformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=3 * WIDTH,
                timestep_guidance_channels=16, guidance_embeds=True, axes_dims_rope=(4, 4, 4, 4), **HEADS,
            )
        ),
    )  # fmt: skip


def flux2_klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=shifting_flow(),
        vae=random(
            diffusers.AutoencoderKLFlux2(block_out_channels=(4, 4, 4, 4), latent_channels=4, norm_num_groups=2)
        ),
        text_encoder=language_model("Qwen3", head="ForCausalLM", num_hidden_layers=28), tokenizer=chat_tokenizer(),
        transformer=random(
            diffusers.Flux2Transformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=3 * WIDTH,
                timestep_guidance_channels=16, guidance_embeds=False, axes_dims_rope=(4, 4, 4, 4), **HEADS,
            )
        ),
    )  # fmt: skip


def chroma() -> Any:
    return diffusers.ChromaPipeline(
        scheduler=flow(), vae=kl(4), text_encoder=t5(), tokenizer=tokenizer(),
        transformer=random(
            diffusers.ChromaTransformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH, axes_dims_rope=ROPE,
                approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **HEADS,
            )
        ),
    )  # fmt: skip


def bria() -> Any:
    return diffusers.BriaPipeline(
        scheduler=flow(), vae=kl(4), text_encoder=t5(), tokenizer=tokenizer(),
        transformer=random(
            diffusers.BriaTransformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH,
                axes_dims_rope=list(ROPE), **HEADS,
            )
        ),
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        scheduler=flow(shift=3.0), vae=kl(4), text_encoder=clip(projection=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True), tokenizer_2=clip_tokenizer(), text_encoder_3=t5(width=2 * WIDTH),
        tokenizer_3=tokenizer(),
        transformer=random(
            diffusers.SD3Transformer2DModel(
                sample_size=8, in_channels=4, out_channels=4, num_layers=3, joint_attention_dim=2 * WIDTH,
                caption_projection_dim=32, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16, qk_norm="rms_norm",
                dual_attention_layers=(0,), **HEADS,
            )
        ),
    )  # fmt: skip


def qwen_image() -> Any:
    return diffusers.QwenImagePipeline(
        scheduler=shifting_flow(), vae=parts.wan_vae("AutoencoderKLQwenImage"), text_encoder=qwen_vl(),
        tokenizer=chat_tokenizer(),
        transformer=random(
            diffusers.QwenImageTransformer2DModel(
                in_channels=64, out_channels=16, num_layers=2, joint_attention_dim=WIDTH, axes_dims_rope=ROPE, **HEADS
            )
        ),
    )  # fmt: skip


def z_image() -> Any:
    return diffusers.ZImagePipeline(
        scheduler=flow(shift=3.0), vae=kl(16), text_encoder=language_model("Qwen3"), tokenizer=chat_tokenizer(),
        transformer=random(
            diffusers.ZImageTransformer2DModel(
                in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
                axes_dims=[4, 4, 8], axes_lens=[1024, 32, 32],
            )
        ),
    )  # fmt: skip


def lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        scheduler=flow(shift=6.0), vae=kl(4), text_encoder=language_model("Gemma2"), tokenizer=tokenizer(ends="<s> $A"),
        transformer=random(
            diffusers.Lumina2Transformer2DModel(
                sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
                num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=ROPE, axes_lens=(300, 32, 32),
                cap_feat_dim=WIDTH,
            )
        ),
    )  # fmt: skip


def pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(
        scheduler=dpm(), vae=kl(4), text_encoder=t5(), tokenizer=tokenizer(),
        transformer=random(
            diffusers.PixArtTransformer2DModel(
                out_channels=8, num_layers=2, cross_attention_dim=32, sample_size=8, caption_channels=WIDTH,
                use_additional_conditions=False, **HEADS,
            )
        ),
    )  # fmt: skip


def pixart_alpha() -> Any:
    return diffusers.PixArtAlphaPipeline(
        scheduler=dpm(), vae=kl(4), text_encoder=t5(), tokenizer=tokenizer(),
        transformer=random(
            diffusers.PixArtTransformer2DModel(
                out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
                sample_size=128, caption_channels=WIDTH, use_additional_conditions=True,
            )
        ),
    )  # fmt: skip


def sana() -> Any:
    return diffusers.SanaPipeline(
        scheduler=dpm(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=random(
            diffusers.AutoencoderDC(
                latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock",
                decoder_block_types="ResBlock", encoder_block_out_channels=(8,) * 6,
                decoder_block_out_channels=(8,) * 6, encoder_layers_per_block=(1,) * 6,
                decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=((),) * 6,
                decoder_qkv_multiscales=((),) * 6,
            )
        ),
        text_encoder=language_model("Gemma2"), tokenizer=tokenizer(ends="<s> $A"),
        transformer=random(
            diffusers.SanaTransformer2DModel(
                in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=16,
                cross_attention_dim=32, caption_channels=WIDTH, sample_size=32, **HEADS,
            )
        ),
    )  # fmt: skip


def cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75), vae=kl(4),
        text_encoder=language_model("Glm"), tokenizer=tokenizer(length=4096, ends="<s> $A"),
        transformer=random(
            diffusers.CogView4Transformer2DModel(
                in_channels=4, out_channels=4, num_layers=2, text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8,
                pos_embed_max_size=16, sample_size=8, rope_axes_dim=(8, 8), **HEADS,
            )
        ),
    )  # fmt: skip


def cogview3_plus() -> Any:
    return diffusers.CogView3PlusPipeline(
        scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
        vae=kl(4), text_encoder=t5(), tokenizer=tokenizer(),
        transformer=random(
            diffusers.CogView3PlusTransformer2DModel(
                in_channels=4, out_channels=4, num_layers=2, text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8,
                pos_embed_max_size=16, sample_size=8, **HEADS,
            )
        ),
    )  # fmt: skip


def auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        scheduler=flow(shift=1.73), vae=kl(4), text_encoder=t5("UMT5"), tokenizer=tokenizer(),
        transformer=random(
            diffusers.AuraFlowTransformer2DModel(
                sample_size=8, num_mmdit_layers=1, num_single_dit_layers=2, joint_attention_dim=WIDTH,
                caption_projection_dim=32, pos_embed_max_size=64, **HEADS,
            )
        ),
    )  # fmt: skip


def hunyuan_dit() -> Any:
    import transformers

    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=parts.SIZE, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4
        )
    ).eval()
    return diffusers.HunyuanDiTPipeline(
        scheduler=diffusers.DDPMScheduler(
            beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False
        ),
        vae=kl(4), text_encoder=bert, tokenizer=clip_tokenizer(), text_encoder_2=t5(),
        tokenizer_2=tokenizer(length=256), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        transformer=random(
            diffusers.HunyuanDiT2DModel(
                in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=2, cross_attention_dim=WIDTH,
                cross_attention_dim_t5=WIDTH, pooled_projection_dim=16, **HEADS,
            )
        ),
    )  # fmt: skip


def kandinsky_transformer() -> Any:
    return random(
        diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=4,
            model_dim=32, ff_dim=37, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
        )
    )  # fmt: skip


def ovis_image() -> Any:
    return diffusers.OvisImagePipeline(
        scheduler=shifting_flow(), vae=kl(4), text_encoder=language_model("Qwen3"), tokenizer=chat_tokenizer(),
        transformer=random(
            diffusers.OvisImageTransformer2DModel(
                in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH,
                axes_dims_rope=ROPE, **HEADS,
            )
        ),
    )  # fmt: skip


def longcat_image() -> Any:
    return diffusers.LongCatImagePipeline(
        scheduler=shifting_flow(), vae=kl(16), text_encoder=qwen_vl(), tokenizer=chat_tokenizer(),
        text_processor=chat_tokenizer(),
        transformer=random(
            diffusers.LongCatImageTransformer2DModel(
                in_channels=64, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH, axes_dims_rope=list(ROPE), **HEADS,
            )
        ),
    )  # fmt: skip


def flux_kontext() -> Any:
    parts_of_flux = flux().components
    return diffusers.FluxKontextPipeline(**parts_of_flux)


def hidream() -> Any:
    """Pictures of the pipeline have 128 × 128 latents' area whatever is asked for, and so have those of a folder of it,
    in which the size set here is lost: the autoencoder has a pixel to a latent."""
    one_to_one = kl(
        4, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,)
    )
    pipeline = diffusers.HiDreamImagePipeline(
        scheduler=flow(shift=3.0), vae=one_to_one, text_encoder=clip(projection=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True), tokenizer_2=clip_tokenizer(), text_encoder_3=t5(),
        tokenizer_3=tokenizer(), text_encoder_4=language_model("Llama", head="ForCausalLM"),
        tokenizer_4=tokenizer(ends="<s> $A"),
        transformer=random(
            diffusers.HiDreamImageTransformer2DModel(
                patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, caption_channels=[WIDTH, WIDTH],
                text_emb_dim=2 * WIDTH, axes_dims_rope=(4, 4, 8), max_resolution=(128, 128), llama_layers=[0, 1],
                **HEADS,
            )
        ),
    )  # fmt: skip
    pipeline.default_sample_size = 8
    return pipeline


def hunyuanimage() -> Any:
    """With a guider that keeps nothing: `AdaptiveProjectedMixGuidance` keeps what it did in the step before."""
    return diffusers.HunyuanImagePipeline(
        scheduler=flow(shift=5.0), guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.5),
        vae=random(
            diffusers.AutoencoderKLHunyuanImage(
                in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32),
                layers_per_block=1, spatial_compression_ratio=8, sample_size=64, scaling_factor=0.5,
            )
        ),
        text_encoder=qwen_vl(), tokenizer=chat_tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
        transformer=random(
            diffusers.HunyuanImageTransformer2DModel(
                in_channels=4, out_channels=4, num_layers=2, num_single_layers=1, num_refiner_layers=1,
                text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8), **HEADS,
            )
        ),
    )  # fmt: skip


def sana_sprint() -> Any:
    given = sana().components
    given["scheduler"] = diffusers.SCMScheduler()
    given["transformer"] = random(
        diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=WIDTH, sample_size=32, guidance_embeds=True, **HEADS,
        )
    )  # fmt: skip
    return diffusers.SanaSprintPipeline(**given)


CASES = {
    "auraflow": Case(auraflow, SHORT),
    "bria": Case(bria, SHORT),
    "chroma": Case(chroma, SHORT),
    "cogview3-plus": Case(cogview3_plus, SHORT),
    "cogview4": Case(cogview4, IMAGE),
    "flux": Case(flux, SHORT),
    "flux-kontext": Case(
        flux_kontext,
        TraceRequest(
            height=32,
            width=48,
            max_sequence_length=64,
            image=True,
            arguments={"max_area": 32 * 48, "_auto_resize": False},
        ),
    ),
    "flux2": Case(flux2, TraceRequest(height=32, width=48, max_sequence_length=256)),
    "flux2-klein": Case(flux2_klein, SHORT),
    "hidream": Case(hidream, TraceRequest(height=8, width=8, max_sequence_length=64)),
    "hunyuan-dit": Case(hunyuan_dit, IMAGE),
    "hunyuanimage": Case(hunyuanimage, IMAGE),
    "longcat-image": Case(longcat_image, TraceRequest(height=32, width=48, arguments={"enable_prompt_rewrite": False})),
    "lumina2": Case(lumina2, TraceRequest(height=32, width=48, max_sequence_length=128)),
    "ovis-image": Case(ovis_image, IMAGE),
    "pixart-alpha": Case(pixart_alpha, IMAGE),
    "pixart-sigma": Case(pixart_sigma, IMAGE),
    "qwen-image": Case(qwen_image, IMAGE),
    "sana": Case(sana, TraceRequest(height=64, width=96)),
    "sana-sprint": Case(sana_sprint, TraceRequest(steps=2, height=64, width=96), refusal="SCMScheduler"),
    "sd3": Case(sd3, SHORT),
    "z-image": Case(z_image, IMAGE),
    "z-image-normalized": Case(
        z_image,
        TraceRequest(height=32, width=48, arguments={"cfg_normalization": True}),
        refusal="by .item()",
    ),
}
