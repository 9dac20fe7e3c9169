"""What a GPU says: one command, eight minutes, one JSON and one table.

    python benchmarks/gpu.py --output out/gpu                      on a machine with an NVIDIA GPU
    python benchmarks/gpu.py --tiny --device null --output DIR     without one, in seconds: so that it cannot rot

Parts, each in a process of its own with a share of the time (on the null device, where nothing can crash, all in one).
One that fails, crashes or takes too long is recorded with the last line of what it said, and what it had found until
then; the others go on.

    machine     device, driver, versions; whether TensorRT for RTX takes the device: engines for its default targets,
                and for `current`
    tiny        cogvideox-tiny in fp32, fp16 and bf16: engines through the runtime against PyTorch on the same device,
                whole plans, in all three ways of launching
    sanitizer   compute-sanitizer over the small case, where it is installed
    torch       a CogVideoX-2B-size model with random weights, 49 frames of 480×720, by PyTorch: eager, torch.compile,
                and CUDA graphs driving the same plan rows through the same loop. Where TensorRT refuses the device
                this is what measures the plan's gain: PyTorch + CUDA graphs, not TensorRT
    engines     the same model, exported and built here: a full step, a skipped step, plans against all steps, what a
                launch costs with and without a graph

The machine needs PyTorch with CUDA, diffusers, cuda-core, onnx, onnxscript, TensorRT for RTX, and this project's own
dependencies. What it cannot fetch is carried as wheels; an image with PyTorch and ONNX mostly lacks

    pip download --no-deps -d WHEELS msgspec diffusers tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings
    pip wheel --no-deps -w WHEELS tensorrt-rtx tensorrt-rtx-cu13
    pip install --no-index --no-deps --target SITE WHEELS/*.whl; export PYTHONPATH=SITE        # there
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project as it lies here, installed or not

from lemica_trt.backends.base import Array, Backend, Capture, Settings
from lemica_trt.backends.build import build
from lemica_trt.core.errors import LemicaError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import read_value, write_bytes, write_value
from lemica_trt.ir.engine import EngineEntry, EngineKey
from lemica_trt.ir.graphs import GraphSet, Role, StepLayout
from lemica_trt.ir.plan import StepPlan, layout_from_plans
from lemica_trt.ir.profile import Profile, Shape
from lemica_trt.ir.resources import load_profile, zoo_path
from lemica_trt.runtime.denoise import Denoiser, RowDone
from lemica_trt.runtime.random import Generator

BACKEND = "tensorrt-rtx"
STEP_ROLES: tuple[Role, ...] = ("combine", "full", "skip")
CAPTURES: tuple[Capture, ...] = ("plan", "step", "none")
PARTS = {"machine": 0.13, "tiny": 0.14, "sanitizer": 0.07, "torch": 0.27, "engines": 0.39}
"""Part → its share of the time; what one leaves over, the later ones share."""

PROBE = 2
"""Full steps of the plan that single rows are timed in."""

REPEATS = 5
"""Most times that a whole plan is timed."""

COMPILE = 60.0
"""Seconds that torch.compile of the large model may take; it is not begun with less."""

GUIDANCE = 6.0
LARGE = {  # huggingface.co/zai-org/CogVideoX-2b, transformer/config.json; the text width is that of the bundled encoder
    "num_layers": 30,
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "time_embed_dim": 512,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "max_text_seq_length": 226,
    "spatial_interpolation_scale": 1.875,
}


class Part:
    """What one part finds; on disk after every finding, so that a part that is killed has said what it knew.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tiny: bool = options.tiny
        self.null: bool = options.device == "null"
        self.torch_device = "cpu" if self.null else "cuda"
        self.folder: Path = options.output
        self.work: Path = options.output / "work"
        self._deadline = time.monotonic() + options.seconds
        self._found: dict[str, Any] = {}

    def found(self, name: str, value: Any) -> None:
        """Record a finding."""
        self._found[name] = value
        write_bytes(json.dumps(self._found, indent=1, default=float).encode(), self.work / f"{self.options.part}.json")

    def attempt(self, name: str, function: Callable[[], Any]) -> Any:
        """Record what a function returns, or how it failed; its result, or None."""
        try:
            result = function()
        except Exception as error:  # a benchmark: whatever it was, the rest goes on
            self.found(name, {"error": _last_line(f"{type(error).__name__}: {error}")})
            return None
        self.found(name, result)
        return result

    def left(self) -> float:
        """Seconds until the part should end."""
        return self._deadline - time.monotonic()

    def earlier(self, part: str) -> dict[str, Any]:
        """What an earlier part found."""
        path = self.work / f"{part}.json"
        return json.loads(path.read_bytes()) if path.is_file() else {}


# ---------------------------------------------------------------- models and plans


def profile_of(part: Part, dtype: str, *, large: bool) -> Profile:
    """The bundled model's profile, or that of the large one; one request a call, so that all shapes are static."""
    profile = load_profile("cogvideox-tiny")
    shape = Shape(frames=49, height=480, width=720) if large and not part.tiny else Shape(frames=9, height=64, width=64)
    steps = 8 if part.tiny else 50
    sampling = msgspec.structs.replace(profile.sampling, steps=steps, guidance_scale=GUIDANCE)
    length = 226 if large and not part.tiny else profile.text_length
    return msgspec.structs.replace(profile, dtype=dtype, shape=shape, sampling=sampling, text_length=length)


def large_model(part: Part, device: str) -> Any:
    """The bundled pipeline with a random transformer of the size of CogVideoX-2B, fp16 (`--tiny`: of two layers)."""
    import torch
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.utils import logging

    from lemica_trt.models import load_model
    from lemica_trt.models.model import Model

    profile = profile_of(part, "fp32" if part.null else "fp16", large=True)
    base = load_model(msgspec.structs.replace(profile, text_length=16, shape=Shape(frames=9, height=64, width=64)))
    logging.set_verbosity_error()
    config = dict(base.pipeline.transformer.config)
    config.update({"num_layers": 2} if part.tiny else LARGE)
    torch.manual_seed(0)
    with torch.device(part.torch_device):
        transformer = CogVideoXTransformer3DModel.from_config(config).to(base.dtype).eval()
    base.pipeline.register_modules(transformer=transformer)
    base.pipeline.to(device)
    return Model(profile, base.family, base.pipeline, zoo_path("cogvideox-tiny"))


def plans_of(model: Any, budgets: Sequence[int]) -> list[StepPlan]:
    """Plans with full steps at equal distances – where they lie does not change the time –, and the uncached one."""
    from lemica_trt.models.scheduler import sampler_table
    from lemica_trt.planning.planner import Problem, planners
    from lemica_trt.planning.step_plan import uncached_plan

    table = sampler_table(model.scheduler())
    problem = Problem(table=table, guidance_scale=GUIDANCE)
    return [
        *(planners()["uniform"](problem, budget) for budget in budgets),
        uncached_plan(table, guidance_scale=GUIDANCE),
    ]


def layout_of(model: Any, plans: Sequence[StepPlan]) -> StepLayout:
    """The layout of a model's step graphs."""
    return layout_from_plans(plans, latent_shape=model.latent_shape, guided=model.guided, conditions=model.conditions)


def request_of(model: Any, layout: StepLayout) -> dict[str, Array]:
    """Arguments of `Denoiser.run` for one request."""
    embeds = model.embed(["a big red circle moves left"]).float().cpu().numpy()
    noise = Generator(7).randn((1, *layout.latent_shape))
    return {"conditions": {"prompt_embeds": embeds}, "noise": noise, "guidance": np.array([GUIDANCE])}


# ---------------------------------------------------------------- engines


def build_engines(part: Part, graphs: GraphSet, root: Path, target: str) -> EngineEntry:
    """Engines of exported graphs: RTX's, or on the null device descriptions that ONNX Runtime computes."""
    if not part.null:
        options = {"compute_capabilities": target} if target else {}
        return build(BACKEND, graphs, root, root, options, Quiet())
    from lemica_trt.testing.null import VERSION, NullPlan, write_engine

    files: dict[Role, str] = {graph.role: f"engines/{graph.role}.engine" for graph in graphs.graphs}
    for graph in graphs.graphs:
        write_engine(NullPlan(graph=graph, onnx=str((root / graph.file).resolve())), root / files[graph.role])
    key = EngineKey(backend=BACKEND, version=VERSION, target="sm_89", dtype=graphs.dtype, graphs_digest="0" * 64)
    return EngineEntry(key=key, files=files)


def open_engines(part: Part, graphs: GraphSet, entry: EngineEntry, root: Path, capture: Capture) -> Denoiser:
    """The loop on engines that were built."""
    settings = Settings(capture=capture, cache=root / "cache")
    backend: Backend
    if part.null:
        from lemica_trt.backends.tensorrt.run import TensorRTBackend
        from lemica_trt.testing.null import NullDevice, null_vendor

        device = NullDevice()
        backend = TensorRTBackend(null_vendor(device), device, entry.key, settings)
    else:
        from lemica_trt.backends.base import open_backend

        backend = open_backend(entry.key, settings)
    engines = {graph.role: backend.load(graph, root / entry.files[graph.role]) for graph in graphs.graphs}
    return Denoiser(backend, graphs, engines)


def export(model: Any, layout: StepLayout, root: Path) -> GraphSet:
    """Export the step graphs only."""
    from lemica_trt.export.graphs import export_graphs

    return export_graphs(model, layout, root, roles=STEP_ROLES)


def tiny_model(part: Part, dtype: str) -> tuple[Any, list[StepPlan], StepLayout]:
    """The bundled model on the CPU, its plans and its layout."""
    from lemica_trt.models import load_model

    model = load_model(profile_of(part, dtype, large=False))
    if part.tiny:
        del model.pipeline.transformer.transformer_blocks[2:]
    plans = plans_of(model, [4] if part.tiny else [10, 25])
    return model, plans, layout_of(model, plans)


def tiny_graphs(part: Part, model: Any, layout: StepLayout) -> tuple[GraphSet, Path]:
    """The bundled model's step graphs and where they lie; exported by the first part that asks."""
    root = part.work / f"tiny-{model.profile.dtype}"
    if not (root / "graphs.json").is_file():
        write_value(export(model, layout, root), root / "graphs.json")
    return read_value(GraphSet, root / "graphs.json"), root


# ---------------------------------------------------------------- measuring


def row_times(denoiser: Denoiser, plan: StepPlan, request: Mapping[str, Any], repeats: int) -> dict[str, float]:
    """Median seconds of a full and a skipped row, the host waiting after each; after two runs to warm up."""
    rows: dict[str, list[float]] = {"full": [], "skip": []}

    def note(row: RowDone) -> None:
        if row.variant in rows:
            rows[row.variant].append(row.seconds)

    denoiser.run(plan, **request)
    denoiser.run(plan, **request, on_step=lambda row: None)
    for _ in range(repeats):
        denoiser.run(plan, **request, on_step=note)
    return {name: median(seconds) for name, seconds in rows.items() if seconds}


def timed(denoiser: Denoiser, plan: StepPlan, request: Mapping[str, Any]) -> tuple[float, Array]:
    """Seconds of a whole plan, uploads and download included, and its latents. The first one also captures it, where
    the contexts are warm."""
    start = time.perf_counter()
    latents = denoiser.run(plan, **request)
    return time.perf_counter() - start, latents


def plan_table(part: Part, denoiser: Denoiser, plans: Sequence[StepPlan], request: Any, full: float) -> list[Any]:
    """Plans against all steps: seconds, overhead over B full steps, speed-up. Those that there is no time for are
    left out by name; N full steps stand for an uncached plan that was.

    Each is run once, and all once more as long as there is time: the first run of a plan, which captures it, counts
    only where there is no other (`with_capture`).

    Args:
        plans: the first is run to warm up.
        full: seconds of a full step.
    """
    denoiser.run(plans[0], **request)
    runs: dict[str, list[float]] = {plan.name: [] for plan in plans}
    finite: dict[str, bool] = {}
    for _ in range(1 + REPEATS):
        for plan in plans:
            if full * plan.budget * 1.2 < part.left():
                seconds, latents = timed(denoiser, plan, request)
                runs[plan.name].append(seconds)
                finite[plan.name] = bool(np.isfinite(latents).all())
    table: list[dict[str, Any]] = []
    for plan in plans:
        row: dict[str, Any] = {"plan": plan.name, "budget": plan.budget, "steps": plan.num_steps}
        table.append(row)
        if not runs[plan.name]:
            row["left_out"] = "no time"
            continue
        row["with_capture"] = len(runs[plan.name]) == 1
        row["seconds"] = median(runs[plan.name][1:] or runs[plan.name])
        row["overhead"] = row["seconds"] / (plan.budget * full) - 1
        row["finite"] = finite[plan.name]
    uncached = next((row["seconds"] for row in table if row["budget"] == row["steps"] and "seconds" in row), None)
    for row in table:
        if "seconds" in row:
            row["speedup"] = (uncached or row["steps"] * full) / row["seconds"]
            row["against"] = "the uncached plan" if uncached else "steps × full step"
    return table


def difference(found: Array, expected: Array) -> dict[str, float]:
    """Largest absolute difference, and that of the norms ‖found − expected‖ / ‖expected‖."""
    error = found.astype(np.float64) - expected
    return {"largest": np.abs(error).max(), "relative": np.linalg.norm(error) / np.linalg.norm(expected)}


# ---------------------------------------------------------------- parts


def machine(part: Part) -> None:
    """What is here, and whether RTX takes it."""
    part.found("host", {"python": platform.python_version(), "machine": platform.machine()})
    names = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "cuda-core", "cuda-bindings", "tensorrt-rtx")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    part.found("versions", versions)

    def device() -> dict[str, Any]:
        if part.null:
            from lemica_trt.testing.null import NullDevice as Device
        else:
            from lemica_trt.backends.tensorrt.cuda import CudaDevice as Device
        opened = Device()
        opened.use()
        free, total = opened.memory_info()
        return {
            "name": opened.name,
            "compute_capability": opened.compute_capability,
            "driver_cuda": opened.driver,
            "memory_free": free,
            "memory_total": total,
        }

    part.attempt("device", device)
    model, plans, layout = tiny_model(part, "fp32" if part.null else "fp16")
    graphs, root = tiny_graphs(part, model, layout)
    request = request_of(model, layout)
    usable = []
    for target in ("",) if part.null else ("", "current"):

        def runs(target: str = target) -> str:
            denoiser = open_engines(part, graphs, build_engines(part, graphs, root, target), root, "none")
            latents = denoiser.run(plans[0], **request)
            return "runs" if np.isfinite(latents).all() else "runs, the result is not finite"

        answer = part.attempt(f"rtx engines for {target or 'the default targets'}", runs)
        if answer is not None:
            usable.append(target)
            part.found("usable_targets", usable)
    part.found("usable_targets", usable)


def usable_target(part: Part) -> str:
    """The RTX target that runs here; the default one is tried where part machine was ended before it knew.

    Raises:
        RuntimeError: there is none, or part machine has not run.
    """
    known = part.earlier("machine")
    targets = known.get("usable_targets", [""] if known else [])
    if not targets:
        raise RuntimeError("TensorRT for RTX runs no engine on this device (part machine): see part torch instead")
    return str(targets[0])


def tiny(part: Part) -> None:
    """The bundled model in every precision, every way of launching, against PyTorch."""
    target = usable_target(part)
    for dtype in ("fp32",) if part.null else ("fp16", "fp32", "bf16"):  # part sanitizer runs the first
        part.attempt(f"{dtype} build", lambda dtype=dtype: _tiny(part, dtype, target))  # type: ignore[misc]


def _tiny(part: Part, dtype: str, target: str) -> dict[str, float]:
    """One precision: a finding for each way of launching, so that one that fails leaves the others."""
    model, plans, layout = tiny_model(part, dtype)
    request = request_of(model, layout)
    graphs, root = tiny_graphs(part, model, layout)
    model.pipeline.to(part.torch_device)
    expected = {plan.name: reference(model, plan, request) for plan in plans}
    start = time.perf_counter()
    entry = build_engines(part, graphs, root, target)
    build_seconds = time.perf_counter() - start
    write_value(entry, root / "entry.json")
    write_value(plans[0], root / "plan.json")
    # What the precision itself costs, and whether engines cost more.
    exact = None if dtype == "fp32" else reference(tiny_model(part, "fp32")[0], plans[0], request)
    if exact is not None:
        part.found(f"{dtype}, PyTorch against fp32", difference(expected[plans[0].name], exact))

    def launched(capture: Capture) -> dict[str, Any]:
        denoiser = open_engines(part, graphs, entry, root, capture)
        denoiser.run(plans[0], **request)
        found: dict[str, Any] = {}
        for plan in plans:
            timed(denoiser, plan, request)
            runs = [timed(denoiser, plan, request) for _ in range(3 if part.tiny else 10)]
            latents = runs[-1][1]
            found[plan.name] = {
                "seconds": median(seconds for seconds, _ in runs),
                **difference(latents, expected[plan.name]),
                "repeats_to_the_bit": bool(np.array_equal(latents, runs[-2][1])),
            }
        if exact is not None:
            found[f"{plans[0].name} against fp32"] = difference(denoiser.run(plans[0], **request), exact)
        return found

    for capture in CAPTURES:
        part.attempt(f"{dtype}, capture {capture}", partial(launched, capture))
    return {"seconds": build_seconds}


def reference(model: Any, plan: StepPlan, request: Mapping[str, Any]) -> Array:
    """A plan by PyTorch, row by row."""
    import torch

    from lemica_trt.models.denoise import denoise

    embeds = torch.from_numpy(request["conditions"]["prompt_embeds"]).to(model.device, model.dtype)
    latents = denoise(model, plan, embeds, torch.from_numpy(request["noise"]), guidance_scale=GUIDANCE)
    found: Array = latents.cpu().numpy()
    return found


def sanitizer(part: Part) -> None:
    """Run the small case again under compute-sanitizer (on the null device: by itself)."""
    program = None if part.null else shutil.which("compute-sanitizer")
    if program is None and not part.null:
        part.found("memcheck", "compute-sanitizer is not installed")
        return
    command = [] if program is None else [program, "--tool", "memcheck", "--error-exitcode", "9"]
    done = subprocess.run(
        [*command, *part_command("sanitized", part.options, part.left())],
        capture_output=True, text=True, timeout=max(part.left() - 2, 1), check=False,
    )  # fmt: skip
    summary = re.search(r"ERROR SUMMARY: (\d+) error", done.stdout + done.stderr)
    part.found("memcheck", {"errors": None if summary is None else int(summary[1]), "exit_code": done.returncode})
    part.found("plan under it", part.earlier("sanitized"))
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        part.found("says", [*lines[:12], _last_line(done.stderr)])


def sanitized(part: Part) -> None:
    """What runs under compute-sanitizer: one plan, plain, then captured. No torch."""
    root = part.work / ("tiny-fp32" if part.null else "tiny-fp16")
    graphs = read_value(GraphSet, root / "graphs.json")
    entry = read_value(EngineEntry, root / "entry.json")
    plan = read_value(StepPlan, root / "plan.json")
    spec = next(spec for spec in graphs.graph("full").inputs if spec.name == "prompt_embeds")
    random = np.random.default_rng(0)
    request = {
        "conditions": {"prompt_embeds": random.standard_normal([int(n) for n in spec.shape])},
        "noise": random.standard_normal((1, *graphs.layout.latent_shape)).astype(np.float32),
        "guidance": np.array([GUIDANCE]),
    }
    denoiser = open_engines(part, graphs, entry, root, "plan")
    results = [denoiser.run(plan, **request) for _ in range(3)]
    part.found("equal", all(np.array_equal(results[0], result) for result in results))


def torch_part(part: Part) -> None:
    """The large model by PyTorch."""
    import torch

    from lemica_trt.backends.torch.options import TorchOptions
    from lemica_trt.evaluate.torch_runtime import torch_denoiser

    model = large_model(part, part.torch_device)
    plans = plans_of(model, [PROBE, 4] if part.tiny else [PROBE, 10, 15, 25])
    layout = layout_of(model, plans)
    request = request_of(model, layout)
    parameters = sum(p.numel() for p in model.pipeline.transformer.parameters())
    part.found("model", {"parameters": parameters, "latents": model.latent_shape, "dtype": model.profile.dtype})
    repeats = 2
    eager = part.attempt(
        "eager step",
        lambda: row_times(torch_denoiser(model, layout, capture="none"), plans[0], request, repeats),
    )
    if eager is None:
        return
    label = "PyTorch + CUDA graphs (not TensorRT)" if not part.null else "PyTorch on the CPU"
    part.attempt(
        f"plans, {label}",
        lambda: plan_table(part, torch_denoiser(model, layout, capture="plan"), plans, request, eager["full"]),
    )
    gc.collect()

    def compiled() -> dict[str, float]:
        if part.tiny or part.left() < COMPILE:
            return {"left_out": "--tiny" if part.tiny else "no time"}  # type: ignore[dict-item]
        return row_times(
            torch_denoiser(model, layout, capture="none", options=TorchOptions(compile=True)),
            plans[0],
            request,
            repeats,
        )

    part.attempt("torch.compile step", compiled)
    if not part.null:
        part.found("peak_memory", torch.cuda.max_memory_allocated())


def engines(part: Part) -> None:
    """The large model by the runtime."""
    target = usable_target(part)
    start = time.perf_counter()
    if part.tiny:  # what part machine has exported will do
        model, plans, layout = tiny_model(part, "fp32" if part.null else "fp16")
        graphs, root = tiny_graphs(part, model, layout)
    else:
        model, root = large_model(part, "cpu"), part.work / "large"
        plans = plans_of(model, [PROBE, 10, 15, 25])
        layout = layout_of(model, plans)
        graphs = export(model, layout, root)
    request = request_of(model, layout)
    part.found("export_seconds", time.perf_counter() - start)
    del model
    gc.collect()
    if not part.null:  # what PyTorch keeps of the memory that the weights were drawn in
        import torch

        torch.cuda.empty_cache()
    start = time.perf_counter()
    entry = build_engines(part, graphs, root, target)
    part.found("build_seconds", time.perf_counter() - start)
    part.found("builds", msgspec.to_builtins(getattr(entry, "builds", {})))
    steps: dict[str, dict[str, float]] = {}
    for capture in ("none", "step"):
        measured = part.attempt(
            f"step, capture {capture}",
            lambda capture=capture: row_times(  # type: ignore[misc]
                open_engines(part, graphs, entry, root, capture), plans[0], request, 2
            ),
        )
        gc.collect()
        if measured is not None:
            steps[capture] = measured
    if len(steps) == 2:
        part.found("launch cost of a skipped step without a graph", steps["none"]["skip"] - steps["step"]["skip"])
    full = min(step["full"] for step in steps.values())
    part.attempt(
        "plans, engines",
        lambda: plan_table(part, open_engines(part, graphs, entry, root, "plan"), plans, request, full),
    )


FUNCTIONS: dict[str, Callable[[Part], None]] = {
    "machine": machine,
    "tiny": tiny,
    "sanitizer": sanitizer,
    "sanitized": sanitized,
    "torch": torch_part,
    "engines": engines,
}

# ---------------------------------------------------------------- all of them


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:500]


def part_command(name: str, options: argparse.Namespace, seconds: float) -> list[str]:
    """The command that runs one part."""
    command = [sys.executable, __file__, "--part", name, "--device", options.device, "--seconds", str(seconds)]
    return [*command, "--output", str(options.output), *(["--tiny"] if options.tiny else [])]


def run_part(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a part; what it found, how long it took, how it failed."""
    file = options.output / "work" / f"{name}.json"
    file.unlink(missing_ok=True)
    start, error = time.monotonic(), None
    try:
        if options.device == "null":
            FUNCTIONS[name](Part(argparse.Namespace(**{**vars(options), "part": name, "seconds": seconds})))
        else:
            command = part_command(name, options, seconds)
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 10, check=False)
            if done.returncode:
                error = f"exit code {done.returncode}: {_last_line(done.stderr)}"
    except subprocess.TimeoutExpired:
        error = f"stopped after {seconds + 10:.0f} s"
    except Exception as failure:  # whatever it was, the rest goes on
        error = _last_line(f"{type(failure).__name__}: {failure}")
    found = json.loads(file.read_bytes()) if file.is_file() else {}
    return {"seconds": time.monotonic() - start, "error": error, "found": found}


def table(report: Mapping[str, Any]) -> str:
    """The report as text: a line for each number."""
    lines = []
    for name, part in report["parts"].items():
        lines += [
            "",
            f"{name}  ({part['seconds']:.0f} s){'' if part['error'] is None else '  FAILED: ' + part['error']}",
        ]
        lines += [f"  {line}" for key, value in part["found"].items() for line in _lines(key, value)]
    return "\n".join(lines[1:]) + "\n"


def _lines(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping) and value and not any(isinstance(v, (Mapping, list)) for v in value.values()):
        return [f"{name:<44} " + "  ".join(f"{key} {_number(v)}" for key, v in value.items())]
    if isinstance(value, Mapping) and value:
        return [name, *(f"  {line}" for key, v in value.items() for line in _lines(key, v))]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [name, *(f"  {line}" for row in value for line in _lines("", row))]
    return [f"{name:<44} {_number(value)}"]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run all parts, or the one that `--part` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), help="folder of report.json and report.txt")
    parser.add_argument(
        "--device", choices=("cuda", "null"), default="cuda", help="null: no GPU, ONNX Runtime computes"
    )
    parser.add_argument("--tiny", action="store_true", help="two layers in place of thirty, 8 steps in place of 50")
    parser.add_argument("--seconds", type=float, default=470.0, help="time for all")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--part", choices=FUNCTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.output / "work"
    if options.part is not None:
        try:
            FUNCTIONS[options.part](Part(options))
        except LemicaError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        return 0
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    end = time.monotonic() + options.seconds
    report: dict[str, Any] = {"arguments": sys.argv[1:], "parts": {}}
    for name in options.only:
        left = [PARTS[other] for other in options.only[options.only.index(name) :]]
        seconds = max((end - time.monotonic()) * PARTS[name] / sum(left), 1.0)  # what earlier parts saved is shared
        report["parts"][name] = run_part(name, options, seconds)
        write_bytes(json.dumps(report, indent=1).encode(), options.output / "report.json")
        write_bytes(table(report).encode(), options.output / "report.txt")
    print((options.output / "report.txt").read_text())
    return 0 if all(part["error"] is None for part in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
