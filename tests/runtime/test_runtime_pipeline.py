"""Prompt → frames with a bundle of toy graphs on ONNX Runtime."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import toy

from lemica_trt.backends.build import build
from lemica_trt.backends.onnxruntime.run import OrtBackend
from lemica_trt.bundle.manifest import PROMPTS_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import add_plan, write_bundle
from lemica_trt.core.errors import EngineError, InputError, IntegrityError, UsageError
from lemica_trt.core.values import json_bytes
from lemica_trt.ir.graphs import EncoderSpec, GraphSet
from lemica_trt.ir.plan import PlanRow, trunk_reads
from lemica_trt.ir.profile import Profile, Sampling, Shape
from lemica_trt.ir.prompts import facts_from_prompts
from lemica_trt.runtime.denoise import Cancelled, RowDone
from lemica_trt.runtime.generation import GenerationRequest
from lemica_trt.runtime.pipeline import Pipeline
from lemica_trt.runtime.random import Generator

pytestmark = pytest.mark.cpu

WORDS = ["<pad>", "</s>", "<unk>", *["a", "big", "small", "red", "blue", "circle", "star", "moves"]]


def tokenizer_json() -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return str(tokenizer.to_str()).encode()


def make_bundle(
    target: Path, work: Path, *, guided: bool = True, stochastic: bool = False, mask: bool = False
) -> Bundle:
    layout = toy.layout_of(2, 2, 2, guided=guided, stochastic=stochastic)
    graphs: GraphSet = toy.graphs_of(layout, data_file=True, mask=mask)
    toy.write_onnx(graphs, work)
    plans = [toy.euler_plan("fsrfsr"), toy.euler_plan("ffffff", name="slow", guidance_scale=2.0)]
    if stochastic:
        plans.append(
            toy.plan_of(
                PlanRow(variant="full", step=0, latents=(1.0,), timestep=0.9),
                PlanRow(
                    variant="skip",
                    step=1,
                    latents=(0.5,),
                    draws=1,
                    noise=(0.5,),
                    timestep=0.5,
                    caches=trunk_reads(1.0),
                ),
                PlanRow(variant=None, step=2, latents=(0.5,), outputs=(0.3,), draws=1, noise=(0.1,)),
                name="noisy",
            )
        )
    names = {name for graph in graphs.graphs for name in (graph.file, *graph.data_files)}
    return write_bundle(
        target,
        profile=Profile(
            name="toy",
            family="toy",
            source="package:toy",
            dtype="fp32",
            text_length=toy.TEXT_LENGTH,
            shape=Shape(frames=2, height=4, width=4, fps=5, max_batch=3),
            sampling=Sampling(negative_prompt="small"),
        ),
        graphs=graphs,
        plans=plans,
        default_plan="default",
        encoders=[
            EncoderSpec(tokenizer="tokenizer/tokenizer.json", length=toy.TEXT_LENGTH, pad_id=0, end_id=1, mask=mask)
        ],
        engines=[build("onnxruntime", graphs, work, work, {"threads": 1})],
        files={**{name: work / name for name in names}, "tokenizer/tokenizer.json": tokenizer_json()},
    )


def stacked(pipe: Pipeline, *prompts: str) -> dict[str, Any]:
    """The conditions of prompts, one after the other."""
    return {"prompt_embeds": np.stack([pipe.encode(prompt)["prompt_embeds"] for prompt in prompts])}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "toy", tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Pipeline:
    return Pipeline(bundle)


def ids_of(prompt: str) -> list[int]:
    ids = [WORDS.index(word) if word in WORDS else 2 for word in prompt.split()][: toy.TEXT_LENGTH - 1] + [1]
    return ids + [0] * (toy.TEXT_LENGTH - len(ids))


def expected(bundle: Bundle, prompt: str, seed: int, scale: float, negative: str, plan: str = "default") -> Any:
    """Latents by the interpreter, frames by numpy."""
    layout = bundle.manifest.graphs.layout
    noise = Generator(seed).randn((1, *toy.LATENT_SHAPE))
    embeds = np.stack([toy.TABLE[ids_of(negative)], toy.TABLE[ids_of(prompt)]])
    latents = toy.interpret(
        bundle.plan(plan), layout, {"prompt_embeds": embeds}, noise, np.array([scale]), lambda: None
    )[0]
    return latents, (latents * 40 + 128).clip(0, 255).transpose(0, 2, 3, 1)


def test_a_prompt_becomes_frames(bundle: Bundle, pipe: Pipeline) -> None:
    clip = pipe("a big red circle moves", seed=5)
    latents, frames = expected(bundle, "a big red circle moves", 5, 3.0, "small")
    np.testing.assert_allclose(clip.latents, latents, rtol=1e-5, atol=1e-5)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == (2, 4, 4, 3)
    assert np.abs(clip.frames - frames).max() <= 1.01
    assert set(clip.seconds) == {"text", "denoise", "decode"}
    assert all(seconds > 0 for seconds in clip.seconds.values())
    assert pipe.fps == 5


def test_a_prompt_that_is_cut_is_told_of(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe("a big red circle", negative_prompt="")
    assert not caplog.records
    pipe("a big red circle moves a star", negative_prompt="small " * 9)
    assert [record.message for record in caplog.records] == [
        "the prompt has 8 tokens, the text encoder takes 5: the end is cut off",
        "the negative prompt has 10 tokens, the text encoder takes 5: the end is cut off",
    ]
    assert {record.name for record in caplog.records} == {"lemica_trt"}


def test_a_prompt_far_from_the_calibration_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = make_bundle(tmp_path / "toy", tmp_path)
    facts = facts_from_prompts(("a big red circle", "a small blue circle"), [4, 4])
    manifest = bundle.manifest
    write_bundle(
        bundle.path,
        profile=manifest.profile,
        graphs=manifest.graphs,
        plans=[bundle.plan(name) for name in bundle.plans],
        default_plan=manifest.default_plan,
        encoders=manifest.encoders,
        engines=manifest.engines,
        files={
            **{name: (bundle.path / name).read_bytes() for name in manifest.files if not name.startswith("plans/")},
            PROMPTS_FILE: json_bytes(facts),
        },
    )
    pipe = Pipeline(Bundle.open(bundle.path))
    pipe(["a big blue circle", "a small star"], negative_prompt="star moves star moves")
    assert not caplog.records
    pipe(["a", "many green dogs run"])
    short, other = (record.message for record in caplog.records)
    assert "is far from those that this bundle was calibrated on, it has 1 tokens, those 4: " in short
    assert ", 0 of its 4 words occur in those: " in other and other.endswith("lemica-trt build … --prompts FILE")


def test_settings_of_a_request(bundle: Bundle, pipe: Pipeline) -> None:
    clip = pipe("blue star", seed=6, guidance_scale=1.5, negative_prompt="big blue", plan="slow")
    latents, _ = expected(bundle, "blue star", 6, 1.5, "big blue", "slow")
    np.testing.assert_allclose(clip.latents, latents, rtol=1e-5, atol=1e-5)
    slow = Pipeline(bundle, "slow")
    np.testing.assert_array_equal(slow("blue star").latents, pipe("blue star", plan="slow", guidance_scale=2).latents)
    assert (pipe("red", guidance_scale=0.0).latents != pipe("red").latents).any()


def test_guidance_that_a_plan_does_not_hold_for_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", tmp_path / "w")
    limited = msgspec.structs.replace(toy.euler_plan("fs", name="limited"), guidance_range=(1.5, 5.25))
    pipe = Pipeline(add_plan(bundle, limited), "limited")
    assert np.isfinite(pipe("red", guidance_scale=5.25).latents).all()
    says = r"plan limited holds for guidance_scale 1\.5 … 5\.25, got 6 → use the plan that skips nothing, or build with"
    with pytest.raises(InputError, match=says):
        pipe("red", guidance_scale=6.0)
    assert np.isfinite(pipe("red", guidance_scale=6.0, plan="slow").latents).all()
    noise = Generator(0).randn((2, *toy.LATENT_SHAPE))
    embeds = stacked(pipe, *["red"] * 4)
    with pytest.raises(InputError, match=says):
        pipe.latents(embeds, noise, guidance_scale=np.array([3.0, 6.0]))


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_request_does_not_see_its_batch(tmp_path: Path, stochastic: bool) -> None:
    pipe = Pipeline(make_bundle(tmp_path / "b", tmp_path / "w", stochastic=stochastic))
    plan = "noisy" if stochastic else None
    requests = [
        GenerationRequest("a big red circle", 1),
        GenerationRequest("small star", 2, 1.0),
        GenerationRequest("blue", 3, 5.0, ""),
        GenerationRequest("a big red circle", 1),  # the second chunk: max_batch is 3
    ]
    together = pipe.run(requests, plan=plan)
    alone = [pipe.run([request], plan=plan)[0] for request in requests]
    for one, other in zip(together, alone):
        np.testing.assert_array_equal(one.latents, other.latents)
        np.testing.assert_array_equal(one.frames, other.frames)
    np.testing.assert_array_equal(alone[0].latents, alone[3].latents)


def test_lists(pipe: Pipeline) -> None:
    clips = pipe(["red", "blue"], seed=[3, 4])
    np.testing.assert_allclose(clips[1].latents, pipe("blue", seed=4).latents, atol=2e-5)
    np.testing.assert_array_equal(pipe(["red", "red"], seed=3)[0].latents, pipe(["red", "red"], seed=3)[1].latents)
    assert pipe([]) == []


def test_stochastic_plans_draw_from_the_seed(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", tmp_path / "w", stochastic=True)
    pipe = Pipeline(bundle, "noisy")
    generator = Generator(4)
    noise = generator.randn((1, *toy.LATENT_SHAPE))
    embeds = {"prompt_embeds": np.stack([toy.TABLE[ids_of("small")], toy.TABLE[ids_of("red")]])}
    latents = toy.interpret(
        bundle.plan("noisy"),
        bundle.manifest.graphs.layout,
        embeds,
        noise,
        np.array([3.0]),
        lambda: generator.randn((1, *toy.LATENT_SHAPE)),
    )
    found = pipe("red", seed=4).latents
    np.testing.assert_allclose(found, latents[0], rtol=1e-5, atol=1e-5)
    lower = pipe.latents(embeds, noise, seeds=[4])
    np.testing.assert_array_equal(lower[0], found)
    with pytest.raises(UsageError, match="no source"):
        pipe.latents(embeds, noise)


def test_lower_level(bundle: Bundle, pipe: Pipeline) -> None:
    embeds = stacked(pipe, "small", "red", "red", "blue")
    noise = np.stack([Generator(seed).randn(toy.LATENT_SHAPE) for seed in (1, 2)])
    latents = pipe.latents(embeds, noise, guidance_scale=np.array([1.0, 2.0]), plan=toy.euler_plan("fr", name="new"))
    assert latents.shape == (2, *toy.LATENT_SHAPE)
    assert pipe.decode(latents[0]).shape == (2, 4, 4, 3)
    with pytest.raises(InputError, match="latents must have shape"):
        pipe.decode(latents)
    with pytest.raises(InputError, match="vae_decoder graph takes latents, got x"):
        pipe.run_graph("vae_decoder", {"x": noise})
    frames = pipe.run_graph("vae_decoder", {"latents": latents})["frames"]
    np.testing.assert_array_equal(frames[1], pipe.decode(latents[1]))
    layout = bundle.manifest.graphs.layout
    names = {tensor.name: tensor.shape for tensor in bundle.manifest.graphs.graph("full").inputs}
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.random([{"batch": 2, "2*batch": 4}.get(n, n) for n in shape]).astype(np.float32)  # type: ignore[call-overload]
        for name, shape in names.items()
    }
    found = pipe.run_graph("full", inputs)
    wanted = toy.step("full", layout, inputs)
    for name in ("latents", "output", "trunk"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="guidance must have shape"):
        pipe.run_graph("full", {**inputs, "guidance": np.ones(3, np.float32)})
    with pytest.raises(EngineError, match="latents are not finite → rebuild with --dtype bf16 or fp32"):
        pipe.latents({"prompt_embeds": embeds["prompt_embeds"] * np.float32(1e35)}, noise, guidance_scale=1e9)


def test_progress_and_cancellation(pipe: Pipeline) -> None:
    rows: list[RowDone] = []
    pipe(["red"] * 4, on_step=rows.append)
    assert [row.index for row in rows] == list(range(14))
    assert {row.rows for row in rows} == {14}

    def cancel(row: RowDone) -> None:
        if row.index == 3:
            raise Cancelled

    before = pipe("red").latents
    with pytest.raises(Cancelled):
        pipe("blue", on_step=cancel)
    np.testing.assert_array_equal(pipe("red").latents, before)


def test_mask_and_no_guidance(tmp_path: Path) -> None:
    pipe = Pipeline(make_bundle(tmp_path / "b", tmp_path / "w", guided=False, mask=True), threads=2)
    assert (pipe.encode("red")["prompt_embeds"][2:] == 0).all(), "padding is masked"
    assert pipe("red").frames.shape == (2, 4, 4, 3)
    for setting in ({"guidance_scale": 2.0}, {"negative_prompt": ""}):
        with pytest.raises(UsageError, match="built without guidance"):
            pipe("red", **setting)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="built without guidance"):
        pipe.latents(stacked(pipe, "red"), Generator(0).randn((1, *toy.LATENT_SHAPE)), guidance_scale=2.0)


def test_bad_values_are_one_line(bundle: Bundle, pipe: Pipeline) -> None:
    bad: list[tuple[type[Exception], str, Any]] = [
        (UsageError, "seed must be an integer from 0", {"seed": -1}),
        (UsageError, "one for each of 1 prompts, got 2", {"seed": [1, 2]}),
        (UsageError, "guidance_scale must be a finite number", {"guidance_scale": float("nan")}),
        (UsageError, "guidance_scale must be a finite number", {"guidance_scale": "3"}),
        (UsageError, "no plan 'fast' → use one of: default, slow", {"plan": "fast"}),
        (InputError, "a prompt must be a string", {"negative_prompt": 3}),
        (UsageError, "no argument 'num_inference_steps' → the steps are part of a plan", {"num_inference_steps": 9}),
        (UsageError, "no argument 'generator' → seed=NUMBER", {"generator": None}),
        (UsageError, "no argument 'abacus' → arguments are prompt, seed, guidance_scale,", {"abacus": 1}),
    ]
    for kind, message, settings in bad:
        with pytest.raises(kind, match=message) as caught:
            pipe("red", **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a prompt must be a string"):
        pipe([None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="no engines for 'tensorrt' → use one of: onnxruntime"):
        Pipeline(bundle, backend="tensorrt")


def test_moved_and_altered(bundle: Bundle, pipe: Pipeline, tmp_path: Path) -> None:
    """A bundle runs from anywhere; with one bit changed in any file that is loaded it does not."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(bundle.path, moved)
    np.testing.assert_array_equal(Pipeline(Bundle.open(moved))("red").latents, pipe("red").latents)
    for name in sorted(bundle.manifest.files):
        data = bytearray((moved / name).read_bytes())
        data[len(data) // 2] ^= 1
        (moved / name).write_bytes(data)
        with pytest.raises(IntegrityError, match="altered"):
            Pipeline(Bundle.open(moved))
        data[len(data) // 2] ^= 1
        (moved / name).write_bytes(data)
    assert Pipeline(Bundle.open(moved))


def test_a_plan_joins_later(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "b")
    more = add_plan(Bundle.open(tmp_path / "b"), toy.euler_plan("fr", name="fast"), default="fast")
    assert more.plans == ("default", "fast", "slow")
    rows: list[RowDone] = []
    Pipeline(more)("red", on_step=rows.append)
    assert [row.variant for row in rows] == ["full", None, None]


def test_a_clip_is_saved(pipe: Pipeline, tmp_path: Path) -> None:
    clip = pipe("red", seed=3)
    clip.save(tmp_path / "clip.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "clip.npy"), clip.frames)
    assert re.fullmatch(r"<Generation: 2 frames 4×4, 5 a second; text .*, denoise .*, decode .*>", repr(clip))
    with pytest.raises(UsageError, match=r"cannot write '\.txt'"):
        clip.save(tmp_path / "clip.txt")


def test_a_closed_pipeline(bundle: Bundle) -> None:
    with Pipeline(bundle) as pipe:
        assert repr(pipe).startswith("<Pipeline: plan default, engines combine, full, skip")
        latents = pipe("red").latents
    assert repr(pipe).startswith("<Pipeline: closed; <Bundle ")
    pipe.close()
    for use in (
        lambda: pipe("red"),
        lambda: pipe.encode("red"),
        lambda: pipe.decode(latents),
        lambda: pipe.latents(latents, latents),
    ):
        with pytest.raises(UsageError, match="the pipeline was closed → load the bundle again"):
            use()


def test_what_a_callback_may_do(pipe: Pipeline) -> None:
    """A preview is decoded; another request, which would wait for this one for ever, is refused."""
    previews, refused = [], []

    def on_step(row: RowDone) -> None:
        previews.append(pipe.decode(np.zeros(toy.LATENT_SHAPE, np.float32)))
        with pytest.raises(UsageError, match="cannot denoise on the pipeline that called it") as caught:
            pipe("blue")
        refused.append(caught.value)

    expected = pipe("red", seed=1).latents
    np.testing.assert_array_equal(pipe("red", seed=1, on_step=on_step).latents, expected)
    assert len(previews) == len(refused) == len(pipe.bundle.plan().rows)
    np.testing.assert_array_equal(pipe("red", seed=1).latents, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_to_load_its_own(pipe: Pipeline) -> None:
    process = os.fork()
    if process == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                pipe("red")
            except UsageError as error:
                code = 0 if "load the bundle again, here" in str(error) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_plans_are_those_of_when_the_pipeline_was_made(bundle: Bundle, tmp_path: Path) -> None:
    """Somebody may replace the bundle while it is open."""
    shutil.copytree(bundle.path, tmp_path / "b")
    pipe = Pipeline(Bundle.open(tmp_path / "b"))
    add_plan(Bundle.open(tmp_path / "b"), toy.euler_plan("fr", name="slow"))
    np.testing.assert_array_equal(pipe("red", plan="slow").latents, Pipeline(bundle)("red", plan="slow").latents)


def test_a_file_that_changes_while_it_is_loaded(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle.path, tmp_path / "b")
    opened = Bundle.open(tmp_path / "b")
    name = opened.manifest.graphs.graph("full").file
    load = OrtBackend.load

    def swapped(self: OrtBackend, graph: Any, path: Path) -> Any:
        if graph.role == "full":
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        return load(self, graph, bundle.path / path.relative_to(opened.path))

    monkeypatch.setattr(OrtBackend, "load", swapped)
    with pytest.raises(IntegrityError, match=f"{name}: expected SHA-256"):
        Pipeline(opened)
