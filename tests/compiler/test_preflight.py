"""What is refused before a download: a model of the hub whose weights may not be touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import pytest
from click.testing import CliRunner, Result

from lemica_trt.cli.main import main
from lemica_trt.ir.resources import load_profile, zoo_path
from lemica_trt.models import preflight
from lemica_trt.models.open_sora import published

pytestmark = pytest.mark.cpu

TOUCHED = "the weights were touched"

PROFILE = """
family = "cogvideox"
source = "nobody/a-model"
dtype = "fp32"
text_length = 16
shape = {frames = 9, height = 64, width = 64, max_batch = 1}
sampling = {steps = 50, guidance_scale = 4.0}
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that has the bundled CogVideoX, gives its configuration, and fails the test where weights are asked for."""
    asked: dict[str, Any] = {"bytes": 1000}
    configuration = tmp_path / "hub"

    def snapshot(source: str, *, allow_patterns: list[str]) -> str:
        asked["source"] = source
        whole = zoo_path("cogvideox-tiny")
        for pattern in allow_patterns:
            for file in whole.glob(pattern):
                target = configuration / file.relative_to(whole)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        assert not list(configuration.rglob("*.safetensors"))
        return str(configuration)

    def touched(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(TOUCHED)

    def model_info(self: Any, source: str, *, files_metadata: bool) -> Any:
        files = [SimpleNamespace(rfilename="transformer/model.safetensors", size=asked["bytes"])]
        return SimpleNamespace(siblings=[*files, SimpleNamespace(rfilename="README.md", size=1 << 60)])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", touched)
    monkeypatch.setattr(preflight, "is_here", lambda profile: False)
    (tmp_path / "model.toml").write_text(PROFILE)
    monkeypatch.chdir(tmp_path)
    return asked


def build(*arguments: object) -> Result:
    command = ["build", "--model", "model.toml", "--output", "out", "--quiet", *map(str, arguments)]
    return CliRunner().invoke(main, command)


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (("--budget", "99"), 6, "budget: expected 5 … 50 full steps"),
    (("--budget", "0"), 6, "budget: expected 5 … 50 full steps"),
    (("--budget", "3"), 6, "budget: expected 5 … 50 full steps"),
    (("--schedule", "0,7,3"), 2, "schedule[2]"),
    (("--schedule", "0,60"), 2, "schedule[1]: expected a step of 0 … 49, got 60"),
    (("--prompts", "nowhere.txt"), 3, "nowhere.txt"),
    (("--scheduler", "DDIMSchedular"), 2, "did you mean DDIMScheduler"),
    (("--scheduler", "DPMSolverSDEScheduler"), 7, "pip install torchsde"),
    (("--scheduler", "FlowMatchEulerDiscreteScheduler"), 5, "not for flow matching"),
    (("--frames", "10"), 3, "use 9 or 17"),
    (("--height", "60"), 3, "height must be a multiple of 16"),
    (("--device", "abacus"), 7, "abacus"),
    (("--backend", "onnxruntime", "--dtype", "bf16"), 5, "bf16"),
    (("--error-graph", "nowhere.json"), 3, "nowhere.json"),
])  # fmt: skip
def test_flags_are_refused_before_weights_are_touched(
    arguments: tuple[str, ...], code: int, says: str, hub: dict[str, Any]
) -> None:
    done = build(*arguments)
    assert done.exit_code == code and says in done.stderr, done.stderr
    assert TOUCHED not in done.stderr and " → " in done.stderr
    assert not Path("out").exists() and not Path("out.work/journals").exists()


def test_weights_larger_than_the_disk_are_not_downloaded(hub: dict[str, Any]) -> None:
    hub["bytes"] = 1 << 60
    done = build("--budget", "15")
    assert done.exit_code == 7 and "the weights take 1152922 TB" in done.stderr, done.stderr
    assert TOUCHED not in done.stderr and "set HF_HOME" in done.stderr


def test_all_repositories_of_a_published_model_must_fit_the_disk(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not needed of them does not count."""
    asked = []

    def model_info(self: Any, source: str, *, files_metadata: bool) -> Any:
        asked.append(source)
        files = {"model.safetensors": 1 << 58, "README.md": 1 << 60}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=its) for name, its in files.items()])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    command = ["build", "--model", "open-sora-1.2", "--dtype", "fp32", "--budget", "15", "--output", "out", "--quiet"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 7 and "OpenSora-STDiT-v3: the weights take 864691 TB" in done.stderr, done.stderr
    assert asked == [each.source for each in published.REPOSITORIES]


def test_what_can_be_built_goes_on_to_the_download(hub: dict[str, Any]) -> None:
    done = build("--budget", "15")
    assert done.exit_code == 3 and TOUCHED in done.stderr and hub["source"] == "nobody/a-model"


def test_a_calibration_of_few_steps_needs_no_budget(hub: dict[str, Any]) -> None:
    """15 full steps are the default of commands that make plans."""
    command = ["calibrate", "--model", "model.toml", "--output", "work", "--denoising-steps", "6", "--quiet"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 3 and TOUCHED in done.stderr, done.stderr


def test_the_scheduler_of_a_traced_pipeline_is_left_to_it(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX's needs a shift that its pipeline takes from the shape."""
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    monkeypatch.setattr(preflight, "_scheduler_in", lambda folder: own)
    Path("model.toml").write_text(PROFILE.replace('"cogvideox"', '"traced"'))
    assert preflight.require_configuration(load_profile("model.toml")) is None


@pytest.mark.filterwarnings("ignore")  # of diffusers
def test_the_loop_of_a_traced_pipeline_is_looked_at_before_weights_are_touched(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own call refuses a shape, and so does tracing a sampler that is not linear; what goes on is downloaded."""
    traced = PROFILE.replace('"cogvideox"', '"traced"').replace("steps = 50", "steps = 8")
    Path("model.toml").write_text(traced)
    shape = build("--height", "60", "--budget", "4")
    assert shape.exit_code == 3 and "CogVideoXPipeline refuses its arguments: `height`" in shape.stderr, shape.stderr
    clipped = {"beta_schedule": "linear", "clip_sample": True}
    own = diffusers.DDIMScheduler(**clipped)  # type: ignore[arg-type]
    monkeypatch.setattr("lemica_trt.models.load.scheduler_for", lambda sampling, scheduler: own)
    sampler = build("--budget", "4")
    assert sampler.exit_code == 5 and "clip_sample" in sampler.stderr, sampler.stderr
    assert TOUCHED not in shape.stderr + sampler.stderr


def test_ray_is_looked_for_before_anything_else(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from lemica_trt.compiler import preflight as checks

    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    done = build("--budget", "15", "--ray", "local")
    assert done.exit_code == 7 and "--ray needs Ray" in done.stderr


def test_where_the_configuration_cannot_be_had_the_download_says_why(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: Any, **keywords: Any) -> Any:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert TOUCHED in build("--budget", "15").stderr
    done = build("--budget", "101")
    assert done.exit_code == 6 and TOUCHED not in done.stderr
