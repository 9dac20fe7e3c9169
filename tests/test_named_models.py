"""The named models: found by name and hub id, told apart from typing errors, refused before any download."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command import result_of

from lemica_trt.cli.main import main
from lemica_trt.core.errors import UsageError
from lemica_trt.ir.profile import TRACED
from lemica_trt.ir.resources import is_pipeline, load_named, load_profile, profile_name, profile_names

NAMES = profile_names()


def lemica(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"HF_HUB_OFFLINE": "1", "COLUMNS": "160"})


@pytest.mark.null
def test_models_lists_every_profile() -> None:
    done = lemica("models", "--json")
    assert done.exit_code == 0
    assert [model["profile"]["name"] for model in result_of(done.stdout)] == NAMES
    table = lemica("models").stdout
    assert all(name in table for name in NAMES)
    assert "qwen-image" in table and "No other model was run with its weights." in table


@pytest.mark.null
@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_where_its_settings_come_from(name: str) -> None:
    model = load_named(name)
    source = model.profile.source
    if source.startswith("package:"):
        assert model.card.ran
        return
    assert model.card.links[0] == f"https://huggingface.co/{source}"
    assert all(link.startswith("https://") for link in model.card.links)
    assert profile_name(source) == profile_name(source.upper()) == name
    assert load_profile(source) == load_profile(name.upper()) == model.profile
    assert not is_pipeline(source)


@pytest.mark.cpu
@pytest.mark.parametrize("name", NAMES)
def test_a_card_names_a_class_that_there_is(name: str) -> None:
    import diffusers

    from lemica_trt.models.load import PIPELINES

    kind = load_named(name).card.pipeline
    assert kind in PIPELINES or hasattr(diffusers, kind)


@pytest.mark.null
@pytest.mark.parametrize(
    ("typed", "near"),
    [("flux1-dev", "flux.1-dev"), ("qwen-imag", "qwen-image"), ("someone/CogVideoX-5B-I2V2", "cogvideox-5b-i2v")],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(typed: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean .*{near}"):
        load_profile(typed)


@pytest.mark.cpu
def test_an_unknown_hub_id_is_answered_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a network
    done = lemica("build", "--model", "someone/FLUX.1-devel", "--budget", "3")
    assert done.exit_code == 3, done.stderr
    assert "did you mean flux.1-dev" in done.stderr


@pytest.mark.null
def test_what_cannot_be_built_is_refused_before_anything_else(tmp_path: Path) -> None:
    """Whatever else is asked for."""
    known = (Path(__file__).parents[1] / "engines" / "flux.1-dev.toml").read_text(encoding="utf-8")
    own = tmp_path / "mine.toml"
    own.write_text(known.replace("[card]", '[card]\nrefused = "it draws nothing"'), encoding="utf-8")
    done = lemica("build", "--model", str(own), "--dtype", "fp32", "--dry-run")
    assert done.exit_code == 5, done.stderr
    assert "mine (FluxPipeline) cannot be built yet: it draws nothing → " in done.stderr
    assert done.stderr.count("\n") == 1


BUILT = [name for name in NAMES if load_profile(name).family == TRACED and not load_named(name).card.refused]


@pytest.mark.null
@pytest.mark.parametrize("name", [name for name in BUILT if load_profile(name).dtype == "bf16"])
def test_a_traced_pipeline_is_built_in_the_dtype_of_its_card(name: str) -> None:
    """An engine that cannot run it is refused before a download, and those that can are named."""
    done = lemica("build", "--model", name, "--backend", "onnxruntime", "--denoising-steps", "8", "--budget", "3")
    assert done.exit_code == 5, done.stderr
    assert "bf16" in done.stderr
    assert "--dtype fp32 (or fp16, where the model stands it), or for --backend tensorrt-rtx or tensorrt" in done.stderr


@pytest.mark.null
def test_batches_of_a_traced_pipeline_are_refused_before_a_download() -> None:
    done = lemica("build", "--model", BUILT[0], "--max-batch", "2", "--budget", "3")
    assert done.exit_code == 5
    assert "for one request a call, got max_batch 2" in done.stderr
