"""`run --lora`: a finished bundle with LoRA weights added is the bundle that was built with them fused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from traced_bundles import lemica, saved

import lemica_trt
from lemica_trt.bundle.reading import Bundle
from lemica_trt.ir.resources import zoo_path
from lemica_trt.runtime.random import Generator

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore"),  # of diffusers, transformers and exporters
]

RANK, SCALE, PROMPT = 2, 0.5, "a red circle"

SMALL = ("--denoising-steps", 4, "--height", 32, "--width", 32, "--schedule", "0,2", "--verify-samples", 0, "--quiet")

COG = (
    *("patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "norm_out.linear", "proj_out"),
    *("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.norm1.linear", "transformer_blocks.5.ff.net.2"),
)
FLUX = ("x_embedder", "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp", "norm_out.linear")


def factors(network: torch.nn.Module, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Random LoRA weights of some modules, in diffusers' format."""
    draw, found = torch.Generator().manual_seed(3), {}
    for name in names:
        rows, *columns = network.get_submodule(name).weight.shape  # type: ignore[misc]
        found[f"transformer.{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, *columns, generator=draw)
        found[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, RANK, *[1] * (len(columns) - 1), generator=draw)
    return found


def latents(path: Path, plan: str = "uncached", **options: object) -> np.ndarray:
    with lemica_trt.load(path, **options) as pipe:
        graphs = pipe.bundle.manifest.graphs
        noise = Generator(3).randn((1, *graphs.layout.latent_shape))
        negatives = [""] if graphs.layout.guided else []
        return pipe.latents(pipe.conditions([PROMPT], negatives), noise, plan=plan)


def require_equal(got: np.ndarray, want: np.ndarray, plain: np.ndarray) -> None:
    size = float(np.abs(want).max())
    assert float(np.abs(got - want).max()) <= 1e-4 * size
    assert float(np.abs(plain - want).max()) > 0.01 * size


def build(model: str | Path, output: Path, *flags: object) -> Path:
    done = lemica("build", "--model", model, *SMALL, *flags, "--output", output)
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture(scope="module")
def cog(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A bundle, the same with LoRA weights fused, and their file."""
    from diffusers import CogVideoXTransformer3DModel

    folder = tmp_path_factory.mktemp("cog")
    style = folder / "style.safetensors"
    network = CogVideoXTransformer3DModel.from_pretrained(zoo_path("cogvideox-tiny"), subfolder="transformer")
    save_file(factors(network, COG), style)
    plain = build("cogvideox-tiny", folder / "plain")
    return plain, build("cogvideox-tiny", folder / "fused", "--lora", f"{style}:{SCALE}"), style


def test_added_is_fused(cog: tuple[Path, Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    plain, fused, style = cog
    with caplog.at_level(logging.WARNING, "lemica_trt"):
        got = latents(plain, loras=[f"{style}:{SCALE}"])
    assert any("plans and their quality were measured without them" in line for line in caplog.messages)
    require_equal(got, latents(fused), latents(plain))
    cached = Bundle.open(plain).manifest.default_plan
    require_equal(latents(plain, cached, loras=[f"{style}:{SCALE}"]), latents(fused, cached), latents(plain, cached))
    taken = latents(fused, loras=[f"{style}:{-SCALE}"])  # on top of what is fused
    assert float(np.abs(taken - latents(plain)).max()) <= 1e-3 * float(np.abs(taken).max())


def test_the_command(cog: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plain, fused, style = cog
    clips = [tmp_path / name for name in ("added.npy", "fused.npy")]
    done = lemica("run", plain, PROMPT, "--plan", "uncached", "--lora", f"{style}:{SCALE}", "-o", clips[0], "--json")
    assert done.exit_code == 0, done.output
    assert lemica("run", fused, PROMPT, "--plan", "uncached", "-o", clips[1]).exit_code == 0
    added, want = (np.load(clip).astype(int) for clip in clips)
    assert np.abs(added - want).max() <= 1
    assert json.loads(done.stdout[done.stdout.index("{") :])["result"]["loras"][0]["scale"] == SCALE
    assert "can change 54 weights" in lemica("inspect", plain).output


def test_external_data(cog: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of large graphs lie beside them."""
    from lemica_trt.export import graphs

    plain, _, style = cog
    monkeypatch.setattr(graphs, "INLINE_BYTES", 0)
    large = build("cogvideox-tiny", tmp_path / "large")
    assert Bundle.open(large).manifest.graphs.graph("full").data_files
    added = {"loras": [f"{style}:{SCALE}"]}
    assert np.array_equal(latents(large, **added), latents(plain, **added))


def test_a_traced_pipeline(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    source, style = saved("flux", tmp_path / "flux"), tmp_path / "style.safetensors"
    save_file(factors(FluxTransformer2DModel.from_pretrained(source, subfolder="transformer"), FLUX), style)
    flags = ("--max-sequence-length", 64)
    plain = build(source, tmp_path / "plain", *flags)
    fused = build(source, tmp_path / "fused", *flags, "--lora", style)
    require_equal(latents(plain, loras=[str(style)]), latents(fused), latents(plain))
