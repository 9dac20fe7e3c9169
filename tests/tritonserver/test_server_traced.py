"""A real tritonserver with traced bundles of images: FLUX has two text encoders, Qwen-Image's shapes follow the prompt.

Every answer is the in-process pipeline's, bit for bit.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_server import failure, grpc, prompt_input, split, stream
from triton_server import CACHE, REFERENCE, Server, serving

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError
from lemica_trt.triton import client
from lemica_trt.triton.check import check_repository
from lemica_trt.triton.interface import interfaces
from lemica_trt.triton.repository import write_repository

pytestmark = pytest.mark.cpu

PROMPTS = (
    ("a cat", ""),
    ("the green house by the tree, and a small blue bird on the roof of it", "grey"),
    ("two red birds in the snow", "a dull picture and the grey noise of a broken lamp"),
    ("", "a dull picture"),
    ("a cat, " * 40, "grey " * 60),
)
"""Prompts and negative prompts of different lengths; the last are cut."""

GUIDED = {"flux": False, "qwen-image": True}

MODELS = "denoiser_stream text_encoder vae_decoder pipeline pipeline_stream"
"""All but one that is like another, and whose engines would take time to load."""


def cases_of(name: str) -> list[dict[str, Any]]:
    cases = [
        {"prompt": prompt, "seed": seed, "plan": plan, "negative_prompt": negative, "guidance_scale": 3.0}
        for seed, (prompt, negative) in enumerate(PROMPTS)
        for plan in ("b3", "uncached")
    ]
    for case in cases if not GUIDED[name] else []:
        del case["negative_prompt"], case["guidance_scale"]
    return cases


@pytest.fixture(scope="module", params=["flux", pytest.param("qwen-image", marks=pytest.mark.long)])
def served(
    request: pytest.FixtureRequest,
    tritonserver: Path,
    traced: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Server, dict[str, Any]]]:
    """The name, its server, and what the pipeline makes of `cases_of` in the interpreter of the server's models."""
    name, folder = request.param, tmp_path_factory.mktemp("traced")
    bundle = traced(name)
    write_repository(Bundle.open(bundle), folder / "repository")
    script = REFERENCE.partition("for text in")[0] + "np.savez(sys.argv[3], **found)"
    command = [str(CACHE / "modelenv/bin/python"), "-c", script, str(bundle), json.dumps(cases_of(name))]
    subprocess.run([*command, str(folder / "found.npz")], check=True, timeout=120)
    with np.load(folder / "found.npz") as found:
        reference = dict(found)
    with serving(tritonserver, folder / "repository", folder / "log", models=MODELS) as server:
        yield name, server, reference


def test_prompts_of_any_length_at_once(served: tuple[str, Server, dict[str, Any]]) -> None:
    """Each case twice, eight requests at a time; what is compared differs from prompt to prompt."""
    name, server, reference = served
    assert check_repository(server.repository) == ()
    cases = cases_of(name)
    assert len({reference[f"frames_{i}"].tobytes() for i in range(0, len(cases), 2)}) == len(PROMPTS)

    def ask(number: int) -> bool:
        prompt, parameters = split(cases[number])
        with grpc.InferenceServerClient(server.grpc) as asked:
            answer = asked.infer("pipeline", prompt_input(grpc, prompt), parameters=parameters, client_timeout=90)
        return np.array_equal(answer.as_numpy("frames")[0], reference[f"frames_{number}"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, [*range(len(cases))] * 2)) == [True] * 2 * len(cases)


def test_the_models_one_by_one(served: tuple[str, Server, dict[str, Any]]) -> None:
    """What the text encoders answer is what the denoiser takes, with texts cut to their tokens."""
    name, server, reference = served

    def encoded(prompt: str) -> dict[str, Any]:
        with grpc.InferenceServerClient(server.grpc) as asked:
            answer = asked.infer("text_encoder", prompt_input(grpc, prompt))
        found = {output.name: answer.as_numpy(output.name) for output in answer.get_response().outputs}
        lengths = {key: int(found.pop(key)[0, 0]) for key in list(found) if key.endswith("_tokens")}
        return {key: array[:, : lengths.get(f"{key}_tokens")] for key, array in found.items()}

    lengths = set()
    for number, case in enumerate(cases_of(name)):
        given = encoded(case["prompt"])
        if GUIDED[name]:
            given |= {f"negative_{key}": array for key, array in encoded(case["negative_prompt"]).items()}
        inputs = [
            grpc.InferInput(key, list(array.shape), "FP32").set_data_from_numpy(array) for key, array in given.items()
        ]
        parameters = {key: case[key] for key in ("plan", "seed", "guidance_scale") if key in case}
        *_, last = stream(server, "denoiser_stream", inputs, parameters)
        np.testing.assert_array_equal(last.as_numpy("latents")[0], reference[f"latents_{number}"])
        lengths.add(tuple(array.shape for array in given.values()))
    assert len(lengths) == (len(PROMPTS) if GUIDED[name] else 1)


def test_an_image_is_a_png(served: tuple[str, Server, dict[str, Any]]) -> None:
    from PIL import Image

    name, server, reference = served
    prompt, parameters = split(cases_of(name)[2])
    content = {"prompt": prompt, **parameters, "output": "png-base64"}
    status, body = server.post("v2/models/pipeline/generate", content)
    assert status == 200, body
    data = base64.b64decode(json.loads(body)["image"])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), reference["frames_2"][0])
    *steps, last = stream(server, "pipeline_stream", prompt_input(grpc, prompt), {**parameters, "output": "png"})
    assert last.as_numpy("image")[0, 0] == data
    assert len(steps) == 3 and all(answer.as_numpy("image") is None for answer in steps)


def test_bad_requests(served: tuple[str, Server, dict[str, Any]]) -> None:
    name, server, _ = served
    bad = [
        ({"output": "mp4"}, "output must be one of frames, png, png-base64; got 'mp4'"),
        ({"prompt": "x" * 9000}, "prompt must be text of at most 8192 bytes; got 9000 bytes"),
        ({"cfg": 3}, "unknown parameter 'cfg'"),
        ({"plan": "b4"}, "plan must be one of b3, uncached; got 'b4'"),
    ]
    if not GUIDED[name]:
        for unguided in ({"negative_prompt": "grey"}, {"guidance_scale": 2.0}):
            bad.append((unguided, "this bundle was built without guidance"))
    for content, message in bad:
        status, body = server.post("v2/models/pipeline/generate", {"prompt": "a cat", **content})
        assert status == 400 and message in json.loads(body)["error"], (content, body)
    with pytest.raises(InputError, match="output must be one of frames, png, png-base64; got 'mp4'"):
        client.generate(server.grpc, "a cat", mp4=True)

    ports = interfaces(Bundle.open(server.repository / "denoiser/bundle").manifest)["denoiser_stream"].inputs
    shapes = {port.name: [1, *(65 if size == -1 else size for size in port.dims)] for port in ports}
    message = "must have one length of 1 … 64 tokens"
    if not GUIDED[name]:
        shapes["pooled_projections"] = [1, 31]
        message = "pooled_projections"
    inputs = [
        grpc.InferInput(key, shape, "FP32").set_data_from_numpy(np.zeros(shape, np.float32))
        for key, shape in shapes.items()
    ]
    with pytest.raises(failure, match=message):
        list(stream(server, "denoiser_stream", inputs, {}))
    with pytest.raises(failure, match="expected 2 inputs but got 1"):
        list(stream(server, "denoiser_stream", inputs[:1], {}))


def test_readiness_and_the_endpoint_in_front(served: tuple[str, Server, dict[str, Any]]) -> None:
    testclient = pytest.importorskip("starlette.testclient", reason="pip install 'lemica-trt[serve]'")
    from lemica_trt.endpoint.app import Endpoint
    from lemica_trt.endpoint.jobs import Jobs
    from lemica_trt.endpoint.makers import Engines, Maker, TritonServer
    from lemica_trt.endpoint.metrics import Metrics
    from lemica_trt.endpoint.requests import Model
    from lemica_trt.runtime.pipeline import Pipeline

    name, server, _ = served
    for flags in ((), ("--clip",)):
        command = [str(server.repository / "probe.py"), "--url", f"http://{server.http}", "--timeout", "60", *flags]
        assert subprocess.run(command, capture_output=True, text=True).stderr == ""

    bundle = Bundle.open(server.repository / "denoiser/bundle")
    model, (prompt, parameters) = Model(bundle), split(cases_of(name)[2])
    frames = client.generate(server.grpc, prompt, parameters=parameters)
    images = []
    with Pipeline(bundle) as pipe:
        makers: list[Maker] = [TritonServer(server.grpc, bundle, model.default), Engines(pipe)]
        for maker in makers:
            jobs = Jobs(maker)
            http = testclient.TestClient(Endpoint(model, jobs, Metrics(model), 0).app(), base_url="http://localhost")
            assert http.get("/health/ready").json()["status"] == "ready"
            answer = http.post("/v1/images/generations", json={"prompt": prompt, **parameters})
            assert answer.status_code == 200, answer.text
            images.append(pixels_of(base64.b64decode(answer.json()["data"][0]["b64_json"])))
            assert http.post("/v1/videos", json={"prompt": prompt}).status_code == 400
            jobs.cancel_all()
        expected = pipe(prompt, **parameters).frames[0]
    np.testing.assert_array_equal(images[0], np.asarray(frames)[0])
    np.testing.assert_array_equal(images[1], expected)


def pixels_of(data: bytes) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)
