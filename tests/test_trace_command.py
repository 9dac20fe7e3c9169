"""`lemica-trt trace` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from command import result_of

from lemica_trt.cli.main import main
from lemica_trt.ir.resources import zoo_path
from lemica_trt.ir.trace import Trace

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers and transformers


def trace(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["trace", *map(str, arguments)], env={"HF_HUB_OFFLINE": "1", "COLUMNS": "80"})


def test_a_profile_is_traced_at_its_shape() -> None:
    done = trace("--model", "wan-tiny", "--quiet")
    assert done.exit_code == 0, done.output
    assert "WanPipeline" in done.stdout
    assert "guidance_scale: 2 calls, linear" in done.stdout
    assert "blocks (5); 86% of its parameters" in done.stdout
    assert "height=64, width=64, num_frames=9" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_json_is_the_value(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo_path("cogvideox-tiny"), folder)
    done = trace(
        *("--model", folder, "--num-inference-steps", 3, "--height", 32, "--width", 48, "--num-frames", 9),
        *("--max-sequence-length", 16, "--argument", "use_dynamic_cfg=true", "--json"),
    )
    assert done.exit_code == 0, done.output
    found = msgspec.convert(result_of(done.stdout), Trace)
    assert found.arguments["use_dynamic_cfg"] is True
    assert found.states[0].table.num_steps == 3


def index(folder: Path, kind: str, **parts: list[str]) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **parts}))
    return folder


def test_mistakes_are_one_line_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a network
    unet = index(tmp_path / "unet", "StableDiffusionPipeline", unet=["diffusers", "UNet2DConditionModel"])
    own = index(tmp_path / "own", "MyPipeline", transformer=["diffusers", "MyTransformer"])
    wan = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
    }
    part = index(tmp_path / "part", "WanPipeline", **wan, text_encoder=["transformers", "UMT5EncoderModel"])
    less = index(tmp_path / "less", "WanPipeline", **wan)
    modular = index(tmp_path / "modular", "WanModularPipeline", **wan)  # which parts it needs its blocks say
    mute = index(tmp_path / "mute", "WanPipeline", **wan, text_encoder=["transformers", "UMT5EncoderModel"])
    for name in (*wan, "text_encoder"):
        (mute / name).mkdir()
    (tmp_path / "empty").mkdir()
    for arguments, code, line in (
        (["cogvideox-tin"], 2, "got 'cogvideox-tin' → did you mean cogvideox-tiny"),
        (["nobody/nothing"], 3, "nobody/nothing: expected a folder or a diffusers pipeline on the hub, got: "),
        ([unet], 5, "expected a pipeline with a diffusion transformer, got a UNet (StableDiffusionPipeline)"),
        ([own], 5, "got MyPipeline"),
        ([part], 3, "expected a complete pipeline, got no folder 'transformer'"),
        ([less], 3, "expected all parts of WanPipeline, got none for text_encoder"),
        ([modular], 3, "expected a complete pipeline, got no folder 'transformer'"),
        ([mute], 3, "expected a vocabulary in tokenizer/, got none"),
        ([tmp_path / "empty"], 3, "got no readable model_index.json"),
        (["wan-tiny", "--argument", "speed"], 2, "--argument must be NAME=VALUE, got 'speed'"),
    ):
        done = trace("--model", *arguments, "--quiet")
        assert (done.exit_code, line in done.stderr, done.stderr.count("\n")) == (code, True, 1), done.output


def test_what_the_pipeline_does_not_take_is_one_line() -> None:
    for arguments, code, line in (
        (["--height", 33], 3, "refuses its arguments: "),
        (["--argument", "speed=2"], 2, "WanPipeline takes no argument 'speed'"),
    ):
        done = trace("--model", "wan-tiny", "--quiet", *arguments)
        assert (done.exit_code, line in done.stderr, done.stderr.count("\n")) == (code, True, 1), done.output
