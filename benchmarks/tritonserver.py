"""What Triton adds to the in-process pipeline: latency p50 and p95, and throughput with concurrent clients.

    python benchmarks/tritonserver.py BUNDLE [--requests 40] [--seconds 10] [--output FILE.json]

Needs tritonclient[grpc,http]; fetches the server with tools/fetch_tritonserver.sh. The in-process pipeline runs in the
interpreter of the server's models, half of it before the server starts and half after it has ended. On a machine that
does other things too, compare the last column: a request's time less what its denoising and decoding took themselves,
as the server measured them for the same requests (means); that is what Triton costs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "tritonserver"))

from triton_server import CACHE, ROOT, Server, serving

from lemica_trt.bundle.reading import Bundle
from lemica_trt.triton.repository import write_repository

PROMPT = "a big red circle moves left"

IN_PROCESS = """
import json, sys, time
from lemica_trt.bundle.reading import Bundle
from lemica_trt.runtime.pipeline import Pipeline
pipe = Pipeline(Bundle.open(sys.argv[1]), sys.argv[2])
pipe(sys.argv[3], seed=1)
rows = []
for seed in range(int(sys.argv[4])):
    start = time.perf_counter()
    seconds = pipe(sys.argv[3], seed=seed).seconds
    rows.append({"total": time.perf_counter() - start, **seconds})
print(json.dumps(rows))
"""


def in_process(bundle: Path, plan: str, count: int) -> dict[str, list[float]]:
    """Seconds of `count` requests: total, and by part."""
    python = CACHE / "modelenv" / "bin" / "python"
    command = [str(python), "-c", IN_PROCESS, str(bundle), plan, PROMPT, str(count)]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {name: [row[name] for row in rows] for name in rows[0]}


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


def throughput(server: Server, plan: str, clients: int, seconds: float) -> tuple[float, float]:
    """Clips a second with so many clients at once, and requests in an engine batch, on average."""
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
    return total / took, requests / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    import tritonclient.grpc as grpc
    import tritonclient.http as http

    subprocess.run([str(ROOT / "tools" / "fetch_tritonserver.sh"), str(CACHE)], check=True)
    bundle = Bundle.open(arguments.bundle)
    plan = bundle.plan().name
    count = arguments.requests
    before = in_process(arguments.bundle, plan, count // 2)
    samples: dict[str, list[float]] = {}
    rest: dict[str, float] = {}
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        write_repository(bundle, Path(folder) / "repository")
        with serving(CACHE / "tritonserver", Path(folder) / "repository", Path(folder) / "log") as server:
            for name, kind, url, output in (
                ("gRPC, frames", grpc, server.grpc, "frames"),
                ("HTTP, frames", http, server.http, "frames"),
                ("gRPC, MP4", grpc, server.grpc, "mp4"),
            ):
                one = ask(kind, url, plan, output)
                one(1)
                old = inside(server)
                key = f"Triton pipeline: {name}"
                samples[key] = timed(one, count)
                seconds, requests = (new - before for new, before in zip(inside(server), old))
                rest[key] = sum(samples[key]) / count - seconds / requests
            for clients in (1, 2, 4, 8):
                rates[clients] = throughput(server, plan, clients, arguments.seconds)
    after = in_process(arguments.bundle, plan, count - count // 2)
    samples = {**{f"in process: {name}": before[name] + after[name] for name in before}, **samples}
    totals = zip(*(np.array(before[name] + after[name]) for name in ("total", "denoise", "decode")))
    rest["in process: total"] = float(np.mean([total - denoise - decode for total, denoise, decode in totals]))
    print(f"plan {plan}, {count} requests each\n")
    print("| | p50 ms | p95 ms | less denoising and decoding, mean ms |\n|---|---|---|---|")
    for name, numbers in samples.items():
        low, high = np.percentile(numbers, [50, 95]) * 1e3
        print(f"| {name} | {low:.1f} | {high:.1f} | {f'{rest[name] * 1e3:.1f}' if name in rest else ''} |")
    print("\n| clients | clips/s | requests a batch |\n|---|---|---|")
    for clients, (rate, batch) in rates.items():
        print(f"| {clients} | {rate:.2f} | {batch:.2f} |")
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"plan": plan, "seconds": samples, "throughput": rates}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
