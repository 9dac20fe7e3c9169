"""A real tritonserver with a traced bundle that needs an image, whose encoder samples its posterior (CogVideoX).

Every answer is the in-process pipeline's, bit for bit.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_server import failure, grpc, prompt_input
from triton_server import CACHE, REFERENCE, Server, serving

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError
from lemica_trt.triton import client
from lemica_trt.triton.check import check_repository
from lemica_trt.triton.repository import write_repository

pytestmark = [pytest.mark.cpu, pytest.mark.long]

PROMPT = "two red birds in the snow"

KINDS = ("PNG", "JPEG", "WEBP")


def picture(kind: str) -> bytes:
    """Of another size than what is made."""
    noise, file = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def served(
    tritonserver: Path, traced: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, list[Any]]]:
    """A server, and the frames of each of `KINDS` with its place as seed."""
    folder, bundle = tmp_path_factory.mktemp("image"), traced("cogvideox-i2v")
    cases = []
    for seed, kind in enumerate(KINDS):
        (folder / kind).write_bytes(picture(kind))
        cases.append({"prompt": PROMPT, "seed": seed, "image": str(folder / kind), "negative_prompt": "grey"})
    script = REFERENCE.partition("for text in")[0] + "np.savez(sys.argv[3], **found)"
    command = [str(CACHE / "modelenv/bin/python"), "-c", script, str(bundle), json.dumps(cases)]
    subprocess.run([*command, str(folder / "found.npz")], check=True, timeout=120)
    with np.load(folder / "found.npz") as found:
        frames = [found[f"frames_{number}"] for number in range(len(KINDS))]
    write_repository(Bundle.open(bundle), folder / "repository")
    models = "denoiser_stream text_encoder image_encoder vae_decoder pipeline pipeline_stream"
    with serving(tritonserver, folder / "repository", folder / "log", models=models) as server:
        yield server, frames


def test_images_over_every_way_in(served: tuple[Server, list[Any]], tmp_path: Path) -> None:
    server, frames = served
    assert check_repository(server.repository) == ()
    assert len({each.tobytes() for each in frames}) == len(KINDS)
    for seed, kind in enumerate(KINDS):
        data, parameters = picture(kind), {"seed": seed, "negative_prompt": "grey"}
        image = grpc.InferInput("image", [1, 1], "BYTES").set_data_from_numpy(np.array([[data]], np.object_))
        with grpc.InferenceServerClient(server.grpc) as asked:
            answer = asked.infer("pipeline", [*prompt_input(grpc, PROMPT), image], parameters=parameters)
        np.testing.assert_array_equal(answer.as_numpy("frames")[0], frames[seed])
        found = client.generate(server.grpc, PROMPT, parameters=parameters, image=data)
        np.testing.assert_array_equal(np.asarray(found)[0] if np.ndim(found) == 5 else found, frames[seed])
    content = {"prompt": PROMPT, "image": base64.b64encode(picture("PNG")).decode(), "negative_prompt": "grey"}
    status, body = server.post("v2/models/pipeline/generate", content)
    assert status == 200 and json.loads(body)["frames"] == frames[0].ravel().tolist()

    (tmp_path / "first.webp").write_bytes(picture("WEBP"))
    command = [sys.executable, "-m", "lemica_trt", "client", "--url", server.grpc, PROMPT, "--seed", "2"]
    command += ["--image", "first.webp", "--negative-prompt", "grey", "--output", "x.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), frames[2])


def test_what_is_no_image(served: tuple[Server, list[Any]]) -> None:
    server, _ = served
    for image, said in (
        ("R0lGODlh", "image: expected a PNG, JPEG or WebP picture, got none of them"),
        ("http://169.254.169.254/", "image: expected the picture itself, got a URL"),
        (base64.b64encode(picture("PNG")[:400]).decode(), "image: expected a whole picture"),
    ):
        status, body = server.post("v2/models/pipeline/generate", {"prompt": PROMPT, "image": image})
        assert status == 400 and said in json.loads(body)["error"], body
    with pytest.raises(InputError, match="image: expected a PNG, JPEG or WebP picture"):
        client.generate(server.grpc, PROMPT, image=b"nothing")
    with pytest.raises(InputError, match=r"missing required input\(s\) \['image'\]"):
        client.generate(server.grpc, PROMPT)
    with grpc.InferenceServerClient(server.grpc) as asked, pytest.raises(failure, match="image"):
        asked.infer("pipeline", prompt_input(grpc, PROMPT))


def test_readiness_and_the_endpoint_in_front(served: tuple[Server, list[Any]]) -> None:
    testclient = pytest.importorskip("starlette.testclient", reason="pip install 'lemica-trt[serve]'")
    from lemica_trt.endpoint.app import Endpoint
    from lemica_trt.endpoint.jobs import Jobs
    from lemica_trt.endpoint.makers import Engines, Maker, TritonServer
    from lemica_trt.endpoint.metrics import Metrics
    from lemica_trt.endpoint.requests import Model
    from lemica_trt.runtime.pipeline import Pipeline

    server, _ = served
    for flags in ((), ("--clip",)):
        command = [str(server.repository / "probe.py"), "--url", f"http://{server.http}", "--timeout", "60", *flags]
        assert subprocess.run(command, capture_output=True, text=True).stderr == ""
    bundle = Bundle.open(server.repository / "denoiser/bundle")
    model, data = Model(bundle), picture("PNG")
    with Pipeline(bundle) as pipe:
        makers: list[Maker] = [TritonServer(server.grpc, bundle, model.default), Engines(pipe)]
        for maker in makers:
            jobs = Jobs(maker)
            http = testclient.TestClient(Endpoint(model, jobs, Metrics(model), 0).app(), base_url="http://localhost")
            assert http.get("/health/ready").json()["status"] == "ready"
            made = http.post("/v1/videos", data={"prompt": PROMPT, "response_format": "b64_json"},
                             files={"input_reference": ("first.png", data)})  # fmt: skip
            assert made.status_code == 200, made.text
            assert base64.b64decode(made.json()["data"][0]["b64_json"])[4:8] == b"ftyp"
            refused = http.post("/v1/videos", json={"prompt": PROMPT})
            assert refused.status_code == 400 and "needs an image" in refused.json()["error"]["message"]
            jobs.cancel_all()
