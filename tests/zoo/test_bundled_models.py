"""The bundled models: diffusers folders that load as they are, small, finite, their words known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.ir.resources import calibration_path, load_profile

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "lemica_trt" / "zoo"
MAX_BYTES = {"cogvideox-tiny": 10e6, "wan-tiny": 5e6, "flux-tiny": 5e6}
TOKENS = 16
VIDEO = {"num_frames": 9, "max_sequence_length": TOKENS, "guidance_scale": 4.0}
ARGUMENTS = {
    "cogvideox-tiny": VIDEO,
    "wan-tiny": VIDEO,
    "flux-tiny": {"max_sequence_length": TOKENS, "guidance_scale": 3.5},
}
pytestmark = pytest.mark.cpu

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module", params=MAX_BYTES)
def folder(request) -> Path:
    return ZOO / request.param


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def shapes():
    """tools/shapes.py"""
    spec = importlib.util.spec_from_file_location("shapes", ROOT / "tools" / "shapes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["shapes"]


def _prompts(model: str) -> list[str]:
    folder = calibration_path(load_profile(model).calibration.prompts)
    return [prompt for name in ("calibration", "held_out") for prompt in read_prompts(folder / f"{name}.txt")]


def test_every_bundled_model_is_tested_and_has_a_profile() -> None:
    assert {path.name for path in ZOO.iterdir()} == set(MAX_BYTES)
    for name in MAX_BYTES:
        assert load_profile(name).source == f"package:{name}"
        assert load_profile(name).text_length == TOKENS


def test_the_folder_is_small_and_readable_by_all(folder) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES[folder.name]
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files)
    assert (folder / "README.md").exists()


def test_every_weight_is_finite_and_stored_in_half_precision(folder) -> None:
    from safetensors.torch import load_file

    for file in folder.rglob("*.safetensors"):
        for name, weight in load_file(file).items():
            assert weight.dtype == torch.float16, f"{file.name}: {name} is {weight.dtype}"
            assert torch.isfinite(weight).all(), f"{file.name}: {name} is not finite"


def test_the_pipeline_is_the_real_one_in_small(pipeline, folder) -> None:
    scheduler, transformer = pipeline.scheduler.config, pipeline.transformer.config
    if folder.name == "wan-tiny":
        assert type(pipeline) is diffusers.WanPipeline
        assert type(pipeline.scheduler) is diffusers.UniPCMultistepScheduler
        assert scheduler.prediction_type == "flow_prediction"
        assert scheduler.use_flow_sigmas and scheduler.flow_shift == 3.0
        assert type(pipeline.text_encoder).__name__ == "UMT5EncoderModel"
        assert transformer.num_layers >= 5
    elif folder.name == "flux-tiny":
        assert type(pipeline) is diffusers.FluxPipeline
        assert type(pipeline.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
        assert scheduler.use_dynamic_shifting and transformer.guidance_embeds
        assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"
        assert transformer.num_layers + transformer.num_single_layers >= 4
        assert pipeline.vae_scale_factor == 8
        return
    else:
        assert type(pipeline) is diffusers.CogVideoXPipeline
        assert type(pipeline.scheduler) is diffusers.CogVideoXDDIMScheduler
        assert scheduler.prediction_type == "v_prediction"
        assert scheduler.timestep_spacing == "trailing" and scheduler.rescale_betas_zero_snr
        assert transformer.max_text_seq_length == TOKENS
        assert transformer.num_layers >= 6
    assert pipeline.vae_scale_factor_spatial == 8 and pipeline.vae_scale_factor_temporal == 4


@pytest.mark.parametrize("component", ["tokenizer", "tokenizer_2"])
def test_the_tokenizer_needs_no_transformers(pipeline, folder, component) -> None:
    """`tokenizer.json` alone gives the ids that the pipeline uses, any case, and no <unk>."""
    if component not in pipeline.components:
        return
    whole = pipeline.components[component]
    alone = tokenizers.Tokenizer.from_file(str(folder / component / "tokenizer.json"))
    unknown, pad, ends = alone.token_to_id("<unk>"), whole.pad_token_id, len(alone.encode("").ids)
    prompts = _prompts(folder.name)
    for prompt in [*prompts, "", prompts[0].upper(), prompts[0] + "." * (unknown is not None)]:  # CLIP keeps stops
        ids = whole(prompt, padding="max_length", max_length=TOKENS).input_ids
        own = alone.encode(prompt).ids
        assert ids == own + [pad] * (TOKENS - len(own))
        assert len(own) == len(prompt.replace(".", "").split()) + ends, "one token a word"
        assert unknown not in own, prompt
    assert ends == (1 if unknown is not None else 2)
    assert unknown is None or unknown in alone.encode("a big red elephant moves left").ids


def test_the_vae_keeps_what_the_world_draws(pipeline, shapes) -> None:
    """Round trip of 4 drawn clips: at least 30 dB; and latents of about unit variance."""
    clips, _ = shapes.draw_clips(4, seed=123, split="held_out")
    x = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    x = x.transpose(1, 2).flatten(0, 1) if type(pipeline.vae) is diffusers.AutoencoderKL else x
    with torch.no_grad():
        z = pipeline.vae.encode(x).latent_dist.mode()
        y = pipeline.vae.decode(z).sample
    mse = (x - y.clamp(-1, 1)).square().mean().item() / 4
    assert -10 * np.log10(mse) > 30
    config = pipeline.vae.config
    if config.get("latents_std"):
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        z = (z - mean) / std
    else:
        z = (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    assert 0.7 < z.std().item() < 1.4


def test_a_prompt_becomes_a_picture(pipeline, folder) -> None:
    """Few steps, guidance: right shape and range, and the same seed gives the same picture."""
    made = [
        pipeline(
            _prompts(folder.name)[0],
            height=64,
            width=64,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **ARGUMENTS[folder.name],
        )
        for _ in range(2)
    ]
    frames = [its.frames[0] if hasattr(its, "frames") else its.images for its in made]
    assert np.asarray(frames[0]).shape == (1 if folder.name == "flux-tiny" else 9, 64, 64, 3)
    assert np.isfinite(frames[0]).all() and np.min(frames[0]) >= 0 and np.max(frames[0]) <= 1
    assert np.array_equal(frames[0], frames[1])


def test_it_draws_what_the_prompt_says(pipeline, folder, shapes) -> None:
    """Of three held-out prompts at least two are read back in size, colour and motion or place."""
    right, held_out = 0, _prompts(folder.name)[-3:]
    for seed, prompt in enumerate(held_out):
        made = pipeline(
            prompt, height=64, width=64, num_inference_steps=20, generator=torch.Generator().manual_seed(seed),
            output_type="np", **ARGUMENTS[folder.name],
        )  # fmt: skip
        frames = made.frames[0] if hasattr(made, "frames") else made.images
        shown, asked = shapes.read_clip((np.asarray(frames) * 255).astype(np.uint8)), shapes.caption_from_text(prompt)
        right += (shown.size, shown.colour, shown.motion) == (asked.size, asked.colour, asked.motion)
    assert right >= 2
