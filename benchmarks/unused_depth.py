"""What it costs that the graphs of a build can do more than its plans use: time of a full step by layout.

    OMP_NUM_THREADS=1 python benchmarks/unused_depth.py --output benchmarks/results/unused-depth-cogvideox-tiny.json
    OMP_NUM_THREADS=1 python benchmarks/unused_depth.py --large --rounds 16 --pairs 2 \\
        --output benchmarks/results/unused-depth-large.json

Graphs are exported before there are plans, deep enough for all that the planners may make: as many latents as the
sampler reads back, six outputs and guidance terms, and the trunk residual is given away. What a plan does not read has
a coefficient of 0. Here the full step of such graphs is timed beside that of the smallest graphs that run the uncached
sampler.

Both are in one process, with one thread, and are run in turn: A B A B … A machine's speed drifts by more than the
difference that is looked for, so that the figure is the median of the ratios of neighbours. Which session was opened
first makes more of a difference, too (4 % on the tiny model): both are opened anew for every round, in every other
round in reverse. Times are seconds of CPU: what another process takes meanwhile is not counted. Writes JSON
(`record.UnusedDepth`) and prints its table.

On a large model even that is too noisy for a tenth of a percent: beside it stands what the nodes take that only the
deep graph has, by ONNX Runtime's own profile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time

import msgspec
import numpy as np
import onnxruntime
from record import UnusedDepth, this_run, write_result
from speed import LARGE, SIDE, write_large_model
from tables import described

from lemica_trt.backends.base import NUMPY_DTYPES, open_backend
from lemica_trt.backends.build import build
from lemica_trt.core.progress import reporter
from lemica_trt.evaluate.timing import backend_name
from lemica_trt.export.graphs import export_graphs
from lemica_trt.ir.graphs import StepLayout, step_layout
from lemica_trt.ir.plan import coefficient_vector
from lemica_trt.ir.resources import load_profile
from lemica_trt.models import Model, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.step_plan import uncached_plan

OUTPUTS = 6
"""Outputs that the deep graphs keep."""

PROFILED = 10
"""Steps whose nodes are timed one by one."""

WARM_UP = 2
"""Steps of each round before the first that counts."""


def open_model(name: str, folder: Path) -> Model:
    """A bundled model, or the large one."""
    if name != LARGE:
        return load_model(load_profile(name))
    write_large_model(folder)
    profile = load_profile("cogvideox-tiny")
    shape = msgspec.structs.replace(profile.shape, height=SIDE, width=SIDE)
    return load_model(msgspec.structs.replace(profile, source=str(folder), shape=shape))


def layouts(model: Model) -> tuple[StepLayout, StepLayout]:
    """The smallest layout of the uncached sampler, and the one that graphs are exported for before there are plans."""
    table = sampler_table(model.scheduler(), dynamic_guidance=model.profile.sampling.dynamic_guidance)
    small = step_layout(
        latent_shape=tuple(model.latent_shape),
        latent_history=table.latent_history,
        output_history=table.output_history,
        conditions=model.conditions,
        trunk_depth=0,
        stochastic=table.stochastic,
        guided=model.guided,
    )
    deep = step_layout(
        latent_shape=small.latent_shape,
        latent_history=small.latent_history,
        output_history=max(OUTPUTS, small.output_history),
        conditions=small.conditions,
        trunk_depth=1,
        stochastic=small.stochastic,
        guided=small.guided,
        guidance_history=max(OUTPUTS, small.output_history) if model.branches else 0,
    )
    return small, deep


class Step:
    """The full step of a layout, exported once; bound anew for every round."""

    def __init__(self, model: Model, layout: StepLayout, folder: Path) -> None:
        role = layout.variants[0].name
        graphs = export_graphs(model, layout, folder, roles=[role])
        self.key = build("onnxruntime", graphs, folder, folder / "engines", {"threads": 1}).key
        self._graph, self._path = graphs.graph(role), folder / graphs.graph(role).file
        table = sampler_table(model.scheduler(), dynamic_guidance=model.profile.sampling.dynamic_guidance)
        plan = uncached_plan(table, guidance_scale=model.profile.sampling.guidance_scale)
        self._coefficients = coefficient_vector(plan.rows[len(plan.rows) // 2], layout)

    def bound(self) -> Callable[[], float]:
        """What runs the step once and gives its seconds of CPU, in a new session with new buffers."""
        backend, graph, buffers = open_backend(self.key), self._graph, {}
        for spec in (*graph.inputs, *graph.outputs):
            buffers[spec.name] = backend.empty(spec.at(1), spec.dtype)
        for spec in graph.inputs:
            numbers = np.random.default_rng(zlib.crc32(spec.name.encode())).standard_normal(spec.at(1))
            values = self._coefficients if spec.name == "coefficients" else numbers
            backend.upload(values.astype(NUMPY_DTYPES[spec.dtype]), buffers[spec.name])
        call = backend.load(graph, self._path).bind(buffers)

        def run() -> float:
            start = process_time()
            call.run()
            return process_time() - start

        for _ in range(WARM_UP):
            run()
        return run

    def nodes(self) -> dict[str, list[float]]:
        """Operator and shapes → median seconds of each node of the graph that has them, from ONNX Runtime's profile."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(self._path.parent / "profile")
        session = onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        inputs = {
            spec.name: np.full(spec.at(1), 0.1, NUMPY_DTYPES[spec.dtype])
            for spec in self._graph.inputs if spec.name != "coefficients"
        }  # fmt: skip
        for _ in range(PROFILED):
            session.run(None, {"coefficients": self._coefficients, **inputs})
        seconds: dict[tuple[str, str], list[float]] = {}
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                about = event["args"]
                kind = f"{about['op_name']} {about['input_type_shape']} {about['output_type_shape']}"
                seconds.setdefault((kind, event["name"]), []).append(event["dur"] * 1e-6)
        found: dict[str, list[float]] = {}
        for (kind, _), times in seconds.items():
            found.setdefault(kind, []).append(median(times))
        return found


def extra_seconds(small: dict[str, list[float]], deep: dict[str, list[float]]) -> float:
    """What the nodes take that only the deep graph has, less those that only the small one has."""
    extra = 0.0
    for kind in {*small, *deep}:
        more = len(deep.get(kind, ())) - len(small.get(kind, ()))
        extra += more * median([*deep.get(kind, ()), *small.get(kind, ())])
    return extra


def timed_round(small: Step, deep: Step, pairs: int, *, deep_first: bool) -> tuple[list[float], list[float]]:
    """Seconds of both steps, in turn."""
    order = (deep, small) if deep_first else (small, deep)
    runs = [(step, step.bound()) for step in order]
    seconds: dict[Step, list[float]] = {small: [], deep: []}
    for _ in range(pairs):
        for step, run in runs:
            seconds[step].append(run())
    return seconds[small], seconds[deep]


def measure(name: str, model: Model, folder: Path, rounds: int, pairs: int) -> UnusedDepth:
    """Time both layouts in turn."""
    report = reporter()
    report.stage("export", name)
    steps = [Step(model, layout, folder / f"{number}") for number, layout in enumerate(layouts(model))]
    report.stage("profile", f"{PROFILED} steps of each")
    extra = extra_seconds(*(step.nodes() for step in steps))
    report.stage("time", f"{rounds} rounds of {pairs} pairs")
    small, deep = list[tuple[float, ...]](), list[tuple[float, ...]]()
    for number in range(rounds):
        of_small, of_deep = timed_round(*steps, pairs, deep_first=number % 2 == 1)
        small.append(tuple(of_small))
        deep.append(tuple(of_deep))
        report.advance(number + 1, rounds)
    report.close()
    return UnusedDepth(
        run=this_run(),
        model=name,
        revision=None if name == LARGE else model.revision,
        parameters=sum(weights.numel() for weights in model.pipeline.transformer.parameters()),
        latent_shape=tuple(model.latent_shape),
        dtype=model.profile.dtype,
        backend=backend_name(steps[0].key),
        outputs=tuple(layout.output_history for layout in layouts(model)),
        extra_node_seconds=extra,
        seconds=tuple(small),
        deep_seconds=tuple(deep),
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cogvideox-tiny", help="profile of a bundled model")
    parser.add_argument("--large", action="store_true", help="a larger model with random weights instead")
    parser.add_argument("--rounds", type=int, default=40, help="how often both are opened, an even number")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of steps in a round")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    name = LARGE if given.large else given.model
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        result = measure(name, open_model(name, root / "model"), root, given.rounds, given.pairs)
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
