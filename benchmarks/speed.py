"""Time of the denoising loop: diffusers, the runtime with all steps in full, and the runtime with step plans.

    python benchmarks/speed.py --output benchmarks/results/speed-cogvideox-tiny.json
    python benchmarks/speed.py --large --rounds 5 --also decomposed openvino openvino-bf16 \\
        --output benchmarks/results/speed-large.json

One request of two guidance branches; text encoder and VAE are left out everywhere. Two kinds of plans, both with full
steps at equal distances, because where they lie does not change the time: `uniform` runs the cheap skip graph in
between, `first-order` runs B engine calls and nothing else, as fitted solvers do.

A machine's speed drifts by more than the differences that are looked for. So all of them are timed in every round, in
turn, every other round in reverse; a speed-up is the median over rounds of the ratio of two times of the same round.
PyTorch and the engines get the same number of threads (`--threads`): OMP_NUM_THREADS alone limits PyTorch only. Run
nothing else: with more than one thread PyTorch can become many times slower on a busy machine, and the engines do not.
`--also` times the uncached and the first-order plans on other engines too, in the same rounds: the exported graph on
ONNX Runtime, with its attention in parts (`decomposed`), and OpenVINO in fp32 and bf16.
`--large` is a random CogVideoX of 8 layers × 512 and 2044 tokens. Writes JSON (`record.Speed`) and prints its table.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from diffusers import CogVideoXTransformer3DModel
from msgspec.structs import replace
from record import LIBRARIES, Speed, SpeedRow, this_run, write_result
from tables import described

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.progress import reporter
from lemica_trt.evaluate.timing import backend_name, request
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.resources import zoo_path
from lemica_trt.models import Model, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.solvers import first_order_table
from lemica_trt.planning.step_plan import plan_from_schedule, plan_from_solver
from lemica_trt.runtime.denoise import RowDone
from lemica_trt.runtime.pipeline import Pipeline

LARGE = "random-8x512"
SIDE = 416
"""Height and width of the large model's frames, pixels."""

ALSO = ("decomposed", "openvino", "openvino-bf16")

WARM_UP = 2
"""Steps of the warm-up of diffusers."""


class Timed(NamedTuple):
    """Seconds of a loop, and of its rows that run the whole DiT and those that do not."""

    seconds: float
    full: Sequence[float] = ()
    skipped: Sequence[float] = ()


class Runner(NamedTuple):
    """Something to time."""

    name: str
    method: str
    full_steps: int
    run: Callable[[], Timed]
    engines: str = ""


def write_large_model(folder: Path) -> None:
    """The bundled pipeline with a random transformer of 8 layers × 512: 3·26·26 + 16 = 2044 tokens."""
    shutil.copytree(zoo_path("cogvideox-tiny"), folder)
    torch.manual_seed(0)
    config = dict(CogVideoXTransformer3DModel.load_config(folder / "transformer"))
    latent = SIDE // 8
    config.update(num_layers=8, num_attention_heads=8, attention_head_dim=64, sample_height=latent, sample_width=latent)
    shutil.rmtree(folder / "transformer")
    CogVideoXTransformer3DModel.from_config(config).save_pretrained(folder / "transformer")


def built(model: str, root: Path, budget: int, backends: Sequence[str], *, large: bool) -> Bundle:
    """A bundle that nothing is calibrated for."""
    command = ["--model", model, "--method", "uniform", "--budget", str(budget), "--verify-samples", "0"]
    if large:
        write_large_model(root / "model")
        command += ["--weights", str(root / "model"), "--height", str(SIDE), "--width", str(SIDE)]
    command += [word for backend in backends for word in ("--backend", backend)]
    command += ["--output", str(root / "bundle"), "--quiet"]
    subprocess.run([sys.executable, "-m", "lemica_trt", "build", *command], check=True, stdout=subprocess.DEVNULL)
    return Bundle.open(root / "bundle")


def eager(model: Model) -> Callable[..., Timed]:
    """The diffusers pipeline from given embeddings and noise to latents."""
    profile = model.profile
    embeds, noise = model.embed(["a big red circle moves left"]), model.noise(0)[None]

    def run(steps: int = profile.sampling.steps) -> Timed:
        start = perf_counter()
        model.pipeline(
            prompt_embeds=embeds[1:],
            negative_prompt_embeds=embeds[:1],
            num_frames=profile.shape.frames,
            height=profile.shape.height,
            width=profile.shape.width,
            num_inference_steps=steps,
            guidance_scale=profile.sampling.guidance_scale,
            output_type="latent",
            **model.family.call_arguments(profile, noise),
        )
        return Timed(perf_counter() - start)

    return run


def by_plan(pipe: Pipeline, plan: StepPlan) -> Callable[[], Timed]:
    """The runtime with a plan; rows are timed in the same run, which waits for the device after each."""
    call, full = request(pipe, plan), set(plan.full_steps)

    def run() -> Timed:
        rows: list[RowDone] = []
        start = perf_counter()
        call(on_step=rows.append)
        seconds = perf_counter() - start
        steps = [row for row in rows if row.step < plan.num_steps]
        return Timed(
            seconds,
            [row.seconds for row in steps if row.step in full],
            [row.seconds for row in steps if row.step not in full],
        )

    return run


def on_other_engines(bundle: Bundle, also: str) -> Bundle:
    """The bundle as one whose first engines are others: one of `ALSO`."""
    (name, bucket), *_ = bundle.manifest.buckets.items()
    if also == "decomposed":
        entry = bundle.engine("onnxruntime")
        entry = replace(entry, files={graph.role: graph.file for graph in bucket.graphs.graphs})
    else:
        entry = bundle.engine("openvino")
        precision = "bf16" if also.endswith("bf16") else "fp32"
        entry = replace(entry, key=replace(entry.key, options={**entry.key.options, "inference_precision": precision}))
    manifest = replace(bundle.manifest, buckets={name: replace(bucket, engines=(entry,))})
    return Bundle(bundle.path, manifest, manifest.digest)


def on_others(bundle: Bundle, every: Sequence[tuple[Runner, StepPlan]], also: str, threads: int) -> Iterator[Runner]:
    """The plans that run the whole DiT only, on other engines."""
    pipe = Pipeline(on_other_engines(bundle, also), threads=threads)
    for runner, plan in every:
        if runner.method != "uniform":
            yield runner._replace(name=f"{runner.name}-{also}", run=by_plan(pipe, plan), engines=also)


def runners(
    bundle: Bundle, model: Model, budgets: Sequence[int], threads: int, also: Sequence[str]
) -> Iterator[Runner]:
    """What is timed: eager, uncached, two plans a budget; then some of them on other engines."""
    steps, guidance = model.profile.sampling.steps, model.profile.sampling.guidance_scale
    pipe, table = Pipeline(bundle, threads=threads), sampler_table(model.scheduler())
    uncached = next(plan for plan in map(bundle.plan, bundle.plans) if plan.budget == plan.num_steps)
    yield Runner("eager", "", steps, eager(model))
    every = [(Runner("uncached", "", steps, by_plan(pipe, uncached)), uncached)]
    for budget in budgets:
        schedule = uniform(steps, budget)
        solver = first_order_table(table, schedule.full_steps)
        for method, plan in (
            ("uniform", plan_from_schedule(schedule, table, name="uniform", guidance_scale=guidance, method="uniform")),
            ("first-order", plan_from_solver(schedule, table, solver, name="first-order", guidance_scale=guidance,
                                             method="first-order")),
        ):  # fmt: skip
            every.append((Runner(f"b{budget}-{method}", method, budget, by_plan(pipe, plan)), plan))
    yield from (runner for runner, _ in every)
    for name in also:
        yield from on_others(bundle, every, name, threads)


def measured(runner: Runner, rounds: Sequence[Timed]) -> SpeedRow:
    """All rounds of one runner."""
    full = [seconds for timed in rounds for seconds in timed.full]
    skipped = [seconds for timed in rounds for seconds in timed.skipped]
    return SpeedRow(
        name=runner.name,
        method=runner.method,
        full_steps=runner.full_steps,
        seconds=tuple(timed.seconds for timed in rounds),
        full_step=median(full) if full else None,
        skipped_step=median(skipped) if skipped else None,
        beyond=median(timed.seconds / sum((*timed.full, *timed.skipped)) - 1 for timed in rounds) if full else None,
        engines=runner.engines,
    )


def measure(bundle: Bundle, model: Model, name: str, given: argparse.Namespace) -> Speed:
    """Time everything in turn, in every round once."""
    torch.set_num_threads(given.threads)
    libraries = (*LIBRARIES, "openvino") if any("openvino" in name for name in given.also) else LIBRARIES
    run, rounds = this_run(*libraries), given.rounds
    every = list(runners(bundle, model, given.budgets, given.threads, given.also))
    report = reporter()
    report.stage("warm up", f"{len(every)} loops")
    eager(model)(WARM_UP)
    for runner in every[2:]:
        runner.run()
    times: dict[str, list[Timed]] = {runner.name: [] for runner in every}
    report.stage("time", f"{rounds} rounds")
    for index in range(rounds):
        for runner in reversed(every) if index % 2 else every:
            times[runner.name].append(runner.run())
        report.advance(index + 1, rounds)
    report.close()
    return Speed(
        run=run,
        model=name,
        revision=None if name == LARGE else bundle.manifest.revision,
        parameters=sum(weights.numel() for weights in model.pipeline.transformer.parameters()),
        latent_shape=tuple(model.latent_shape),
        dtype=model.profile.dtype,
        threads=given.threads,
        backend=backend_name(bundle.engine(None).key),
        steps=model.profile.sampling.steps,
        rows=tuple(measured(runner, times[runner.name]) for runner in every),
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cogvideox-tiny", help="profile of a bundled model")
    parser.add_argument("--large", action="store_true", help="a larger model with random weights instead")
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 15, 20, 25], help="full steps of the plans")
    parser.add_argument("--also", nargs="+", choices=ALSO, default=[], help="other engines, in the same rounds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, and of the engines")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backends = ["onnxruntime", *(["openvino"] if {"openvino", "openvino-bf16"} & {*given.also} else [])]
        bundle = built(given.model, Path(folder), given.budgets[0], backends, large=given.large)
        source = str(Path(folder) / "model") if given.large else None
        model = load_model(bundle.manifest.profile, source=source)
        name = LARGE if given.large else given.model
        result = measure(bundle, model, name, given)
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
