"""Trace and dry-run models at their true size, from published configurations without weights: docs/families.md.

    python benchmarks/true_size.py --output benchmarks/results/true-size.json

Each command runs in a process of its own, whose time and peak memory are written down. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from published import write_folder
from record import TrueSize, TrueSizeRow, this_run, write_result
from tables import described

from lemica_trt.core.progress import reporter
from lemica_trt.ir.resources import load_profile

MODELS = ("wan2.1-t2v-14b", "hunyuanvideo", "flux.1-dev", "qwen-image")

BACKEND = "tensorrt-rtx"
"""What the dry run is of."""


class Ran(NamedTuple):
    """What a command printed, and what it took; bytes at the peak."""

    result: Any
    seconds: float
    cpu: float
    memory: int


def lemica(*arguments: object) -> Ran:
    """Run a command of lemica-trt.

    Raises:
        RuntimeError: it fails; says how.
    """
    command = [sys.executable, "-m", "lemica_trt", *map(str, arguments), "--json"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if status:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {err.read().decode()}")
        memory = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Ran(json.load(out)["result"], seconds, used.ru_utime + used.ru_stime, memory)


def measured(name: str, folder: Path) -> TrueSizeRow:
    """The row of a model."""
    profile, folder = load_profile(name), write_folder(name, folder / name)
    shape = profile.shape
    frames = [] if shape.is_image else ["--frames", shape.frames]
    trace = lemica(
        *("trace", "--model", folder, "--dtype", profile.dtype, "--height", shape.height, "--width", shape.width),
        *(*frames, "--guidance-scale", profile.sampling.guidance_scale, "--max-sequence-length", profile.text_length),
    )
    dry = lemica(
        *("build", "--dry-run", "--model", name, "--weights", folder, "--backend", BACKEND, "--output", folder / "out")
    )
    (state,) = trace.result["states"]
    stages = [stage for stage in dry.result if stage["name"] in ("export", "engine")]
    return TrueSizeRow(
        model=name,
        latents=tuple(state["shape"]),
        weights=stages[0]["disk"],
        trunk=tuple(trunk["share"] for trunk in trace.result["trunks"]),
        trace=(trace.seconds, trace.cpu, trace.memory),
        dry_run=(dry.seconds, dry.cpu, dry.memory),
        disk=sum(stage.get("disk") or 0 for stage in dry.result),
        export_memory=stages[0]["memory"],
        engine_memory=stages[1]["memory"],
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    report, run, rows = reporter(), this_run(), list[TrueSizeRow]()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as workers:
        for row in workers.map(lambda name: measured(name, Path(folder)), given.models):
            rows.append(row)
            result = TrueSize(run=run, rows=tuple(rows))
            write_result(result, given.output)  # a model takes minutes: what was measured stays
            report.advance(len(rows), len(given.models))
    report.close()
    print(described(result))


if __name__ == "__main__":
    main()
