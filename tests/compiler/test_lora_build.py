"""`build --lora`: another model, in every figure and in the bundle's identity; the same again is not built again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from command import result_of
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file

import lemica_trt
from lemica_trt.bundle.reading import Bundle
from lemica_trt.cli.main import main
from lemica_trt.core.files import sha256_of
from lemica_trt.ir.resources import load_profile, zoo_path
from lemica_trt.models.load import revision_of
from lemica_trt.runtime.random import Generator

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers, transformers and exporters

SMALL = (
    *("--model", "cogvideox-tiny", "--denoising-steps", 4, "--height", 32, "--width", 32),
    *("--schedule", "0,2", "--verify-samples", 0),
)

LAYER, SCALE, PROMPT = "transformer_blocks.0.attn1.to_v", 0.5, "a red circle"


def lemica(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], env={"HF_HUB_OFFLINE": "1", "COLUMNS": "160"})


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    config = json.loads((zoo_path("cogvideox-tiny") / "transformer" / "config.json").read_bytes())
    width = config["attention_head_dim"] * config["num_attention_heads"]
    draw = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, width, generator=draw), torch.randn(width, 2, generator=draw)
    save_file({f"transformer.{LAYER}.lora_A.weight": a, f"transformer.{LAYER}.lora_B.weight": b}, path)
    return path


def latents_of_diffusers(noise: np.ndarray, added: torch.Tensor | None) -> np.ndarray:
    """Final latents of the pipeline itself, with something added to the weight by hand."""
    pipeline = CogVideoXPipeline.from_pretrained(zoo_path("cogvideox-tiny"))
    pipeline.set_progress_bar_config(disable=True)
    if added is not None:
        with torch.no_grad():
            pipeline.transformer.get_submodule(LAYER).weight += added
    return pipeline(
        PROMPT, height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=4.0, max_sequence_length=16,
        latents=torch.from_numpy(noise), output_type="latent",
    ).frames.numpy()  # fmt: skip


@pytest.mark.long
def test_a_build_is_of_the_fused_model(style: Path, tmp_path: Path) -> None:
    output, flags = tmp_path / "fused", (*SMALL, "--lora", f"{style}:{SCALE}", "--output", tmp_path / "fused")
    done = lemica("build", *flags, "--quiet")
    assert done.exit_code == 0, done.output
    bundle = Bundle.open(output)
    with lemica_trt.load(output) as pipe:
        noise = Generator(3).randn((1, *bundle.manifest.graphs.layout.latent_shape))
        got = pipe.latents(pipe.conditions([PROMPT], [""]), noise, plan="uncached")
    factors = load_file(style)
    a, b = (factors[f"transformer.{LAYER}.lora_{letter}.weight"] for letter in "AB")
    want, plain = latents_of_diffusers(noise, SCALE * b @ a), latents_of_diffusers(noise, None)
    assert got == pytest.approx(want, abs=1e-4 * float(np.abs(want).max()))
    assert np.abs(plain - want).max() > 0.01 * np.abs(want).max()

    assert bundle.manifest.revision != revision_of(load_profile("cogvideox-tiny"))
    (lora,) = bundle.manifest.profile.loras or ()
    assert (lora.source, lora.scale, lora.sha256) == ("style.safetensors", SCALE, sha256_of(style))
    shown = lemica("inspect", output).output
    assert f"style.safetensors × 0.5, sha256 {sha256_of(style)[:16]}" in shown
    assert str(style.parent) not in (output / "manifest.json").read_text()

    again = lemica("build", *flags, "--dry-run", "--json")
    assert all(stage["what"].startswith("unchanged") for stage in result_of(again.stdout))
    assert lemica("build", *flags, "--quiet").exit_code == 0
    assert Bundle.open(output).manifest.digest == bundle.digest
    other = lemica("build", *SMALL, "--lora", f"{style}:0.6", "--output", output, "--dry-run", "--json")
    assert not any(stage["what"].startswith("unchanged") for stage in result_of(other.stdout))

    unnamed = lemica("verify", output, "--samples", 1)
    assert unnamed.exit_code == 2 and "--lora style.safetensors:0.5" in unnamed.output
    wrong = lemica("verify", output, "--samples", 1, "--lora", style)
    assert wrong.exit_code == 3 and "LoRA weights with --lora" in wrong.output


@pytest.mark.parametrize("command", ["build", "calibrate", "trace"])
def test_refusals_come_first(command: str, style: Path, tmp_path: Path) -> None:
    flags = () if command == "trace" else ("--output", tmp_path / "out")
    cases = {"none.safetensors": (3, "which is not there"), f"{style}:much": (2, "with a number as scale")}
    for text, (code, message) in cases.items():
        done = lemica(command, "--model", "cogvideox-tiny", "--lora", text, *flags)
        assert (done.exit_code, done.output.count("\n")) == (code, 1) and message in done.output, done.output
    strange = tmp_path / "strange.safetensors"
    save_file({"double_blocks.0.lora_A.weight": torch.ones(2, 2)}, strange)
    done = lemica(command, "--model", "cogvideox-tiny", "--lora", strange, "--quiet", *flags)
    assert done.exit_code == 3 and "keys that begin with transformer., as CogVideoXPipeline has them" in done.output
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()
