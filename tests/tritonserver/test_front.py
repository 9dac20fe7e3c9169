"""OpenAI's endpoint in front of a real tritonserver: the clips are the server's, and so is their cancelling."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest
from triton_server import Server

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import UnsupportedError
from lemica_trt.triton import client

pytestmark = pytest.mark.cpu

testclient = pytest.importorskip("starlette.testclient", reason="pip install 'lemica-trt[serve]'")

from lemica_trt.endpoint.app import Endpoint  # noqa: E402
from lemica_trt.endpoint.jobs import Jobs  # noqa: E402
from lemica_trt.endpoint.makers import TritonServer  # noqa: E402
from lemica_trt.endpoint.metrics import Metrics  # noqa: E402
from lemica_trt.endpoint.requests import Model  # noqa: E402

PROMPT = "a big red circle moves left"


def test_the_endpoint_in_front_of_triton(server: Server, tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    model = Model(bundle)
    maker = TritonServer(server.grpc, bundle, model.default)
    maker.check()
    metrics = Metrics(model)
    jobs = Jobs(maker, workers=2, on_end=metrics.ended)
    http = testclient.TestClient(Endpoint(model, jobs, metrics, 0).app(), base_url="http://localhost")
    asked = {"prompt": PROMPT, "seed": 3, "plan": "b6", "guidance_scale": 2.5, "negative_prompt": "blue"}
    found = http.post("/v1/videos", json={**asked, "response_format": "b64_json"})
    assert found.status_code == 200, found.text
    parameters = {name: value for name, value in asked.items() if name != "prompt"}
    expected = client.generate(server.grpc, PROMPT, parameters=parameters, mp4=True)
    assert base64.b64decode(found.json()["data"][0]["b64_json"]) == expected

    first, second = (http.post("/v1/videos", json={"prompt": PROMPT, "seed": seed}).json()["id"] for seed in (1, 2))
    job = jobs.find(first)
    assert http.delete(f"/v1/videos/{first}").status_code == 200
    jobs.find(second).future.result(timeout=120)
    job.future.result(timeout=120)
    assert http.get(f"/v1/videos/{second}").json()["status"] == "completed"
    assert http.get("/health/ready").json()["status"] == "ready"
    jobs.cancel_all()


def test_a_server_of_another_bundle(server: Server, built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    other = Bundle.open(built[0])
    with pytest.raises(UnsupportedError, match=r"expected a server of bundle .*, it serves .* → give the bundle"):
        TritonServer(server.grpc, other, "b4").check()
