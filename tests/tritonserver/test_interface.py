"""Which tensors the models take and give, for every kind of bundle; and what becomes of conditions on the way."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import toy
from test_repository import make_bundle

from lemica_trt.core.errors import InputError
from lemica_trt.ir.graphs import EncoderSpec, GraphSet, GraphSpec, StepLayout, TensorSpec, text_axis
from lemica_trt.ir.profile import Profile, Shape
from lemica_trt.runtime.conditions import EncodedText, conditions_from_texts
from lemica_trt.triton.config import Settings, config_text
from lemica_trt.triton.interface import (
    conditions_from_inputs,
    inputs_from_conditions,
    interfaces,
    tensors_from_text,
    text_from_tensors,
)
from lemica_trt.triton.readme import readme_text
from lemica_trt.triton.server import batching, load, requests

pytestmark = pytest.mark.null

FREE, NEGATIVE = text_axis(8), text_axis(8, negative=True)


def tensor(name: str, *shape: int | str, dtype: str = "fp32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)  # type: ignore[arg-type]


FLUX = (tensor("hidden", "batch", 8, 4), tensor("pooled", "batch", 4, dtype="bf16"))
MASKED = (tensor("hidden", "2*batch", 8, 4), tensor("mask", "2*batch", 8, dtype="int64"))
QWEN = (tensor("hidden", "batch", FREE, 4), tensor("negative_hidden", "batch", NEGATIVE, 4))
KANDINSKY = (*QWEN, tensor("pooled", "2*batch", 4))
LATTE = (tensor("hidden", "2*batch", FREE, 4),)

LAYOUTS = {"flux": FLUX, "masked": MASKED, "qwen": QWEN, "kandinsky": KANDINSKY, "latte": LATTE}


def layout_of(name: str) -> StepLayout:
    return msgspec.structs.replace(toy.layout_of(guided=name != "flux"), conditions=LAYOUTS[name])


def manifest_of(name: str, *, frames: int = 1, encoded: bool = True) -> Any:
    """What the models read of a manifest: a text encoder for each condition, or for the first one alone."""
    layout = layout_of(name)
    given = [spec for spec in layout.conditions if not spec.name.startswith("negative_")][: None if encoded else 1]
    graphs = [graph for graph in toy.graphs_of(toy.layout_of()).graphs if graph.role != "text_encoder"]
    encoders = []
    for spec in given:
        output = tensor(spec.name, 1, *spec.at(1)[1:], dtype=spec.dtype)
        ids = (tensor("input_ids", 1, 8, dtype="int64"),)
        role = f"text_encoder_{spec.name}"
        graphs.append(GraphSpec(role=role, file="onnx/text_encoder.onnx", inputs=ids, outputs=(output,), opset=20))
        encoders.append(EncoderSpec(graph=role, tokenizer="tokenizer.json", length=8, pad_id=0))
    shape = Shape(frames=frames, height=4, width=4, max_batch=3)
    return SimpleNamespace(
        graphs=GraphSet(dtype="fp32", layout=layout, max_batch=3, graphs=tuple(graphs)),
        encoders=tuple(encoders),
        profile=Profile(name="toy", family="toy", source="toy", dtype="fp32", text_length=8, shape=shape),
        default_plan="default",
        engines=(),
        files={},
    )


@pytest.mark.parametrize(
    ("name", "inputs", "text"),
    [
        ("flux", ["hidden FP32 8 4", "pooled FP32 4"], ["hidden FP32 8 4", "pooled FP32 4"]),
        (
            "masked",
            ["hidden FP32 8 4", "negative_hidden FP32 8 4", "mask INT64 8", "negative_mask INT64 8"],
            ["hidden FP32 8 4", "mask INT64 8"],
        ),
        (
            "qwen",
            ["hidden FP32 -1 4", "negative_hidden FP32 -1 4"],
            ["hidden FP32 8 4", "hidden_tokens INT32 1"],
        ),
        (
            "kandinsky",
            ["hidden FP32 -1 4", "negative_hidden FP32 -1 4", "pooled FP32 4", "negative_pooled FP32 4"],
            ["hidden FP32 8 4", "pooled FP32 4", "hidden_tokens INT32 1"],
        ),
        (
            "latte",
            ["hidden FP32 -1 4", "negative_hidden FP32 -1 4"],
            ["hidden FP32 8 4", "hidden_tokens INT32 1"],
        ),
    ],
)
def test_ports(name: str, inputs: list[str], text: list[str]) -> None:
    found = interfaces(manifest_of(name))

    def shown(ports: Any) -> list[str]:
        return [" ".join(map(str, (port.name, port.dtype, *port.dims))) for port in ports]

    assert shown(found["denoiser"].inputs) == shown(found["denoiser_stream"].inputs) == inputs
    assert shown(found["text_encoder"].outputs) == text
    assert shown(found["pipeline"].inputs) == ["prompt STRING 1"]


def test_files_of_images_and_of_clips() -> None:
    for frames, name in ((1, "image"), (2, "video")):
        found = interfaces(manifest_of("flux", frames=frames))
        assert [port.name for port in found["pipeline"].outputs] == ["frames", name]
        assert [port.name for port in found["pipeline_stream"].outputs] == ["step", "num_steps", "frames", name]


def test_conditions_that_no_text_encoder_gives() -> None:
    assert list(interfaces(manifest_of("flux", encoded=False))) == ["denoiser", "denoiser_stream"]


def text_of(conditions: tuple[TensorSpec, ...], tokens: int, seed: int) -> EncodedText:
    random, arrays, lengths = np.random.default_rng(seed), {}, {}
    for spec in conditions:
        if not spec.name.startswith("negative_"):
            arrays[spec.name] = random.standard_normal(spec.at(1)[1:]).astype(np.float32)
            lengths.update({spec.name: tokens} if spec.text_axes else {})
    return EncodedText(arrays, lengths)


@pytest.mark.parametrize("name", LAYOUTS)
def test_conditions_come_through_whole(name: str) -> None:
    """From the text encoder's answer to what the denoiser runs on: what the runtime makes without a server."""
    layout = layout_of(name)
    prompt, negative = text_of(layout.conditions, 5, 1), text_of(layout.conditions, 3, 2)
    texts = ([prompt], [negative] if layout.guided else [])
    expected = conditions_from_texts(layout, *texts)
    again = [[text_from_tensors(layout, tensors_from_text(text)) for text in each] for each in texts]
    inputs = inputs_from_conditions(conditions_from_texts(layout, *again))
    assert all(len(array) == 1 for array in inputs.values())
    found = conditions_from_inputs(layout, {name: array[0] for name, array in inputs.items()})
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
    if name == "qwen":
        np.testing.assert_array_equal(found["hidden"][0], prompt.arrays["hidden"][:5])
        np.testing.assert_array_equal(found["negative_hidden"][0], negative.arrays["hidden"][:3])
    if name == "latte":  # one axis of both: the negative prompt's row is as long as the prompt's
        np.testing.assert_array_equal(found["hidden"][0], negative.arrays["hidden"][:5])


def test_a_text_without_tokens() -> None:
    with pytest.raises(InputError, match="prompts must be of at least 1 token, got one of none"):
        conditions_from_texts(layout_of("qwen"), [text_of(QWEN, 4, 1)], [text_of(QWEN, 0, 1)])


BAD: list[tuple[str, dict[str, tuple[int, ...]], str]] = [
    ("qwen", {"hidden": (9, 4)}, r"hidden must have one length of 1 … 8 tokens, .* got 9"),
    ("qwen", {"hidden": (2, 5)}, r"hidden must be float32 \[1, -1, 4\], one sample a request; got float32 \[1, 2, 5\]"),
    ("qwen", {"hidden": (4,)}, r"hidden must be float32 \[1, -1, 4\]"),
    ("latte", {"hidden": (5, 4)}, "negative_hidden must be as long as hidden, 5 tokens; got 2"),
]


@pytest.mark.parametrize(("name", "shapes", "message"), BAD, ids=[message for *_, message in BAD])
def test_conditions_that_are_refused(name: str, shapes: dict[str, Any], message: str) -> None:
    """What a denoiser does with a request's tensors, before its turn comes."""
    ports = interfaces(manifest_of(name))["denoiser"].inputs
    given = {port.name: np.zeros((1, *shapes.get(port.name, (2, 4))), np.float32) for port in ports}
    pb = SimpleNamespace(get_input_tensor_by_name=lambda _, port: SimpleNamespace(as_numpy=lambda: given[port]))
    with pytest.raises(InputError, match=message):
        conditions_from_inputs(layout_of(name), {port.name: requests.tensor_from(pb, None, port) for port in ports})


def test_requests_whose_shapes_follow_the_prompt_share_no_batch() -> None:
    bundle = SimpleNamespace(manifest=manifest_of("qwen"), plans=("default",), plan=lambda _: PLAN)
    assert bundle.manifest.graphs.max_batch == 3
    batches = batching.Batches(SimpleNamespace(bundle=bundle), "exact")  # type: ignore[arg-type]
    jobs = [batches._probe(PLAN, seed) for seed in range(3)]
    assert [job.conditions["hidden"].shape for job in jobs] == [(1, 8, 4)] * 3
    assert [len(group) for group in batches.groups(jobs)] == [1, 1, 1]


PLAN = toy.euler_plan("fsrf")


def test_rows_of_negative_prompts_come_first_in_a_batch() -> None:
    seen: list[Any] = []

    def latents(conditions: Any, noise: Any, **_: Any) -> Any:
        seen.append(conditions)
        return noise

    bundle = SimpleNamespace(manifest=manifest_of("masked"), plans=("default",), plan=lambda _: PLAN)
    batches = batching.Batches(SimpleNamespace(bundle=bundle, latents=latents), "off")  # type: ignore[arg-type]
    jobs = [batches._probe(PLAN, seed) for seed in range(3)]
    batches.run(jobs)
    rows = [job.conditions["hidden"][row] for row in (0, 1) for job in jobs]
    np.testing.assert_array_equal(seen[-1]["hidden"], rows)
    assert seen[-1]["mask"].dtype == np.int64 and seen[-1]["mask"].all(), "a mask that hides nothing"


def test_each_graph_runs_once_at_load() -> None:
    """The first rows of a plan, until its variants have run; no more."""
    bundle = SimpleNamespace(manifest=manifest_of("flux"), plans=("default",), plan=lambda _: PLAN)
    ran: list[str | None] = []

    def latents(conditions: Any, noise: Any, *, plan: Any, on_step: Any, **_: Any) -> Any:
        for index, row in enumerate(plan.rows):
            ran.append(row.variant)
            on_step(SimpleNamespace(index=index))

    batches = batching.Batches(SimpleNamespace(bundle=bundle, latents=latents), "off")  # type: ignore[arg-type]
    batches.warm_up()
    assert ran == ["full", "skip", None]


def test_configs_of_a_text_axis(tmp_path: Path) -> None:
    """A free dimension is -1; the denoisers, which run rows of their own at load, get no request of zeros."""
    whole = make_bundle(tmp_path / "bundle")
    bundle: Any = SimpleNamespace(manifest=manifest_of("qwen"), digest=whole.digest, plans=whole.plans, plan=whole.plan)
    found = interfaces(bundle.manifest)
    configs = {model: config_text(model, found[model], bundle, whole.engine(), Settings()) for model in found}
    assert '{ name: "negative_hidden" data_type: TYPE_FP32 dims: [ -1, 4 ] }' in configs["denoiser_stream"]
    assert "model_warmup" not in configs["denoiser_stream"] and "model_warmup" in configs["text_encoder"]
    assert '{ name: "hidden_tokens" data_type: TYPE_INT32 dims: [ 1 ] }' in configs["text_encoder"]
    assert '{ name: "image" data_type: TYPE_STRING dims: [ 1 ] }' in configs["pipeline"]
    readme = readme_text(bundle, tuple(found), cpu=True)
    assert "`png-base64`" in readme and ".mp4" not in readme and "`negative_prompt`" in readme


def test_the_pipelines_ask_for_the_file_that_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace())  # type: ignore[arg-type]
    loaded = runpy.run_path(str(Path(load.__file__).parents[1] / "model" / "pipeline.py"))
    for frames, outputs in ((1, ("frames", "png", "png-base64")), (2, ("frames", "mp4", "mp4-base64"))):
        bundle = SimpleNamespace(manifest=manifest_of("flux", frames=frames))
        monkeypatch.setattr(load, "open_bundle", lambda *_, bundle=bundle: (bundle, {}))
        model = loaded["TritonPythonModel"]()
        monkeypatch.setattr(loaded["importlib"].util, "find_spec", lambda name: name == "av")
        model.initialize({"model_name": "pipeline"})
        assert model.outputs == outputs
        monkeypatch.setattr(loaded["importlib"].util, "find_spec", lambda name: None)
        model.initialize({"model_name": "pipeline"})
        assert model.outputs == (outputs if frames == 1 else ("frames",))
