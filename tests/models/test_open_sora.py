"""Open-Sora 1.2: published keys, equations said again in another way, and the repositories that its weights are in."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import pytest
import sentencepiece
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lemica_trt.cli.main import main
from lemica_trt.core.errors import InputError
from lemica_trt.ir.profile import Sampling, Shape
from lemica_trt.ir.resources import load_named, load_profile
from lemica_trt.models.load import is_here, load_model, load_pipeline, revision_of, scheduler_for
from lemica_trt.models.open_sora import published
from lemica_trt.models.open_sora.transformer import STDiT3, branch_mask
from lemica_trt.models.open_sora.vae import CausalConv3d, OpenSoraVAE
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.testing.pipelines import parts, tiny_pipeline

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers and transformers

Shapes = dict[str, tuple[int, ...]]

SDXL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
}
"""The config of SDXL's autoencoder."""

CALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 64}


def shapes_of(module: Any, prefix: str = "") -> Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if name.startswith(prefix)}


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    return float((one - other).abs().max() / other.abs().max())


def drawn(*shape: int) -> Tensor:
    """Noise, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def layer(name: str, out: int, *inner: int, bias: bool = True) -> Shapes:
    """A linear layer or a convolution."""
    return {f"{name}.weight": (out, *inner), **({f"{name}.bias": (out,)} if bias else {})}


def test_the_transformer_has_the_published_keys() -> None:
    """hidden 1152, depth 28, 16 heads, caption 4096, 300 tokens, patch 1 × 2 × 2: `STDiT3-XL/2`."""
    c, expected = 1152, Shapes()
    expected |= {"rope.freqs": (36,), "y_embedder.y_embedding": (300, 4096), "final_layer.scale_shift_table": (2, c)}
    expected |= layer("x_embedder.proj", c, 4, 1, 2, 2) | layer("t_block.1", 6 * c, c)
    for name in ("t_embedder", "fps_embedder"):
        expected |= layer(f"{name}.mlp.0", c, 256) | layer(f"{name}.mlp.2", c, c)
    expected |= layer("y_embedder.y_proj.fc1", c, 4096) | layer("y_embedder.y_proj.fc2", c, c)
    expected |= layer("final_layer.linear", 32, c)
    for block in (f"{kind}_blocks.{i}" for kind in ("spatial", "temporal") for i in range(28)):
        expected |= layer(f"{block}.attn.qkv", 3 * c, c) | layer(f"{block}.attn.proj", c, c)
        expected |= {f"{block}.attn.{norm}_norm.weight": (72,) for norm in "qk"}
        expected |= layer(f"{block}.cross_attn.q_linear", c, c) | layer(f"{block}.cross_attn.kv_linear", 2 * c, c)
        expected |= layer(f"{block}.cross_attn.proj", c, c) | {f"{block}.scale_shift_table": (6, c)}
        expected |= layer(f"{block}.mlp.fc1", 4 * c, c) | layer(f"{block}.mlp.fc2", c, 4 * c)
    with torch.device("meta"):
        assert shapes_of(STDiT3()) == expected


def test_the_autoencoder_has_the_published_keys() -> None:
    def conv(name: str, out: int, channels: int, kernel: int, *, bias: bool = True) -> Shapes:
        return layer(f"temporal_vae.{name}.conv", out, channels, kernel, kernel, kernel, bias=bias)

    def norm(name: str, width: int) -> Shapes:
        return layer(f"temporal_vae.{name}", width)

    def blocks(name: str, channels: int, out: int) -> Shapes:
        found = Shapes()
        for i in range(4):
            own = channels if i == 0 else out
            found |= norm(f"{name}.{i}.norm1", own) | norm(f"{name}.{i}.norm2", out)
            found |= conv(f"{name}.{i}.conv1", out, own, 3, bias=False)
            found |= conv(f"{name}.{i}.conv2", out, out, 3, bias=False)
            found |= conv(f"{name}.{i}.conv3", out, own, 1, bias=False) if own != out else {}
        return found

    expected = conv("quant_conv", 8, 8, 1) | conv("post_quant_conv", 4, 4, 1)
    expected |= conv("encoder.conv_in", 128, 4, 3, bias=False) | conv("encoder.conv2", 8, 512, 1)
    expected |= conv("decoder.conv1", 512, 4, 3) | conv("decoder.conv_out", 4, 128, 3)
    expected |= norm("encoder.norm1", 512) | norm("decoder.norm1", 128)
    expected |= blocks("encoder.res_blocks", 512, 512) | blocks("decoder.res_blocks", 512, 512)
    levels = ((128, 128), (128, 256), (256, 256), (256, 512)), ((256, 128), (256, 256), (512, 256), (512, 512))
    for part, pairs in zip(("encoder", "decoder"), levels):
        for i, pair in enumerate(pairs):
            expected |= blocks(f"{part}.block_res_blocks.{i}", *pair)
    expected |= conv("encoder.conv_blocks.1", 256, 256, 3) | conv("encoder.conv_blocks.2", 256, 256, 3)
    expected |= conv("decoder.conv_blocks.1", 512, 256, 3) | conv("decoder.conv_blocks.2", 1024, 512, 3)
    with torch.device("meta"):
        vae = OpenSoraVAE(spatial=SDXL)
    assert shapes_of(vae, "temporal_vae.") == expected
    others = shapes_of(vae).keys() - expected.keys()
    assert {name for name in others if not name.startswith("spatial_vae.module.")} == {"scale", "shift"}
    assert shapes_of(vae, "s")["scale"] == shapes_of(vae, "s")["shift"] == (1, 4, 1, 1, 1)
    assert {name.split(".")[2] for name in others - {"scale", "shift"}} == {
        "encoder", "decoder", "quant_conv", "post_quant_conv",
    }  # fmt: skip
    assert sum(parameter.numel() for parameter in vae.parameters()) == 393_341_007
    assert vae.latent_frames(51) == 15 and vae.latent_frames(1) == 1 and vae.latent_frames(20) == 6


# ---------------------------------------------------------------- the transformer's equations, said in another way


def weighed(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def wave(numbers: Tensor, count: int) -> Tensor:
    """e^(i·number·frequency), complex [..., count]."""
    frequencies = torch.tensor([10000 ** (-k / count) for k in range(count)])
    return torch.polar(torch.ones(()), numbers[..., None] * frequencies)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of one sequence: [n, d], [m, d], [m, d]."""
    weights = torch.exp(q @ k.T / math.sqrt(q.shape[1]))
    return (weights / weights.sum(1, keepdim=True)) @ v


def self_attended(state: Mapping[str, Tensor], block: str, x: Tensor, heads: int) -> Tensor:
    """A sequence [n, C]; positions are turned where the block is temporal."""
    found, size = [], x.shape[1] // heads
    q, k, v = weighed(state, f"{block}.attn.qkv", x).split(x.shape[1], 1)
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        parts = []
        for name, whole in (("q", q), ("k", k)):
            part = whole[:, own]
            part = (
                part / (part.square().mean(1, keepdim=True) + 1e-6).sqrt() * state[f"{block}.attn.{name}_norm.weight"]
            )
            if block.startswith("temporal"):
                turned = torch.view_as_complex(part.reshape(len(x), size // 2, 2).contiguous())
                part = torch.view_as_real(turned * wave(torch.arange(len(x)).float(), size // 2)).reshape(len(x), size)
            parts.append(part)
        found.append(attended(*parts, v[:, own]))
    return weighed(state, f"{block}.attn.proj", torch.cat(found, 1))


def cross_attended(
    state: Mapping[str, Tensor], block: str, x: Tensor, packed: Tensor, lengths: list[int], heads: int
) -> Tensor:
    """Rows [R, N, C] to a text of all rows in one, [sum of lengths, C]: as upstream packs it."""
    q = weighed(state, f"{block}.cross_attn.q_linear", x)
    rows, size = [], x.shape[2] // heads
    for own, text in zip(q, packed.split(lengths)):
        k, v = weighed(state, f"{block}.cross_attn.kv_linear", text).split(x.shape[2], 1)
        parts = [slice(h * size, (h + 1) * size) for h in range(heads)]
        rows.append(torch.cat([attended(own[:, p], k[:, p], v[:, p]) for p in parts], 1))
    return weighed(state, f"{block}.cross_attn.proj", torch.stack(rows))


def mlp(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = weighed(state, f"{name}.fc1", x)
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return weighed(state, f"{name}.fc2", x)


def embedded(state: Mapping[str, Tensor], name: str, numbers: Tensor) -> Tensor:
    waves = wave(numbers, 128)
    x = weighed(state, f"{name}.mlp.0", torch.cat([waves.real, waves.imag], 1))
    return weighed(state, f"{name}.mlp.2", x * torch.sigmoid(x))


def positions(width: int, rows: int, columns: int, pixels: float) -> Tensor:
    """[rows·columns, width], token by token."""
    scale, base = math.sqrt(pixels) / 512, round(math.sqrt(rows * columns))
    found = []
    for row in range(rows):
        for column in range(columns):
            across, down = column * base / columns / scale, row * base / rows / scale
            one, other = (wave(torch.tensor(place), width // 4) for place in (across, down))
            found.append(torch.cat([one.imag, one.real, other.imag, other.real]))
    return torch.stack(found)


def said_again(
    model: STDiT3, x: Tensor, t: Tensor, y: Tensor, mask: Tensor, fps: float, size: tuple[int, int]
) -> Tensor:
    """The published forward of a model with patches of 1 × 2 × 2; the mask is [R, L], without rows of zeros."""
    state, heads = model.state_dict(), model.config["num_heads"]
    frames, rows, columns = x.shape[2], -(-x.shape[3] // 2), -(-x.shape[4] // 2)
    padded = F.pad(x, (0, x.shape[4] % 2, 0, x.shape[3] % 2))
    cells = padded.reshape(len(x), 4, frames, rows, 2, columns, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    tokens = cells @ state["x_embedder.proj.weight"].flatten(1).T + state["x_embedder.proj.bias"]
    tokens = tokens + positions(tokens.shape[2], rows, columns, size[0] * size[1]).repeat(frames, 1)
    numbers = embedded(state, "t_embedder", t) + embedded(state, "fps_embedder", torch.tensor([fps]))
    modulation = weighed(state, "t_block.1", numbers * torch.sigmoid(numbers)).reshape(len(x), 6, -1)
    packed = mlp(state, "y_embedder.y_proj", torch.cat([text[own > 0] for text, own in zip(y, mask)]))
    lengths = [int(own.sum()) for own in mask]
    for block in (f"{kind}_blocks.{i}" for i in range(model.config["depth"]) for kind in ("spatial", "temporal")):
        table = (state[f"{block}.scale_shift_table"] + modulation)[:, :, None]
        z = (standardised(tokens) * (1 + table[:, 1]) + table[:, 0]).reshape(len(x), frames, rows * columns, -1)
        lines = z if block.startswith("spatial") else z.transpose(1, 2)
        lines = torch.stack([torch.stack([self_attended(state, block, s, heads) for s in row]) for row in lines])
        z = lines if block.startswith("spatial") else lines.transpose(1, 2)
        tokens = tokens + table[:, 2] * z.reshape(tokens.shape)
        tokens = tokens + cross_attended(state, block, tokens, packed, lengths, heads)
        z = mlp(state, f"{block}.mlp", standardised(tokens) * (1 + table[:, 4]) + table[:, 3])
        tokens = tokens + table[:, 5] * z
    table = state["final_layer.scale_shift_table"] + numbers[:, None]
    out = weighed(state, "final_layer.linear", standardised(tokens) * (1 + table[:, 1:]) + table[:, :1])
    out = out.reshape(len(x), frames, rows, columns, 2, 2, 8).permute(0, 6, 1, 2, 4, 3, 5)
    return out.reshape(len(x), 8, frames, 2 * rows, 2 * columns)[..., : x.shape[3], : x.shape[4]]


def example(model: STDiT3, *, rows: int = 3, columns: int = 5) -> dict[str, Any]:
    """Arguments of a call, two branches; texts of 3 and 9 tokens."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.zeros(2, 20, dtype=torch.long)
    mask[0, :3], mask[1, :9] = 1, 1
    return {
        "hidden_states": torch.randn(2, 4, 3, rows, columns, generator=generator),
        "timestep": torch.full((2,), 731.25),
        "encoder_hidden_states": torch.randn(2, 20, model.config["caption_channels"], generator=generator),
        "encoder_attention_mask": mask,
        "fps": 24,
        "height": 8 * rows,
        "width": 8 * columns + 2,
    }


@pytest.fixture(scope="module")
def transformer() -> STDiT3:
    found: STDiT3 = tiny_pipeline("open-sora").transformer
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in found.named_parameters():
            if "q_norm" in name or "k_norm" in name or "table" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def call(model: STDiT3, **arguments: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**arguments).sample
    return found


def test_the_transformer_is_its_published_equations(transformer: STDiT3) -> None:
    given = example(transformer)
    with torch.no_grad():
        expected = said_again(
            transformer, *(given[name] for name in list(given)[:5]), (given["height"], given["width"])
        )
    assert expected.shape == (2, 8, 3, 3, 5)
    for name, other in {"fps": 8, "width": 400, "timestep": torch.full((2,), 20.0)}.items():
        changed = call(transformer, **{**given, name: other})
        assert apart(changed, expected) > 1e-3, name
    got = call(transformer, **given)
    assert apart(got, expected) < 2e-6


def test_what_is_masked_is_not_read(transformer: STDiT3) -> None:
    given = example(transformer)
    behind = torch.where(given["encoder_attention_mask"][:, :, None] > 0, given["encoder_hidden_states"], 1e3)
    assert torch.equal(call(transformer, **{**given, "encoder_hidden_states": behind}), call(transformer, **given))
    shorter = {name: given[name][:, :9] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    cut = call(transformer, **{**given, **shorter})
    assert apart(cut, call(transformer, **given)) < 2e-6


def test_a_row_without_text_is_masked_like_its_other_branch(transformer: STDiT3) -> None:
    given = example(transformer)
    none, both = given["encoder_attention_mask"].clone(), given["encoder_attention_mask"].clone()
    none[0], both[0] = 0, both[1]
    got, expected = (call(transformer, **{**given, "encoder_attention_mask": mask}) for mask in (none, both))
    assert torch.equal(got, expected)
    assert not torch.equal(got, call(transformer, **given))
    two = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])  # of requests a and b: a−, b−, a+, b+
    assert branch_mask(two).int().tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert branch_mask(torch.zeros(2, 3)).all() and branch_mask(torch.zeros(1, 3)).all()


# ---------------------------------------------------------------- the autoencoder's


@pytest.fixture(scope="module")
def vae() -> OpenSoraVAE:
    found: OpenSoraVAE = tiny_pipeline("open-sora").vae
    return found


def convolved(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """[1, channels, frames, …], frame by frame: frame t is of the frames up to t."""
    weight, bias = state[f"{name}.conv.weight"], state.get(f"{name}.conv.bias")
    kernel = weight.shape[2]
    found = []
    for t in range(x.shape[2]):
        parts = [
            F.conv2d(x[:, :, t - back], weight[:, :, kernel - 1 - back], padding=kernel // 2)
            for back in range(kernel)
            if t >= back
        ]
        found.append(sum(parts[1:], parts[0]))
    whole = torch.stack(found, 2)
    return whole if bias is None else whole + bias[None, :, None, None, None]


def normed(state: Mapping[str, Tensor], name: str, x: Tensor, groups: int) -> Tensor:
    parts = x.reshape(groups, -1)
    parts = (parts - parts.mean(1, keepdim=True)) / (parts.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    weight, bias = (state[f"{name}.{what}"][None, :, None, None, None] for what in ("weight", "bias"))
    y = parts.reshape(x.shape) * weight + bias
    return y * torch.sigmoid(y)


def test_the_second_stage_decodes_as_published(vae: OpenSoraVAE) -> None:
    state, groups = vae.temporal_vae.state_dict(), 2
    z = torch.randn(1, 4, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    x = convolved(state, "decoder.conv1", convolved(state, "post_quant_conv", z))
    for name in ("res_blocks.0", *(f"block_res_blocks.{i}.0" for i in (3, 2, 1, 0))):
        block = f"decoder.{name}"
        y = convolved(state, f"{block}.conv1", normed(state, f"{block}.norm1", x, groups))
        y = convolved(state, f"{block}.conv2", normed(state, f"{block}.norm2", y, groups))
        x = y + (convolved(state, f"{block}.conv3", x) if f"{block}.conv3.conv.weight" in state else x)
        up = f"decoder.conv_blocks.{int(name.split('.')[1]) - 1}"
        if name.startswith("block") and f"{up}.conv.weight" in state:
            y = convolved(state, up, x)
            x = torch.stack([y[:, 0::2], y[:, 1::2]], 3).reshape(1, y.shape[1] // 2, 2 * y.shape[2], *y.shape[3:])
    x = convolved(state, "decoder.conv_out", normed(state, "decoder.norm1", x, groups))
    assert x.shape == (1, 4, 8, 3, 4)
    with torch.no_grad():
        for frames in (5, 8):
            got = vae.temporal_vae.decode(z, frames)
            assert got.shape[2] == frames
            assert apart(got, x[:, :, 8 - frames :]) < 5e-6


@pytest.mark.parametrize("stride", [1, 2])
def test_a_causal_convolution_reads_no_later_frame(stride: int) -> None:
    conv = CausalConv3d(2, 3, 3, stride=stride)
    x = torch.randn(1, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    later = x.clone()
    later[:, :, 4:] += 1
    with torch.no_grad():
        one, other = conv(x), conv(later)
    assert one.shape == (1, 3, 8 // stride, 4, 4)
    same = [torch.equal(one[:, :, t], other[:, :, t]) for t in range(one.shape[2])]
    assert same == [stride * t + stride - 1 < 4 for t in range(one.shape[2])]


@torch.no_grad()
def test_pieces_are_coded_apart(vae: OpenSoraVAE) -> None:
    """9 frames are pieces of 5 and 4; of a piece of 5, the first 3 of 8 decoded frames are padding."""
    z = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    frames = vae.decode(z, 9).sample
    assert frames.shape == (1, 3, 9, 32, 48)
    parts = [vae.decode(z[:, :, :2], 5).sample, vae.decode(z[:, :, 2:], 4).sample]
    assert apart(torch.cat(parts, 2), frames) < 1e-5
    latents = vae.temporal_vae.decode((z * vae.scale + vae.shift)[:, :, :2], 5)[:, :, 0]
    first = vae.spatial_vae.module.decode(latents / 0.18215).sample
    assert apart(first, frames[:, :, 0]) < 1e-5
    with pytest.raises(ValueError, match="9 frames are 3 latents, got 2"):
        vae.decode(z[:, :, :2], 9)
    assert vae.encode(frames).latent_dist.mean.shape == z.shape


# ---------------------------------------------------------------- the pipeline


@pytest.mark.parametrize(("frames", "counted"), [(51, 15), (102, 30), (1, 1), (60, 15)])
def test_timesteps_and_steps_are_those_of_upstream(frames: int, counted: int) -> None:
    """`timestep_transform` and the update of `opensora/schedulers/rf`, in float64."""
    pipeline = tiny_pipeline("open-sora")
    pipeline.vae.register_to_config(micro_frame_size=17)
    found = pipeline.timesteps(30, 240, 426, frames)
    ratio = math.sqrt(240 * 426 / 512**2) * math.sqrt(counted)
    linear = [1 - i / 30 for i in range(30)]
    expected = [1000 * ratio * t / (1 + (ratio - 1) * t) for t in linear]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    rows = sampler_table(pipeline.scheduler).rows
    for i, row in enumerate(rows[1:]):
        step = (expected[i] - (expected[i + 1] if i < 29 else 0)) / 1000
        assert row.latents[0] == pytest.approx(1) and row.outputs[0] == pytest.approx(-step, abs=1e-6)


@pytest.mark.parametrize(
    "kind", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"]
)
@pytest.mark.parametrize("asked", [None, 3.0])
def test_other_samplers_take_the_shift_of_the_size_or_the_one_that_is_asked_for(kind: str, asked: float | None) -> None:
    pipeline = tiny_pipeline("open-sora")
    pipeline.scheduler = scheduler_for(Sampling(steps=30, scheduler=kind, flow_shift=asked), pipeline.scheduler)
    noise = sampler_table_of(pipeline).levels.noise
    shift = asked or math.sqrt(240 * 424 / 512**2) * math.sqrt(15)
    linear = [level / (shift - (shift - 1) * level) for level in noise]  # before it was shifted
    assert linear == pytest.approx([1 - i / 30 for i in range(31)], abs=0.04)  # each class spaces it in its own way


def sampler_table_of(pipeline: Any) -> Any:
    """Of 30 steps of a video of 51 frames."""
    pipeline.vae.register_to_config(micro_frame_size=17)
    pipeline.timesteps(30, 240, 424, 51)
    return sampler_table(pipeline.scheduler)


def test_without_a_negative_prompt_the_null_embedding_is_one_with_the_prompts_mask() -> None:
    """The loop as upstream's script has it, with the velocity towards the video."""
    pipeline, noise = tiny_pipeline("open-sora"), drawn(1, 4, 3, 4, 6)
    prompt = "the red cat sees a blue bird"
    got = pipeline(prompt, latents=noise, guidance_scale=3.0, output_type="latent", **CALL).frames
    tokens = pipeline.tokenizer(prompt, padding="max_length", max_length=64, return_tensors="pt")
    mask, model = tokens.attention_mask, pipeline.transformer
    with torch.no_grad():
        embeds = pipeline.text_encoder(tokens.input_ids, attention_mask=mask)[0]
        both = torch.cat([embeds, model.y_embedder.y_embedding[None]])
        times, x = [*pipeline.timesteps(3, 32, 48, 9), torch.tensor(0.0)], noise
        for t, after in itertools.pairwise(times):
            out = said_again(model, torch.cat([x, x]), t.repeat(2), both, mask.repeat(2, 1), 24, (32, 48))
            with_text, without = out[:, :4]
            x = x + (without + 3.0 * (with_text - without)) * (t - after) / 1000
    assert apart(got, x) < 1e-5
    written = pipeline(prompt, "a dull picture", latents=noise, guidance_scale=3.0, output_type="latent", **CALL).frames
    empty = pipeline(prompt, " ", latents=noise, guidance_scale=3.0, output_type="latent", **CALL).frames
    assert torch.equal(empty, got) and apart(written, got) > 1e-4


def test_one_frame_and_several_prompts() -> None:
    pipeline = tiny_pipeline("open-sora")
    noise = drawn(2, 4, 1, 4, 6)
    prompts, call = ["a red cat", "two blue birds in a tree"], {**CALL, "num_frames": 1, "latents": noise}
    both = pipeline(prompts, output_type="pt", **call).frames
    assert both.shape == (2, 1, 3, 32, 48)
    alone = pipeline(prompts[1], output_type="pt", **{**call, "latents": noise[1:]}).frames
    assert apart(both[1:], alone) < 1e-4
    unguided = {**call, "guidance_scale": 1.0}
    empty = pipeline(["", prompts[1]], output_type="pt", **unguided).frames
    alone = pipeline("", output_type="pt", **{**unguided, "latents": noise[:1]}).frames
    assert apart(empty[:1], alone) < 1e-4, "a row without text has no other branch"
    for wrong, says in (
        ({"max_sequence_length": 65}, "prompts of 1 to 64 tokens, got max_sequence_length 65"),
        ({"negative_prompt": ["one"]}, "a negative prompt for each of 2 prompts, got 1"),
        ({"width": 50}, "multiples of 8, got 32 and 50"),
    ):
        with pytest.raises(ValueError, match=says):
            pipeline(prompts, **{**call, **wrong})


# ---------------------------------------------------------------- the repositories


def publish(folder: Path) -> Path:
    """A folder with the repositories, as the hub has them, of the tiny pipeline's weights."""
    pipeline = tiny_pipeline("open-sora")
    stdit, vae, text, images = (folder / repository.name for repository in published.REPOSITORIES)
    for path in (stdit, vae, images / "vae"):
        path.mkdir(parents=True)
    own = {key: value for key, value in pipeline.transformer.config.items() if key[0] != "_"}
    config = {"architectures": ["STDiT3"], "model_type": "STDiT3", "class_dropout_prob": 0.1, "drop_path": 0.0, **own}
    (stdit / "config.json").write_text(json.dumps({**config, "enable_flash_attn": True, "skip_y_embedder": False}))
    save_file(pipeline.transformer.state_dict(), stdit / "model.safetensors", {"format": "pt"})
    second = {"type": "VAE_Temporal", "filters": 4, "num_res_blocks": 1, "num_groups": 2}
    first = {"type": "VideoAutoencoderKL", "from_pretrained": published.IMAGES.source, "micro_batch_size": 4}
    config = {"model_type": "VideoAutoencoderPipeline", "micro_frame_size": 5, "vae_2d": first, "vae_temporal": second}
    numbers = {"shift": pipeline.vae.shift.flatten().tolist(), "scale": pipeline.vae.scale.flatten().tolist()}
    (vae / "config.json").write_text(json.dumps({**config, **numbers}))
    save_file(pipeline.vae.state_dict(), vae / "model.safetensors", {"format": "pt"})
    pipeline.vae.spatial_vae.module.save_config(images / "vae")
    pipeline.text_encoder.save_pretrained(text)
    pipeline.tokenizer.save_pretrained(text)
    return folder


def publish_spiece(folder: Path) -> None:
    """The tokenizer as T5's repository has it: a sentencepiece model, of other words."""
    for path in folder.glob("*token*"):
        path.unlink()
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts.TEXT.split()), model_writer=file, vocab_size=60, hard_vocab_limit=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **special}))


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return publish(tmp_path / "open-sora")


def test_a_folder_of_the_repositories_is_the_pipeline(repositories: Path) -> None:
    pipeline = load_pipeline(str(repositories))
    source = tiny_pipeline("open-sora")
    noise = drawn(1, 4, 3, 4, 6)
    got, expected = (each("a red cat", latents=noise, output_type="pt", **CALL).frames for each in (pipeline, source))
    assert torch.equal(got, expected)
    assert pipeline.vae.config["micro_batch_size"] == 4 and pipeline.vae.config["micro_frame_size"] == 5
    half = load_pipeline(str(repositories), dtype="bf16")
    assert {value.dtype for part in (half.transformer, half.vae) for value in part.state_dict().values()} == {
        torch.bfloat16
    }


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        del state[name]

    return change


@pytest.mark.parametrize(
    ("repository", "change", "says"),
    [
        (published.TRANSFORMER, drop("temporal_blocks.1.attn.q_norm.weight"), "has no temporal_blocks.1.attn.q_norm"),
        (published.TRANSFORMER, drop("y_embedder.y_embedding"), "has no y_embedder.y_embedding"),
        (published.TRANSFORMER, lambda state: state.update(extra=torch.zeros(1)), "has an unknown extra"),
        (published.AUTOENCODER, drop("temporal_vae.decoder.conv1.conv.weight"), "has no temporal_vae.decoder.conv1"),
        (published.AUTOENCODER, drop("spatial_vae.module.decoder.conv_in.weight"), "has no spatial_vae.module.decoder"),
        (published.AUTOENCODER, lambda state: state.update(scale=torch.ones(1, 8, 1, 1, 1)), "another shape of scale"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    repositories: Path, repository: published.Repository, change: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    file = repositories / repository.name / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(InputError, match=says) as refusal:
        load_pipeline(str(repositories))
    assert "\n" not in str(refusal.value)


def without_a_shard(folder: Path) -> None:
    """The text encoder's weights in pieces, of which one was not downloaded to its end."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    first, second = (f"model-0000{k}-of-00002.safetensors" for k in (1, 2))
    index = {"weight_map": {"shared.weight": first, "another.weight": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_what_is_missing_is_named(repositories: Path) -> None:
    changes: dict[str, tuple[str, Callable[[], Any]]] = {
        "no t5": ("got no t5-v1_1-xxl", lambda: shutil.rmtree(repositories / "t5-v1_1-xxl")),
        "t5 without weights": (
            r"expected a file .safetensors or .bin",
            lambda: (repositories / "t5-v1_1-xxl" / "model.safetensors").unlink(),
        ),
        "a shard": (
            r"expected all files that model\.safetensors\.index\.json names, got no model-00002",
            lambda: without_a_shard(repositories / "t5-v1_1-xxl"),
        ),
        "another model": (
            "expected the config.json of an STDiT3, got one of STDiT2",
            lambda: (repositories / "OpenSora-STDiT-v3" / "config.json").write_text('{"model_type": "STDiT2"}'),
        ),
        "no weights": (
            "expected model.safetensors",
            lambda: (repositories / "OpenSora-VAE-v1.2" / "model.safetensors").unlink(),
        ),
        "another config": (
            "expected a config.json with vae_2d and vae_temporal",
            lambda: (repositories / "OpenSora-VAE-v1.2" / "config.json").write_text('{"vae_2d": 1}'),
        ),
    }
    for says, change in changes.values():
        shutil.rmtree(repositories)
        publish(repositories)
        change()
        with pytest.raises(InputError, match=says) as refusal:
            load_pipeline(str(repositories))
        assert "\n" not in str(refusal.value)
    done = CliRunner().invoke(main, ["trace", "--model", str(repositories)])
    assert done.exit_code == 3 and done.stderr.splitlines()[1:] == [done.stderr.splitlines()[-1]], done.stderr


def test_the_profile_loads_from_the_hub(repositories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, at a size that a test can trace: only the files that are needed are asked for."""
    asked: dict[str, list[str]] = {}

    def snapshot(source: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked[source] = allow_patterns
        return str(repositories / source.partition("/")[2])

    publish_spiece(repositories / published.TEXT.name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    named = load_named("open-sora-1.2")
    assert not named.card.refused
    profile = msgspec.structs.replace(
        load_profile("open-sora-1.2"), dtype="fp32", text_length=64, shape=Shape(frames=9, height=32, width=48)
    )
    assert is_here(profile)
    model = load_model(profile)
    assert isinstance(model.pipeline.tokenizer, transformers.T5Tokenizer)
    assert asked == {each.source: list(each.files) for each in published.REPOSITORIES}
    assert model.latent_shape == (4, 3, 4, 6) and model.guided and model.branches
    assert (
        revision_of(profile)
        == model.revision
        == revision_of(msgspec.structs.replace(profile, source=str(repositories)))
    )
    assert model.decode(torch.zeros(1, *model.latent_shape)).shape == (1, 9, 32, 48, 3)
    without_a_shard(repositories / published.TEXT.name)
    assert not is_here(profile)


def test_without_a_network_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*arguments: Any, **keywords: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    profile = load_profile("open-sora-1.2")
    assert not is_here(profile)
    with pytest.raises(InputError, match=r"hpcai-tech/OpenSora-STDiT-v3: expected a repository on the hub.*no network"):
        load_pipeline(profile.source)
