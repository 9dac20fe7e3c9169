"""Processes of models that are killed: their requests end with an error, and `unload`, `load` starts them anew.

Rarely the server ends with such a process, if it held a lock of the memory that both share
(github.com/triton-inference-server/server/issues/8882). That is Triton's, and nothing that a model can mend: a check
whose server has ended by itself runs again with a new one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_server import eventually, failure, grpc, probe, prompt_input, split, stream
from triton_server import CASES, ROOT, STARTS, Server, serving

from lemica_trt.bundle.reading import Bundle
from lemica_trt.triton.repository import write_repository
from lemica_trt.triton.server import temporary

pytestmark = pytest.mark.cpu

Check = Callable[[Server], None]


@pytest.fixture(scope="module")
def run(tritonserver: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Check], None]]:
    """Runs a check with the module's server, and with a new one if that has ended by itself."""
    folder = tmp_path_factory.mktemp("killed")
    write_repository(Bundle.open(tiny), folder / "repository")
    servers: list[Server] = []
    with contextlib.ExitStack() as running:

        def has_ended() -> bool:
            return temporary.has_died(str(servers[-1].pid))

        def until_it_stays(check: Check) -> None:
            for attempt in range(STARTS):
                if not servers or has_ended():
                    running.close()
                    servers.append(running.enter_context(serving(tritonserver, folder / "repository", folder / "log")))
                try:
                    return check(servers[-1])
                except Exception:
                    if attempt == STARTS - 1 or not eventually(has_ended):
                        raise
                    print("the server has ended:", servers[-1].log.read_text()[-2000:])

        yield until_it_stays


def test_the_probe_says_so(run: Callable[[Check], None]) -> None:
    """Triton's own readiness does not notice."""

    def check(server: Server) -> None:
        os.kill(server.stub("denoiser_stream"), signal.SIGKILL)
        done = probe(server)
        assert done.returncode == 1 and done.stderr.startswith("probe: "), done.stderr
        assert done.stderr.count("\n") == 1
        assert server.get("v2/health/ready") == b""
        assert server.restart("denoiser_stream")
        assert probe(server).returncode == 0

    run(check)


def test_the_request_that_was_under_way_gets_an_answer(run: Callable[[Check], None], reference: dict[str, Any]) -> None:
    prompt, parameters = split(CASES[0])

    def check(server: Server) -> None:
        for _ in range(5):  # a request may be quicker than who kills its process
            process = server.stub("denoiser_stream")
            answers = stream(server, "pipeline_stream", prompt_input(grpc, prompt), {"plan": "uncached"})
            try:
                next(answers)
                os.kill(process, signal.SIGKILL)
                list(answers)
            except failure:
                break
            assert server.restart("denoiser_stream")
        else:
            pytest.fail("no request was under way when its process was killed")
        with grpc.InferenceServerClient(server.grpc) as client:
            with pytest.raises(failure):
                client.infer("pipeline", prompt_input(grpc, prompt), parameters=parameters, client_timeout=30)
            assert server.restart("denoiser_stream")
            answer = client.infer("pipeline", prompt_input(grpc, prompt), parameters=parameters)
            np.testing.assert_array_equal(answer.as_numpy("frames")[0], reference["frames_0"])

    run(check)


def test_again_and_again(run: Callable[[Check], None], reference: dict[str, Any]) -> None:
    """Not the first time only, when the `__pycache__` that the interpreter has written makes `load` alone work, too."""
    prompt, parameters = split(CASES[0])

    def check(server: Server) -> None:
        with grpc.InferenceServerClient(server.grpc) as client:
            for model in ("text_encoder", "denoiser_stream", "vae_decoder") * 2:
                os.kill(server.stub(model), signal.SIGKILL)
                with pytest.raises(failure):
                    client.infer("pipeline", prompt_input(grpc, prompt), parameters=parameters, client_timeout=30)
                assert server.restart(model)
                answer = client.infer("pipeline", prompt_input(grpc, prompt), parameters=parameters)
                np.testing.assert_array_equal(answer.as_numpy("frames")[0], reference["frames_0"])

    run(check)


def test_a_new_plan_replaces_a_dead_process(run: Callable[[Check], None], tiny: Path) -> None:
    """`load` of a model whose process has died and whose plans have changed."""

    def check(server: Server) -> None:
        bundle = server.repository / "denoiser/bundle"
        command = [sys.executable, "-m", "lemica_trt", "plan", str(bundle), "--method", "uniform", "--budget", "5"]
        made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert made.returncode == 0, made.stderr
        os.kill(server.stub("denoiser_stream"), signal.SIGKILL)
        try:
            write_repository(Bundle.open(bundle), server.repository)
            for model in ("denoiser_stream", "pipeline"):
                assert server.load(model)[0] == 200
            ask = {"prompt": "red", "plan": "b5", "output": "mp4-base64"}
            assert server.post("v2/models/pipeline/generate", ask)[0] == 200
        finally:
            write_repository(Bundle.open(tiny), server.repository)

    run(check)
