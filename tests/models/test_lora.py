"""LoRA weights fused into models: W + scale · B A, all of a file or a refusal."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import pytest
import torch
from diffusers import FluxPipeline, WanPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from lemica_trt.cli.flags import loras_from_flags, profile_from_flags
from lemica_trt.core.errors import InputError, LemicaError, MissingDependencyError, UnsupportedError, UsageError
from lemica_trt.core.files import sha256_of
from lemica_trt.ir.profile import TRACED, Lora, Profile, Sampling, Shape
from lemica_trt.ir.resources import absolute_source, load_profile
from lemica_trt.models import denoise, load_model
from lemica_trt.models.load import is_here, load_pipeline, revision_of
from lemica_trt.models.lora import require_fitting_lora
from lemica_trt.models.preflight import require_configuration
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.step_plan import uncached_plan
from lemica_trt.testing.pipelines import tiny_pipeline

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers and transformers

RANK = 2
COG = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2", "patch_embed.text_proj")


def factors(network: nn.Module, part: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Random LoRA weights of some modules, in diffusers' format."""
    draw = torch.Generator().manual_seed(3)
    found = {}
    for name in names:
        rows, columns = network.get_submodule(name).weight.shape  # type: ignore[misc]
        found[f"{part}.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw)
        found[f"{part}.{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw)
    return found


def saved(weights: Mapping[str, Tensor], path: Path) -> Lora:
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return Lora(source=str(path))


def cogvideox(*loras: Lora) -> Profile:
    return msgspec.structs.replace(load_profile("cogvideox-tiny"), loras=loras)


@pytest.fixture(scope="module")
def cog() -> Any:
    return load_model(load_profile("cogvideox-tiny"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    tiny_pipeline("flux").save_pretrained(folder)
    return folder


def require_fused(before: nn.Module, after: nn.Module, added: Mapping[str, Tensor]) -> None:
    """Weights are the old ones and what was added by name of module; all others are the same, and none is new."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert old.keys() == new.keys() >= {f"{name}.weight" for name in added}
    for key, value in old.items():
        name = key.removesuffix(".weight")
        if key != name and name in added:
            assert new[key].detach() == pytest.approx(value.detach() + added[name], abs=1e-5 * float(added[name].max()))
            assert not torch.equal(new[key], value)
        else:
            assert torch.equal(new[key], value)


def products(weights: Mapping[str, Tensor], part: str, scale: float) -> dict[str, Tensor]:
    ending = ".lora_A.weight"
    names = [key.removesuffix(ending) for key in weights if key.endswith(ending) and key.startswith(f"{part}.")]
    return {
        name.removeprefix(f"{part}."): scale * weights[f"{name}.lora_B.weight"] @ weights[name + ending]
        for name in names
    }


def test_a_familys_weights_are_fused_and_its_revision_is_another(cog: Any, tmp_path: Path) -> None:
    before = cog.pipeline.transformer
    weights = factors(before, "transformer", COG)
    lora = msgspec.structs.replace(saved(weights, tmp_path / "a.safetensors"), scale=0.5)
    fused = load_model(cogvideox(lora))
    require_fused(before, fused.pipeline.transformer, products(weights, "transformer", 0.5))
    assert fused.profile.loras[0].sha256 == sha256_of(tmp_path / "a.safetensors")
    assert fused.revision == revision_of(cogvideox(lora))
    others = [(), (msgspec.structs.replace(lora, scale=0.6),), (lora, lora)]
    moved = saved(weights, tmp_path / "b.safetensors")
    assert fused.revision not in {revision_of(cogvideox(*loras)) for loras in others}
    assert fused.revision == revision_of(cogvideox(msgspec.structs.replace(moved, scale=0.5)))
    assert revision_of(cogvideox()) == cog.revision


def test_several_are_added(cog: Any, tmp_path: Path) -> None:
    before = cog.pipeline.transformer
    weights = factors(before, "transformer", COG)
    one = saved(weights, tmp_path / "one.safetensors")
    half = msgspec.structs.replace(one, scale=-0.5)
    fused = load_model(cogvideox(one, half)).pipeline.transformer
    require_fused(before, fused, products(weights, "transformer", 0.5))


def test_text_encoders_count(flux: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("flux")
    weights = {
        **factors(pipeline.transformer, "transformer", ("transformer_blocks.0.attn.to_q", "x_embedder")),
        **factors(pipeline.text_encoder, "text_encoder", ("encoder.layers.0.self_attn.q_proj",)),
    }
    fused = load_pipeline(
        str(flux), loras=[msgspec.structs.replace(saved(weights, tmp_path / "f.safetensors"), scale=2)]
    )
    for part in ("transformer", "text_encoder"):
        require_fused(getattr(pipeline, part), getattr(fused, part), products(weights, part, 2))


def test_the_format_of_other_trainers(flux: Path, tmp_path: Path) -> None:
    """kohya's names; its alpha divides by the rank, and query, key and value are one module."""
    pipeline, draw = tiny_pipeline("flux"), torch.Generator().manual_seed(1)
    width = pipeline.transformer.get_submodule("transformer_blocks.0.attn.to_q").in_features
    down, up = torch.randn(RANK, width, generator=draw), torch.randn(3 * width, RANK, generator=draw)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    weights = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    fused = load_pipeline(str(flux), loras=[saved(weights, tmp_path / "kohya.safetensors")])
    parts = (up @ down / RANK).chunk(3)
    added = {f"transformer_blocks.0.attn.to_{letter}": part for letter, part in zip("qkv", parts)}
    require_fused(pipeline.transformer, fused.transformer, added)


def test_a_traced_pipeline_is_traced_with_them(flux: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("flux")
    weights = {
        **factors(pipeline.transformer, "transformer", ("transformer_blocks.0.attn.to_v",)),
        **factors(pipeline.text_encoder, "text_encoder", ("encoder.layers.0.self_attn.v_proj",)),
    }
    profile = Profile(
        name="flux", family=TRACED, source=str(flux), dtype="fp32", text_length=64,
        shape=Shape(frames=1, height=32, width=32), sampling=Sampling(steps=3, guidance_scale=3.5),
        loras=(saved(weights, tmp_path / "f.safetensors"),),
    )  # fmt: skip
    model = load_model(profile)
    assert model.revision == revision_of(profile) != revision_of(msgspec.structs.replace(profile, loras=()))
    plain = load_pipeline(str(flux))
    with torch.no_grad():
        for part in ("transformer", "text_encoder"):
            for name, added in products(weights, part, 1.0).items():
                getattr(plain, part).get_submodule(name).weight += added
    plan = uncached_plan(sampler_table(model.scheduler()), guidance_scale=3.5)
    noise, prompt = model.noise(5)[None], "a green house by the tree"
    got = denoise(model, plan, model.embed([prompt]), noise)
    want = plain(
        prompt, height=32, width=32, num_inference_steps=3, guidance_scale=3.5, max_sequence_length=64, latents=noise,
        output_type="latent",
    ).images  # fmt: skip
    assert got == pytest.approx(want, abs=1e-4 * float(want.abs().max()))


def _strange(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("transformer_blocks", "blocks"): value for key, value in weights.items()}


def _narrow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value[:, :-1] if "lora_A" in key else value for key, value in weights.items()}


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], type[LemicaError], str]] = {
    "others": (
        lambda w: {key.replace("transformer.", "unet."): value for key, value in w.items()},
        InputError,
        r"expected keys that begin with transformer\., as CogVideoXPipeline has them, got unet\.\S+ and 5 more",
    ),
    "modules": (
        _strange,
        InputError,
        r"modules that the transformer has, such as patch_embed\S*, proj_out, got blocks\.0\.attn1\.to_q\.lora_A",
    ),
    "one too many": (
        lambda w: {**w, "text_encoder.x.lora_A.weight": torch.ones(2, 2)},
        InputError,
        r"got text_encoder\.x\.lora_A\.weight →",
    ),
    "shape": (_narrow, InputError, r"expected B A of \[\d+, \d+\] for transformer\.patch_embed\.text_proj, got"),
    "half": (lambda w: dict(list(w.items())[:-1]), InputError, "lora_A and lora_B of transformer modules"),
    "dora": (
        lambda w: {**w, "transformer.proj_out.dora_scale": torch.ones(2)},
        InputError,
        "expected LoRA weights that diffusers takes whole: It seems like you are using a DoRA",
    ),
    "full weights": (
        lambda w: {**w, "transformer.proj_out.weight": torch.ones(2)},
        UnsupportedError,
        "got proj_out.weight: only products B A are fused",
    ),
    "lokr": (
        lambda w: {"transformer.proj_out.lokr_w1": torch.ones(2, 2), "transformer.proj_out.lokr_w2": torch.ones(2, 2)},
        UnsupportedError,
        "got proj_out.lokr_w1 and 1 more: only products B A are fused",
    ),
    "change of a weight": (
        lambda w: {**w, "diffusion_model.norm.diff": torch.ones(2)},
        UnsupportedError,
        "got changes of whole weights: diffusion_model.norm.diff",
    ),
    "remains of a projection": (
        lambda w: {**w, "diffusion_model.time_projection.1.alpha": torch.ones(1)},
        InputError,
        "expected the products of time_projection, got diffusion_model.time_projection.1.alpha →",
    ),
    "bias of one": (
        lambda w: {**w, f"transformer.{COG[0]}.lora_B.bias": torch.ones(3)},
        InputError,
        "lora_B.bias of all transformer modules or none",
    ),
    "nan": (lambda w: {key: value * torch.nan for key, value in w.items()}, InputError, "NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_of_a_file_is_dropped(case: str, cog: Any, tmp_path: Path) -> None:
    change, error, message = REFUSED[case]
    lora = saved(change(factors(cog.pipeline.transformer, "transformer", COG)), tmp_path / "x.safetensors")
    if case != "nan":  # all else is known before weights are loaded
        with pytest.raises(error, match=message):
            require_configuration(cogvideox(lora))
    with pytest.raises(error, match=message) as raised:
        load_model(cogvideox(lora))
    assert "\n" not in str(raised.value)


def test_what_fits_is_let_through_without_weights(cog: Any, flux: Path, tmp_path: Path) -> None:
    require_configuration(
        cogvideox(saved(factors(cog.pipeline.transformer, "transformer", COG), tmp_path / "c.safetensors"))
    )
    encoder = factors(tiny_pipeline("flux").text_encoder, "text_encoder", ("encoder.layers.0.self_attn.q_proj",))
    traced = Profile(
        name="flux", family=TRACED, source=str(flux), dtype="fp32", text_length=64,
        shape=Shape(frames=1, height=32, width=32), loras=(saved(encoder, tmp_path / "e.safetensors"),),
    )  # fmt: skip
    require_configuration(traced)
    for path in (flux / "transformer").glob("*.safetensors"):
        path.rename(tmp_path / path.name)
    require_configuration(traced)
    for path in tmp_path.glob("diffusion*.safetensors"):
        path.rename(flux / "transformer" / path.name)


def test_a_link_to_a_file_keeps_its_name(tmp_path: Path) -> None:
    """As in the hub's cache, whose files have no names that say what they are."""
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "style.safetensors").symlink_to(tmp_path / "blob")
    assert absolute_source(str(tmp_path / "style.safetensors")) == str(tmp_path / "style.safetensors")


def test_pipelines_of_two_transformers_and_parts_that_are_missing(cog: Any, tmp_path: Path) -> None:
    """diffusers puts everything into one of them, or drops it without a word."""
    weights = factors(cog.pipeline.transformer, "transformer", COG)
    two = {"transformer": cog.pipeline.transformer, "transformer_2": cog.pipeline.transformer}
    first = saved(weights, tmp_path / "one.safetensors")
    second = msgspec.structs.replace(first, expert="transformer_2")
    assert require_fitting_lora(WanPipeline, two, first) == {"transformer": {*COG}}
    assert require_fitting_lora(WanPipeline, two, second) == {"transformer_2": {*COG}}
    for networks in ({**two, "transformer_2": None}, {"transformer": cog.pipeline.transformer}):
        with pytest.raises(UnsupportedError, match=r"expected a pipeline with a second transformer, Wan\w+ has none"):
            require_fitting_lora(WanPipeline, networks, second)
    other = {**two, "transformer_2": tiny_pipeline("wan").transformer}
    with pytest.raises(InputError, match=r"modules that the transformer_2 has, .* got patch_embed\.text_proj"):
        require_fitting_lora(WanPipeline, other, second)
    both = {
        **weights,
        **{key.replace("transformer.", "transformer_2.", 1): value.clone() for key, value in weights.items()},
    }
    one = {"transformer": cog.pipeline.transformer, "transformer_2": None}
    with pytest.raises(InputError, match="no weights of a transformer_2, which this pipeline does not have"):
        require_fitting_lora(WanPipeline, one, saved(both, tmp_path / "both.safetensors"))
    for lora in (first, second):
        lora = msgspec.structs.replace(lora, source=str(tmp_path / "both.safetensors"))
        with pytest.raises(InputError, match=r"begin with transformer\., which --lora and --lora-2 put into one"):
            require_fitting_lora(WanPipeline, two, lora)


WAN = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2", "proj_out")


def test_each_of_two_transformers_has_its_own(tmp_path: Path) -> None:
    """Wan 2.2: into the one that is named, and into no other; which one is part of the model's revision."""
    before = tiny_pipeline("wan2.2")
    before.save_pretrained(tmp_path / "wan")
    weights = {part: factors(getattr(before, part), "transformer", WAN) for part in ("transformer", "transformer_2")}
    files = {part: saved(its, tmp_path / f"{part}.safetensors") for part, its in weights.items()}
    high = msgspec.structs.replace(files["transformer"], scale=0.5)
    low = msgspec.structs.replace(files["transformer_2"], scale=2.0, expert="transformer_2")
    profile = Profile(
        name="wan", family=TRACED, source=str(tmp_path / "wan"), dtype="fp32", text_length=64,
        shape=Shape(frames=9, height=32, width=48), loras=(high, low),
    )  # fmt: skip
    require_configuration(profile)
    for loras, scales in (((high, low), (0.5, 2.0)), ((low,), (0.0, 2.0)), ((high,), (0.5, 0.0))):
        after = load_pipeline(str(tmp_path / "wan"), loras=loras)
        for (part, its), scale in zip(weights.items(), scales):
            require_fused(
                getattr(before, part), getattr(after, part), products(its, "transformer", scale) if scale else {}
            )
    swapped = (msgspec.structs.replace(high, expert="transformer_2"), low)
    revisions = {
        revision_of(msgspec.structs.replace(profile, loras=loras)) for loras in ((high, low), (high,), swapped)
    }
    assert len(revisions) == 3
    assert "in transformer_2" in low.text and low.flag == f"--lora-2 {low.source}:2"


def test_a_pipeline_that_takes_none(cog: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "latte"
    tiny_pipeline("latte").save_pretrained(folder)
    lora = saved(factors(cog.pipeline.transformer, "transformer", COG), tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedError, match=r"takes no LoRA weights for LattePipeline → leave --lora out"):
        load_pipeline(str(folder), loras=[lora])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    with pytest.raises(MissingDependencyError, match=r"peft, which is not installed → pip install .*\[build\]"):
        require_configuration(cogvideox(lora))


def test_files_are_found(tmp_path: Path) -> None:
    assert hasattr(FluxPipeline, "lora_state_dict")
    (tmp_path / "a:b.safetensors").touch()
    (tmp_path / "c.bin").touch()
    assert loras_from_flags([f"{tmp_path}/a:b.safetensors", f"{tmp_path}/a:b.safetensors:-2"]) == (
        Lora(source=f"{tmp_path}/a:b.safetensors"),
        Lora(source=f"{tmp_path}/a:b.safetensors", scale=-2),
    )
    assert loras_from_flags(["o/n:0.5", "o/n/x.safetensors"])[0] == Lora(source="o/n", scale=0.5)
    assert Lora(source="o/n/x.safetensors").on_hub == ("o/n", "x.safetensors")
    for text in ("o/n:big", "o/n:", "o/n:nan"):
        with pytest.raises(UsageError, match="with a number as scale, got 'o/n:"):
            loras_from_flags([text])
    for text in ("x.safetensors", "loras/x.safetensors:1", "./o/n", "/no/such"):
        with pytest.raises(InputError, match="which is not there"):
            loras_from_flags([text])
    with pytest.raises(InputError, match=r"in a \.safetensors file"):
        revision_of(cogvideox(Lora(source=f"{tmp_path}/c.bin")))
    (tmp_path / "d.safetensors").touch()
    with pytest.raises(
        InputError, match=r"expected one \.safetensors file of LoRA weights, got a:b\.safetensors, d\.saf"
    ):
        revision_of(cogvideox(Lora(source=str(tmp_path))))


def test_the_hubs_cache_is_enough(cog: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    profiles = [cogvideox(Lora(source=source)) for source in ("o/n", "o/n/style.safetensors")]
    for profile in profiles:
        assert not is_here(profile)
        with pytest.raises(InputError, match=r"o/n.*: expected a file of LoRA weights, or one on the hub, got: "):
            load_model(profile)
    repository = tmp_path / "models--o--n"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (folder := repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    weights = factors(cog.pipeline.transformer, "transformer", COG)
    saved(weights, folder / "style.safetensors")
    for profile in profiles:
        assert is_here(profile)
        assert revision_of(profile) == revision_of(cogvideox(Lora(source=str(folder)))) != cog.revision
        require_configuration(profile)


def test_flags_of_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.touch()
    assert not profile_from_flags("cogvideox-tiny", None, {"lora": ()}).loras
    found = profile_from_flags("cogvideox-tiny", None, {"lora": f"{path}:0.25"})
    assert found.loras == (Lora(source=str(path), scale=0.25),)
    found = profile_from_flags("cogvideox-tiny", None, {"lora": [str(path)], "lora_2": f"{path}:0.25"})
    assert found.loras == (Lora(source=str(path)), Lora(source=str(path), scale=0.25, expert="transformer_2"))
    with pytest.raises(UsageError, match=r"--lora-2: expected FILE_OR_HUB_ID.*, got 'a/b:strong' → for"):
        loras_from_flags((), ["a/b:strong"])
