"""What linear layers in int8 or fp8 cost and save, under the plan of the engines in fp32 and under others.

    lemica-trt build --model cogvideox-tiny --budget 15 --output out/tiny
    OMP_NUM_THREADS=1 python benchmarks/quantize.py out/tiny \\
        --output benchmarks/results/quantize-cogvideox-tiny.json
    OMP_NUM_THREADS=1 python benchmarks/quantize.py out/tiny --quantize fp8 \\
        --output benchmarks/results/quantize-cogvideox-tiny-fp8.json

The bundle's engines are quantised (`lemica-trt engine --quantize int8`), and plans made for the result on its own
engines (`lemica-trt plan --calibrate-on engine`). Held-out clips on the engines; PSNR against the uncached run of those
in fp32. Beside them the same steps fitted to end where the quantised engines' own uncached runs end. int8: steps of
both are timed in turns, on `--threads` threads, as CPU time of the process. fp8: CPUs round to it and multiply in fp32,
so nothing is timed; instead an engine of TensorRT for RTX is built, which needs no GPU, and is not run. Writes JSON
(`record.Quantized`) and prints its table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import process_time

from msgspec import UNSET
from record import Quantized, QuantizedRow, RtxQuantized, this_run, write_result
from tables import described

from lemica_trt.bundle.contents import read_from
from lemica_trt.bundle.manifest import SAMPLER_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.calibrate.fit import Fitter
from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.compiler.bundle_engines import rebuild_engines
from lemica_trt.compiler.refit import refit
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.core.metrics import Frames, psnr
from lemica_trt.core.progress import Reporter, reporter
from lemica_trt.evaluate.engine_model import EngineModel
from lemica_trt.evaluate.samples import HELD_OUT_SEED, Samples, held_out_samples
from lemica_trt.evaluate.timing import request
from lemica_trt.ir.engine import Option
from lemica_trt.ir.graphs import Role
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.resources import calibration_path
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.step_plan import UNCACHED
from lemica_trt.runtime.pipeline import Pipeline

BACKEND, RTX = "onnxruntime", "tensorrt-rtx"

CAPABILITY = "8.9"
"""Of the GPUs that engines in fp8 are built for: the lowest that multiplies such numbers."""

FP32, OWN, RUNS = "plan of the fp32 engines", "plan of its own", "the same steps, fitted to its own uncached runs"


def fitted_to_own_runs(bundle: Bundle, plan: StepPlan) -> StepPlan:
    """The steps of a plan under a solver that ends where the quantised engines' own uncached runs end."""
    settings = bundle.manifest.profile.calibration
    table = read_from(bundle, SamplerTable, SAMPLER_FILE)
    prompts = read_prompts(calibration_path(settings.prompts) / "calibration.txt")
    with Pipeline(bundle, backend=BACKEND) as pipe, tempfile.TemporaryDirectory() as folder:
        fitter = Fitter(
            EngineModel(pipe, BACKEND), table, table, prompts, samples=settings.fit_samples, seed=settings.seed,
            journal=Path(folder) / "fits.jsonl",
        )  # fmt: skip
        return fitter(Schedule(num_steps=plan.num_steps, full_steps=plan.full_steps))


def clips(pipe: Pipeline, plan: StepPlan, samples: Samples) -> list[Frames]:
    """Clips of all samples."""
    model = EngineModel(pipe, BACKEND)
    return [model.frames(model.run(plan, *samples[s])) for s in range(samples.count)]


def step_seconds(pipes: list[Pipeline], plan: StepPlan, rounds: int) -> list[tuple[float, ...]]:
    """CPU seconds of a full step of each pipeline, in turns: a run of a plan over its full steps. Every other round is
    in reverse order, so that none always runs behind the same other one."""
    runs = [request(pipe, plan) for pipe in pipes]
    for run in runs:
        run()
    found: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        for which in range(len(runs)) if number % 2 == 0 else reversed(range(len(runs))):
            began = process_time()
            runs[which]()
            found[which].append((process_time() - began) / plan.budget)
    return [tuple(each) for each in found]


def quantised(bundle: Bundle, folder: Path, kind: str, threads: int, report: Reporter) -> Bundle:
    """A bundle with quantised engines and plans of their own; of fp8 with engines for GPUs, too."""
    plan = bundle.plan()
    options: dict[str, Option] = {"quantize": kind, "threads": threads}
    backends: tuple[str, ...] = (BACKEND,)
    if kind == "fp8":
        options |= {"compute_capabilities": CAPABILITY, "builder_optimization_level": 0}
        backends = (BACKEND, RTX)
    rebuild_engines(bundle, folder / kind, {"backends": backends, "options": options}, report)
    refit(Bundle.open(folder / kind), BuildRequest(budgets=(plan.budget,), backends=(BACKEND,)), report)
    return Bundle.open(folder / kind)


def rtx_engines(bundle: Bundle, role: Role) -> RtxQuantized:
    """What the engines for GPUs are."""
    entry = bundle.engine(RTX)
    sources = entry.sources or {}
    return RtxQuantized(
        version=entry.key.version,
        target=entry.key.target,
        sizes=(bundle.file(sources[role]).stat().st_size, bundle.file(entry.files[role]).stat().st_size),
        precisions=entry.builds[role].engine_precisions or {},
    )


def measure(
    bundle: Bundle, folder: Path, kind: str, count: int, rounds: int, threads: int, report: Reporter
) -> Quantized:
    """Quantise, plan, and run everything on `count` clips."""
    plan, profile = bundle.plan(), bundle.manifest.profile
    assert plan.method.startswith("fitted"), plan.method
    made = quantised(bundle, folder, kind, threads, report)
    own, uncached = made.plan(plan.name), bundle.plan(UNCACHED)
    samples = held_out_samples(read_prompts(calibration_path(profile.calibration.prompts) / "held_out.txt"), count)
    report.stage("quantize", f"{count} clips")
    entry = made.engine(BACKEND)
    (role,) = entry.quantized
    with Pipeline(bundle, backend=BACKEND, threads=threads) as plain, Pipeline(made, backend=BACKEND) as quantized:
        exact = clips(plain, uncached, samples)
        cases = [
            (plain, "fp32", FP32, plan),
            (quantized, kind, UNCACHED, uncached),
            (quantized, kind, FP32, plan),
            (quantized, kind, OWN, own),
            (quantized, kind, RUNS, fitted_to_own_runs(made, own)),
        ]
        rows = tuple(
            QuantizedRow(
                engines=engines, plan=name, full_steps=run.full_steps,
                psnr=tuple(map(psnr, clips(pipe, run, samples), exact)),
            )
            for pipe, engines, name, run in cases
        )  # fmt: skip
        seconds = step_seconds([plain, quantized], plan, rounds) if kind == "int8" else [(), ()]
    files = [each.file(each.engine(BACKEND).files[role]) for each in (bundle, made)]
    return Quantized(
        run=this_run(), model=profile.name, revision=bundle.manifest.revision, steps=plan.num_steps,
        budget=plan.budget, first_seed=HELD_OUT_SEED, threads=threads, rows=rows,
        layers=entry.builds[role].layers or (),
        sizes=tuple(file.stat().st_size for file in files), seconds=tuple(seconds), clock="cpu",
        rtx=rtx_engines(made, role) if kind == "fp8" else UNSET,
    )  # fmt: skip


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--quantize", choices=("int8", "fp8"), default="int8")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12, help="that steps are timed in")
    parser.add_argument("--threads", type=int, default=1, help="of the engines")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    report = reporter()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            Bundle.open(given.bundle), Path(folder), given.quantize, given.clips, given.rounds, given.threads, report
        )
    report.close()
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
