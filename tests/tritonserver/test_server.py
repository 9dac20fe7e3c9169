"""A real tritonserver and real tritonclients: the answers of the in-process pipeline, bit for bit, or an error."""

from __future__ import annotations

import base64
import io
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton_server import ADMIN_TOKEN, CACHE, CASES, PREFIX, ROOT, STEPS, Server, ServerEnded, serving, stubs

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core import landlock
from lemica_trt.core.errors import EngineError, InputError, MissingDependencyError
from lemica_trt.triton.check import check_repository
from lemica_trt.triton.repository import Settings, write_repository

pytestmark = pytest.mark.cpu

grpc = pytest.importorskip("tritonclient.grpc")
http = pytest.importorskip("tritonclient.http")
failure = pytest.importorskip("tritonclient.utils").InferenceServerException

MODELS = ("denoiser", "denoiser_stream", "pipeline", "pipeline_stream", "text_encoder", "vae_decoder")


def split(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Prompt and request parameters."""
    return case["prompt"], {name: value for name, value in case.items() if name != "prompt"}


def prompt_input(kind: Any, prompt: str) -> list[Any]:
    text = kind.InferInput("prompt", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[prompt.encode()]], np.object_))
    return [text]


def embeds_input(kind: Any, reference: dict[str, Any], prompt: str, negative: str = "") -> list[Any]:
    inputs = []
    for name, text in (("prompt_embeds", prompt), ("negative_prompt_embeds", negative)):
        array = reference[f"embeds_{text}"][None]
        tensor = kind.InferInput(name, list(array.shape), "FP32")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def stream(
    server: Server, model: str, inputs: list[Any], parameters: dict[str, Any], outputs: Any = None
) -> Iterator[Any]:
    """The answers of a streaming model; raises its error; cancels when it is closed early."""
    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(callback=lambda result, error: answers.put(error or result))
        client.async_stream_infer(
            model, inputs, parameters=parameters, outputs=outputs, enable_empty_final_response=True
        )
        try:
            while True:
                answer = answers.get(timeout=60)
                if isinstance(answer, Exception):
                    raise answer
                if answer.get_response().outputs:
                    yield answer
                if answer.get_response().parameters["triton_final_response"].bool_param:
                    return
        finally:
            client.stop_stream(cancel_requests=True)


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def probe(server: Server, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(server.repository / "probe.py"), "--url", f"http://{server.http}", "--timeout", "60", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_build_writes_a_repository_too(tiny: Path) -> None:
    assert check_repository(tiny.parent / "repository") == ()


def test_everything_is_ready(server: Server) -> None:
    for model in MODELS:
        server.get(f"v2/models/{model}/ready")
    assert check_repository(server.repository) == ()
    assert server.metric("lemica_batch_size") >= 2
    bundle = Bundle.open(server.repository / "denoiser/bundle")
    engines = [bundle.engine().files[role] for role in bundle.manifest.graphs.layout.step_graphs]
    files = sum((bundle.path / file).stat().st_size for file in engines)
    assert server.metric("lemica_engine_bytes", model="denoiser") == files
    assert server.metric("lemica_resident_bytes", model="denoiser_stream") > files


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
def test_models_have_given_up_what_they_must_not_do(server: Server) -> None:
    """Each process has at least asked for it: whoever does gets no new privileges. What it forbids, others try."""
    found = stubs(server.repository)
    assert len(found) >= len(MODELS) and all(region.startswith(PREFIX) for region in found.values())
    for pid in found:
        assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text(), pid
    log = server.log.read_text()
    assert "no process from writing" not in log and "may still write" not in log


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
def test_a_model_that_tries_to_write_into_the_bundle_fails(server: Server) -> None:
    """During a request, in a process that this server has started; the request itself is answered."""
    manifest = server.repository / "denoiser/bundle/manifest.json"
    model = server.repository / "vae_decoder/1/model.py"
    text, before = model.read_text(), manifest.read_bytes()
    attempt = (
        "    def execute(self, arrived):\n"
        "        try:\n"
        f"            open({str(manifest)!r}, 'ab').write(b' ')\n"
        "        except OSError as error:\n"
        "            pb_utils.Logger.log_info(f'refused: {type(error).__name__}')\n"
    )
    try:
        model.write_text(text.replace("    def execute(self, arrived):\n", attempt))
        assert server.load("vae_decoder")[0] == 200
        ask = {"prompt": "red", "plan": "b4", "output": "mp4-base64"}
        assert server.post("v2/models/pipeline/generate", ask)[0] == 200
    finally:
        model.write_text(text)
        assert server.load("vae_decoder")[0] == 200
    assert "refused: PermissionError" in server.log.read_text()
    assert manifest.read_bytes() == before


@pytest.mark.parametrize("number", range(len(CASES)))
def test_http_gives_the_bits_of_the_pipeline(server: Server, reference: dict[str, Any], number: int) -> None:
    prompt, parameters = split(CASES[number])
    with http.InferenceServerClient(server.http) as client:
        frames = client.infer("pipeline", prompt_input(http, prompt), parameters=parameters).as_numpy("frames")
    np.testing.assert_array_equal(frames[0], reference[f"frames_{number}"])


def test_grpc_gives_the_bits_of_the_pipeline(server: Server, reference: dict[str, Any]) -> None:
    prompt, parameters = split(CASES[0])
    with grpc.InferenceServerClient(server.grpc) as client:
        frames = client.infer("pipeline", prompt_input(grpc, prompt), parameters=parameters).as_numpy("frames")
        np.testing.assert_array_equal(frames[0], reference["frames_0"])
        found = client.infer("text_encoder", prompt_input(grpc, prompt)).as_numpy("prompt_embeds")
        np.testing.assert_array_equal(found[0], reference[f"embeds_{prompt}"])
        settings = {"plan": "b4", "seed": 3}
        latents = client.infer("denoiser", embeds_input(grpc, reference, prompt), parameters=settings)
        np.testing.assert_array_equal(latents.as_numpy("latents")[0], reference["latents_0"])
        tensor = grpc.InferInput("latents", list(latents.as_numpy("latents").shape), "FP32")
        tensor.set_data_from_numpy(latents.as_numpy("latents"))
        decoded = client.infer("vae_decoder", [tensor]).as_numpy("frames")
        np.testing.assert_array_equal(decoded[0], reference["frames_0"])
        by_steps = client.infer("denoiser", embeds_input(grpc, reference, prompt), parameters={"steps": 4, "seed": 3})
        np.testing.assert_array_equal(by_steps.as_numpy("latents")[0], reference["latents_0"])


@pytest.mark.parametrize("model", ["denoiser_stream", "pipeline_stream"])
def test_progress_over_grpc(server: Server, reference: dict[str, Any], model: str) -> None:
    prompt, parameters = split(CASES[0])
    del parameters["negative_prompt"]  # "" is the bundle's default
    inputs = prompt_input(grpc, prompt)
    if model == "denoiser_stream":
        inputs = embeds_input(grpc, reference, prompt)
    answers = list(stream(server, model, inputs, parameters))
    full = Bundle.open(server.repository / "denoiser/bundle").plan("b4").full_steps
    assert [int(answer.as_numpy("step")[0, 0]) for answer in answers] == [step + 1 for step in full] + [STEPS]
    assert {int(answer.as_numpy("num_steps")[0, 0]) for answer in answers} == {STEPS}
    name = "latents" if model == "denoiser_stream" else "frames"
    assert all(answer.as_numpy(name) is None for answer in answers[:-1])
    np.testing.assert_array_equal(answers[-1].as_numpy(name)[0], reference[f"{name}_0"])


def test_progress_and_a_film_over_sse(server: Server) -> None:
    import av

    prompt, parameters = split(CASES[0])
    content = {"prompt": prompt, **parameters, "output": "mp4-base64"}
    status, body = server.post("v2/models/pipeline_stream/generate_stream", content)
    assert status == 200, body
    events = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]
    assert [event["step"] for event in events][-1] == STEPS
    assert len(events) == 5
    with av.open(io.BytesIO(base64.b64decode(events[-1]["video"]))) as film:
        assert sum(1 for _ in film.decode(video=0)) == 9
    status, body = server.post("v2/models/pipeline/generate", content)
    assert status == 200
    assert json.loads(body)["video"] == events[-1]["video"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"plan": "b5"}, "plan must be one of b4, b6, uncached; got 'b5'"),
    ({"steps": 5}, "must be one of 4 (plan b4), 6 (plan b6), 12 (plan uncached); got 5"),
    ({"plan": "b4", "steps": 6}, "must be one of 4 (plan b4); got 6"),
    ({"seed": -1}, "seed must be an integer from 0 to 2^63 - 1; got -1"),
    ({"seed": 1.5}, "seed must be an integer from 0 to 2^63 - 1; got 1.5"),
    ({"seed": "7"}, "seed must be an integer"),
    ({"guidance_scale": -0.5}, "guidance_scale must be a number from 0 to 100; got -0.5"),
    ({"guidance_scale": "much"}, "guidance_scale must be a number from 0 to 100; got 'much'"),
    ({"output": "gif"}, "output must be one of frames, mp4, mp4-base64; got 'gif'"),
    ({"negative_prompt": "x" * 9000}, "negative_prompt must be text of at most 8192 bytes; got 9000 bytes"),
    (
        {"cfg": 3},
        "unknown parameter 'cfg': expected guidance_scale, negative_prompt, output, plan, quality, seed, steps",
    ),
    ({"caller": "0" * 32}, "unknown parameter 'caller'"),
]


@pytest.mark.parametrize(("parameters", "message"), BAD, ids=[" ".join(bad) for bad, _ in BAD])
def test_bad_requests_say_what_is_allowed(server: Server, parameters: dict[str, Any], message: str) -> None:
    status, body = server.post("v2/models/pipeline/generate", {"prompt": "red", **parameters})
    assert status == 400
    assert message in json.loads(body)["error"]
    with grpc.InferenceServerClient(server.grpc) as client, pytest.raises(failure) as caught:
        client.infer("pipeline", prompt_input(grpc, "red"), parameters=parameters)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert message in caught.value.message()


def test_bad_tensors(server: Server, reference: dict[str, Any]) -> None:
    with grpc.InferenceServerClient(server.grpc) as client:
        inputs = embeds_input(grpc, reference, "")
        inputs[0].set_data_from_numpy(np.full_like(reference["embeds_"][None], np.nan))
        two = [grpc.InferInput(name, [2, 16, 64], "FP32") for name in ("prompt_embeds", "negative_prompt_embeds")]
        for tensor in two:
            tensor.set_data_from_numpy(np.zeros((2, 16, 64), np.float32))
        text = prompt_input(grpc, "")
        text[0].set_data_from_numpy(np.array([[b"\xff\xfe"]], np.object_))
        for model, given, message in (
            ("denoiser", inputs, "prompt_embeds must be finite"),
            ("denoiser", two, "one sample a request"),
            ("pipeline", text, "prompt must be UTF-8"),
        ):
            with pytest.raises(failure, match=message) as caught:
                client.infer(model, given)
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_requests_share_batches_and_not_bits(server: Server, reference: dict[str, Any]) -> None:
    """Twelve at once, of one plan and of two, with their own seeds and guidance: each is what it is alone."""
    prompts = ("a big red circle moves left", "a small blue square moves up", "blue")

    def ask(i: int, client: Any) -> Any:
        settings = {"plan": "b6" if i % 4 == 3 else "b4", "seed": i, "guidance_scale": 2.0 + 0.4 * i}
        inputs = embeds_input(grpc, reference, prompts[i % 3])
        return client.infer("denoiser", inputs, parameters=settings).as_numpy("latents")

    def executions(requests: float) -> float:
        """So far, once the metrics have counted so many requests: they lag behind the answers."""
        assert eventually(lambda: server.metric("nv_inference_count", model="denoiser") >= requests)
        return server.metric("nv_inference_exec_count", model="denoiser")

    asked = server.metric("nv_inference_count", model="denoiser")
    with grpc.InferenceServerClient(server.grpc) as client, ThreadPoolExecutor(12) as pool:
        alone = [ask(i, client) for i in range(12)]
        for attempt in range(1, 9):  # on a busy machine they may arrive one by one; that they always do is a fault
            before = executions(asked + 12 * attempt)
            np.testing.assert_array_equal(list(pool.map(lambda i: ask(i, client), range(12))), alone)
            if executions(asked + 12 * attempt + 12) - before < 12:
                return
    raise AssertionError("they never came in batches")


@pytest.mark.parametrize("model", ["text_encoder", "pipeline", "pipeline_stream", "vae_decoder", "denoiser"])
def test_what_no_model_declares_is_an_error_whether_its_answer_is_cached_or_not(
    server: Server, reference: dict[str, Any], model: str
) -> None:
    """Embeddings of the prompt are kept after the first request; over gRPC and HTTP, unary and streamed."""
    prompt = "a cached star"
    latents = np.zeros((1, *reference["latents_0"].shape), np.float32)
    inputs = prompt_input(grpc, prompt)
    if model == "denoiser":
        inputs = embeds_input(grpc, reference, "a big red circle moves left")
    if model == "vae_decoder":
        inputs = [grpc.InferInput("latents", list(latents.shape), "FP32").set_data_from_numpy(latents)]
    for parameters, outputs, message in (
        ({}, None, ""),
        ({"cfg": 3}, None, "unknown parameter 'cfg'"),
        ({}, ["nothing"], "unexpected inference output 'nothing'"),
    ):
        wanted = None if outputs is None else [grpc.InferRequestedOutput(name) for name in outputs]
        error = None
        try:
            if model == "pipeline_stream":
                list(stream(server, model, inputs, parameters, wanted))
            else:
                with grpc.InferenceServerClient(server.grpc) as client:
                    client.infer(model, inputs, parameters=parameters, outputs=wanted)
        except failure as found:
            error = found
        assert (message in error.message()) if message else (error is None), error
    status, body = server.post("v2/models/pipeline/infer", {**HTTP_RED, "outputs": [{"name": "video"}]})
    assert status == 400 and "outputs must be frames, which output 'frames' makes; got video" in body.decode()


HTTP_RED = {"inputs": [{"name": "prompt", "shape": [1, 1], "datatype": "BYTES", "data": ["red"]}]}


def test_time_outs_over_generate(server: Server) -> None:
    ask = {"prompt": "red", "plan": "uncached"}
    for model in ("pipeline/generate", "pipeline_stream/generate_stream"):
        _, body = server.post(f"v2/models/{model}", {**ask, "timeout": 20_000})
        assert "timeout" in body.decode() and b"frames" not in body, body
        _, body = server.post(f"v2/models/{model}", {**ask, "timeout": "soon"})
        assert "timeout must be a number of microseconds from 1 to 2^63 - 1; got 'soon'" in body.decode()
    assert server.post("v2/models/pipeline/generate", {**ask, "timeout": 60_000_000})[0] == 200


@pytest.mark.parametrize("model", ["denoiser_stream", "pipeline_stream"])
def test_cancellation_stops_between_steps(server: Server, reference: dict[str, Any], model: str) -> None:
    prompt = "a small blue square moves up"
    inputs = embeds_input(grpc, reference, prompt) if model == "denoiser_stream" else prompt_input(grpc, prompt)

    def counts() -> tuple[float, float]:
        return (
            server.metric("lemica_requests_total", model="denoiser_stream", outcome="cancelled"),
            server.metric("lemica_steps_total", model="denoiser_stream"),
        )

    # The model is quick: on a busy machine a cancellation may arrive during the last step, or behind it.
    for _ in range(20):
        cancelled, steps = counts()
        answers = stream(server, model, inputs, {"plan": "uncached"})
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        time.sleep(0.5)
        now_cancelled, now_steps = counts()
        if now_cancelled == cancelled + 1 and now_steps - steps < STEPS:
            return
    pytest.fail("twenty cancelled requests all ran to their end")


def test_cancellation_of_one_leaves_its_batch_alone(server: Server, reference: dict[str, Any]) -> None:
    """Several under way, one of them cancelled: the others' bits do not change."""
    inputs = embeds_input(grpc, reference, "a big red circle moves left")
    with ThreadPoolExecutor(3) as pool:
        parameters = {"plan": "b4", "seed": 3}
        others = [pool.submit(list, stream(server, "denoiser_stream", inputs, parameters)) for _ in range(3)]
        answers = stream(server, "denoiser_stream", inputs, parameters)
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        for other in others:
            np.testing.assert_array_equal(other.result()[-1].as_numpy("latents")[0], reference["latents_0"])


@pytest.mark.parametrize("model", ["denoiser", "pipeline"])
def test_time_outs_stop_between_steps(server: Server, reference: dict[str, Any], model: str) -> None:
    prompt = "a small blue square moves up"
    inputs = embeds_input(grpc, reference, prompt) if model == "denoiser" else prompt_input(grpc, prompt)
    with grpc.InferenceServerClient(server.grpc) as client, pytest.raises(failure) as caught:
        client.infer(model, inputs, parameters={"plan": "uncached"}, timeout=20_000)
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert "timeout" in caught.value.message().lower()


def test_a_full_queue_is_unavailable(server: Server, tiny: Path, reference: dict[str, Any]) -> None:
    write_repository(Bundle.open(tiny), server.repository, Settings(queue=1))
    assert server.load("denoiser")[0] == 200
    inputs = embeds_input(grpc, reference, "a big red circle moves left")

    def ask(client: Any) -> Any:
        try:
            return client.infer("denoiser", inputs, parameters={"plan": "b4", "seed": 3}).as_numpy("latents")[0]
        except failure as error:
            return error

    try:
        with grpc.InferenceServerClient(server.grpc) as client, ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: ask(client), range(16)))
    finally:
        write_repository(Bundle.open(tiny), server.repository)
        assert server.load("denoiser")[0] == 200
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    assert 1 <= len(refused) < 16
    assert {answer.status() for answer in refused} == {"StatusCode.UNAVAILABLE"}  # type: ignore[attr-defined]
    for answer in answers:
        if not isinstance(answer, Exception):
            np.testing.assert_array_equal(answer, reference["latents_0"])


def test_a_plan_is_replaced_while_serving(server: Server, tiny: Path, reference: dict[str, Any]) -> None:
    """No request is lost while plans come and go; a broken plan is refused and the old ones keep serving."""
    inputs = embeds_input(grpc, reference, "a big red circle moves left")
    done = threading.Event()
    wrong: list[str] = []
    answered = 0

    def load() -> None:
        nonlocal answered
        with grpc.InferenceServerClient(server.grpc) as client:
            while not done.is_set():
                try:
                    found = client.infer("denoiser", inputs, parameters={"plan": "b4", "seed": 3}).as_numpy("latents")
                    if not np.array_equal(found[0], reference["latents_0"]):
                        wrong.append("other bits")
                except failure as error:
                    wrong.append(str(error))
                answered += 1

    bundle = server.repository / "denoiser/bundle"
    thread = threading.Thread(target=load)
    thread.start()
    try:
        command = [sys.executable, "-m", "lemica_trt", "plan", str(bundle), "--method", "uniform", "--budget", "5"]
        made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert made.returncode == 0, made.stderr
        status, body = server.load("denoiser")
        assert status == 400
        assert b"expected the bundle that denoiser was written for, got another" in body
        write_repository(Bundle.open(bundle), server.repository)
        assert server.load("denoiser")[0] == 200
        with grpc.InferenceServerClient(server.grpc) as client:
            client.infer("denoiser", inputs, parameters={"plan": "b5"})
            plan = bundle / "plans" / "b4.json"
            whole = plan.read_bytes()
            plan.write_bytes(whole.replace(b'"guidance_scale": ', b'"guidance_scale": 1', 1))
            assert plan.read_bytes() != whole
            status, body = server.load("denoiser")
            assert status == 400
            assert b"plans/b4.json" in body
            client.infer("denoiser", inputs, parameters={"plan": "b5"})
    finally:
        done.set()
        thread.join()
        write_repository(Bundle.open(tiny), server.repository)
        assert server.load("denoiser")[0] == 200
    assert wrong == []
    assert answered > 5


def test_nobody_loads_code_without_the_token(server: Server) -> None:
    """Nor reads traces, logs or shared memory. NVIDIA's secure deployment guide tells what the load API can do."""
    code = base64.b64encode(b"raise SystemExit").decode()
    upload = {"parameters": {"config": '{"backend": "python"}', "file:1/model.py": code}}
    wrong = {"admin-token": "0" * 64}
    closed = [
        ("v2/repository/models/mine/load", upload),
        ("v2/repository/models/denoiser/unload", {}),
        ("v2/repository/index", {}),
        ("v2/trace/setting", {"trace_level": ["TENSORS"]}),
        ("v2/logging", {"log_verbose_level": 1}),
        ("v2/systemsharedmemory/region/mine/register", {"key": "/x", "offset": 0, "byte_size": 1}),
    ]
    for path, content in closed:
        for headers in ({}, wrong):
            status, body = server.post(path, content, headers)
            assert status == 403, (path, body)
    with grpc.InferenceServerClient(server.grpc) as client:
        for headers in ({}, {"triton-grpc-protocol-admin-token": "0" * 64}):
            for call in (
                lambda headers=headers: client.load_model("denoiser", headers=headers),
                lambda headers=headers: client.unload_model("denoiser", headers=headers),
                lambda headers=headers: client.update_log_settings({"log_verbose_level": 1}, headers=headers),
                lambda headers=headers: client.update_trace_settings("denoiser", {}, headers=headers),
            ):
                with pytest.raises(failure, match="restricted"):
                    call()
        index = client.get_model_repository_index(headers={"triton-grpc-protocol-admin-token": ADMIN_TOKEN})
    assert {model.name for model in index.models} >= set(MODELS)


def test_prompts_are_not_logged(server: Server) -> None:
    for prompt in ("a very private prompt", "a very private prompt" * 1000):
        server.post("v2/models/pipeline/generate", {"prompt": prompt, "output": "mp4-base64"})
        server.post("v2/models/pipeline/generate", {"prompt": prompt, "plan": "none"})
    assert "private" not in server.log.read_text()


def test_32_clients(server: Server, reference: dict[str, Any]) -> None:
    """Nobody gets another's clip, and nobody is left without."""

    def ask(number: int) -> list[bool]:
        found = []
        with grpc.InferenceServerClient(server.grpc) as client:
            for turn in range(2):
                case = (number + turn) % len(CASES)
                prompt, parameters = split(CASES[case])
                answer = client.infer("pipeline", prompt_input(grpc, prompt), parameters=parameters, client_timeout=90)
                found.append(np.array_equal(answer.as_numpy("frames")[0], reference[f"frames_{case}"]))
        return found

    with ThreadPoolExecutor(32) as pool:
        right = [one for many in pool.map(ask, range(32)) for one in many]
    assert right == [True] * 64


def test_the_client_command(server: Server, tmp_path: Path, reference: dict[str, Any]) -> None:
    def client(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lemica_trt", "client", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)

    prompt, parameters = split(CASES[2])
    given = ["--plan", parameters["plan"], "--seed", str(parameters["seed"]), "--negative-prompt", "blue"]
    done = client(prompt, "--url", server.grpc, *given, "--output", str(tmp_path / "clip.npy"))
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "clip.npy"), reference["frames_2"])
    done = client(prompt, "--url", server.grpc, "--output", str(tmp_path / "clip.mp4"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    for arguments, code, message in (
        (("--url", server.grpc, "--plan", "no"), InputError.exit_code, "plan must be one of b4, b6, uncached"),
        (("--url", "127.0.0.1:9"), MissingDependencyError.exit_code, "expected a Triton server at 127.0.0.1:9"),
        (("--url", server.grpc, "--timeout", "0.01"), EngineError.exit_code, "timeout"),
    ):
        done = client(prompt, *arguments, "--output", str(tmp_path / "clip.npy"))
        assert done.returncode == code, done.stderr
        assert message.lower() in done.stderr.splitlines()[-1].lower()


def test_a_numpy_that_the_server_cannot_read_is_refused(tritonserver: Path, tiny: Path, tmp_path: Path) -> None:
    """The server of 24.10 reads wrong numbers out of numpy 2 arrays: the model says so, and does not load."""
    write_repository(Bundle.open(tiny), tmp_path / "repository")
    environment = {"MODELENV": str(CACHE / "numpy2")}
    with (
        pytest.raises(ServerEnded, match=r"this server cannot read arrays of numpy 2\.[^→]*→ pip install 'numpy<2'"),
        serving(tritonserver, tmp_path / "repository", tmp_path / "log", models="pipeline", environment=environment),
    ):
        pass


def test_the_probe_asks_for_something_real(server: Server) -> None:
    """A step, and a clip; a server that is not there is one line."""
    asked = server.metric("lemica_requests_total", model="denoiser_stream")
    assert probe(server).returncode == 0
    assert eventually(lambda: server.metric("lemica_requests_total", model="denoiser_stream") == asked + 1)
    assert probe(server, "--clip").returncode == 0
    done = subprocess.run(
        [str(server.repository / "probe.py"), "--url", "http://127.0.0.1:9", "--timeout", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "refused" in done.stderr
