"""What Triton adds to the in-process pipeline: latency p50 and p95, and throughput with concurrent clients.

    python benchmarks/tritonserver.py out/cogvideox-tiny --output benchmarks/results/serving-cogvideox-tiny.json

Needs tritonclient[grpc,http]; fetches the server with tools/fetch_tritonserver.sh. The in-process pipeline runs in the
interpreter of the server's models, half of it before the server starts and half after it has ended. On a machine that
does other things too, compare the last column: a request's time less what its denoising and decoding took themselves,
as the server measured them for the same requests (means); that is what Triton costs. Writes JSON (`record.Serving`)
and prints its tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from record import Latency, Serving, Throughput, this_run, write_result
from tables import described

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "tritonserver"))

from triton_server import CACHE, ROOT, Server, serving

from lemica_trt.bundle.reading import Bundle
from lemica_trt.triton.repository import write_repository

PROMPT = "a big red circle moves left"
SERVER = "2.51.0"
"""What tools/fetch_tritonserver.sh fetches."""

CLIENTS = (1, 2, 4, 8)

IN_PROCESS = """
import importlib.metadata, json, sys, time
from lemica_trt.bundle.reading import Bundle
from lemica_trt.runtime.pipeline import Pipeline
pipe = Pipeline(Bundle.open(sys.argv[1]), sys.argv[2])
pipe(sys.argv[3], seed=1)
rows = []
for seed in range(int(sys.argv[4])):
    start = time.perf_counter()
    seconds = pipe(sys.argv[3], seed=seed).seconds
    rows.append({"total": time.perf_counter() - start, **seconds})
versions = {name: importlib.metadata.version(name) for name in ("numpy", "onnxruntime")}
print(json.dumps({"rows": rows, "versions": versions}))
"""


def in_process(bundle: Path, plan: str, count: int) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Seconds of `count` requests, total and by part; and versions of the libraries there."""
    python = CACHE / "modelenv" / "bin" / "python"
    command = [str(python), "-c", IN_PROCESS, str(bundle), plan, PROMPT, str(count)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found["rows"], found["versions"]


def ask(kind: Any, url: str, plan: str, output: str) -> Any:
    """A function that makes one request over HTTP or gRPC and waits for the clip."""
    client = kind.InferenceServerClient(url)
    text = kind.InferInput("prompt", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[PROMPT.encode()]], np.object_))

    def one(seed: int) -> None:
        client.infer("pipeline", [text], parameters={"plan": plan, "seed": seed, "output": output})

    return one


def timed(one: Any, count: int) -> list[float]:
    found = []
    for seed in range(count):
        start = time.perf_counter()
        one(seed)
        found.append(time.perf_counter() - start)
    return found


def inside(server: Server) -> tuple[float, float]:
    """Seconds of denoising and decoding, and requests, since the server started."""
    seconds = server.metric("lemica_denoise_seconds_sum", model="denoiser_stream")
    seconds += server.metric("nv_inference_compute_infer_duration_us", model="vae_decoder") / 1e6
    return seconds, server.metric("lemica_denoise_seconds_count", model="denoiser_stream")


def throughput(server: Server, plan: str, clients: int, seconds: float) -> Throughput:
    """So many clients at once, for some seconds."""
    import tritonclient.grpc as grpc

    end = time.monotonic() + seconds

    def work(number: int) -> int:
        one, done = ask(grpc, server.grpc, plan, "frames"), 0
        while time.monotonic() < end:
            one(number * 1000 + done)
            done += 1
        return done

    names = ("nv_inference_count", "nv_inference_exec_count")
    before = [server.metric(name, model="denoiser_stream") for name in names]
    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(work, range(clients)))
    took = time.monotonic() - start
    requests, batches = (server.metric(name, model="denoiser_stream") - old for name, old in zip(names, before))
    return Throughput(clients=clients, clips=total / took, batch=requests / batches)


def over_network(server: Server, plan: str, count: int) -> Iterator[Latency]:
    """Single requests, one after the other, by each protocol."""
    import tritonclient.grpc as grpc
    import tritonclient.http as http

    for name, kind, url, output in (
        ("Triton, gRPC, frames", grpc, server.grpc, "frames"),
        ("Triton, HTTP, frames", http, server.http, "frames"),
        ("Triton, gRPC, MP4", grpc, server.grpc, "mp4"),
    ):
        one = ask(kind, url, plan, output)
        one(1)
        old = inside(server)
        seconds = timed(one, count)
        compute, requests = (new - before for new, before in zip(inside(server), old))
        yield Latency(name=name, seconds=tuple(seconds), beyond=sum(seconds) / count - compute / requests)


def measure(path: Path, count: int, seconds: float) -> Serving:
    """Everything, on one bundle."""
    bundle = Bundle.open(path)
    plan = bundle.plan()
    before, versions = in_process(path, plan.name, count // 2)
    with tempfile.TemporaryDirectory() as folder:
        write_repository(bundle, Path(folder) / "repository")
        with serving(CACHE / "tritonserver", Path(folder) / "repository", Path(folder) / "log") as server:
            latency = list(over_network(server, plan.name, count))
            rates = [throughput(server, plan.name, clients, seconds) for clients in CLIENTS]
    after, _ = in_process(path, plan.name, count - count // 2)
    rows = before + after
    beyond = [row["total"] - row["denoise"] - row["decode"] for row in rows]
    own = Latency(name="in process", seconds=tuple(row["total"] for row in rows), beyond=sum(beyond) / len(rows))
    return Serving(
        run=msgspec.structs.replace(this_run("tritonclient"), versions=versions),
        server=SERVER,
        model=bundle.manifest.profile.name,
        plan=plan.name,
        full_steps=plan.budget,
        steps=plan.num_steps,
        latency=(own, *latency),
        throughput=tuple(rates),
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10, help="of each number of clients at once")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    subprocess.run([str(ROOT / "tools" / "fetch_tritonserver.sh"), str(CACHE)], check=True)
    result = measure(given.bundle, given.requests, given.seconds)
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
