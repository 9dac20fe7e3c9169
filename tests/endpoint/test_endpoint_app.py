"""The routes, on a maker that the test holds: statuses, error objects, who may ask."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from makers import Held
from PIL import Image

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import EngineError
from lemica_trt.endpoint import requests
from lemica_trt.endpoint.errors import Refused
from lemica_trt.endpoint.jobs import Jobs
from lemica_trt.endpoint.requests import Model

pytestmark = pytest.mark.cpu

testclient = pytest.importorskip("starlette.testclient", reason="pip install 'lemica-trt[serve]'")

from lemica_trt.endpoint import guard, health  # noqa: E402
from lemica_trt.endpoint.app import Endpoint  # noqa: E402
from lemica_trt.endpoint.metrics import Metrics  # noqa: E402

PROMPT = {"prompt": "a secret prompt"}
KEY = "0123456789abcdef"


class Rig:
    """An endpoint for tests."""

    def __init__(
        self, bundle: Path, *, key: str | None = None, image: bool = False, needs: bool = False, queue: int = 1
    ) -> None:
        self.model, self.maker, self.now = Model(Bundle.open(bundle)), Held(), 0.0
        model = self.model
        model.needs_image = needs
        if image:
            model.shape = msgspec.structs.replace(model.shape, frames=1)
        metrics = Metrics(model)
        self.jobs = Jobs(self.maker, queue=queue, on_end=metrics.ended)
        endpoint = Endpoint(model, self.jobs, metrics, 5, health.Health(self.jobs, lambda: self.now))
        self.app = endpoint.app(key)
        self.client = testclient.TestClient(self.app, base_url="http://localhost:8000")

    def post(self, **body: Any) -> Any:
        return self.client.post("/v1/videos", json={**PROMPT, **body})

    def ended(self, name: str) -> None:
        self.jobs.find(name).future.result(timeout=60)


@pytest.fixture
def rig(built: tuple[Path, subprocess.CompletedProcess[str]]) -> Iterator[Rig]:
    made = Rig(built[0])
    yield made
    made.maker.finish()
    made.jobs.cancel_all()


def test_a_video_from_its_request_to_its_end(rig: Rig) -> None:
    made = rig.post(seed=7, plan="b5").json()
    rig.maker.arrive()
    rig.maker.step()
    rig.maker.step()
    shown = rig.client.get(f"/v1/videos/{made['id']}").json()
    assert (shown["object"], shown["status"], shown["progress"], shown["plan"]) == ("video", "in_progress", 50, "b5")
    early = rig.client.get(f"/v1/videos/{made['id']}/content")
    assert early.status_code == 404 and early.json()["error"]["code"] == "video_not_ready"
    rig.maker.finish()
    rig.ended(made["id"])
    shown = rig.client.get(f"/v1/videos/{made['id']}").json()
    assert (shown["status"], shown["progress"], shown["error"]) == ("completed", 100, None)
    assert shown["expires_at"] - shown["completed_at"] == 3600 and "prompt" not in shown
    found = rig.client.get(f"/v1/videos/{made['id']}/content")
    assert found.content == b"7 .mp4" and found.headers["content-type"] == "video/mp4"
    assert rig.client.get(f"/v1/videos/{made['id']}/content?variant=thumbnail").status_code == 400
    gone = rig.client.delete(f"/v1/videos/{made['id']}").json()
    assert gone == {"id": made["id"], "object": "video.deleted", "deleted": True}
    assert rig.client.get(f"/v1/videos/{made['id']}").status_code == 404


def test_lists_page_by_page(rig: Rig) -> None:
    rig.maker.finish()
    names = []
    for seed in range(3):
        names.append(rig.post(seed=seed).json()["id"])
        rig.ended(names[-1])
    page = rig.client.get("/v1/videos?limit=2").json()
    assert [video["id"] for video in page["data"]] == names[:0:-1] and page["has_more"] and page["object"] == "list"
    page = rig.client.get(f"/v1/videos?after={page['last_id']}").json()
    assert [video["id"] for video in page["data"]] == names[:1] and not page["has_more"]
    assert [video["id"] for video in rig.client.get("/v1/videos?order=asc").json()["data"]] == names
    for wrong in ("limit=0", "limit=x", "limit=101", "limit=" + 5000 * "1", "limit=-1", "order=up", "after=me"):
        assert rig.client.get(f"/v1/videos?{wrong}").status_code == 400


def test_a_queue_that_is_full_a_job_that_fails_one_that_is_deleted(rig: Rig) -> None:
    first = rig.post().json()["id"]
    rig.maker.arrive()
    second = rig.post().json()["id"]
    full = rig.post()
    assert full.status_code == 429 and full.headers["retry-after"] == "1"
    assert full.json()["error"]["type"] == "rate_limit_error" and full.json()["error"]["code"] == "queue_full"
    assert rig.client.delete(f"/v1/videos/{first}").status_code == 200  # it runs: before its next step it ends
    rig.maker.failure = EngineError("out of memory")
    rig.maker.finish()
    rig.ended(second)
    shown = rig.client.get(f"/v1/videos/{second}").json()
    assert shown["status"] == "failed" and shown["error"] == {"code": "generation_failed", "message": "out of memory"}
    assert rig.client.get(f"/v1/videos/{second}/content").json()["error"]["code"] == "video_failed"
    page = rig.client.get("/metrics")
    assert 'lemica_requests_total{outcome="cancelled",plan="b4"} 1.0' in page.text
    assert 'lemica_requests_total{outcome="error",plan="b4"} 1.0' in page.text
    assert 'lemica_jobs{status="failed"} 1.0' in page.text


def test_clips_in_the_answer(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    rig = Rig(built[0], image=True)
    rig.maker.finish()
    found = rig.client.post("/v1/images/generations", json={**PROMPT, "seed": 3, "response_format": "b64_json"}).json()
    assert base64.b64decode(found["data"][0]["b64_json"]) == b"3 .png" and found["size"] == "64x64"
    assert rig.jobs.all() == []  # the client has it
    refused = rig.post().json()["error"]
    assert "makes images: POST /v1/images/generations" in refused["message"]
    rig.maker.failure = EngineError("out of memory")
    failed = rig.client.post("/v1/images/generations", json=PROMPT)
    assert failed.status_code == 500 and failed.json()["error"]["message"] == "out of memory"

    rig = Rig(built[0])
    rig.maker.finish()
    found = rig.post(nvext={"seed": 4}, response_format="b64_json").json()  # as Dynamo's clients
    assert base64.b64decode(found["data"][0]["b64_json"]) == b"4 .mp4" and found["status"] == "completed"
    page = rig.client.get("/metrics").text
    assert (
        'lemica_steps_total{kind="full",plan="b4"} 3.0' in page and 'lemica_denoise_seconds_sum{plan="b4"} 0.5' in page
    )


def test_a_client_that_goes_away_cancels_its_image(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    rig = Rig(built[0], image=True)
    body = json.dumps(PROMPT).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.to_thread(rig.maker.arrive)  # it goes when its request runs
        assert rig.jobs.count("in_progress") == 1 and rig.jobs.all() == []  # no other client sees it
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    sent: list[Any] = []
    scope = {
        "type": "http", "method": "POST", "path": "/v1/images/generations", "raw_path": b"", "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http", "root_path": "", "server": ("localhost", 80), "client": ("localhost", 1),
    }  # fmt: skip
    asyncio.run(rig.app(scope, receive, send))
    assert sent[0]["status"] == 499 and rig.jobs.all() == []
    rig.maker.finish()
    rig.jobs.cancel_all()
    assert rig.maker.made == []


def test_models_health_and_what_is_not_there(rig: Rig) -> None:
    listed = rig.client.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed] == [
        "cogvideox-tiny",
        *(f"cogvideox-tiny:{n}" for n in ("b4", "b5", "uncached")),
    ]
    assert rig.client.get("/v1/models/cogvideox-tiny:b5").json() == {**listed[2]}
    assert listed[2]["full_steps"] == 5 and listed[2]["created"] == 5
    assert rig.client.get("/v1/models/sora-2").json()["error"]["code"] == "model_not_found"
    assert rig.client.get("/health/live").json() == {"status": "live"}
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/videos", 405),
        ("GET", "/v1/videos/video_0", 404),
        ("DELETE", "/v1/videos/../../etc/passwd", 404),
        ("POST", "/v1/videos/x/remix", 404),
    ):
        found = rig.client.request(method, path)
        assert found.status_code == status and found.json()["error"]["type"] == "invalid_request_error"


def test_readiness_is_a_real_check_and_not_too_often(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    assert rig.client.get("/health/ready").json()["status"] == "ready" and rig.maker.checks == 1
    assert rig.client.get("/health/ready").status_code == 200 and rig.maker.checks == 1
    rig.now += health.FRESH_SECONDS
    rig.maker.sick = EngineError("the driver has gone")
    found = rig.client.get("/health/ready")
    assert found.status_code == 503 and rig.maker.checks == 2
    assert found.json()["reason"] == "the check failed; see the log"  # strangers may read it
    assert "the check failed: EngineError: the driver has gone" in caplog.text
    rig.now += health.FRESH_SECONDS
    rig.maker.sick = None
    assert rig.client.get("/health/ready").status_code == 200
    rig.now += health.FRESH_SECONDS
    rig.post()
    rig.maker.arrive()
    assert rig.client.get("/health/ready").json() == {"status": "ready", "reason": None, "running": 1, "waiting": 0}
    assert rig.maker.checks == 3


def test_a_job_that_succeeds_shows_more_than_the_check_before(rig: Rig) -> None:
    rig.maker.sick = EngineError("for a moment")
    assert rig.client.get("/health/ready").status_code == 503
    first = rig.post().json()["id"]
    rig.maker.arrive()
    rig.now += health.FRESH_SECONDS
    assert rig.client.get("/health/ready").json()["status"] == "failed"  # nothing has shown otherwise
    rig.maker.finish()
    rig.ended(first)
    rig.now -= health.FRESH_SECONDS
    assert rig.client.get("/health/ready").json()["status"] == "ready" and rig.maker.checks == 1
    rig.now += health.FRESH_SECONDS
    assert rig.client.get("/health/ready").json()["status"] == "failed" and rig.maker.checks == 2


def test_a_server_that_shuts_down_is_not_ready(rig: Rig) -> None:
    assert rig.client.get("/health/ready").status_code == 200
    rig.jobs.close()
    found = rig.client.get("/health/ready")
    assert found.status_code == 503 and found.json()["status"] == "stopping" and rig.maker.checks == 1


def test_bodies(rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rig.maker.finish()
    made = rig.client.post("/v1/videos", data={**PROMPT, "seed": "9", "seconds": "1"}, files={"x": ("", b"")})
    assert made.status_code == 400 and made.json()["error"]["param"] == "x"
    made = rig.client.post("/v1/videos", data={**PROMPT, "seed": "9"})
    assert made.status_code == 200
    for content, kind, status in (
        (b"{", "application/json", 400),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=b", 400),
        (json.dumps(PROMPT).encode(), "text/plain", 415),
        (b"{" + b" " * requests.MAX_BODY_BYTES, "application/json", 413),
    ):
        found = rig.client.post("/v1/videos", content=content, headers={"content-type": kind})
        assert found.status_code == status, found.text
        assert found.json()["error"]["type"] == "invalid_request_error"

    def parts() -> Iterator[bytes]:  # without a length
        for _ in range(2):
            yield b" " * (requests.MAX_BODY_BYTES // 2 + 1)

    found = rig.client.post("/v1/videos", content=parts(), headers={"content-type": "application/json"})
    assert found.status_code == 413
    assert "POST /v1/videos 413" in caplog.text and "secret" not in caplog.text


def picture(height: int, width: int, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def test_images_are_looked_at_before_a_job_is_made(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """As a file, larger than other requests may be; as a data URL in a form and in JSON; never written to disk."""
    rig = Rig(built[0], needs=True, queue=8)
    rig.maker.finish()
    whole = picture(700, 600)
    assert len(whole) > requests.MAX_BODY_BYTES
    url = "data:image/png;base64," + base64.b64encode(whole).decode()
    small = picture(20, 30, "WEBP")
    for sent in (
        {"data": PROMPT, "files": {"input_reference": ("first.png", whole)}},
        {"data": PROMPT, "files": {"input_reference[image_url]": (None, url)}},
        {"data": {**PROMPT, "input_reference": base64.b64encode(small).decode()}},
        {"json": {**PROMPT, "input_reference": {"image_url": url}}},
    ):
        made = rig.client.post("/v1/videos", **sent)
        assert made.status_code == 200, made.text
        rig.ended(made.json()["id"])
        assert rig.maker.images.pop() in (whole, small)
    for data, said in (
        (b"GIF89a" + bytes(40), "input_reference: expected a PNG, JPEG or WebP picture, got none of them"),
        (whole[:-100], "input_reference: expected a whole picture"),
        (b"", "input_reference: expected a PNG, JPEG or WebP picture"),
        (picture(2, 64), "input_reference: expected a picture of at most 8192 pixels a side"),
    ):
        refused = rig.client.post("/v1/videos", data=PROMPT, files={"input_reference": ("first.png", data)})
        assert refused.status_code == 400 and said in refused.json()["error"]["message"], refused.text
        assert refused.json()["error"]["param"] == "input_reference"
    assert rig.maker.images == [] and rig.client.post("/v1/videos", json=PROMPT).status_code == 400
    too_large = b" " * (rig.model.max_body_bytes + 1)
    found = rig.client.post("/v1/videos", content=too_large, headers={"content-type": "application/json"})
    assert found.status_code == 413
    rig.jobs.cancel_all()


def test_files_of_forms_are_not_written_to_disk(
    built: tuple[Path, subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rolled(*_: object) -> None:
        raise AssertionError("a file on disk")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rolled)
    rig = Rig(built[0], needs=True)
    rig.maker.finish()
    made = rig.client.post("/v1/videos", data=PROMPT, files={"input_reference": ("x.png", picture(700, 600))})
    assert made.status_code == 200
    rig.jobs.cancel_all()


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_openais_client_sends_images(
    built: tuple[Path, subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai")
    rig = Rig(built[0], needs=True)
    rig.maker.finish()
    client, data = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none"), picture(700, 600)
    monkeypatch.setattr(client._client, "send", lambda request, **_: _answer(rig, request))
    made = client.videos.create(prompt="a bird", input_reference=("first.png", data))
    rig.ended(made.id)
    assert rig.maker.images == [data]
    rig.jobs.cancel_all()


def _answer(rig: Rig, request: Any) -> Any:
    """The application's answer to a request of OpenAI's client, as that client's own kind of answer."""
    found = rig.client.post(
        "/v1/videos", content=request.read(), headers={"content-type": request.headers["content-type"]}
    )
    module = sys.modules[type(request).__module__.partition(".")[0]]
    return module.Response(found.status_code, content=found.content, headers=dict(found.headers), request=request)


def test_a_refusal_keeps_nothing_of_the_one_before() -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": b" " * (requests.MAX_BODY_BYTES + 1)}

    async def read() -> None:
        await guard._limited(receive)()

    refusals = []
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            asyncio.run(read())
        refusals.append(refused.value)
    assert refusals[0] is not refusals[1]


def test_who_may_ask(built: tuple[Path, subprocess.CompletedProcess[str]], rig: Rig) -> None:
    for headers in ({"origin": "https://example.com"}, {"host": "example.com"}, {"host": "localhost.example.com:80"}):
        found = rig.client.get("/v1/models", headers=headers)
        assert found.status_code == 403 and found.json()["error"]["code"] == "forbidden"
    for host in ("127.0.0.1:8000", "127.0.0.2:8000", "[::1]:8000", "LocalHost"):
        assert rig.client.get("/v1/models", headers={"host": host}).status_code == 200

    locked = Rig(built[0], key=KEY).client
    for header in ("", "Bearer", "Bearer 0123456789abcdee", f"Basic {KEY}", f"Bearer {KEY}x"):
        found = locked.get("/v1/models", headers={"authorization": header})
        assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
        assert found.json()["error"]["code"] == "invalid_api_key" and KEY not in found.text
    assert (
        locked.get("/v1/models", headers={"authorization": f"Bearer {KEY}", "host": "example.com"}).status_code == 200
    )
    assert locked.get("/health/live").status_code == locked.get("/metrics").status_code == 200


def test_a_fault_is_told_to_the_log_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError(PROMPT["prompt"])

    monkeypatch.setattr(rig.jobs, "submit", broken)
    found = rig.post()
    assert found.status_code == 500
    assert found.json()["error"] == {
        "message": "an internal error of the server", "type": "server_error", "param": None, "code": "internal_error",
    }  # fmt: skip
    assert "KeyError" in caplog.text and "secret" not in caplog.text
