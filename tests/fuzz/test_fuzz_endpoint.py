"""Requests of OpenAI's clients, mutated, through the whole application: a job or an error object, never a 500.

Seeds: bodies as OpenAI's, SGLang's, vLLM-Omni's and Dynamo's clients send them, one a line.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st
from makers import Held
from mutations import TIERS, changed, run

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.text import printable
from lemica_trt.endpoint.jobs import Jobs
from lemica_trt.endpoint.requests import Model
from lemica_trt.triton import probe

testclient = pytest.importorskip("starlette.testclient", reason="pip install 'lemica-trt[serve]'")

from lemica_trt.endpoint.app import Endpoint  # noqa: E402
from lemica_trt.endpoint.metrics import Metrics  # noqa: E402

pytestmark = pytest.mark.cpu

SEEDS = Path(__file__).parent / "seeds"
GOLDEN = Path(__file__).parents[1] / "golden/bundle"

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=b"
PARTS = b"".join(
    b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % part
    for part in ((b"prompt", b"a red circle"), (b"seed", b"7"), (b"nvext", b'{"steps": 3}'))
)


PIXEL = base64.b64decode(probe.PIXEL)
REFERENCE = (
    PARTS
    + b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="x.png"\r\n\r\n'
    + PIXEL
    + b"\r\n--b--\r\n"
)


class Asked:
    """An endpoint whose jobs are done at once."""

    def __init__(self, *, image: bool, needs: bool = False) -> None:
        self.image, self.model = image, Model(Bundle.open(GOLDEN))
        self.model.needs_image = needs
        if image:
            self.model.shape = msgspec.structs.replace(self.model.shape, frames=1)
        self.path = "/v1/images/generations" if image else "/v1/videos"
        self.jobs = Jobs(Held(free=True), queue=64, kept=4)
        app = Endpoint(self.model, self.jobs, Metrics(self.model), 5).app()
        self.client = testclient.TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=True)

    def post(self, data: bytes, kind: str) -> Any:
        return self.client.post(self.path, content=data, headers={"content-type": kind})

    def target(self, asked: tuple[str, bytes]) -> None:
        """Whatever is sent: something that the bundle has, or what is wrong with it."""
        kind, data = asked
        answer = self.post(data, kind)
        found = answer.json()
        if answer.status_code == 200:
            assert self.image or found["plan"] in self.model.plans
            if self.image or "data" in found:
                assert base64.b64decode(found["data"][0]["b64_json"], validate=True)
        else:
            assert answer.status_code in (400, 404, 413, 415, 429), found
            message = found["error"]["message"]
            assert message and printable(message) == message and len(message) < 20_000
            assert found["error"]["type"] != "server_error"

    def close(self) -> None:
        self.jobs.cancel_all()


@pytest.fixture
def videos() -> Iterator[Asked]:
    made = Asked(image=False)
    yield made
    made.close()


@pytest.fixture
def images() -> Iterator[Asked]:
    made = Asked(image=True)
    yield made
    made.close()


@pytest.fixture
def pictured() -> Iterator[Asked]:
    made = Asked(image=False, needs=True)
    yield made
    made.close()


def seeds(name: str) -> list[bytes]:
    return (SEEDS / name).read_bytes().splitlines()


def test_the_seeds_are_right(videos: Asked, images: Asked) -> None:
    for asked, name in ((videos, "videos.jsonl"), (images, "images.jsonl")):
        for seed in seeds(name):
            answer = asked.post(seed, JSON)
            assert answer.status_code == 200, answer.text
    for data, kind in (((SEEDS / "video.form").read_bytes(), FORM), (PARTS + b"--b--\r\n", MULTIPART)):
        answer = videos.post(data, kind)
        assert answer.status_code == 200, answer.text


def bodies(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
    return st.one_of(*(st.tuples(st.just(JSON), changed(seed, is_json=True)) for seed in seeds(name)))


@TIERS
def test_videos(many: bool, videos: Asked) -> None:
    run(videos.target, bodies("videos.jsonl"), many=many)


@TIERS
def test_images(many: bool, images: Asked) -> None:
    run(images.target, bodies("images.jsonl"), many=many)


@TIERS
def test_forms(many: bool, videos: Asked) -> None:
    parts = changed(PARTS + b"--b--\r\n").map(lambda data: (MULTIPART, data))
    fields = changed((SEEDS / "video.form").read_bytes()).map(lambda data: (FORM, data))
    run(videos.target, st.one_of(fields, parts), many=many)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Starlette: a file that never ends
@TIERS
def test_images_of_requests(many: bool, pictured: Asked) -> None:
    """A file of a form, and a data URL in JSON; what they hold is mutated, too."""
    assert pictured.post(REFERENCE, MULTIPART).status_code == 200
    url = b'{"prompt": "x", "input_reference": {"image_url": "data:image/png;base64,%s"}}' % base64.b64encode(PIXEL)
    assert pictured.post(url, JSON).status_code == 200
    forms, bodies = changed(REFERENCE), changed(url, is_json=True)
    asked = st.one_of(forms.map(lambda data: (MULTIPART, data)), bodies.map(lambda data: (JSON, data)))
    run(pictured.target, asked, many=many)
