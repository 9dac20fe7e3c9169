"""Requests as OpenAI's clients, SGLang's, vLLM-Omni's and Dynamo's send them."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError, LemicaError
from lemica_trt.endpoint.errors import Refused, error_object
from lemica_trt.endpoint.requests import MAX_BODY_BYTES, PARAMETERS, Model, body_from_form, body_from_json
from lemica_trt.ir.graphs import ImageSpec, PictureSpec, Source

pytestmark = pytest.mark.cpu

PROMPT = {"prompt": "a red circle"}


@pytest.fixture(scope="module")
def model(built: tuple[Path, subprocess.CompletedProcess[str]]) -> Model:
    return Model(Bundle.open(built[0]))


def test_what_is_left_out_is_the_bundles(model: Model) -> None:
    asked = model.read(PROMPT, image=False)
    assert (asked.plan.name, asked.generation.seed, asked.generation.guidance_scale) == ("b4", 0, 4.0)
    assert asked.generation.negative_prompt is None and not asked.inline and asked.model == "cogvideox-tiny"
    assert (model.size, model.seconds) == ("64x64", "1.125")


@pytest.mark.parametrize(
    ("sent", "plan"),
    [
        ({"model": "cogvideox-tiny:b5"}, "b5"),
        ({"plan": "b5"}, "b5"),
        ({"steps": 8}, "uncached"),
        ({"quality": "auto"}, "b4"),
        ({"quality": "low"}, "b4"),
        ({"quality": "fast"}, "b4"),
        ({"quality": "balanced"}, "b4"),
        ({"quality": "hd"}, "b5"),
        ({"quality": "lossless"}, "uncached"),
        ({"quality": "high", "steps": 4}, "b4"),
        ({"quality": "high", "plan": "b5"}, "b5"),
        ({"model": "cogvideox-tiny:b5", "plan": "b5", "steps": 5}, "b5"),
        ({"seconds": "1", "size": "64x64", "model": None}, "b4"),  # OpenAI
        ({"seconds": 1.125, "num_frames": 9, "fps": 8, "n": 1, "user": "somebody"}, "b4"),  # SGLang
        ({"width": 64, "height": 64, "num_inference_steps": 8, "extra_params": {}}, "b4"),  # vLLM-Omni
        ({"nvext": {"plan": "b5", "num_inference_steps": 8, "fps": None}}, "b5"),  # Dynamo
    ],
    ids=str,
)
def test_plans_are_chosen_and_sizes_compared(model: Model, sent: dict[str, Any], plan: str) -> None:
    assert model.read({**PROMPT, **sent}, image=False).plan.name == plan


@pytest.mark.parametrize(
    ("sent", "said", "param"),
    [
        ({"prompt": None}, "prompt must be given", "prompt"),
        ({"prompt": 3}, "prompt must be a string, got int", "prompt"),
        ({"prompt": "x" * 8193}, "prompt must be text of at most 8192 bytes; got 8193", "prompt"),
        ({"prompt": "\ud800"}, "prompt must be Unicode text", "prompt"),
        ({"sed": 1}, "unknown parameter 'sed': expected fps,", "sed"),
        ({"background": "auto"}, "unknown parameter 'background'", "background"),
        ({"seed": -1}, "seed must be an integer from 0 to", "seed"),
        ({"seed": "7"}, "seed must be an integer from 0 to", "seed"),
        ({"plan": "b9"}, "plan must be one of b4, b5, uncached; got 'b9'", "plan"),
        ({"model": "cogvideox-tiny:b5", "plan": "b4"}, "model names plan b5: leave out plan and steps", "model"),
        ({"model": ["x"]}, "model must be a string, got list", "model"),
        ({"quality": "best"}, "quality must be one of auto, balanced", "quality"),
        ({"guidance_scale": 1e9}, "guidance_scale must be a number from 0 to 100", "guidance_scale"),
        ({"size": "1280x720"}, "size must be 64x64 or auto, which the bundle was built for; got '1280x720'", "size"),
        ({"seconds": "4"}, "seconds must be 1.125 or 1, which the bundle was built for; got '4'", "seconds"),
        ({"seconds": {}}, "seconds must be 1.125 or 1", "seconds"),
        ({"num_frames": True}, "num_frames must be 9", "num_frames"),
        ({"num_inference_steps": 4}, "num_inference_steps must be 8, .*; for fewer full steps name a plan", None),
        ({"n": 2}, "n must be 1; send a request for each, with its own seed; got 2", "n"),
        ({"response_format": "url"}, "response_format must be b64_json; got 'url'", "response_format"),
        ({"input_reference": "(a file)"}, "input_reference must be left out: .* from text alone", "input_reference"),
        ({"nvext": 3}, "nvext must be an object", None),
        ({"seed": 1, "nvext": {"seed": 2}}, "seed must be given once; it is also in nvext", "seed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_says_what_there_is(model: Model, sent: dict[str, Any], said: str, param: str | None) -> None:
    with pytest.raises(InputError, match=said) as refused:
        model.read({**PROMPT, **sent}, image=False)
    assert "x" * 99 not in str(refused.value)
    found = error_object(refused.value, PARAMETERS)
    assert param in (None, found["param"]) and found["type"] == "invalid_request_error"


def test_models_that_are_not_there_and_images(model: Model) -> None:
    with pytest.raises(Refused, match=r"model must be one of cogvideox-tiny, cogvideox-t.*; got 'sora-2'") as no:
        model.read({**PROMPT, "model": "sora-2"}, image=False)
    assert no.value.status == 404
    with pytest.raises(InputError, match="model cogvideox-tiny makes videos: POST /v1/videos"):
        model.read(PROMPT, image=True)


def test_forms_are_text(model: Model) -> None:
    """As `curl -F` and OpenAI's client send them."""
    form = {"prompt": "7", "seed": "7", "guidance_scale": "2.5", "seconds": "1", "extra_body": '{"plan": "b5"}'}
    asked = model.read(body_from_form(form), image=False)
    assert (asked.generation.prompt, asked.generation.seed, asked.generation.guidance_scale) == ("7", 7, 2.5)
    assert asked.plan.name == "b5"
    for wrong in ({"seed": "7.5"}, {"seed": "x"}, {"seed": ""}, {"extra_body": "[]"}, {"input_reference": b"a file"}):
        with pytest.raises(LemicaError):
            model.read(body_from_form({"prompt": "x", **wrong}), image=False)


FILE = b"\x89PNG"


def encoded(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture
def pictured(built: tuple[Path, subprocess.CompletedProcess[str]]) -> Model:
    """Of a bundle that needs an image."""
    return model_with(Bundle.open(built[0]), "image")


@pytest.fixture
def twice_pictured(built: tuple[Path, subprocess.CompletedProcess[str]]) -> Model:
    """Of a bundle that needs a first and a last image."""
    return model_with(Bundle.open(built[0]), "image", "last_image")


def model_with(bundle: Bundle, *images: Source) -> Model:
    specs = [
        PictureSpec(
            name=name, height=64, width=64, fit="stretch", by="lanczos", scale=(1.0,) * 3, offset=(0.0,) * 3, of=name
        )
        for name in images
    ]
    graphs = msgspec.structs.replace(bundle.manifest.graphs, image=ImageSpec(pictures=tuple(specs)))
    manifest = SimpleNamespace(graphs=graphs, profile=bundle.manifest.profile)
    return Model(SimpleNamespace(manifest=manifest, plans=bundle.plans, plan=bundle.plan))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sent",
    [
        {"input_reference": FILE},  # OpenAI: a file of a form
        {"input_reference[image_url]": encoded(FILE)},  # OpenAI: an object, in a form
        {"input_reference": {"image_url": encoded(FILE)}},
        {"image_reference": f'{{"image_url": "{encoded(FILE)}"}}'},  # vLLM-Omni
        {"input_reference": encoded(FILE)},
        {"extra_body": f'{{"input_reference": "{base64.b64encode(FILE).decode()}"}}'},  # SGLang
    ],
    ids=range(6),
)
def test_images_as_clients_send_them(pictured: Model, sent: dict[str, Any]) -> None:
    asked = pictured.read(body_from_form({**PROMPT, **sent}), image=False)
    assert asked.generation.image == FILE and "PNG" not in repr(asked)
    assert pictured.needs_image and pictured.max_body_bytes > 4 * (32 << 20) // 3 + MAX_BODY_BYTES


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({}, "input_reference must be given, once: the model needs an image, a file of a form, or"),
        (
            {"input_reference": b"x", "image_reference": {"image_url": "eA=="}},
            "input_reference must be given, once",
        ),
        ({"input_reference": 3}, "input_reference must be a file, or an object with image_url; got int"),
        ({"input_reference": {"file_id": "file-1"}}, "must have image_url, a data URL, and nothing else; got file_id"),
        ({"input_reference": {"image_url": 3}}, "input_reference must be a file, .* got int"),
        (
            {"input_reference": {"image_url": "http://169.254.169.254/latest"}},
            "input_reference: expected the picture itself, got a URL",
        ),
        ({"image_reference": {"image_url": "x"}}, "image_reference: expected base64, got something else"),
        ({"input_reference": "/etc/passwd"}, "input_reference: expected base64, got something else"),
    ],
    ids=range(8),
)
def test_images_that_are_refused(pictured: Model, sent: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        pictured.read({**PROMPT, **sent}, image=False)
    assert error_object(refused.value, PARAMETERS)["param"] in ("input_reference", "image_reference")


@pytest.mark.parametrize("name", ["last_image", "last_image[image_url]"])
def test_a_last_image_beside_the_first(twice_pictured: Model, pictured: Model, name: str) -> None:
    """A file of a form or a data URL, as the first; needed and refused in a line each."""
    other, sent = b"RIFF", {**PROMPT, "input_reference": FILE}
    last = {name: encoded(other) if "url" in name else other}
    asked = twice_pictured.read(body_from_form({**sent, **last}), image=False)
    assert (asked.generation.image, asked.generation.last_image) == (FILE, other)
    assert twice_pictured.max_body_bytes - pictured.max_body_bytes == pictured.max_body_bytes - MAX_BODY_BYTES > 0
    with pytest.raises(InputError, match=r"^last_image must be given, once: the model needs a last image, a file"):
        twice_pictured.read(body_from_form(sent), image=False)
    with pytest.raises(InputError, match=r"last_image must be left out: .* videos from a first image alone"):
        pictured.read(body_from_form({**sent, **last}), image=False)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a": NaN}', b"\xff", b"[" * 10_000 + b"]" * 10_000])
def test_bodies_that_are_no_objects(body: bytes) -> None:
    with pytest.raises(InputError, match="the body must be a JSON object"):
        body_from_json(body)
