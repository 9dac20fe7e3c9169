"""The bundled models: diffusers folders that load as they are, small, finite, their words known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemica_trt.ir.resources import load_profile

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "lemica_trt" / "zoo"
MAX_BYTES = {"cogvideox-tiny": 10e6, "wan-tiny": 5e6}
TOKENS = 16
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


def _prompts() -> list[str]:
    lines = [
        line.strip()
        for name in ("calibration", "held_out")
        for line in (ROOT / "calibration" / "cogvideox-tiny" / f"{name}.txt").read_text().split("\n")
    ]
    return [line for line in lines if line and not line.startswith("#")]


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
    else:
        assert type(pipeline) is diffusers.CogVideoXPipeline
        assert type(pipeline.scheduler) is diffusers.CogVideoXDDIMScheduler
        assert scheduler.prediction_type == "v_prediction"
        assert scheduler.timestep_spacing == "trailing" and scheduler.rescale_betas_zero_snr
        assert transformer.max_text_seq_length == TOKENS
        assert transformer.num_layers >= 6
    assert pipeline.vae_scale_factor_spatial == 8 and pipeline.vae_scale_factor_temporal == 4


def test_the_tokenizer_needs_no_transformers(pipeline, folder) -> None:
    """`tokenizer.json` alone gives the ids that the pipeline uses, any case, and no <unk>."""
    alone = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    unknown, pad = alone.token_to_id("<unk>"), alone.token_to_id("<pad>")
    for prompt in [*_prompts(), "", "A BIG Red circle moves left."]:
        ids = pipeline.tokenizer(prompt, padding="max_length", max_length=TOKENS).input_ids
        own = alone.encode(prompt).ids
        assert ids == own + [pad] * (TOKENS - len(own))
        assert unknown not in ids, prompt
        words = prompt.replace(".", "").split()
        assert len(own) == len(words) + 1, "one token a word, and </s>"
    assert unknown in alone.encode("a big red elephant moves left").ids


def test_the_vae_keeps_what_the_world_draws(pipeline) -> None:
    """Round trip of 4 drawn clips: at least 30 dB; and latents of about unit variance."""
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("shapes", ROOT / "tools" / "shapes.py")
    shapes = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = shapes
    spec.loader.exec_module(shapes)

    clips, _ = shapes.draw_clips(4, seed=123, split="held_out")
    x = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
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
        z = z * config.scaling_factor
    assert 0.7 < z.std().item() < 1.4


def test_a_prompt_becomes_a_video(pipeline) -> None:
    """Few steps, guidance: right shape and range, and the same seed gives the same video."""
    video = [
        pipeline(
            "a big red circle moves left",
            num_frames=9,
            height=64,
            width=64,
            max_sequence_length=TOKENS,
            guidance_scale=4.0,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).frames
        for _ in range(2)
    ]
    assert np.asarray(video[0]).shape == (1, 9, 64, 64, 3)
    assert np.isfinite(video[0]).all() and np.min(video[0]) >= 0 and np.max(video[0]) <= 1
    assert np.array_equal(video[0], video[1])
