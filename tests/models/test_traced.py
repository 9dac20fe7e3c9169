"""Models made from traces: every tiny pipeline either runs from its own parts as the pipeline does, or says why not."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from msgspec import UNSET
from PIL import Image
from torch import Tensor

from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.core.errors import InputError, LemicaError, UnsupportedError
from lemica_trt.core.metrics import psnr
from lemica_trt.core.pictures import drawn_picture
from lemica_trt.export import export_graphs
from lemica_trt.ir.graphs import FULL, SKIP, TRUNK, StepLayout, full_name, skip_name, step_layout, trunk_name
from lemica_trt.ir.profile import TRACED, DType, Profile, Sampling, Shape
from lemica_trt.ir.report import HALF_PSNR
from lemica_trt.ir.resources import load_named, load_profile, profile_names
from lemica_trt.models.denoise import Rollout, denoise
from lemica_trt.models.graph_specs import example_inputs, input_specs
from lemica_trt.models.load import load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.models.steps import step_modules
from lemica_trt.models.trace.replay import ROUNDINGS
from lemica_trt.models.traced import TracedModel
from lemica_trt.planning.step_plan import uncached_plan
from lemica_trt.testing.pipelines import CASES, tiny_pipeline

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers and transformers

RUN = (
    *("auraflow", "chroma", "cogvideox", "cogview3-plus", "easyanimate", "flux", "hunyuanvideo", "ltx", "mochi"),
    *("pixart-sigma", "kandinsky5", "latte", "open-sora", "qwen-image", "sana", "sd3", "wan2.2-ti2v"),
    *("cogvideox-i2v", "wan-i2v", "wan-flf2v", "wan2.2", "wan2.2-i2v"),
    *("cogview4", "flux2", "hidream", "hunyuanimage", "hunyuanvideo-1.5", "ltx2", "lumina2", "z-image"),
    "z-image-modular",
)

LONG = ("flux2", "hunyuanimage", "hunyuanvideo-1.5", "ltx2", "lumina2", "wan-flf2v", "z-image-modular")

NAMES = [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in RUN]

FREE = ("cogview4", "kandinsky5", "latte", "qwen-image", "z-image")
"""Those whose shapes follow the prompt."""

MODELS: dict[str, TracedModel] = {}


def profile(name: str) -> Profile:
    request, call = CASES[name].request, inspect.signature(type(tiny_pipeline(name)).__call__).parameters
    scales = [parameter.default for key, parameter in call.items() if key.endswith(("guidance_scale", "cfg_scale"))]
    length = call["max_sequence_length"].default if "max_sequence_length" in call else 77
    return Profile(
        name=name,
        family="traced",
        source="here",
        dtype="fp32",
        text_length=request.max_sequence_length or length,
        shape=Shape(frames=request.frames or 1, height=request.height or 32, width=request.width or 32),
        sampling=Sampling(
            steps=5, guidance_scale=next((float(s) for s in scales if isinstance(s, int | float) and s > 1), 1.0)
        ),
    )


def model(name: str) -> TracedModel:
    if name not in MODELS:
        MODELS[name] = TracedModel(profile(name), tiny_pipeline(name), Path("here"))
    return MODELS[name]


@pytest.fixture(scope="module")
def half_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, DType], TracedModel]:
    """A model of (name, dtype), loaded as a build loads it; made once."""

    @functools.cache
    def loaded(name: str, dtype: DType) -> TracedModel:
        folder = tmp_path_factory.mktemp(name)
        tiny_pipeline(name).save_pretrained(folder)
        found = load_model(msgspec.structs.replace(profile(name), source=str(folder), dtype=dtype))
        assert isinstance(found, TracedModel)
        return found

    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_the_uncached_plan_is_the_pipeline(name: str) -> None:
    """With a prompt, noise, image, guidance scale and number of steps that tracing has not seen."""
    traced = model(name)
    scale = traced.profile.sampling.guidance_scale * (1.1 if traced.guided else 1.0)
    plan = uncached_plan(traced.table(), guidance_scale=scale)
    noise = traced.noise(5)[None]
    prompt = "a green house by the tree"
    got = denoise(traced, plan, traced.embed([prompt], "a dull picture", seeds=[5]), noise)
    want = traced.reference([prompt], noise, negative="a dull picture", guidance_scale=scale, seed=5)
    other = denoise(traced, plan, traced.embed(["the red cat"], "a dull picture", seeds=[5]), noise)
    effect = float((other - want).abs().max())  # of the prompt: small in networks of random weights
    assert got == pytest.approx(want, abs=min(1e-4 * float(want.abs().max()), 0.05 * effect))
    frames = traced.decode(got)
    shape = traced.profile.shape
    assert tuple(frames.shape) == (1, shape.frames, shape.height, shape.width, 3)


@pytest.mark.parametrize("name", NAMES)
def test_skipping_with_the_own_residual_is_the_full_step(name: str) -> None:
    traced = model(name)
    for kind in range(len(traced.experts)):
        full, skipped = full_and_skipped(traced, layout_of(traced), kind)
        output = full["output"]
        assert skipped["output"] == pytest.approx(output, abs=2e-5 * float(output.abs().max()))


def full_and_skipped(
    traced: TracedModel, layout: StepLayout, kind: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A full step, and a skipped one with its residual."""
    modules, trunk = step_modules(traced, layout), trunk_name(kind)
    inputs = example_inputs(input_specs(full_name(kind), traced, layout, {}), 1, traced.device)
    generator = torch.Generator().manual_seed(0)
    inputs = {key: torch.rand(x.shape, generator=generator).to(x.dtype) for key, x in inputs.items()}
    inputs |= traced.embed(["a bird"])
    with torch.no_grad():
        full = modules[full_name(kind)](inputs)
        coefficients = inputs["coefficients"].clone()
        coefficients[layout.offsets[trunk]] = 1.0
        return full, modules[skip_name(kind)]({**inputs, "coefficients": coefficients, f"{trunk}_0": full[trunk]})


HALF_CI = (
    *(("auraflow", "bf16"), ("cogview3-plus", "bf16"), ("flux", "bf16"), ("latte", "bf16"), ("ltx", "bf16")),
    *(("pixart-sigma", "bf16"), ("chroma", "fp16")),
)
"""Of each way to guide, with and without a text axis; the rest is `long`."""

HALF = [
    case if case in HALF_CI else pytest.param(*case, marks=pytest.mark.long)
    for case in (*((name, "bf16") for name in RUN), ("chroma", "fp16"), ("hunyuanvideo", "fp16"))
]


@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_the_uncached_plan_is_the_pipeline_in_half_precision(
    name: str, dtype: DType, half_model: Callable[[str, DType], TracedModel]
) -> None:
    """What both round differently, guidance and latents, is two roundings a step, which add up as independent ones do;
    frames are what `verify` asks for. The trace is that of fp32."""
    traced = half_model(name, dtype)
    assert traced.trace.dtype == str(traced.dtype).removeprefix("torch.")
    assert traced.trace.error <= ROUNDINGS * torch.finfo(traced.dtype).eps
    assert [trunk.streams for trunk in traced.trace.trunks] == [trunk.streams for trunk in model(name).trace.trunks]
    scale = traced.profile.sampling.guidance_scale * (1.1 if traced.guided else 1.0)
    plan = uncached_plan(traced.table(), guidance_scale=scale)
    noise = traced.noise(5)[None]
    prompt = "a green house by the tree"
    got = denoise(traced, plan, traced.embed([prompt], "a dull picture", seeds=[5]), noise)
    want = traced.reference([prompt], noise, negative="a dull picture", guidance_scale=scale, seed=5)
    rounding = ROUNDINGS * torch.finfo(traced.dtype).eps
    assert got == pytest.approx(want, abs=plan.num_steps**0.5 * rounding * float(want.abs().max()))
    assert psnr(traced.decode(got)[0].numpy(), traced.decode(want)[0].numpy()) >= HALF_PSNR
    float_specs = [spec for spec in traced.conditions if spec.dtype != "int64"]
    assert {spec.dtype for spec in float_specs} - {"fp32"} == {dtype}
    assert all(spec.dtype == dtype or traced.image is not UNSET for spec in float_specs)  # Wan's masks are fp32


@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_a_residual_in_half_precision_stands_in_for_the_trunk(
    name: str, dtype: DType, half_model: Callable[[str, DType], TracedModel]
) -> None:
    """The cache slot is in the model's dtype: that one rounding is all that the skipped step loses."""
    traced = half_model(name, dtype)
    layout = layout_of(traced)
    full, skipped = full_and_skipped(traced, layout)
    assert full[TRUNK].dtype == traced.dtype
    assert full["output"].dtype == skipped["output"].dtype == torch.float32
    rounding = ROUNDINGS * torch.finfo(traced.dtype).eps
    assert skipped["output"] == pytest.approx(full["output"], abs=rounding * float(full["output"].abs().max()))


def test_step_graphs_are_exported_in_bf16(tmp_path: Path, half_model: Callable[[str, DType], TracedModel]) -> None:
    """What its conditions and its cache slot are; the interface around the network is fp32."""
    traced = half_model("pixart-sigma", "bf16")
    graphs = export_graphs(traced, layout_of(traced), tmp_path, roles=(FULL.name, SKIP.name)).graphs
    for graph in graphs:
        dtypes = {spec.name: spec.dtype for spec in (*graph.inputs, *graph.outputs)}
        halves = {name for name in dtypes if name.startswith((TRUNK, "encoder_hidden"))}
        assert halves and {dtypes[name] for name in halves} == {"bf16"}
        assert {dtypes[name] for name in ("latents_0", "coefficients", "guidance", "latents", "output")} == {"fp32"}


@pytest.mark.parametrize("name", ["chroma", "flux"])
def test_requests_of_a_batch_are_independent(name: str) -> None:
    traced = model(name)
    plan = uncached_plan(sampler_table(traced.scheduler()), guidance_scale=traced.profile.sampling.guidance_scale)
    noise = torch.stack([traced.noise(1), traced.noise(2)])
    prompts = ["a red cat", "a green dog"]
    together = denoise(traced, plan, traced.embed(prompts), noise)
    for i, prompt in enumerate(prompts):
        alone = denoise(traced, plan, traced.embed([prompt]), noise[i : i + 1])
        assert together[i : i + 1] == pytest.approx(alone, abs=1e-6)


def test_a_picture_of_another_size_is_encoded_as_the_pipeline_does(tmp_path: Path) -> None:
    """The picture of a prompt's line, larger and of another aspect ratio; and one that has changed since."""
    traced = model("wan-i2v")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    (tmp_path / "prompts.txt").write_text("a green house\tfirst.png\n")
    Image.fromarray(pixels).save(tmp_path / "first.png")
    (line,) = read_prompts(tmp_path / "prompts.txt")
    plan = uncached_plan(sampler_table(traced.scheduler()), guidance_scale=traced.profile.sampling.guidance_scale)
    noise = traced.noise(5)[None]
    want = traced.reference([line], noise)
    own = denoise(traced, plan, traced.embed([line]), noise)
    assert own == pytest.approx(want, abs=1e-4 * float(want.abs().max()))
    drawn = denoise(traced, plan, traced.embed(["a green house"]), noise)
    assert float((drawn - own).abs().max()) > 1e-2 * float(want.abs().max())
    Image.fromarray(255 - pixels).save(tmp_path / "first.png")
    with pytest.raises(InputError, match="expected the picture that the prompts were read with, it has changed since"):
        traced.embed([line])
    with pytest.raises(InputError, match="FluxPipeline takes no image, the prompt 'a green house' brings one"):
        model("flux").embed([line])


def test_a_seed_is_the_noise_of_the_posterior_and_then_the_initial_noise() -> None:
    """As the pipeline's own generator draws them, where nobody gives it latents."""
    traced, name = model("cogvideox-i2v"), "cogvideox-i2v"
    plan = uncached_plan(sampler_table(traced.scheduler()), guidance_scale=6.0)
    prompt, picture = "a bird", drawn_picture("a bird", 32, 48)
    got = denoise(traced, plan, traced.embed([prompt], "", seeds=[7]), traced.noise(7)[None])
    want = tiny_pipeline(name)(
        image=Image.fromarray(picture), prompt=prompt, negative_prompt="", height=32, width=48, num_frames=9,
        max_sequence_length=64, num_inference_steps=5, guidance_scale=6.0, output_type="latent", return_dict=False,
        generator=torch.Generator().manual_seed(7),
    )[0]  # fmt: skip
    assert got == pytest.approx(want, abs=1e-4 * float(want.abs().max()))
    other = denoise(traced, plan, traced.embed([prompt], "", seeds=[8]), traced.noise(7)[None])
    assert float((other - want).abs().max()) > 1e-2 * float(want.abs().max())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flux-kontext", "its shapes follow the size of its picture (transformer.hidden_states)"),
        (
            "ltx-i2v",
            "what it makes of its image follows several draws of noise, or the initial noise "
            "(transformer.hidden_states)",
        ),
    ],
)
def test_images_that_cannot_be_built_yet_say_why(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And which slots follow them. Without an image LTX's call fails, so that it is given one."""
    if name == "flux-kontext":
        request = CASES[name].request
        monkeypatch.setattr("lemica_trt.models.traced.request_from_profile", lambda profile, pipeline: request)
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        TracedModel(profile(name), tiny_pipeline(name), Path("here"))


def wan_whose_first_step_is_scaled(by: str) -> Any:
    """A pipeline whose loop does something more in step 0."""
    source = textwrap.dedent(inspect.getsource(diffusers.WanPipeline.__call__))
    end = "# compute the previous noisy sample x_t -> x_t-1"
    assert source.count(end) == 1
    made = dict(vars(inspect.getmodule(diffusers.WanPipeline)))
    exec(source.replace(end, f"noise_pred = noise_pred * ({by}) if i == 0 else noise_pred"), made)
    return type("FirstStepPipeline", (diffusers.WanPipeline,), {"__call__": made["__call__"]})(
        **tiny_pipeline("wan").components
    )


def test_a_first_step_that_differs_is_a_kind_of_its_own() -> None:
    pipeline = wan_whose_first_step_is_scaled("0.5")
    pipeline.set_progress_bar_config(disable=True)
    traced = TracedModel(profile("wan"), pipeline, Path("here"))
    assert traced.experts == ("transformer", "transformer")
    plan = uncached_plan(traced.table(), guidance_scale=4.0)
    assert [row.variant for row in plan.rows] == ["full", *["full2"] * 4, None]
    noise = traced.noise(5)[None]
    got = denoise(traced, plan, traced.embed(["a green house"], "a dull picture"), noise)
    want = traced.reference(["a green house"], noise, negative="a dull picture", guidance_scale=4.0)
    assert got == pytest.approx(want, abs=1e-4 * float(want.abs().max()))


def test_a_kind_of_steps_that_follows_their_number_is_refused() -> None:
    """A number that only one step of a trace has looks like a constant; runs of other lengths tell."""
    pipeline = wan_whose_first_step_is_scaled("0.1 * num_inference_steps")
    pipeline.set_progress_bar_config(disable=True)
    traced = TracedModel(profile("wan"), pipeline, Path("here"))
    with pytest.raises(UnsupportedError, match="with 5 steps: step 0 reads what changes with the number of steps"):
        traced.table()


def test_a_second_guidance_scale_is_the_builds() -> None:
    """A request's own is that of the first expert; without a second one both follow it."""
    asked = profile("wan2.2")
    sampling = msgspec.structs.replace(asked.sampling, guidance_scale_2=3.0)
    traced = TracedModel(msgspec.structs.replace(asked, sampling=sampling), tiny_pipeline("wan2.2"), Path("here"))
    both = model("wan2.2").table()
    table = traced.table()
    assert [row.guidance for row in both.rows] == [(0.0, 1.0)] * 6
    assert [row.guidance for row in table.rows] == [(0.0, 1.0)] * 2 + [(3.0, 0.0)] * 3 + [(0.0, 1.0)]
    assert table.digest != both.digest and table.kinds == both.kinds == (0, 0, 1, 1, 1)
    noise = traced.noise(5)[None]
    got = denoise(traced, uncached_plan(table, guidance_scale=6.0), traced.embed(["a house"]), noise)
    want = traced.reference(["a house"], noise, guidance_scale=6.0)
    other = denoise(traced, uncached_plan(both, guidance_scale=6.0), traced.embed(["a house"]), noise)
    assert got == pytest.approx(want, abs=1e-4 * float(want.abs().max()))
    assert float((other - want).abs().max()) > 1e-2 * float(want.abs().max())
    with pytest.raises(ValueError, match="guidance_scale_2 is of traced pipelines"):
        msgspec.structs.replace(load_profile("wan-tiny"), sampling=sampling)


CASES_OF_CARDS = {
    "AllegroPipeline": "allegro",
    "AuraFlowPipeline": "auraflow",
    "ChromaPipeline": "chroma",
    "CogVideoXImageToVideoPipeline": "cogvideox-i2v",
    "CogView4Pipeline": "cogview4",
    "Flux2KleinPipeline": "flux2-klein",
    "Flux2Pipeline": "flux2",
    "FluxPipeline": "flux",
    "HiDreamImagePipeline": "hidream",
    "HunyuanVideo15Pipeline": "hunyuanvideo-1.5",
    "HunyuanVideoPipeline": "hunyuanvideo",
    "Kandinsky5T2VPipeline": "kandinsky5",
    "LTX2Pipeline": "ltx2",
    "LTXPipeline": "ltx",
    "LattePipeline": "latte",
    "Lumina2Pipeline": "lumina2",
    "MochiPipeline": "mochi",
    "OpenSoraPipeline": "open-sora",
    "PixArtSigmaPipeline": "pixart-sigma",
    "QwenImagePipeline": "qwen-image",
    "SanaPipeline": "sana",
    "StableDiffusion3Pipeline": "sd3",
    "WanImageToVideoPipeline": "wan-i2v",
    "ZImagePipeline": "z-image",
}
"""Class of a named model → a tiny pipeline of it."""

CASES_OF_NAMES = {
    "wan2.1-flf2v": "wan-flf2v",
    "wan2.2-t2v-a14b": "wan2.2",
    "wan2.2-i2v-a14b": "wan2.2-i2v",
    "wan2.2-ti2v-5b": "wan2.2-ti2v",
}
"""The same where the class alone does not tell."""


@pytest.mark.parametrize("name", [n for n in profile_names() if load_profile(n).family == TRACED])
def test_a_named_model_builds_as_its_card_says(name: str) -> None:
    """A card that refuses says what tracing says; one that does not is of a class that is traced and built."""
    card = load_named(name).card
    case = CASES_OF_NAMES.get(name, CASES_OF_CARDS.get(card.pipeline))
    if case is None:
        assert card.refused
    elif not card.refused:
        assert model(case).conditions
    else:
        with pytest.raises(LemicaError, match=re.escape(card.refused)):
            model(case)


def layout_of(traced: TracedModel) -> StepLayout:
    return step_layout(
        latent_shape=traced.latent_shape,
        latent_history=1,
        output_history=1,
        conditions=traced.conditions,
        guided=traced.guided,
        experts=traced.experts,
    )


def test_batches_are_refused() -> None:
    shape = msgspec.structs.replace(profile("flux").shape, max_batch=2)
    with pytest.raises(LemicaError, match="for one request a call, got max_batch 2"):
        TracedModel(msgspec.structs.replace(profile("flux"), shape=shape), tiny_pipeline("flux"), Path("here"))


@pytest.mark.parametrize("name", ["chroma", "cogvideox", "ltx"])
def test_guidance_terms_are_what_guidance_adds_to_the_conditional_output(name: str) -> None:
    """At scale 1 there is none; at others output and term lie on the line from it, whose slope is the same."""
    traced = model(name)
    assert traced.guided and traced.branches
    layout = step_layout(
        latent_shape=traced.latent_shape, latent_history=1, output_history=1, conditions=traced.conditions,
        trunk_depth=0, guidance_history=1,
    )  # fmt: skip
    plan = uncached_plan(sampler_table(traced.scheduler(), dynamic_guidance=False), guidance_scale=3.0)
    found = {}
    for scale in (1.0, 2.0, 4.0):
        rollout = Rollout(traced, layout, traced.embed(["a prompt"]), traced.noise(0)[None], guidance_scale=scale)
        found[scale] = rollout(plan.rows[0])
    conditional = found[1.0]["output"]
    size = float(conditional.abs().max())
    for scale, result in found.items():
        assert_near(result["output"] - result["guidance_term"], conditional, size)
        assert_near(result["guidance_term"], (scale - 1) * found[2.0]["guidance_term"], scale * size)
    assert float(found[2.0]["guidance_term"].abs().max()) > 1e-3 * size


@pytest.mark.parametrize("name", FREE)
def test_conditions_are_as_long_as_the_prompt(name: str) -> None:
    """And as wide as the longest one says; the longest is cut to what the pipeline takes."""
    traced = model(name)
    specs = {spec.name: spec for spec in traced.conditions}
    lengths = []
    for prompt in ("a cat", "a green house by the tree, and a small blue bird on the roof of it", "a " * 1100):
        found = traced.embed([prompt], "a dull picture")
        assert found.keys() == specs.keys()
        for key, spec in specs.items():
            axes = list(zip(spec.shape, found[key].shape))
            for dim, size in axes:
                assert size <= spec.text_axes[dim] if dim in spec.text_axes else True
            if any(str(dim).startswith("tokens") for dim, _ in axes):
                lengths.append(found[key].shape[1])
    short, middle, longest = lengths
    assert short < middle < longest
    assert longest in max(specs.values(), key=lambda spec: len(spec.text_axes)).text_axes.values()


def assert_near(left: torch.Tensor, right: torch.Tensor, size: float) -> None:
    assert float((left - right).abs().max()) <= 1e-5 * size


def test_the_guidance_scale_that_a_network_embeds_is_baked() -> None:
    assert not model("flux").guided
    assert model("ltx").guided
