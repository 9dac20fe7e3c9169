"""A server under load, for minutes: `make load`. LOAD_SECONDS sets how long each of the first two tests lasts, or 300.

Every request is answered once, right or with a status, while processes of models are killed, requests are cancelled,
time out, or are not what they must be; where the server itself is killed, the connection may break. Afterwards nothing
has leaked.

Once a killed process left the server answering nothing any more; it probably held a lock of Triton's shared memory.
Then the probe must say so, and the test goes on with another server.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import queue
import random
import signal
import socket
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
from test_server import embeds_input, eventually, failure, grpc, probe, prompt_input, split, stream
from triton_server import CASES, ROOT, SHM, STARTS, Server, serving, stubs

from lemica_trt.bundle.reading import Bundle
from lemica_trt.triton.repository import write_repository
from lemica_trt.triton.server import temporary

pytestmark = pytest.mark.load

SECONDS = float(os.environ.get("LOAD_SECONDS", "300"))
CLIENTS = 32
KILL_EVERY_SECONDS = 12.0
PATIENCE_SECONDS = 240
"""For one request, on a machine that has little to give: it ends long before, or it hangs."""

UNANSWERED = "no answer"

KILLED = ("denoiser_stream", "text_encoder", "vae_decoder", "pipeline", "pipeline_stream", "denoiser")

Ask = Callable[[Server, Any, dict[str, Any], random.Random], str]


# ---------------------------------------------------------------- one request of each kind: its outcome


def whole(server: Server, client: Any, reference: dict[str, Any], draw: random.Random) -> str:
    number = draw.randrange(len(CASES))
    prompt, parameters = split(CASES[number])
    answer = client.infer(
        "pipeline", prompt_input(grpc, prompt), parameters=parameters, client_timeout=PATIENCE_SECONDS
    )
    np.testing.assert_array_equal(answer.as_numpy("frames")[0], reference[f"frames_{number}"])
    return "right"


def latents(server: Server, client: Any, reference: dict[str, Any], draw: random.Random) -> str:
    inputs = embeds_input(grpc, reference, "a big red circle moves left")
    parameters = {"plan": "b4", "seed": 3, "guidance_scale": 4.0}
    answer = client.infer("denoiser", inputs, parameters=parameters, client_timeout=PATIENCE_SECONDS)
    np.testing.assert_array_equal(answer.as_numpy("latents")[0], reference["latents_0"])
    return "right"


def streamed(server: Server, client: Any, reference: dict[str, Any], draw: random.Random) -> str:
    prompt, parameters = split(CASES[0])
    answers = list(stream(server, "pipeline_stream", prompt_input(grpc, prompt), parameters))
    results = [answer for answer in answers if answer.as_numpy("frames") is not None]
    assert len(results) == 1, "one result, and it comes once"
    np.testing.assert_array_equal(results[0].as_numpy("frames")[0], reference["frames_0"])
    return "right"


def cancelled(server: Server, client: Any, reference: dict[str, Any], draw: random.Random) -> str:
    answers = stream(server, "pipeline_stream", prompt_input(grpc, "red"), {"plan": "uncached"})
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    return "cancelled"


def out_of_time(server: Server, client: Any, reference: dict[str, Any], draw: random.Random) -> str:
    try:
        client.infer("pipeline", prompt_input(grpc, "red"), parameters={"plan": "uncached"}, timeout=20_000)
    except failure as error:
        # A model that is started anew takes no request, and Triton says INTERNAL of one whose process has died.
        ended = str(error.status()).endswith(("UNAVAILABLE", "NOT_FOUND")) or "not healthy" in error.message()
        assert ended or eventually(lambda: temporary.has_died(str(server.pid))), f"{error.status()}: {error.message()}"
        raise
    raise AssertionError("a whole clip in 20 ms")


def malformed(server: Server, client: Any, reference: dict[str, Any], draw: random.Random) -> str:
    """Not what a model takes; the message is INVALID_ARGUMENT."""
    wrong = grpc.InferInput("prompt_embeds", [1, 2], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 2), np.float32))
    text = grpc.InferInput("prompt", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"\xff\xfe"]], np.object_))
    model, inputs, parameters = draw.choice(
        [
            ("pipeline", [text], {}),
            ("pipeline", prompt_input(grpc, "x" * 9000), {}),
            ("pipeline", prompt_input(grpc, "red"), {"plan": "none"}),
            ("pipeline", prompt_input(grpc, "red"), {"seed": -1}),
            ("text_encoder", prompt_input(grpc, "red"), {"more": 1}),
            ("denoiser", [wrong], {}),
            ("vae_decoder", prompt_input(grpc, "red"), {}),
            ("nothing", prompt_input(grpc, "red"), {}),
        ]
    )
    try:
        client.infer(model, inputs, parameters=parameters, client_timeout=PATIENCE_SECONDS)
    except failure as error:
        known = ("INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE", "INTERNAL")
        assert any(code in str(error.status()) for code in known), error
        return "refused"
    raise AssertionError(f"{model} took what it must not: {parameters}")


def no_http(server: Server, client: Any, reference: dict[str, Any], draw: random.Random) -> str:
    """Bytes that are no request, and requests that break off."""
    host, _, port = server.http.partition(":")
    body = json.dumps({"prompt": "red", "plan": "b4"}).encode()
    sent = draw.choice(
        [
            b"\x00" * 1000,
            b"POST /v2/models/pipeline/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{",
            b"POST /v2/models/pipeline/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n[[[[[[[[[",
            b"POST /v2/models/pipeline/generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body),
        ]
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection, contextlib.suppress(OSError):
        connection.sendall(sent)
        connection.settimeout(0.2)
        connection.recv(100)
    return "broken off"


def generated(server: Server, client: Any, reference: dict[str, Any], draw: random.Random) -> str:
    connection = http.client.HTTPConnection(server.http, timeout=PATIENCE_SECONDS)
    try:
        body = {"prompt": "red", "plan": "b4", "output": "mp4-base64"}
        connection.request("POST", "/v2/models/pipeline/generate", json.dumps(body))
        answer = connection.getresponse()
        content = json.loads(answer.read())
    finally:
        connection.close()
    assert (answer.status == 200) == ("video" in content) and ("error" in content) == (answer.status != 200), content
    return "right" if answer.status == 200 else f"HTTP {answer.status}"


KINDS: tuple[Ask, ...] = (whole, whole, latents, streamed, cancelled, out_of_time, malformed, no_http, generated)


# ---------------------------------------------------------------- what there is of the server


def processes(server: Server) -> list[int]:
    return [server.pid, *stubs(server.repository)]


def resident(server: Server) -> int:
    """Bytes of memory that the server and its models' processes hold by themselves."""
    total = 0
    for pid in processes(server):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def descriptors(server: Server) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in processes(server))  # noqa: PTH208


def shared_memory() -> set[str]:
    return {path.name for path in SHM.iterdir()}


@pytest.fixture
def fresh(tritonserver: Path, tiny: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of its own: what a test leaves in it is nobody else's."""
    write_repository(Bundle.open(tiny), tmp_path / "repository")
    with serving(tritonserver, tmp_path / "repository", tmp_path / "log") as found:
        yield found


# ---------------------------------------------------------------- the tests


@contextlib.contextmanager
def clients(
    server: Server, reference: dict[str, Any], is_over: Callable[[], bool], wrong: list[str]
) -> Iterator[collections.Counter[str]]:
    """32 clients, each with one request at a time until it is over; when the block ends, each has its last answer.

    Args:
        wrong: gets what no request may end in: a wrong answer, a second one, none in `PATIENCE_SECONDS`.

    Yields:
        How often each outcome has been seen: right, a status, or that the connection broke.
    """
    seen = collections.Counter[str]()

    def work(number: int) -> None:
        draw = random.Random(number)
        with grpc.InferenceServerClient(server.grpc) as client:
            while not is_over() and not wrong:
                ask = draw.choice(KINDS)
                start = time.monotonic()
                try:
                    outcome = ask(server, client, reference, draw)
                except failure as error:
                    outcome = str(error.status()).removeprefix("StatusCode.")
                except (OSError, http.client.HTTPException) as error:
                    outcome = type(error).__name__
                except queue.Empty:
                    wrong.append(f"{ask.__name__}: {UNANSWERED}")
                    return
                except Exception as error:  # an assertion: what these tests are about
                    wrong.append(f"{ask.__name__}: {type(error).__name__}: {error}")
                    return
                if time.monotonic() - start > PATIENCE_SECONDS:
                    wrong.append(f"{ask.__name__}: {UNANSWERED}")
                seen[f"{ask.__name__}: {outcome}"] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        done = [pool.submit(work, number) for number in range(CLIENTS)]
        yield seen
        for each in done:
            each.result(PATIENCE_SECONDS + 60)


def rights(seen: collections.Counter[str]) -> int:
    """How many answers were right."""
    return sum(count for outcome, count in seen.items() if outcome.endswith(": right"))


def require_right(server: Server, reference: dict[str, Any]) -> None:
    with grpc.InferenceServerClient(server.grpc) as client:
        for ask in (whole, latents, streamed):
            assert ask(server, client, reference, random.Random(1)) == "right"


def require_gone(server: Server, left: dict[int, str]) -> None:
    """Processes of models whose server was killed end by themselves, with their shared memory and call files."""
    assert eventually(lambda: not stubs(server.repository), 60.0), stubs(server.repository)
    assert not set(left.values()) & shared_memory()
    assert not [file for file in temporary.call_folder().glob("*-*") if int(file.name.partition("-")[0]) in left]


def past(end: float) -> Callable[[], bool]:
    return lambda: time.monotonic() >= end


def kill_again_and_again(server: Server, wrong: list[str], end: float, draw: random.Random) -> int:
    """Every twelve seconds a process of a model is killed, and the model started anew; how many were."""
    kills = 0
    while time.monotonic() < end and not wrong:
        time.sleep(min(KILL_EVERY_SECONDS, max(0.0, end - time.monotonic())))
        model = draw.choice(KILLED)
        with contextlib.suppress(ValueError, ProcessLookupError):  # it has no process at this moment
            os.kill(server.stub(model), signal.SIGKILL)
            kills += 1
        for _ in range(5):  # the server may be taking the model down
            if server.restart(model):
                break
            time.sleep(1)
    return kills


def test_every_request_is_answered_once(
    tritonserver: Path, tiny: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    """32 clients while processes of models are killed; SECONDS in a row on one server."""
    write_repository(Bundle.open(tiny), tmp_path / "repository")
    draw = random.Random(0)
    for attempt in range(STARTS):
        wrong = list[str]()
        with serving(tritonserver, tmp_path / "repository", tmp_path / "log") as server:
            end = time.monotonic() + SECONDS
            with clients(server, reference, past(end), wrong) as seen:
                kills = kill_again_and_again(server, wrong, end, draw)
            print(f"{sum(seen.values())} requests, {kills} kills; {dict(sorted(seen.items()))}")
            if not wrong:
                require_right(server, reference)  # all is as it was
                break
            assert all(UNANSWERED in each for each in wrong), wrong[:3]
            found = probe(server, "--clip")
            print(f"{len(wrong)} requests have no answer; {found.stderr.strip()}")
            assert found.returncode == 1 and attempt < STARTS - 1, "it is blocked, and its probe says so; once"
    assert seen["whole: right"] and seen["latents: right"] and seen["cancelled: cancelled"] and kills


def test_a_server_that_is_killed_again_and_again(
    tritonserver: Path, tiny: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    """SIGKILL under 32 clients: each has one answer, or a connection that broke. No process, no shared memory and no
    call file stays, and the next server answers as the first one did."""
    write_repository(Bundle.open(tiny), tmp_path / "repository")
    draw, end, wrong, rounds = random.Random(0), time.monotonic() + SECONDS, list[str](), 0
    while not rounds or time.monotonic() < end:
        rounds += 1
        with serving(tritonserver, tmp_path / "repository", tmp_path / "log") as server:
            require_right(server, reference)
            killed = threading.Event()
            with clients(server, reference, killed.is_set, wrong) as seen:
                time.sleep(draw.uniform(3.0, min(20.0, max(4.0, SECONDS))))
                assert eventually(lambda: rights(seen) > 0, 60.0) or wrong, seen
                left, before = stubs(server.repository), seen.copy()
                os.kill(server.pid, signal.SIGKILL)
                time.sleep(1)  # requests to a server that is not there
                killed.set()
            print(f"round {rounds}: {sum(seen.values())} requests; {dict(sorted(seen.items()))}")
            assert not wrong, wrong[:3]
            assert sum(seen.values()) >= sum(before.values()) + CLIENTS  # what each was waiting for, too
            assert any(outcome.endswith(("UNAVAILABLE", "Error", "Disconnected")) for outcome in seen), seen
            assert len(left) >= len(KILLED)
            require_gone(server, left)
    with serving(tritonserver, tmp_path / "repository", tmp_path / "log") as server:
        require_right(server, reference)


def test_500_requests_leave_nothing_behind(fresh: Server, reference: dict[str, Any]) -> None:
    """Memory within 2 % of what it was after the 50th request, no file more for each request, no shared memory."""

    def ask(count: int) -> None:
        def one(number: int) -> str:
            with grpc.InferenceServerClient(fresh.grpc) as client:
                kind = (whole, streamed, latents, generated)[number % 4]
                return kind(fresh, client, reference, random.Random(number))

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(one, range(count))) == {"right"}

    ask(50)
    time.sleep(2)
    before = resident(fresh), descriptors(fresh), shared_memory()
    ask(450)
    assert eventually(lambda: descriptors(fresh) <= before[1] + 8), (descriptors(fresh), before[1])  # 450 would leak
    after = resident(fresh), descriptors(fresh), shared_memory()
    print(f"memory {before[0] / 1e6:.1f} → {after[0] / 1e6:.1f} MB, descriptors {before[1]} → {after[1]}")
    assert after[0] <= before[0] * 1.02
    assert after[2] <= before[2]


def test_a_killed_server_leaves_nothing_behind(tritonserver: Path, tiny: Path, tmp_path: Path) -> None:
    """Its models' processes end by themselves, also in the middle of a request; so do their files."""
    write_repository(Bundle.open(tiny), tmp_path / "repository")
    with serving(tritonserver, tmp_path / "repository", tmp_path / "log") as server:

        def request() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.post("v2/models/pipeline/generate", {"prompt": "red", "plan": "uncached"})

        running = threading.Thread(target=request)
        running.start()
        left = stubs(server.repository)
        os.kill(server.pid, signal.SIGKILL)
        running.join()
        require_gone(server, left)
    with serving(tritonserver, tmp_path / "repository", tmp_path / "log") as server:
        assert server.post("v2/models/pipeline/generate", {"prompt": "red", "output": "mp4-base64"})[0] == 200


def test_plans_by_several_writers_while_serving(fresh: Server, tiny: Path) -> None:
    """Each that exits with 0 has its plan in, the others say that somebody writes; the server takes them all."""
    bundle = fresh.repository / "denoiser/bundle"
    budgets = range(2, 12)
    command = [sys.executable, "-m", "lemica_trt", "plan", str(bundle), "--method", "uniform", "--quiet", "--budget"]
    writers = [
        subprocess.Popen(
            [*command, str(budget)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for budget in budgets
    ]
    for budget, writer in zip(budgets, writers):
        # A model that is being started anew is not there, or one of its processes is not.
        said = writer.communicate(timeout=300)[1]
        has = f"b{budget}" in Bundle.open(bundle).plans
        assert (writer.returncode == 0 and has) or (writer.returncode == 2 and "is writing it" in said), said
    write_repository(Bundle.open(bundle), fresh.repository)
    for model in ("denoiser", "denoiser_stream", "pipeline", "pipeline_stream"):
        assert fresh.load(model)[0] == 200
    for name in Bundle.open(bundle).plans:
        ask = {"prompt": "red", "plan": name, "output": "mp4-base64"}
        assert fresh.post("v2/models/pipeline/generate", ask)[0] == 200
