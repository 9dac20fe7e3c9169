"""What a benchmark writes: one JSON file a run, with everything that its figures depend on.

Every figure in README.md and docs/ comes from such a file below `benchmarks/results/`; `tools/make_docs.py` prints the
tables. Raw numbers are stored (a number a clip, a number a round), so that means, percentiles and intervals are
computed in one place, `tables`. No PyTorch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args

import msgspec
from msgspec import UNSET, UnsetType

from lemica_trt.core.errors import InputError
from lemica_trt.core.values import Value, read_value, require, write_bytes
from lemica_trt.ir.engine import LinearLayer

RESULTS = Path(__file__).parent / "results"
"""Where committed results lie."""

LIBRARIES = ("torch", "diffusers", "transformers", "onnxruntime", "numpy")
"""Libraries whose versions are recorded."""


class Run(Value, frozen=True):
    """What made a result.

    Attributes:
        command: the command line, from the root of a checkout.
        commit: `git describe --always --dirty` of the checkout; None: it is none.
        date: UTC, `2026-01-31`.
        system: operating system and architecture.
        processor: model name of the CPU.
        cores: logical cores of the machine.
        threads: OMP_NUM_THREADS, which limits PyTorch, but not ONNX Runtime; None: not set.
        load: processes that wanted to run, mean of the minute before it began: times of a busy machine mean little.
        python: version.
        versions: library → version.
    """

    command: str
    commit: str | None
    date: str
    system: str
    processor: str
    cores: int
    threads: int | None
    load: float
    python: str
    versions: dict[str, str]


class QualityRow(Value, frozen=True):
    """One plan on all clips.

    Attributes:
        method: the planner that made it, by the name that `--method` takes; of a baseline that only takes fewer
            steps, `fewer-steps` or the diffusers scheduler that takes the place of the model's own.
        own: whether it is the bundle's own plan; else it is a baseline with the same number of full steps.
        full_steps: the steps that run the whole DiT; of a solver with fewer steps, 0 … B − 1.
        psnr, ssim: against the uncached N steps, one number a clip; PSNR in dB.
        fine_psnr, fine_ssim: against the fine reference.
        flip: against the uncached N steps, 0 … 1, one number a clip; empty: not measured.
    """

    method: str
    own: bool
    full_steps: tuple[int, ...]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    fine_psnr: tuple[float, ...]
    fine_ssim: tuple[float, ...]
    flip: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        counts = {len(self.psnr), len(self.ssim), len(self.fine_psnr), len(self.fine_ssim)}
        counts |= {len(self.flip)} if self.flip else set()
        require(len(counts) == 1 and 0 not in counts, f"{self.method}: expected one number a clip, got {counts}")

    @property
    def budget(self) -> int:
        return len(self.full_steps)


class Quality(Value, frozen=True, tag_field="kind", tag="quality"):
    """Held-out quality of a bundle's plans, and of baselines.

    Attributes:
        run: what made this.
        model: name of the profile.
        revision: of the model's weights.
        scheduler: diffusers class.
        steps: N, the uncached steps.
        fine_steps: steps of the fine reference.
        guidance_scale: of all runs.
        calibration: how the bundle was calibrated.
        samples, validation_samples: that calibrated, and that chose between plans.
        first_seed: seed of the first held-out clip; clip s has prompt s of the held-out list and this seed + s.
        uncached_fine_psnr: the uncached N steps against the fine reference, one number a clip.
        rows: by budget; the bundle's own plan first.
        seed: of the first calibration sample.
        flow_shift: of the sigmas, where it is not the scheduler's own.
        reference_steps: M, where the plans stand for the sampler with M steps; None: N.
    """

    run: Run
    model: str
    revision: str | None
    scheduler: str
    steps: int
    fine_steps: int
    guidance_scale: float
    calibration: str
    samples: int
    validation_samples: int
    first_seed: int
    uncached_fine_psnr: tuple[float, ...]
    rows: tuple[QualityRow, ...]
    seed: int = 0
    flow_shift: float | None = None
    reference_steps: int | None = None

    @property
    def budgets(self) -> list[int]:
        return sorted({row.budget for row in self.rows})

    def of_budget(self, budget: int) -> list[QualityRow]:
        return [row for row in self.rows if row.budget == budget]


class SpeedRow(Value, frozen=True):
    """One way of running the denoising loop.

    Attributes:
        name: `eager`, `uncached`, or the plan's.
        method: the planner that made the plan; empty for the other two.
        full_steps: B.
        seconds: of the loop, one number a round.
        full_step, skipped_step: median seconds of such a row; None where there is none, or none is seen.
        beyond: median over rounds of (seconds / seconds of the round's own rows) − 1; None where rows are not seen.
        engines: what else than the result's backend ran it; empty: that.
    """

    name: str
    method: str
    full_steps: int
    seconds: tuple[float, ...]
    full_step: float | None = None
    skipped_step: float | None = None
    beyond: float | None = None
    engines: str = ""


class Speed(Value, frozen=True, tag_field="kind", tag="speed"):
    """Time of the denoising loop, measured in rounds: every round times every row once.

    Attributes:
        run: what made this.
        model: name of the profile.
        revision: of the model's weights; None: random.
        parameters: of the DiT.
        latent_shape: of one sample.
        dtype: of the DiT.
        threads: of PyTorch, and of the engines.
        backend: engines, version and device.
        steps: N.
        rows: `eager` first, `uncached` second.
    """

    run: Run
    model: str
    revision: str | None
    parameters: int
    latent_shape: tuple[int, ...]
    dtype: str
    threads: int
    backend: str
    steps: int
    rows: tuple[SpeedRow, ...]

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        require(names[:2] == ["eager", "uncached"], f"rows must begin with eager, uncached; got {names}")
        rounds = {len(row.seconds) for row in self.rows}
        require(len(rounds) == 1 and 0 not in rounds, f"expected one number a round in every row, got {rounds}")


class Latency(Value, frozen=True):
    """Requests of one kind, one after the other.

    Attributes:
        name: how the request was made.
        seconds: one number a request.
        beyond: mean seconds of a request less its denoising and decoding.
    """

    name: str
    seconds: tuple[float, ...]
    beyond: float


class Throughput(Value, frozen=True):
    """So many clients at once.

    Attributes:
        clients: each sends its next request when the last is answered.
        clips: a second.
        batch: mean requests in an engine call.
    """

    clients: int
    clips: float
    batch: float


class Serving(Value, frozen=True, tag_field="kind", tag="serving"):
    """What Triton adds to the pipeline in one process.

    Attributes:
        run: what made this; `versions` are those of the server's models.
        server: version of Triton.
        model: name of the profile.
        plan: name; `full_steps` of `steps` steps.
        latency, throughput: see there.
    """

    run: Run
    server: str
    model: str
    plan: str
    full_steps: int
    steps: int
    latency: tuple[Latency, ...]
    throughput: tuple[Throughput, ...]


class BuildRow(Value, frozen=True):
    """An export or an engine.

    Attributes:
        opset: of the ONNX graphs.
        what: `export`, or the engine.
        seconds: wall-clock time.
        memory: peak bytes that only this process could have.
        size: bytes of the files.
        layers: precision → number of layers; empty for an export.
        fused, attentions: how many of the attentions are one kernel; None: not looked into.
    """

    opset: int
    what: str
    seconds: float
    memory: int
    size: int
    layers: dict[str, int] = {}
    fused: int | None = None
    attentions: int | None = None


class EngineBuild(Value, frozen=True, tag_field="kind", tag="engine-build"):
    """Export and engines of a model of real size with random weights.

    Attributes:
        run: what made this.
        model: name of the profile.
        parameters: of the DiT.
        layers: transformer blocks.
        dtype: of the DiT.
        frames, height, width: of the clip.
        backend: that built the engines.
        rows: see there.
    """

    run: Run
    model: str
    parameters: int
    layers: int
    dtype: str
    frames: int
    height: int
    width: int
    backend: str
    rows: tuple[BuildRow, ...]


class UnusedDepth(Value, frozen=True, tag_field="kind", tag="unused-depth"):
    """Time of a full step on graphs that keep more than is read, beside the smallest ones; one thread, in pairs.

    Attributes:
        run: what made this.
        model: name of the profile.
        revision: of the model's weights; None: random.
        parameters: of the DiT.
        latent_shape: of one sample.
        dtype: of the DiT.
        threads: of PyTorch, and of the engines.
        backend: engines, version and device.
        outputs: how many outputs the small and the deep graph take; the deep one takes as many guidance terms, and
            gives its trunk residual away.
        extra_node_seconds: what the nodes take that only the deep graph has, in the profile of a step.
        seconds, deep_seconds: of CPU; for every round, in which both are opened anew, one number a pair. The
            small one is opened first in the first round, and in every other one after it.
    """

    run: Run
    model: str
    revision: str | None
    parameters: int
    latent_shape: tuple[int, ...]
    dtype: str
    backend: str
    outputs: tuple[int, int]
    extra_node_seconds: float
    seconds: tuple[tuple[float, ...], ...]
    deep_seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        pairs = {len(times) for times in (*self.seconds, *self.deep_seconds)}
        require(
            len(self.seconds) == len(self.deep_seconds) > 0 and len(pairs) == 1 and 0 not in pairs,
            f"expected as many pairs in every round, got {sorted(pairs)}",
        )
        require(
            len(self.seconds) % 2 == 0,
            f"expected an even number of rounds, got {len(self.seconds)}",
        )


class BuildCostRow(Value, frozen=True):
    """One build.

    Attributes:
        way: how: an effort, or another combination of settings.
        seed: of the first calibration sample.
        budgets: full steps of each plan; the first is scored.
        full_steps: stage → full steps of the DiT that it ran, both branches of the guidance as one.
        method: that the plan was made by.
        psnr: dB against the uncached run, one number a held-out clip.
    """

    way: str
    seed: int
    budgets: tuple[int, ...]
    full_steps: dict[str, int]
    method: str
    psnr: tuple[float, ...]

    @property
    def total(self) -> int:
        """Full steps of all stages."""
        return sum(self.full_steps.values())


class BuildCost(Value, frozen=True, tag_field="kind", tag="build-cost"):
    """What builds cost, and what their plans are worth.

    Attributes:
        run: what made this.
        model: name of the profile.
        revision: of the model's weights.
        steps: N.
        budget: B of the plans that are scored.
        rows: by seed, then way.
        stock: standard solver with B steps → dB, one number a held-out clip.
    """

    run: Run
    model: str
    revision: str | None
    steps: int
    budget: int
    rows: tuple[BuildCostRow, ...]
    stock: dict[str, tuple[float, ...]]

    @property
    def ways(self) -> list[str]:
        """In the order in which they were built."""
        return list(dict.fromkeys(row.way for row in self.rows))

    def of_way(self, way: str) -> list[BuildCostRow]:
        """By seed."""
        return [row for row in self.rows if row.way == way]


class GuidanceRow(Value, frozen=True):
    """One plan at one guidance scale.

    Attributes:
        method: which plan.
        scale: of the requests, and of the uncached run.
        psnr: dB against that run, one number a held-out clip.
    """

    method: str
    scale: float
    psnr: tuple[float, ...]


class Guidance(Value, frozen=True, tag_field="kind", tag="guidance"):
    """What plans are worth at other guidance scales.

    Attributes:
        run: what made this.
        model: name of the profile.
        revision: of the model's weights.
        steps: N.
        budget: B of all plans.
        guidance_scale: that the plans were made at.
        first_seed: of the clips.
        rows: by scale, then plan.
    """

    run: Run
    model: str
    revision: str | None
    steps: int
    budget: int
    guidance_scale: float
    first_seed: int
    rows: tuple[GuidanceRow, ...]


class QuantizedRow(Value, frozen=True):
    """One plan on engines of one precision.

    Attributes:
        engines: precision of their linear layers.
        plan: which, in words; `uncached`: all steps.
        full_steps: that it runs.
        psnr: dB of each clip against the uncached run of the fp32 engines.
    """

    engines: str
    plan: str
    full_steps: tuple[int, ...]
    psnr: tuple[float, ...]


class RtxQuantized(Value, frozen=True):
    """TensorRT for RTX engines of the same graphs, built and not run.

    Attributes:
        version: of TensorRT for RTX.
        target: GPUs that they are for.
        sizes: bytes of the engine that computes everything, in fp32 and quantised.
        precisions: what products of the quantised engine multiply.
    """

    version: str
    target: str
    sizes: tuple[int, int]
    precisions: dict[str, int]


class Quantized(Value, frozen=True, tag_field="kind", tag="quantized"):
    """What quantised linear layers cost and save on the CPU.

    Attributes:
        run: what made this.
        model: name of the profile.
        revision: of the model's weights.
        steps: N.
        budget: B of all plans but the uncached one.
        first_seed: of the clips.
        threads: of the engines.
        rows: one a plan, the first on the engines in fp32.
        layers: linear layers of the graph, the largest error first.
        sizes: bytes of the graph that computes everything, in fp32 and quantised.
        seconds: of a full step, in fp32 and quantised, in each round; they take turns. Empty: not measured, as of
            fp8, which CPUs do not multiply.
        rtx: of fp8, engines for GPUs.
        clock: what those are: `wall`; or `cpu`, of all threads of the process, and every other round in reverse order.
    """

    run: Run
    model: str
    revision: str | None
    steps: int
    budget: int
    first_seed: int
    threads: int
    rows: tuple[QuantizedRow, ...]
    layers: tuple[LinearLayer, ...]
    sizes: tuple[int, int]
    seconds: tuple[tuple[float, ...], tuple[float, ...]]
    rtx: RtxQuantized | UnsetType = UNSET
    clock: Literal["wall", "cpu"] = "wall"

    @property
    def precision(self) -> str:
        """What linear layers are quantised to."""
        return self.rows[1].engines


class TraceRow(Value, frozen=True):
    """One tiny random pipeline, traced.

    Attributes:
        name: of the case in `lemica_trt.testing.pipelines`.
        pipeline: diffusers class.
        refusal: why it was refused; "": it was traced, and the rest is given.
        sampler: diffusers class of each state's scheduler.
        kinds: kinds of steps.
        guidance: how guidance is done, in words.
        conditions: what a request brings, without duplicates.
        text: whether shapes follow the prompt: `fixed`, `free`, `none`.
        trunk: share of the parameters of each network that its blocks have; of random weights, so only > 0 matters.
        streams: hidden streams that the trunk adds to.
        error: of the replay for another request, relative.
    """

    name: str
    pipeline: str
    refusal: str = ""
    sampler: tuple[str, ...] = ()
    kinds: int = 0
    guidance: str = ""
    conditions: tuple[str, ...] = ()
    text: str = ""
    trunk: tuple[float, ...] = ()
    streams: int = 0
    error: float = 0.0


class RtxBuild(Value, frozen=True):
    """Engines of one tiny random pipeline.

    Attributes:
        name: of the case in `lemica_trt.testing.pipelines`.
        pipeline: diffusers class.
        engines: the graphs that an engine was built of; none where it was refused.
        version: of TensorRT for RTX.
        refusal: why it was refused; "": it was not.
    """

    name: str
    pipeline: str
    engines: tuple[str, ...] = ()
    version: str = ""
    refusal: str = ""


class RtxBuilds(Value, frozen=True, tag_field="kind", tag="rtx-builds"):
    """TensorRT for RTX engines of tiny traced pipelines; built, and not run.

    Attributes:
        run: what made this.
        rows: a pipeline each.
    """

    run: Run
    rows: tuple[RtxBuild, ...]


class TrueSizeRow(Value, frozen=True):
    """A model at its true size, without weights.

    Attributes:
        model: profile, at whose shape and dtype it is.
        latents: shape of one request's.
        weights: bytes of all networks in the profile's dtype.
        trunk: share of the parameters of each network of the loop that its blocks have.
        trace, dry_run: seconds on the clock, seconds of CPUs, and bytes of the process at its peak.
        disk: bytes that a build would write, as the dry run says.
        export_memory, engine_memory: bytes at the peak of these stages, as it says.
    """

    model: str
    latents: tuple[int, ...]
    weights: int
    trunk: tuple[float, ...]
    trace: tuple[float, float, int]
    dry_run: tuple[float, float, int]
    disk: int
    export_memory: int
    engine_memory: int


class TrueSize(Value, frozen=True, tag_field="kind", tag="true-size"):
    """Models traced and dry-run at their true size.

    Attributes:
        run: what made this.
        rows: a model each.
    """

    run: Run
    rows: tuple[TrueSizeRow, ...]


class ExportRow(Value, frozen=True):
    """Step graphs exported at their true size, from random weights.

    Attributes:
        model: profile, at whose shape and dtype they are.
        dtype: of the graphs.
        weights: bytes of the transformer.
        graphs: role → bytes of its ONNX files; the checker has passed them.
        before: bytes of the process at its peak before the export, with the weights in memory.
        export: seconds on the clock, seconds of CPUs, and bytes of the process at its peak.
    """

    model: str
    dtype: str
    weights: int
    graphs: dict[str, int]
    before: int
    export: tuple[float, float, int]


class TrueSizeExports(Value, frozen=True, tag_field="kind", tag="true-size-exports"):
    """Models exported at their true size.

    Attributes:
        run: what made this.
        rows: a model each.
    """

    run: Run
    rows: tuple[ExportRow, ...]


class Traces(Value, frozen=True, tag_field="kind", tag="traces"):
    """All tiny pipelines, traced.

    Attributes:
        run: what made this.
        rows: by name.
    """

    run: Run
    rows: tuple[TraceRow, ...]


class DrawingRow(Value, frozen=True):
    """What a bundled model draws.

    Attributes:
        model: name of the profile.
        revision: of its weights.
        guidance_scale: of all runs.
        asked: the held-out prompts.
        shown: what the clip of each shows, as a prompt.
    """

    model: str
    revision: str
    guidance_scale: float
    asked: tuple[str, ...]
    shown: tuple[str, ...]

    def __post_init__(self) -> None:
        require(len(self.asked) == len(self.shown) > 0, f"{self.model}: expected a clip of each prompt")


class Drawing(Value, frozen=True, tag_field="kind", tag="drawing"):
    """How well the bundled models draw.

    Attributes:
        run: what made this.
        steps: of each run, uncached.
        first_seed: seed of the first clip; clip s has this seed + s.
        rows: a model each.
    """

    run: Run
    steps: int
    first_seed: int
    rows: tuple[DrawingRow, ...]


class AttentionRow(Value, frozen=True):
    """One attention.

    Attributes:
        how: `in parts`: as exported, on ONNX Runtime; or the backend that ran its own graph.
        tokens: of queries and of keys.
        seconds: of the first run.
        memory: peak bytes beyond inputs, outputs and libraries.
    """

    how: str
    tokens: int
    seconds: float
    memory: int


class AttentionMemory(Value, frozen=True, tag_field="kind", tag="attention-memory"):
    """Peak memory of one fp32 attention of random numbers, one thread.

    Attributes:
        run: what made this.
        heads, width: number of heads, and size of one.
        masked: whether there is a mask of keys.
        rows: by tokens.
    """

    run: Run
    heads: int
    width: int
    masked: bool
    rows: tuple[AttentionRow, ...]


class ScalingRow(Value, frozen=True):
    """One way to use several GPUs, calculated.

    Attributes:
        model, way: names.
        devices: GPUs.
        link: between them; "": nothing is sent within a step.
        step: seconds of a full step.
        latency: seconds of a request.
        throughput: requests a second, with enough of them waiting.
    """

    model: str
    way: str
    devices: int
    link: str
    step: float
    latency: float
    throughput: float


class Scaling(Value, frozen=True, tag_field="kind", tag="scaling"):
    """What several GPUs would give, by the model of `scaling.py`; not measured.

    Attributes:
        run: what made this.
        speed, utilisation: operations a second of a GPU, and the part of it that is reached.
        latency: seconds of a collective of no bytes.
        links: bytes a second in one direction.
        full_steps: of a request.
        operations: by model, of text encoder, full step and decoder.
        rows: see there.
    """

    run: Run
    speed: float
    utilisation: float
    latency: float
    links: dict[str, float]
    full_steps: int
    operations: dict[str, tuple[float, float, float]]
    rows: tuple[ScalingRow, ...]


class PeerRow(Value, frozen=True):
    """One setting of one method.

    Attributes:
        library: distribution; `lemica-trt`: our own.
        method: as the library calls it; of our own, the planner or `the plan`.
        setting: in words; empty: the method was refused as a whole.
        refusal: what the library said where it does not run, or runs every step in full; "": it runs, and has numbers.
        full_steps: work of the transformer's blocks in that of an uncached step, one number a clip: multiply-adds of
            linear layers and of attention.
        seconds: of CPU for the denoising loop, one number a clip.
        uncached_seconds: of the uncached run before the settings of this method, on the same clip: one for all of
            them.
        psnr, ssim, flip: against the uncached run, one number a clip; PSNR in dB, FLIP 0 … 1, empty without
            `flip-evaluator`.
    """

    library: str
    method: str
    setting: str
    refusal: str = ""
    full_steps: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    uncached_seconds: tuple[float, ...] = ()
    psnr: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    flip: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        several = (self.full_steps, self.seconds, self.uncached_seconds, self.psnr, self.ssim)
        counts = {len(each) for each in several} | ({len(self.flip)} if self.flip else set())
        require(len(counts) == 1, f"{self.method}, {self.setting}: expected one number a clip, got {counts}")
        require((counts == {0}) == bool(self.refusal), f"{self.method}, {self.setting}: expected numbers or a refusal")


class Peers(Value, frozen=True, tag_field="kind", tag="peers"):
    """Methods of other libraries on a diffusers pipeline, and ours, in one run.

    Attributes:
        run: what made this.
        model: name of the profile.
        revision: of the model's weights.
        scheduler: diffusers class.
        steps: N.
        guidance_scale: of all runs.
        blocks: of the transformer.
        first_seed: of the clips; clip s has prompt s of the held-out list and this seed + s.
        rows: by library, method and setting, as they were run.
    """

    run: Run
    model: str
    revision: str | None
    scheduler: str
    steps: int
    guidance_scale: float
    blocks: int
    first_seed: int
    rows: tuple[PeerRow, ...]


Result = (
    Quality
    | Speed
    | Serving
    | EngineBuild
    | UnusedDepth
    | BuildCost
    | Guidance
    | Quantized
    | Peers
    | Traces
    | TrueSize
    | TrueSizeExports
    | RtxBuilds
    | Drawing
    | AttentionMemory
    | Scaling
)


def this_run(*libraries: str) -> Run:
    """The running command on this machine.

    Args:
        libraries: whose versions are recorded; none: `LIBRARIES`.
    """
    return Run(
        command=shlex.join(["python", *map(_portable, sys.argv)]),
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=int(os.environ["OMP_NUM_THREADS"]) if os.environ.get("OMP_NUM_THREADS") else None,
        load=os.getloadavg()[0],
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in libraries or LIBRARIES},
    )


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _portable(argument: str) -> str:
    """An argument without the folders of this machine."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    root = Path(__file__).parents[1]
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_result(result: Result, path: Path) -> None:
    """Write JSON: sorted keys, a list of numbers on one line, numbers rounded to 7 digits."""
    values = _rounded(msgspec.to_builtins(result))
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False)
    write_bytes(re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text).encode() + b"\n", path)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


class _Kind(msgspec.Struct):
    """What every result has."""

    kind: str


def read_results(folder: Path = RESULTS) -> list[Result]:
    """All results of a folder, by file name.

    Raises:
        InputError: a file is not a result.
    """
    kinds: dict[str, type[Result]] = {str(kind.__struct_config__.tag): kind for kind in get_args(Result)}
    found = []
    for path in sorted(folder.glob("*.json")):
        kind = read_value(_Kind, path).kind
        if kind not in kinds:
            raise InputError(f"{path}: expected a result of kind {', '.join(kinds)}, got {kind!r}")
        found.append(read_value(kinds[kind], path))
    return found
