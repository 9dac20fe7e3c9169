"""What a hand-edited, half-copied or converted pipeline folder can look like: loaded right, or refused in one line."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import diffusers
import msgspec
import pytest
import sentencepiece
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from lemica_trt.core.errors import InputError, LemicaError, MissingDependencyError, UnsupportedError
from lemica_trt.models import load_model, scheduler_like
from lemica_trt.models.load import revision_of

pytestmark = pytest.mark.cpu

WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def wan(model_of, tmp_path):
    """A copy of the Wan pipeline that a test may break."""
    return shutil.copytree(model_of("wan").folder, tmp_path / "pipeline")


def _profile(folder: Path, **changes: object):
    return tiny.tiny_profile(folder, "wan", frames=5, **changes)


def _refusal(folder: Path, **changes: object) -> str:
    with pytest.raises(InputError) as caught:
        load_model(_profile(folder, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _largest(weights: dict[str, torch.Tensor]) -> str:
    return max(sorted(weights), key=lambda name: weights[name].numel())


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("lacking", "a file that has no"),
        ("surplus", "a file that has an unknown fp8.scale_weight"),
        ("shape", "a file that has another shape of"),
        ("compiled", r"a file that has no .* and \d+ more"),
        ("adapter", "a file that has no"),
    ],
)
def test_weights_that_do_not_match_their_config(wan: Path, part: str, harm: str, message: str) -> None:
    file = wan / WEIGHTS[part]
    weights = load_file(file)
    name = _largest(weights)
    if harm == "lacking":
        del weights[name]
    elif harm == "surplus":
        weights["fp8.scale_weight"] = torch.ones(1)
    elif harm == "shape":
        weights[name] = weights[name][:-1].clone()
    elif harm == "compiled":
        weights = {f"_orig_mod.{key}": value for key, value in weights.items()}
    else:
        weights[f"{name.removesuffix('.weight')}.base_layer.weight"] = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{part}: expected weights that match config.json, got {message}") as caught:
        load_model(_profile(wan))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.fp16-00001-of-00001.safetensors"])
def test_weights_of_a_variant_alone(wan: Path, name: str) -> None:
    file = wan / WEIGHTS["text_encoder"]
    file.rename(file.with_name(name))
    assert "text_encoder: expected weights, got some of the variant fp16 only → download the others" in _refusal(wan)
    shutil.copy(file.with_name(name), file)
    assert load_model(_profile(wan))


def test_a_file_in_place_of_a_folder(wan: Path) -> None:
    message = "expected a pipeline folder, got a file → give the folder that has model_index.json"
    assert message in _refusal(wan / WEIGHTS["transformer"])


def test_a_config_of_fewer_layers(wan: Path) -> None:
    _edit(wan / "transformer/config.json", num_layers=1)
    assert "transformer: expected weights that match config.json, got a file that has an unknown" in _refusal(wan)


def test_weights_in_another_format_are_part_of_the_revision(wan: Path) -> None:
    file = wan / WEIGHTS["text_encoder"]
    weights = load_file(file)
    file.unlink()
    found = []
    for factor in (1.0, 2.0):
        torch.save({name: value * factor for name, value in weights.items()}, file.with_name("pytorch_model.bin"))
        found.append((revision_of(_profile(wan)), load_model(_profile(wan)).embed(["ab"])))
    (first, embeds), (second, others) = found
    assert first != second
    assert not torch.equal(embeds, others)


def test_a_transformer_of_an_image_to_video_model(wan: Path) -> None:
    folder = wan / "transformer"
    config = json.loads((folder / "config.json").read_text())
    diffusers.WanTransformer3DModel.from_config({**config, "in_channels": 36}).save_pretrained(folder)
    assert "the transformer does not fit the other parts" in _refusal(wan)


def test_a_vae_of_fewer_channels(wan: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((wan / "vae/config.json").read_text())
    fewer = {"z_dim": 8, "latents_mean": config["latents_mean"][:8], "latents_std": config["latents_std"][:8]}
    diffusers.AutoencoderKLWan.from_config({**config, **fewer}).save_pretrained(wan / "vae")
    assert "the VAE does not fit the other parts" in _refusal(wan)
    assert not [record for record in caplog.records if record.exc_info]  # torch logs a traceback of its own


def test_a_text_encoder_of_another_width_or_vocabulary(wan: Path) -> None:
    folder = wan / "text_encoder"
    original = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"vocab_size": 10}, "tokens of the tokenizer, got one for 10"),
        ({"d_model": 16}, "the transformer does not fit the other parts"),
    ):
        config = transformers.UMT5Config.from_dict({**original, **change})
        transformers.UMT5EncoderModel(config).save_pretrained(folder)
        assert message in _refusal(wan)


def test_a_shape_beyond_the_table_of_positions(wan: Path) -> None:
    assert "the transformer does not fit the other parts at 5 frames of 544x32" in _refusal(wan, width=544)


def test_a_tokenizer_without_its_vocabulary(wan: Path) -> None:
    for path in (wan / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    assert "expected a vocabulary in tokenizer/" in _refusal(wan) or "a complete pipeline" in _refusal(wan)


def test_parts_come_from_diffusers_and_transformers_only(wan: Path) -> None:
    _edit(wan / "model_index.json", text_encoder=["antigravity", "Encoder"])
    with pytest.raises(UnsupportedError, match=r"text_encoder must be a class of diffusers or transformers, got anti"):
        load_model(_profile(wan))


def test_a_vocabulary_of_sentencepiece_alone(wan: Path, tmp_path: Path) -> None:
    """As CogVideoX has it on the hub: `spiece.model`, no `tokenizer.json`; the ids are sentencepiece's own."""
    (tmp_path / "text").write_text("a red ball rolls left\nthe green box is still\ntwo blue dots rise\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), vocab_size=30, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    shutil.rmtree(wan / "tokenizer")
    (wan / "tokenizer").mkdir()
    shutil.copy(tmp_path / "spiece.model", wan / "tokenizer")
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (wan / "tokenizer/tokenizer_config.json").write_text(json.dumps({**settings, "extra_ids": 0}))
    _edit(wan / "model_index.json", tokenizer=["transformers", "T5Tokenizer"])
    newer = importlib.metadata.version("sentencepiece") >= "0.2.3"
    if newer and int(importlib.metadata.version("protobuf").split(".")[0]) < 7:  # excluded by pyproject.toml
        with pytest.raises(MissingDependencyError, match=r"do not go together.*pip install 'sentencepiece<0\.2\.3'"):
            load_model(_profile(wan))
        return
    tokens = load_model(_profile(wan)).tokens(["two dots"])["input_ids"][0].tolist()
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model")).encode("two dots")
    assert tokens == [*own[: tiny.TEXT_LENGTH - 1], 1] + [0] * (tiny.TEXT_LENGTH - 1 - len(own))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, {}, "cannot make 4 steps"),
        ({"_class_name": "DDIMScheduler"}, {"steps": 1001}, "DDIMScheduler cannot make 1001 steps"),
        ({}, {"scheduler": "VQDiffusionScheduler"}, "VQDiffusionScheduler"),
    ],
)
def test_schedulers_that_diffusers_refuses(wan: Path, config, changes, message: str) -> None:
    if config:
        (wan / "scheduler/scheduler_config.json").write_text(json.dumps(config))
        _edit(wan / "model_index.json", scheduler=["diffusers", config["_class_name"]])
    with pytest.raises(LemicaError, match=message) as caught:
        load_model(_profile(wan, **changes)).scheduler()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == UnsupportedError.exit_code


def test_a_scheduler_class_that_does_not_take_the_settings() -> None:
    sde = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    for kind in (diffusers.DEISMultistepScheduler, diffusers.VQDiffusionScheduler):
        with pytest.raises(UnsupportedError, match=f"{kind.__name__} cannot be made with the model's settings"):
            scheduler_like(kind, sde)


def test_a_wider_shape_of_the_same_model(model_of) -> None:
    """Sizes are checked for each shape; CogVideoX 1.5 has positions for its own width only."""
    for variant in ("sincos", "rotary", "wan", "packed"):
        profile = model_of(variant).profile
        wider = msgspec.structs.replace(profile, shape=msgspec.structs.replace(profile.shape, width=64))
        if variant == "packed":
            with pytest.raises(InputError, match="the transformer does not fit the other parts at 9 frames of 64x32"):
                load_model(wider)
        else:
            assert load_model(wider).latent_shape[-1] == 2 * model_of(variant).latent_shape[-1]
