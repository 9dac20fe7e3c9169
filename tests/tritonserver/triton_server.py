"""A real tritonserver on loopback, with cogvideox-tiny on ONNX Runtime; fetched once into `.cache/triton`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "triton"
if " " in str(ROOT):  # the server cannot be started from such a path
    CACHE = Path(tempfile.gettempdir()) / f"lemica-trt-triton-{hashlib.sha256(bytes(ROOT)).hexdigest()[:16]}"
SHM = Path("/dev/shm")

STARTS = 3
"""Times that a server is started that lost a lock."""

LOST_LOCK = "boost::interprocess::lock_exception"

ADMIN_TOKEN = "the-token-of-the-tests"

PREFIX = "of_another_name_"
"""Of the names of shared memory that a server gives its models."""

STEPS = 12
NEGATIVE = "blue"
CASES: tuple[dict[str, Any], ...] = tuple(
    {"prompt": prompt, "seed": seed, "plan": plan, "guidance_scale": scale, "negative_prompt": negative}
    for seed, (prompt, plan, scale, negative) in enumerate(
        [
            ("a big red circle moves left", "b4", 4.0, ""),
            ("a small blue square moves up", "b4", 2.5, ""),
            ("a big red circle moves left", "b6", 4.0, NEGATIVE),
            ("a green triangle", "b4", 7.0, NEGATIVE),
            ("a small blue square moves up", "uncached", 4.0, ""),
            ("", "b6", 2.5, ""),
        ],
        start=3,
    )
)

REFERENCE = """
import json, sys
import numpy as np
from lemica_trt.bundle.reading import Bundle
from lemica_trt.runtime.pipeline import Pipeline
pipe = Pipeline(Bundle.open(sys.argv[1]))
found = {}
for i, case in enumerate(json.loads(sys.argv[2])):
    result = pipe(case.pop("prompt"), **case)
    found[f"frames_{i}"], found[f"latents_{i}"] = result.frames, result.latents
for text in ("", "blue", "a big red circle moves left", "a small blue square moves up"):
    found["embeds_" + text] = pipe.encode(text)["prompt_embeds"]
np.savez(sys.argv[3], **found)
"""


class ServerEnded(Exception):
    """The server did not become ready."""


@dataclass
class Server:
    """A running server."""

    http: str
    grpc: str
    metrics_port: int
    repository: Path
    log: Path
    pid: int

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{self.http}/{path}", timeout=30) as answer:
            return bytes(answer.read())

    def post(self, path: str, content: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body."""
        data = json.dumps(content or {}).encode()
        request = urllib.request.Request(f"http://{self.http}/{path}", data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def load(self, model: str) -> tuple[int, bytes]:
        return self.post(f"v2/repository/models/{model}/load", headers={"admin-token": ADMIN_TOKEN})

    def restart(self, model: str) -> bool:
        """Start a model's processes anew, also dead ones: `load` alone does nothing if no file has changed."""
        unloaded = self.post(f"v2/repository/models/{model}/unload", headers={"admin-token": ADMIN_TOKEN})
        return unloaded[0] == 200 and self.load(model)[0] == 200

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric over all label sets that have these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f"{name}{{") and all(label in line for label in wanted)
        )

    def stub(self, model: str) -> int:
        """Process id of a model's first instance."""
        return min(stubs(self.repository, f"{model}/"))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def serving(
    launcher: Path,
    repository: Path,
    log: Path,
    *flags: str,
    models: str = "*",
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server by its start script; it is gone afterwards, and so are its models' processes and what they left in
    /dev/shm.

    Triton's python backend now and then loses a lock while models are loaded on a busy machine, and ends
    (github.com/triton-inference-server/server/issues/8882): then it is started again.

    Raises:
        ServerEnded: it ended by itself; the message is the end of its log.
    """
    for attempt in range(STARTS):
        http, grpc, metrics = free_ports(3)
        command = [
            str(repository / "start.sh"),
            "--model-config-name=cpu",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=12",
            *flags,
        ]
        settings = {
            "TRITONSERVER": str(launcher),
            "HTTP_PORT": str(http),
            "GRPC_PORT": str(grpc),
            "METRICS_PORT": str(metrics),
            "ADMIN_TOKEN": ADMIN_TOKEN,
            "MODELS": models,
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **settings, **(environment or {})},
            )
        server = Server(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", metrics, repository, log, process.pid)
        try:
            if _ready(server, process):
                yield server
                return
            if LOST_LOCK not in log.read_text() or attempt == STARTS - 1:
                raise ServerEnded(log.read_text()[-6000:])
        finally:
            _end(process, repository)


def _ready(server: Server, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers; False: it ended, or took too long."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            server.get("v2/health/ready")
            server.metric("nv_inference_count")  # its port opens last
            return True
        time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes], repository: Path) -> None:
    """End the server, and what it leaves behind where it crashed or its models were killed."""
    regions = stubs(repository)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in stubs(repository):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for region in regions.values():
        (SHM / region).unlink(missing_ok=True)


def stubs(repository: Path, model: str = "") -> dict[int, str]:
    """Processes of the repository's models, or of one, and the name of the shared memory of each."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = [word.decode() for word in path.read_bytes().split(b"\0")]
            if "stub" in words[0] and words[1].startswith(f"{repository}/{model}"):
                found[int(path.parent.name)] = words[2]
    return found
