"""Which tensors the models take and give, for every kind of bundle; and what becomes of conditions on the way."""

from __future__ import annotations

import base64
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import UNSET

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import toy
from test_repository import make_bundle

from lemica_trt.core.errors import InputError
from lemica_trt.ir.graphs import (
    EncoderSpec,
    GraphSet,
    GraphSpec,
    ImageSpec,
    PictureSpec,
    StepLayout,
    TensorSpec,
    text_axis,
)
from lemica_trt.ir.profile import Profile, Shape
from lemica_trt.runtime.conditions import EncodedText, conditions_from_texts
from lemica_trt.runtime.pipeline import Pipeline
from lemica_trt.runtime.random import Generator
from lemica_trt.triton import repository
from lemica_trt.triton.config import Settings, config_text
from lemica_trt.triton.interface import (
    MODELS,
    Port,
    conditions_from_inputs,
    graphs_of,
    inputs_from_conditions,
    interfaces,
    tensors_from_text,
    text_from_tensors,
)
from lemica_trt.triton.probe import PIXEL
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


IMAGE = "i2v"
"""A bundle that needs an image: one condition of each encoder."""

LAYOUTS[IMAGE] = (tensor("hidden", "2*batch", 8, 4), tensor("first", "batch", 2, 4, 4))

LAST = "flf2v"
"""A bundle that needs two."""

LAYOUTS[LAST] = LAYOUTS[IMAGE]


def layout_of(name: str) -> StepLayout:
    return msgspec.structs.replace(toy.layout_of(guided=name != "flux"), conditions=LAYOUTS[name])


def manifest_of(name: str, *, frames: int = 1, encoded: bool = True, negative: bool = False) -> Any:
    """What the models read of a manifest: a text encoder for each condition, or for the first one alone; and, where
    `negative`, one of negative prompts beside it."""
    layout = layout_of(name)
    given = [spec for spec in layout.conditions if not spec.name.startswith("negative_")][: None if encoded else 1]
    pictured = [given.pop()] if name in (IMAGE, LAST) else []
    graphs = [graph for graph in toy.graphs_of(toy.layout_of()).graphs if graph.role != "text_encoder"]
    encoders = []
    for spec in given:
        output = tensor(spec.name, 1, *spec.at(1)[1:], dtype=spec.dtype)
        ids = (tensor("input_ids", 1, 8, dtype="int64"),)
        role = f"text_encoder_{spec.name}"
        graphs.append(GraphSpec(role=role, file="onnx/text_encoder.onnx", inputs=ids, outputs=(output,), opset=20))
        encoders.append(EncoderSpec(graph=role, tokenizer="tokenizer.json", length=8, pad_id=0))
        if negative:
            graphs.append(msgspec.structs.replace(graphs[-1], role=f"negative_{role}"))
            encoders.append(msgspec.structs.replace(encoders[-1], graph=f"negative_{role}", negative=True))
    for spec in pictured:
        given_to = (*(tensor(its.name, 1, 3, 16, 24) for its in SPECS[name].pictures), tensor("draw", 1, 4, 8))
        made = (tensor(spec.name, 1, *spec.at(1)[1:]),)
        graphs.append(GraphSpec(role="image_encoder", file="x.onnx", inputs=given_to, outputs=made, opset=20))
    shape = Shape(frames=frames, height=4, width=4, max_batch=3)
    return SimpleNamespace(
        graphs=GraphSet(
            dtype="fp32", layout=layout, max_batch=3, graphs=tuple(graphs), image=SPECS[name] if pictured else UNSET
        ),
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


def test_encoders_of_negative_prompts_are_one_model_with_those_of_prompts() -> None:
    """Sana: it runs both, and is asked for one by a parameter."""
    manifest = manifest_of("masked", negative=True)
    found = interfaces(manifest)
    assert found == interfaces(manifest_of("masked")) and list(found["text_encoder"].inputs) == [
        Port("prompt", "STRING", (1,))
    ]
    assert graphs_of("text_encoder", manifest) == (
        "text_encoder_hidden", "negative_text_encoder_hidden", "text_encoder_mask", "negative_text_encoder_mask",
    )  # fmt: skip


PICTURE = PictureSpec(
    name="image", height=16, width=24, fit="cover", by="lanczos", scale=(0.5,) * 3, offset=(-1.0, 0.0, 1.0)
)

SPEC = ImageSpec(pictures=(PICTURE,), draw=(1, 4, 8))

SPECS = {
    IMAGE: SPEC,
    LAST: ImageSpec(
        pictures=(PICTURE, msgspec.structs.replace(PICTURE, name="last_image", of="last_image")), draw=(1, 4, 8)
    ),
}


def test_models_and_ports_of_an_image() -> None:
    found = interfaces(manifest_of(IMAGE, frames=2))
    assert list(found) == list(MODELS)
    shown = {
        model: [" ".join(map(str, (port.name, port.dtype, *port.dims))) for port in found[model].inputs]
        for model in found
    }
    assert shown["pipeline"] == shown["pipeline_stream"] == ["prompt STRING 1", "image STRING 1"]
    assert shown["image_encoder"] == ["image STRING 1"]
    assert shown["denoiser"] == ["hidden FP32 8 4", "negative_hidden FP32 8 4", "first FP32 2 4 4"]
    assert [port.name for port in found["text_encoder"].outputs] == ["hidden"]
    assert [port.name for port in found["image_encoder"].outputs] == ["first"]
    assert graphs_of("image_encoder", manifest_of(IMAGE)) == ("image_encoder",)


def test_files_of_images_and_of_clips() -> None:
    for frames, name in ((1, "image"), (2, "video")):
        found = interfaces(manifest_of("flux", frames=frames))
        assert [port.name for port in found["pipeline"].outputs] == ["frames", name]
        assert [port.name for port in found["pipeline_stream"].outputs] == ["step", "num_steps", "frames", name]


def test_conditions_that_no_text_encoder_gives() -> None:
    assert list(interfaces(manifest_of("flux", encoded=False))) == ["denoiser", "denoiser_stream"]


def test_a_page_without_pipelines_and_one_of_an_image(tmp_path: Path) -> None:
    """A repository of the denoisers alone names no model, script or output that it has not."""
    whole = make_bundle(tmp_path / "bundle")
    pages, contents = {}, {}
    for name, encoded in (("flux", False), (IMAGE, True), (LAST, True)):
        manifest = manifest_of(name, frames=2, encoded=encoded)
        bundle: Any = SimpleNamespace(
            manifest=manifest, digest=whole.digest, plans=whole.plans, plan=whole.plan, engine=whole.engine
        )
        models = tuple(interfaces(manifest))
        pages[name] = readme_text(bundle, models, cpu=True)
        contents[name] = repository._contents(bundle, models, Settings())
    assert not re.findall(r"pipeline_|`pipeline`|text_encoder|probe\.py|client|mp4|--clip", pages["flux"])
    assert "for model in denoiser denoiser_stream; do" in pages["flux"]
    assert "probe.py" not in contents["flux"] and "probe.py" in contents[IMAGE]
    assert "--image first.png" in pages[IMAGE]
    assert "a PNG, JPEG or WebP file, as it is or in base64" in " ".join(pages[IMAGE].split())
    assert "--last-image" not in pages[IMAGE] and "--image first.png --last-image last.png" in pages[LAST]
    (tmp_path / "first.png").write_bytes(PNG)
    (tmp_path / "last.png").write_bytes(GREY)
    for name in (IMAGE, LAST):
        (command,) = re.findall(r"printf .*generate", pages[name])
        sent = subprocess.run(
            ["sh", "-c", command.replace("curl -d @-", "cat; true")], cwd=tmp_path, capture_output=True, check=True
        )
        body = json.loads(sent.stdout)
        assert base64.b64decode(body["image"]) == PNG
        assert body.get("last_image") == (base64.b64encode(GREY).decode() if name == LAST else None)


def text_of(conditions: tuple[TensorSpec, ...], tokens: int, seed: int) -> EncodedText:
    random, arrays, lengths = np.random.default_rng(seed), {}, {}
    for spec in conditions:
        if not spec.name.startswith("negative_"):
            arrays[spec.name] = random.standard_normal(spec.at(1)[1:]).astype(np.float32)
            lengths.update({spec.name: tokens} if spec.text_axes else {})
    return EncodedText(arrays, lengths)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in (IMAGE, LAST)])
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
    batches = batching.Batches(SimpleNamespace(bundle=bundle, latents=latents, generator=Generator), "off")  # type: ignore[arg-type]
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

    batches = batching.Batches(SimpleNamespace(bundle=bundle, latents=latents, generator=Generator), "off")  # type: ignore[arg-type]
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


class Request:
    """What a model sees of a request."""

    def __init__(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> None:
        self.inputs, self._parameters, self.answers = inputs, parameters, list[Any]()

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def get_response_sender(self) -> Any:
        return SimpleNamespace(send=lambda answer, flags=None: self.answers.append(answer))

    def timeout(self) -> int:
        return 0

    def requested_output_names(self) -> list[str]:
        return ["frames"]


class Backend:
    """`triton_python_backend_utils`; a model that is called answers by `called`."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    Logger = SimpleNamespace(log_warn=print)

    class TritonError(SimpleNamespace):
        INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = range(4)

        def __init__(self, text: str, code: int) -> None:
            super().__init__(message=lambda: text, code=lambda: code)

    @staticmethod
    def Tensor(name: str, array: Any) -> Any:
        return SimpleNamespace(name=lambda: name, as_numpy=lambda: array)

    @staticmethod
    def InferenceResponse(output_tensors: Any = (), error: Any = None) -> Any:
        return SimpleNamespace(
            output_tensors=lambda: output_tensors, has_error=lambda: error is not None, error=lambda: error
        )

    @staticmethod
    def get_input_tensor_by_name(request: Request, name: str) -> Any:
        found = request.inputs.get(name)
        return None if found is None else SimpleNamespace(as_numpy=lambda: found)

    def __init__(self) -> None:
        self.called: dict[str, Any] = {}

    def InferenceRequest(self, model_name: str, inputs: Any, **options: Any) -> Any:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in inputs}
        return SimpleNamespace(exec=lambda **_: self.called[model_name](arrays, options))


def text(value: bytes) -> Any:
    return np.array([[value]], np.object_)


def model_of(monkeypatch: pytest.MonkeyPatch, backend: Backend, file: str) -> Any:
    """A model's class, in a server that is not there."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)  # type: ignore[arg-type]
    return runpy.run_path(str(Path(load.__file__).parents[1] / "model" / file))["TritonPythonModel"]()


PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")
"""One red pixel."""

GREY = base64.b64decode(PIXEL)
"""The probe's pixel."""


class EncoderOf:
    """A pipeline whose image encoder gives the mean of its picture, and the mean of its noise."""

    def __init__(self, name: str = IMAGE) -> None:
        self.bundle = SimpleNamespace(manifest=manifest_of(name, frames=2))

    def encode_image(self, image: Any, seed: int = 0, *, last_image: Any = None) -> Any:
        return Pipeline.encode_image(self, image, seed, last_image=last_image)  # type: ignore[arg-type]

    def run_graph(self, role: str, inputs: Any) -> Any:
        first = np.full((1, 2, 4, 4), inputs["image"].mean(), np.float32)
        first[0, 1] = inputs["draw"].mean()
        if "last_image" in inputs:
            first[0, :, 0] = inputs["last_image"].mean()
        return {"first": first}


def test_the_image_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The content of a file, or base64 of it; noise of the request's seed; what is no picture in a line."""
    pytest.importorskip("PIL")
    model, pipeline = model_of(monkeypatch, Backend(), "image_encoder.py"), EncoderOf()
    monkeypatch.setattr(load, "load_pipeline", lambda *_: (pipeline, {}))
    model.initialize({"model_name": "image_encoder"})
    sent = [(text(PNG), {}), (text(base64.b64encode(PNG)), {"seed": 7}), (text(PNG), {"seed": 7})]
    answers = model.execute([Request({"image": image}, given) for image, given in sent])
    plain, coded, seeded = (answer.output_tensors()[0].as_numpy() for answer in answers)
    expected = pipeline.encode_image(np.array([[[255, 0, 0]]], np.uint8), 7)["first"]
    np.testing.assert_array_equal(seeded, expected[None])
    np.testing.assert_array_equal(coded, seeded)
    assert (plain[0, 0] == seeded[0, 0]).all() and (plain[0, 1] != seeded[0, 1]).all()
    bad = [
        ({"image": text(b"GIF89a")}, {}, "image: expected a PNG, JPEG or WebP picture, got none of them"),
        ({"image": text(b"http://localhost/")}, {}, "image: expected the picture itself, got a URL"),
        ({"image": text(PNG[:-26])}, {}, "image: expected a whole picture"),
        ({}, {}, "image must be object [1, 1], one sample a request; got none"),
        ({"image": text(PNG)}, {"seed": -1}, "seed must be an integer"),
        ({"image": text(PNG)}, {"plan": "b3"}, "unknown parameter 'plan'"),
    ]
    for answer, (*_, said) in zip(model.execute([Request(*given) for *given, _ in bad]), bad):
        error = answer.error()
        assert said in error.message() and error.code() == Backend.TritonError.INVALID_ARG, error.message()
        assert "\n" not in error.message()


def test_the_image_encoder_of_two_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is itself; one without the other is refused by name."""
    pytest.importorskip("PIL")
    model, pipeline = model_of(monkeypatch, Backend(), "image_encoder.py"), EncoderOf(LAST)
    monkeypatch.setattr(load, "load_pipeline", lambda *_: (pipeline, {}))
    model.initialize({"model_name": "image_encoder"})
    (answer,) = model.execute([Request({"image": text(PNG), "last_image": text(GREY)}, {"seed": 7})])
    red, grey = np.array([[[255, 0, 0]]], np.uint8), np.full((1, 1, 3), 128, np.uint8)
    expected = pipeline.encode_image(red, 7, last_image=grey)["first"]
    np.testing.assert_array_equal(answer.output_tensors()[0].as_numpy(), expected[None])
    assert (expected != pipeline.encode_image(grey, 7, last_image=red)["first"]).any()
    bad = [
        ({"image": text(PNG)}, "last_image must be object [1, 1], one sample a request; got none"),
        ({"image": text(PNG), "last_image": text(b"GIF89a")}, "last_image: expected a PNG, JPEG or WebP picture"),
    ]
    for answer, (_, said) in zip(model.execute([Request(inputs, {}) for inputs, _ in bad]), bad):
        assert said in answer.error().message() and answer.error().code() == Backend.TritonError.INVALID_ARG
    with pytest.raises(InputError, match=r"needs a last image beside the first one, got none → give one: last_image"):
        pipeline.encode_image(red)
    with pytest.raises(InputError, match="takes no last image: its pipeline has none"):
        EncoderOf().encode_image(red, last_image=grey)


@pytest.mark.parametrize("images", [("image",), ("image", "last_image")])
def test_the_pipelines_hand_images_on(images: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the image encoder, with the seed; what that makes of them, beside the text's, to the denoiser."""
    backend, seen = Backend(), dict[str, Any]()
    model = model_of(monkeypatch, backend, "pipeline.py")
    bundle = SimpleNamespace(manifest=manifest_of(IMAGE if images == ("image",) else LAST, frames=2))
    monkeypatch.setattr(load, "open_bundle", lambda *_: (bundle, {}))
    model.initialize({"model_name": "pipeline"})

    def answering(name: str, **tensors: Any) -> Any:
        def called(inputs: Any, options: Any) -> Any:
            seen[name] = inputs, options
            answer = backend.InferenceResponse([backend.Tensor(*item) for item in tensors.items()])
            return iter([answer]) if name == "denoiser_stream" else answer

        return called

    hidden, first = np.ones((1, 8, 4), np.float32), np.full((1, 2, 4, 4), 3, np.float32)
    latents, step = np.full((1, 2, 3), 5, np.float32), np.array([[3]], np.int32)
    frames = np.zeros((1, 2, 4, 4, 3), np.uint8)
    backend.called = {
        "text_encoder": answering("text_encoder", hidden=hidden),
        "image_encoder": answering("image_encoder", first=first),
        "denoiser_stream": answering("denoiser_stream", step=step, num_steps=step, latents=latents),
        "vae_decoder": answering("vae_decoder", frames=frames),
    }
    sent = {"image": PNG, "last_image": GREY}
    request = Request({"prompt": text(b"a bird"), **{name: text(sent[name]) for name in images}}, {"seed": 7})
    asked: list[Any] = []
    once = backend.called["text_encoder"]
    backend.called["text_encoder"] = lambda inputs, options: (
        asked.append(options["parameters"]) or once(inputs, options)
    )
    request.is_cancelled = lambda: False  # type: ignore[attr-defined]
    model.execute([request])
    (answer,) = request.answers
    assert not answer.has_error(), answer.error().message()
    np.testing.assert_array_equal(answer.output_tensors()[0].as_numpy(), frames)
    assert asked == [{"negative": False}, {"negative": True}]
    inputs, options = seen["image_encoder"]
    assert {name: array[0, 0] for name, array in inputs.items()} == {name: sent[name] for name in images}
    assert options["parameters"] == {"seed": 7}
    inputs, options = seen["denoiser_stream"]
    np.testing.assert_array_equal(inputs["first"], first)
    assert set(inputs) == {"hidden", "negative_hidden", "first"}
    assert json.loads(options["parameters"]["settings"]) == {"seed": 7}

    missing = Request({"prompt": text(b"a bird"), **{name: text(sent[name]) for name in images[:-1]}}, {})
    model.execute([missing])
    said = missing.answers[0].error().message()
    assert f"{images[-1]} must be object [1, 1], one sample a request; got none" in said


def test_the_denoiser_draws_behind_the_image_encoder() -> None:
    """The initial noise of a seed is what diffusers draws after the posterior's."""
    seen: list[Any] = []

    def latents(conditions: Any, noise: Any, **_: Any) -> Any:
        seen.append(noise)
        return noise

    bundle = SimpleNamespace(manifest=manifest_of(IMAGE), plans=("default",), plan=lambda _: PLAN)
    pipeline = SimpleNamespace(bundle=bundle, latents=latents)
    pipeline.generator = lambda seed: Pipeline.generator(pipeline, seed)  # type: ignore[arg-type]
    batches = batching.Batches(pipeline, "off")  # type: ignore[arg-type]
    batches.run([batches._probe(PLAN, 7)])
    generator = Generator(7)
    generator.randn(SPEC.draw)  # type: ignore[arg-type]
    np.testing.assert_array_equal(seen[-1][0], generator.randn(layout_of(IMAGE).latent_shape))
