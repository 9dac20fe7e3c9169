"""`lemica-trt serve` as a process: OpenAI's own client, the bytes of `run`, signals."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import toy
from command import SMALL, lemica
from makers import Held

from lemica_trt.core.errors import InputError, LemicaError, UsageError

pytestmark = pytest.mark.cpu

pytest.importorskip("starlette", reason="pip install 'lemica-trt[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'lemica-trt[serve]'")

import uvicorn  # noqa: E402

from lemica_trt.endpoint.jobs import Jobs  # noqa: E402
from lemica_trt.endpoint.requests import Asked  # noqa: E402
from lemica_trt.endpoint.server import FLUSH_SECONDS, Settings, _Server, listen, read_key  # noqa: E402
from lemica_trt.runtime.generation import GenerationRequest  # noqa: E402

KEY = "a-key-for-the-tests"
PROMPT = "a big red circle moves left"
Built = tuple[Path, subprocess.CompletedProcess[str]]


class Served:
    """A process that serves."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def stop(self) -> str:
        """SIGTERM; what it wrote to standard error."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, errors
        return errors


@contextmanager
def serving(bundle: Path, *flags: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "lemica_trt", "serve", str(bundle), "--port", "0", "--json", *flags]
    environment = {**os.environ, "LEMICA_TRT_API_KEY": KEY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        said = "".join(iter(process.stdout.readline, "}\n"))
        yield Served(process, json.loads(said + "}")["result"]["url"])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_openais_client_gets_the_bytes_of_run(built: Built, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    done = lemica("run", built[0], PROMPT, "--seed", "7", "--plan", "b5", "--scale", "1", "-o", tmp_path / "clip.mp4")
    assert done.returncode == 0, done.stderr
    files = {path: path.stat().st_mtime_ns for path in built[0].rglob("*")}
    with serving(built[0]) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of OpenAI's own service, whose protocol lives on
            video = client.videos.create(
                model="cogvideox-tiny:b5", prompt=PROMPT, seconds="1", size="64x64", extra_body={"seed": 7}
            )
            assert video.status in ("queued", "in_progress") and video.id.startswith("video_")
            video = client.videos.poll(video.id, poll_interval_ms=50)
            assert (video.status, video.progress, video.model) == ("completed", 100, "cogvideox-tiny:b5")
            content = client.videos.download_content(video.id).read()
            assert content == (tmp_path / "clip.mp4").read_bytes()
            assert [one.id for one in client.videos.list()] == [video.id]
            assert client.videos.delete(video.id).deleted
            with pytest.raises(openai.NotFoundError, match="no such video"):
                client.videos.retrieve(video.id)
            with pytest.raises(openai.BadRequestError, match="size must be 64x64") as refused:
                client.videos.create(prompt=PROMPT, size="720x1280")
        assert refused.value.param == "size" and refused.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError, match="makes videos: POST /v1/videos"):
            client.images.generate(prompt=PROMPT)
        assert "cogvideox-tiny:uncached" in [model.id for model in client.models.list()]
        with pytest.raises(openai.AuthenticationError, match="expected the API key"):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="another").models.list()
        assert served.ask("/health/ready")["status"] == "ready"
        log = served.stop()
    assert "POST /v1/videos 200" in log and "circle" not in log and KEY not in log
    assert {path: path.stat().st_mtime_ns for path in built[0].rglob("*")} == files  # nothing is written


@pytest.mark.long
def test_images_are_those_of_run(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    flags = ("--frames", "1", "--method", "uniform", "--budget", "4", "--verify-samples", "0", "--output", bundle)
    done = lemica("build", *SMALL[:4], *flags)
    assert done.returncode == 0, done.stderr
    done = lemica("run", bundle, PROMPT, "--seed", "3", "--scale", "1", "--output", tmp_path / "image.png")
    assert done.returncode == 0, done.stderr
    with serving(bundle) as served:
        answer = served.ask("/v1/images/generations", {"prompt": PROMPT, "seed": 3, "n": 1})
        assert base64.b64decode(answer["data"][0]["b64_json"]) == (tmp_path / "image.png").read_bytes()
        served.stop()


def test_sigterm_answers_what_is_open(built: Built) -> None:
    """Whoever waits gets the clip or an error, never a connection that breaks."""
    with serving(built[0], "--grace", "30") as served:
        answers: list[Any] = []

        def ask() -> None:
            body = {"prompt": PROMPT, "plan": "uncached", "response_format": "b64_json"}
            try:
                answers.append(served.ask("/v1/videos", body)["status"])
            except urllib.error.HTTPError as error:
                answers.append(json.load(error)["error"]["code"])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while served.ask("/health/ready")["running"] == 0:
            pass
        served.stop()
        for thread in threads:
            thread.join(timeout=120)
    assert len(answers) == 4 and set(answers) <= {"completed", "shutting_down"}, answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_grace(number: signal.Signals) -> None:
    maker = Held()
    jobs = Jobs(maker)
    job = jobs.submit(Asked(GenerationRequest(PROMPT), toy.euler_plan("ffff", name="b4"), "toy"), ".mp4")
    maker.arrive()
    config = uvicorn.Config(None, lifespan="off")  # type: ignore[arg-type]
    server = _Server(config, jobs, 1e6, lambda: None)
    server.servers = []
    server.handle_exit(number, None)
    assert server.should_exit and not server.force_exit
    server.handle_exit(number, None)
    assert server.force_exit
    asyncio.run(server.shutdown())  # neither for the grace nor for the step
    assert job.error is not None and job.error["code"] == "shutting_down" and maker.made == []
    maker.finish()


def test_clients_that_do_not_read_are_not_waited_for() -> None:
    config = uvicorn.Config(None, lifespan="off")  # type: ignore[arg-type]
    server = _Server(config, Jobs(Held()), 0.0, lambda: None)
    server.servers, server.force_exit = [], True
    asyncio.run(server.shutdown())
    assert config.timeout_graceful_shutdown == FLUSH_SECONDS


def test_what_is_refused_before_it_listens(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEMICA_TRT_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "example.com"):
        with pytest.raises(UsageError, match=rf"expected an API key to listen on {host}, .* → --api-key-file FILE, or"):
            listen(Settings(host=host))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1, port {port}: .* → give another --host or"):
            listen(Settings(port=port))
    with listen(Settings(host="localhost", port=0)) as at:
        assert at.getsockname()[0] in ("127.0.0.1", "::1")
    assert read_key(None) is None
    file = tmp_path / "key"
    for content in ("short", "with spaces in the key", "ümlaute" * 4):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="API key"):
            read_key(file)
        monkeypatch.setenv("LEMICA_TRT_API_KEY", content)
        with pytest.raises(InputError, match=r"^\$LEMICA_TRT_API_KEY: expected an API key of at least 16"):
            read_key(None)
    monkeypatch.delenv("LEMICA_TRT_API_KEY")
    file.write_text(f"{KEY}\n")
    assert read_key(file) == KEY
    with pytest.raises(LemicaError, match="expected a readable file"):
        read_key(tmp_path / "none")
    done = lemica("serve", built[0], "--triton", "localhost:1", "--threads", "2")
    assert done.returncode == 2 and "--triton cannot be used together with --threads" in done.stderr
    done = lemica("serve", built[0], "--triton", "localhost:1", "--port", "0")
    assert done.returncode == 7 and "expected a Triton server at localhost:1" in done.stderr
    done = lemica("serve", built[0], "--workers", "2")
    assert done.returncode == 2 and "expected --workers 1 without --triton" in done.stderr
    done = lemica("serve", built[0], "--plan", "b9")
    assert done.returncode == 2 and "b9" in done.stderr
