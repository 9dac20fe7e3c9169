"""Parts of tiny pipelines: tokenizers made in place, and networks of a few thousand random weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn

from lemica_trt.ir.trace import TraceRequest
from lemica_trt.models.trace import arguments


@dataclass(frozen=True)
class Case:
    """A tiny pipeline.

    Attributes:
        make: the pipeline, of random weights.
        request: what it is called with.
        refusal: part of the message that tracing refuses it with; "": it is traced.
        needs: a library without which its pipeline does not run.
    """

    make: Callable[[], Any]
    request: TraceRequest
    refusal: str = ""
    needs: str = ""


WIDTH = 32
"""Of every text encoder."""

TEXT = " ".join(
    (
        arguments.BASE, arguments.LONGER, arguments.NEGATIVE, arguments.LONGER_NEGATIVE,
        "system user assistant Describe the image video by color shape size green dog horse house tree",
    )
)  # fmt: skip
"""What the tokenizers know."""

PIECE = r"\w{1,3}|[^\w\s]"
"""A token: at most three letters, so that a chat template is about as long as with a real tokenizer."""

SPECIAL = (
    "<pad>", "</s>", "<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<think>", "</think>",
)  # fmt: skip

VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *sorted(set(re.findall(PIECE, TEXT)))])}

PAD, END, START = (VOCABULARY[token] for token in ("<pad>", "</s>", "<s>"))

SIZE = 128
"""Embeddings of a text encoder: the vocabulary, rounded up."""

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(*, length: int = 512, ends: str = "$A </s>", kind: Any = None) -> Any:
    """A tokenizer of pieces of words.

    Args:
        length: the longest prompt that it says the model takes.
        ends: template of the special tokens around a prompt.
        kind: transformers class.
    """
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    made.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[(token, VOCABULARY[token]) for token in SPECIAL if token in ends]
    )
    found = (kind or transformers.PreTrainedTokenizerFast)(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>",
        additional_special_tokens=list(SPECIAL[4:]), model_max_length=length,
    )  # fmt: skip
    found.chat_template = CHAT
    return found


def clip_tokenizer() -> Any:
    """A start token, and 77 tokens at most."""
    return tokenizer(length=77, ends="<s> $A </s>")


def chat_tokenizer() -> Any:
    """No special tokens but those of the chat template."""
    return tokenizer(length=4096, ends="$A")


def random(module: nn.Module, seed: int = 0) -> Any:
    """Random weights where initialisation leaves zeros or constants, so that everything that is computed shows."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            flat = parameter.numel() > 1 and float(parameter.float().std()) < 1e-3
            if flat or not bool(torch.isfinite(parameter).all()):
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def clip(*, projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=SIZE, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=WIDTH, bos_token_id=START, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config).eval()


def t5(kind: str = "T5", *, width: int = WIDTH) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=SIZE, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    return random(getattr(transformers, f"{kind}EncoderModel")(config))


def language_model(name: str, *, head: str = "Model", **changes: Any) -> Any:
    """A decoder such as Llama.

    Args:
        name: transformers' prefix: `Llama`, `Gemma2`, `Qwen3`, `Glm`.
        head: rest of the name of the class.
        changes: of the configuration.
    """
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": SIZE, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": PAD,
            "bos_token_id": START, "eos_token_id": END, **changes,
        }
    )  # fmt: skip
    return getattr(transformers, f"{name}{head}")(config).eval()


def qwen_vl(*, text_only: bool = False) -> Any:
    """Qwen 2.5-VL, which is only given text."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": SIZE, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
        },
        image_token_id=VOCABULARY["<|image_pad|>"], vision_start_token_id=VOCABULARY["<|vision_start|>"],
        vision_end_token_id=VOCABULARY["<|vision_end|>"], video_token_id=SIZE - 1,
    )  # fmt: skip
    if text_only:
        return transformers.Qwen2_5_VLTextModel(config.text_config).eval()
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def mistral_3() -> Any:
    """Mistral 3 with eyes, which is only given text."""
    config = transformers.Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": SIZE, "hidden_size": WIDTH, "intermediate_size": 37,
            "num_hidden_layers": 31, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
        },
        image_token_index=VOCABULARY["<|image_pad|>"],
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def kl(channels: int = 4, **changes: Any) -> Any:
    """The autoencoder of images: 8 pixels to a latent."""
    return random(
        diffusers.AutoencoderKL(
            **{
                "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
                "block_out_channels": (4, 4, 4, 4), "latent_channels": channels, "norm_num_groups": 2,
                "sample_size": 64, "shift_factor": 0.1, "scaling_factor": 0.5, **changes,
            }
        )
    )  # fmt: skip


def wan_vae(kind: str = "AutoencoderKLWan") -> Any:
    """16 channels, 8 pixels and 4 frames to a latent."""
    return random(
        getattr(diffusers, kind)(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    )


def flow(**settings: Any) -> Any:
    """Flow matching, Euler."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def shifting_flow() -> Any:
    """Flow matching whose shift follows the number of tokens."""
    return flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)


def unipc() -> Any:
    """UniPC for flow matching, as Wan has it."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def dpm(**settings: Any) -> Any:
    """DPM-Solver++ of second order."""
    return diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", **settings)
