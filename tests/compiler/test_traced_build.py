"""Pipelines that have no family are built end to end: trace, export, engines, plan, run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from traced_bundles import FLAGS, IMAGES, LAST, SMALL, built, lemica, saved

import lemica_trt
from lemica_trt.core.errors import InputError
from lemica_trt.core.values import read_value
from lemica_trt.ir.graphs import FULL, SKIP, TRUNK
from lemica_trt.ir.report import HALF_PSNR, VerifyReport
from lemica_trt.runtime.random import Generator
from lemica_trt.testing.pipelines import tiny_pipeline

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers, transformers and exporters

GRAPHS = ("combine", FULL.name, SKIP.name)

CALLS = {
    "cogview4": {"height": 32, "width": 48, "max_sequence_length": 64, "guidance_scale": 3.0},
    "latte": {"height": 32, "width": 32, "video_length": 4, "guidance_scale": 3.0},
    "qwen-image": {"height": 32, "width": 48, "max_sequence_length": 64, "true_cfg_scale": 3.0},
    "z-image": {"height": 32, "width": 48, "max_sequence_length": 64, "guidance_scale": 3.0},
}
"""Pipelines whose shapes follow the prompt, and how they are called."""

ENCODED = {
    "sana": {"height": 64, "width": 96, "use_resolution_binning": False},
    "sd3": {"height": 32, "width": 48},
    "wan2.2-ti2v": {"height": 64, "width": 64, "num_frames": 5},
}
"""Pipelines whose conditions follow several tokenizers, a template that negative prompts do not have, or how many
tokens Python counts in a prompt."""


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name for name in FLAGS if name not in ("flux", "open-sora", "wan2.2", *CALLS, *ENCODED)]
)
def test_the_uncached_plan_of_a_bundle_is_the_pipeline(name: str, tmp_path: Path) -> None:
    output = built(name, tmp_path, "--budget", 3, *SMALL)
    require_agreement(output, apart=2 * (name == "hidream"))


@pytest.mark.parametrize(
    "name", [name if name == "latte" else pytest.param(name, marks=pytest.mark.long) for name in CALLS]
)
def test_prompts_of_any_length_are_the_pipelines(name: str, tmp_path: Path) -> None:
    """From a budget to engines; new prompts, seeds and a new scale, all in one bundle, none of them padded or cut."""
    output = built(name, tmp_path, "--budget", 3, *SMALL)
    require_agreement(output)
    with lemica_trt.load(output) as pipe:
        for seed, (prompt, negative) in enumerate(PROMPTS):
            noise = torch.from_numpy(Generator(seed).randn((1, *pipe.bundle.manifest.graphs.layout.latent_shape)))
            conditions = pipe.conditions([prompt], [negative])
            got = pipe.latents(conditions, noise.numpy(), guidance_scale=3.0, plan="uncached")
            source = tiny_pipeline(name)
            want = source(
                prompt, negative_prompt=negative, latents=noise, num_inference_steps=5, output_type="latent",
                return_dict=False, **CALLS[name],
            )[0].numpy()  # fmt: skip
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
        key = next(spec.name for spec in pipe.bundle.manifest.graphs.layout.conditions if spec.text_axes)
        longer = {**conditions, key: np.zeros((len(conditions[key]), 1000, conditions[key].shape[2]), np.float32)}
        with pytest.raises(InputError, match=r"must have one length of 1 … \d+ tokens"):
            pipe.latents(longer, noise.numpy())
        assert pipe("a red bird", seed=3).frames.shape[1:] == (32, CALLS[name]["width"], 3)


@pytest.mark.long
def test_open_sora_is_guided_away_from_its_null_embedding(tmp_path: Path) -> None:
    """New prompts, seeds and scales, with the null embedding and with a negative prompt: the final latents are the
    pipeline's. 6 frames are two pieces of the autoencoder's."""
    output, source = built("open-sora", tmp_path), tiny_pipeline("open-sora")
    require_agreement(output)
    with lemica_trt.load(output) as pipe:
        shape = pipe.bundle.manifest.graphs.layout.latent_shape
        for seed, (prompt, negative, scale) in enumerate([(*PROMPTS[0], 2.5), (*PROMPTS[1], 3.5), (*PROMPTS[2], 3.0)]):
            noise = torch.from_numpy(Generator(seed).randn((1, *shape)))
            conditions = pipe.conditions([prompt], [negative])
            got = pipe.latents(conditions, noise.numpy(), guidance_scale=scale, plan="uncached")
            want = source(
                prompt, negative, latents=noise, num_inference_steps=5, guidance_scale=scale, height=32, width=48,
                num_frames=6, max_sequence_length=64, output_type="latent",
            ).frames.numpy()  # fmt: skip
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
        assert pipe("a red bird", seed=3).frames.shape == (6, 32, 48, 3)


@pytest.mark.long
@pytest.mark.parametrize("name", ENCODED)
def test_prompts_of_any_length_become_what_they_become_in_the_pipeline(name: str, tmp_path: Path) -> None:
    """What the transformer is given, and what comes of it; the last prompt is cut."""
    output, source = built(name, tmp_path, "--schedule", "0,2,4", "--verify-samples", 0), tiny_pipeline(name)
    given: list[dict[str, torch.Tensor]] = []
    source.transformer.register_forward_pre_hook(lambda _, __, kwargs: given.append(kwargs), with_kwargs=True)
    with lemica_trt.load(output) as pipe:
        layout = pipe.bundle.manifest.graphs.layout
        for seed, (prompt, negative) in enumerate((*PROMPTS, ("red bird " * 50, "grey " * 99))):
            noise = torch.from_numpy(Generator(seed).randn((1, *layout.latent_shape)))
            given.clear()
            want = source(
                prompt, negative_prompt=negative, latents=noise, num_inference_steps=5, output_type="latent",
                return_dict=False, guidance_scale=3.0, max_sequence_length=64, **ENCODED[name],
            )[0].numpy()  # fmt: skip
            conditions = pipe.conditions([prompt], [negative])
            for key, value in conditions.items():
                name_there = "encoder_hidden_states" if key == "prompt_embeds" else key
                rows = torch.cat([call[name_there] for call in given[: 3 - len(given[0][name_there])]]).numpy()
                rows = rows if len(given[0][name_there]) == 2 else rows[::-1]  # two calls: the prompt's first
                assert np.abs(value - rows).max() <= 1e-5 * np.abs(rows).max(), key
            got = pipe.latents(conditions, noise.numpy(), guidance_scale=3.0, plan="uncached")
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


PROMPTS = (
    ("a cat", "a dull picture"),
    ("the green house by the tree, and a small blue bird on the roof of it", ""),
    ("two red birds in the snow", "a dull picture and the grey noise of a broken lamp in a dark room"),
)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.long
@pytest.mark.parametrize("name", IMAGES)
def test_images_are_encoded_as_the_pipeline_does(name: str, tmp_path: Path) -> None:
    """Calibrated with pictures of the user's, verified with drawn ones; a whole call of the pipeline with a new prompt,
    seed and pictures, of other sizes than what is made, is reproduced from the prompt, the seed and the files."""
    last = {"last_image": picture(50, 60)} if name in LAST else {}
    picture(40, 40).save(tmp_path / "one.png")
    (tmp_path / "prompts.txt").write_text("a red bird in a tree\tone.png" + "\tone.png" * len(last) + "\na blue bird\n")
    output = built(name, tmp_path, "--budget", 3, *SMALL, "--prompts", tmp_path / "prompts.txt")
    require_agreement(output)
    assert str(tmp_path) not in "".join(path.read_text() for path in output.rglob("*.json"))
    prompt, first = "two red birds in the snow", tmp_path / "first.png"
    picture(90, 70).save(first)
    with lemica_trt.load(output, plan="uncached") as pipe:
        scale = pipe.bundle.plan().guidance_scale
        asked = {"seed": 9, "negative_prompt": "", "guidance_scale": 1.1 * scale}
        got = pipe(prompt, image=first, **asked, **last)
        again = pipe(prompt, image=np.array(picture(90, 70)), **asked, **last)
        others = [pipe(prompt, image=picture(91, 70), **asked, **last)]
        others += [pipe(prompt, image=first, **asked, last_image=picture(51, 60)) for _ in last]
        others += [pipe(prompt, image=last["last_image"], **asked, last_image=first) for _ in last]
        wrong: list[tuple[dict[str, object], str]] = [
            ({}, "needs an image beside the prompt, got none"),
            ({"image": 3, **last}, "expected a path"),
            ({"image": first}, "needs a last image beside the first one, got none")
            if last
            else ({"image": first, "last_image": first}, "takes no last image: its pipeline has none"),
        ]
        for given, message in wrong:
            with pytest.raises(InputError, match=message):
                pipe(prompt, **given)
    want = tiny_pipeline(name)(
        image=picture(90, 70), prompt=prompt, negative_prompt="", height=32, width=48, num_frames=9,
        max_sequence_length=dict(zip(IMAGES[name][::2], IMAGES[name][1::2])).get("--max-sequence-length", 512),
        num_inference_steps=5, guidance_scale=1.1 * scale, generator=torch.Generator().manual_seed(9),
        output_type="latent", return_dict=False, **last,
    )[0][0].numpy()  # fmt: skip
    assert np.abs(got.latents - want).max() <= 1e-4 * np.abs(want).max()
    assert np.array_equal(again.latents, got.latents)
    for other in others:
        assert np.abs(other.latents - want).max() > 1e-3 * np.abs(want).max()
    assert got.frames.shape == (9, 32, 48, 3)
    run = ("run", output, prompt, "--output", tmp_path / "x.npy", "--quiet")
    both = ("--image", first, *("--last-image", tmp_path / "one.png") * len(last))
    assert lemica(*run, *both).exit_code == 0
    if last:
        done = lemica(*run, *both[:2])
        assert done.exit_code == 3 and "needs a last image beside the first one, got none → give one" in done.output
    done = lemica(*run)
    assert done.exit_code == 3 and "needs an image beside the prompt, got none → give one" in done.output
    done = lemica("triton", output, "--output", tmp_path / "models")
    assert done.exit_code == 0 and "image_encoder" in done.output


def require_agreement(bundle: Path, *, apart: int = 0) -> None:
    """Of a verified bundle; `apart`: attentions of the network that ONNX Runtime does not fuse."""
    report = read_value(VerifyReport, bundle / "reports" / "verify.json")
    found = {(run.plan, run.against): run.difference for run in report.agreement}
    assert found["uncached", "diffusers"] < 1e-4
    assert max(found.values()) < 1e-4
    assert {check.role for check in report.graphs} >= {*GRAPHS, "text_encoder", "vae_decoder"}
    with lemica_trt.load(bundle) as pipe:
        made = pipe.bundle.engine().builds[FULL.name]
    assert made.fused_attention == made.attentions - apart > 0


def test_one_command_makes_a_plan_for_a_budget(traced: Callable[[str], Path], tmp_path: Path) -> None:
    output = traced("flux")
    require_agreement(output)
    with lemica_trt.load(output) as pipe:
        assert pipe.bundle.plan().budget == 3
        one, other = (pipe(prompt, seed=3) for prompt in ("a red bird", "a green house"))
        again = pipe("a red bird", seed=3)
    assert one.frames.shape == (1, 32, 48, 3)
    assert np.array_equal(one.latents, again.latents)
    assert not np.array_equal(one.latents, other.latents)
    run = ("run", output, "a red bird", "--output", tmp_path / "x.png", "--quiet")
    done = lemica(*run, "--image", tmp_path / "x.png")
    assert done.exit_code == 3 and "the bundle takes no image: its pipeline has none → leave it out" in done.output
    done = lemica(*run)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.png").stat().st_size > 100


@pytest.mark.long
def test_a_pipeline_in_fp16_is_calibrated_and_built_in_fp16(tmp_path: Path) -> None:
    """The pipeline's own precision from the first run to the engines; latents and coefficients stay fp32."""
    output = built("flux", tmp_path, "--dtype", "fp16", "--budget", 3, *SMALL)
    report = read_value(VerifyReport, output / "reports" / "verify.json")
    assert report.dtype == "fp16" and not report.failures()
    found = {(run.plan, run.against): run for run in report.agreement}
    assert found["uncached", "diffusers"].psnr >= HALF_PSNR
    assert 1e-5 < found["uncached", "diffusers"].difference < 2e-2
    with lemica_trt.load(output) as pipe:
        full = next(graph for graph in pipe.bundle.manifest.graphs.graphs if graph.role == FULL.name)
        dtypes = {spec.name: spec.dtype for spec in (*full.inputs, *full.outputs)}
        assert pipe("a red bird", seed=3).frames.shape == (1, 32, 48, 3)
    halves = {"encoder_hidden_states", "pooled_projections", TRUNK}
    assert dtypes == {name: "fp16" if name in halves else "fp32" for name in dtypes}
    assert halves <= dtypes.keys()


@pytest.mark.long
def test_two_transformers_are_two_experts(tmp_path: Path) -> None:
    """Wan 2.2: a plan folds across the switch, one reuses residuals on both sides of it and never over it; a request's
    guidance scale is that of the first expert, the second has its own."""
    output = built("wan2.2", tmp_path, "--budget", 2, *SMALL, "--method", "linear", "--guidance-scale-2", 3)
    report = read_value(VerifyReport, output / "reports" / "verify.json")
    found = {(run.plan, run.against): run.difference for run in report.agreement}
    assert found.keys() == {("uncached", "diffusers"), ("b2", "torch")} and max(found.values()) < 1e-4
    with lemica_trt.load(output) as pipe:
        layout = pipe.bundle.manifest.graphs.layout
        assert [(variant.name, variant.expert) for variant in layout.variants] == EXPERTS
        assert [row.variant for row in pipe.bundle.plan("uncached").rows] == ["full"] * 2 + ["full2"] * 3 + [None]
        assert [row.variant for row in pipe.bundle.plan("b2").rows] == ["full", "full2", None]
        noise = torch.from_numpy(Generator(7).randn((1, *layout.latent_shape)))
        conditions = pipe.conditions(["two red birds in the snow"], ["a dull picture"])
        got = pipe.latents(conditions, noise.numpy(), guidance_scale=3.5, plan="uncached")
    want = tiny_pipeline("wan2.2")(
        "two red birds in the snow", negative_prompt="a dull picture", latents=noise, num_inference_steps=5,
        guidance_scale=3.5, guidance_scale_2=3.0, height=32, width=48, num_frames=9, max_sequence_length=64,
        output_type="latent", return_dict=False,
    )[0].numpy()  # fmt: skip
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


EXPERTS = [("full", "transformer"), ("full2", "transformer_2")]


def test_a_dry_run_counts_the_weights_of_both_experts(tmp_path: Path) -> None:
    source = saved("wan2.2", tmp_path / "wan2.2")
    done = lemica("build", "--model", source, *FLAGS["wan2.2"], "--output", tmp_path / "out", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["result"]}
    sizes = {
        path.parent.name: sum(x.nbytes for x in load_file(path).values()) for path in source.glob("*/*.safetensors")
    }
    every = sum(sizes.values())
    assert sizes["transformer"] + sizes["transformer_2"] < every == stages["export"]["disk"] == stages["bundle"]["disk"]
    assert stages["engine"]["memory"] > every and stages["export"]["seconds"] > 0


@pytest.mark.long
def test_residuals_are_reused_on_both_sides_of_a_switch(tmp_path: Path) -> None:
    """Planned in PyTorch by LeMiCa's method, and again on the engines; every graph and plan is verified."""
    output = built("wan2.2", tmp_path, "--budget", "3", *SMALL)
    require_agreement(output)
    report = read_value(VerifyReport, output / "reports" / "verify.json")
    assert {check.role for check in report.graphs} >= {"full2", "skip2"}
    done = lemica("plan", output, "--method", "lemica", "--budget", 2, "--calibrate-on", "engine", "--quiet")
    assert done.exit_code == 0, done.output
    with lemica_trt.load(output) as pipe:
        for name, reads in (("b3", 1), ("b2", 2)):
            plan = pipe.bundle.plan(name)
            assert plan.method == "lemica" and plan.full_steps[:2] in ((0, 1), (0, 2)) and 2 in plan.full_steps
            assert len(plan.cache_depths) >= reads and plan.cache_depths.keys() <= {"trunk", "trunk2"}
            assert np.isfinite(pipe("a red bird", seed=3, plan=name).latents).all()
    refused = lemica("plan", output, "--schedule", "0,1", "--quiet")
    assert refused.exit_code == 6 and "expected step 2 among the full steps" in refused.stderr


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hunyuanimage", "a state that the loop carries"),
        ("cogvideox", "expected a profile of the family cogvideox"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name: str, line: str, tmp_path: Path) -> None:
    source, pipeline = tmp_path / name, tiny_pipeline(name)
    if name == "hunyuanimage":
        pipeline.guider = diffusers.AdaptiveProjectedGuidance(3.5, adaptive_projected_guidance_momentum=-0.5)
    pipeline.save_pretrained(source)
    size = ("--height", 32, "--width", 48, *(() if name == "hunyuanimage" else ("--frames", 9)))
    done = lemica(
        "build",
        "--model",
        source,
        *size,
        "--denoising-steps",
        5,
        "--budget",
        3,
        *SMALL,
        "--quiet",
        "--output",
        tmp_path / "out",
    )
    assert done.exit_code in (2, 5), done.output
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
