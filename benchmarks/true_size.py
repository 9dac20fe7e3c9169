"""Models at their true size, from published configurations without weights: docs/families.md.

    python benchmarks/true_size.py --output benchmarks/results/true-size.json
    python benchmarks/true_size.py --export --output benchmarks/results/true-size-export.json

They are traced and dry-run; or, with random weights in their transformer, their step graphs are exported as a build
exports them. Each runs in a process of its own, whose time and peak memory are written down. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from published import write_folder
from record import ExportRow, TrueSize, TrueSizeExports, TrueSizeRow, this_run, write_result
from tables import described

from lemica_trt.core.progress import reporter
from lemica_trt.ir.resources import load_profile

MODELS = ("wan2.1-t2v-14b", "hunyuanvideo", "flux.1-dev", "qwen-image")

EXPORTED = ("pixart-sigma", "wan2.1-t2v-1.3b")
"""Whose weights fit in memory here."""

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
        return Ran(json.load(out)["result"], seconds, *taken(used))


def taken(used: resource.struct_rusage) -> tuple[float, int]:
    """Seconds of CPUs, and bytes at the peak."""
    return used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def exported(name: str, folder: Path) -> ExportRow:
    """The row of a model, exported in this process."""
    import msgspec

    from lemica_trt.compiler.context import solver_tables
    from lemica_trt.export import export_graphs
    from lemica_trt.models import load_model
    from lemica_trt.planning.layout import layout_for_methods
    from lemica_trt.planning.planner import Problem, planners_named

    profile = msgspec.structs.replace(load_profile(name), source=str(write_folder(name, folder / name)))
    model = load_model(profile, weights=False)
    weights = fill(model.pipeline.transformer)
    table = model.table()
    layout = layout_for_methods(
        Problem(table=table, guidance_scale=profile.sampling.guidance_scale, model=name, solver=solver_tables(table)),
        planners_named(["auto"]),
        latent_shape=tuple(model.latent_shape),
        guided=model.guided,
        branches=model.branches,
        conditions=model.conditions,
    )
    start, (cpu, before) = time.perf_counter(), taken(resource.getrusage(resource.RUSAGE_SELF))
    graphs = export_graphs(model, layout, folder, roles=layout.step_graphs)
    seconds, (after, memory) = time.perf_counter() - start, taken(resource.getrusage(resource.RUSAGE_SELF))
    return ExportRow(
        model=name,
        dtype=graphs.dtype,
        weights=weights,
        graphs={
            graph.role: sum((folder / file).stat().st_size for file in (graph.file, *graph.data_files))
            for graph in graphs.graphs
        },
        before=before,
        export=(seconds, after - cpu, memory),
    )


def fill(network: Any) -> int:
    """Give a network without weights random ones, the same numbers again and again; their bytes."""
    import torch

    numbers = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    count = 0
    for module in network.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.numel(), dtype=parameter.dtype)
                for part in values.split(len(numbers)):
                    part.copy_(numbers[: len(part)])
                module._parameters[key] = torch.nn.Parameter(values.view(parameter.shape), requires_grad=False)
                count += values.nbytes
    return count


def export_all(names: Sequence[str], folder: Path) -> Iterator[ExportRow]:
    """The rows of models, each of a process of its own."""
    for name in names:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            yield process.submit(exported, name, folder / name).result()


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted({*MODELS, *EXPORTED}), help="(default: the documented)")
    parser.add_argument("--export", action="store_true", help="export their step graphs, with random weights")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    report, run, names = reporter(), this_run(), given.models or (EXPORTED if given.export else MODELS)
    rows: list[Any] = []
    kind: type[TrueSize | TrueSizeExports] = TrueSizeExports if given.export else TrueSize
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as workers:
        traced = workers.map(lambda name: measured(name, Path(folder)), () if given.export else names)
        for row in export_all(names, Path(folder)) if given.export else traced:
            rows.append(row)
            result = kind(run=run, rows=tuple(rows))
            write_result(result, given.output)  # a model takes minutes: what was measured stays
            report.advance(len(rows), len(names))
    report.close()
    print(described(result))


if __name__ == "__main__":
    main()
