"""Results → Markdown tables: what the benchmarks print, and what `tools/make_docs.py` puts into README.md and docs/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import msgspec
import numpy as np
from record import (
    AttentionMemory,
    BuildCost,
    Drawing,
    EngineBuild,
    Guidance,
    PeerRow,
    Peers,
    Quality,
    QualityRow,
    Quantized,
    Result,
    RtxBuilds,
    Run,
    Scaling,
    Serving,
    Speed,
    SpeedRow,
    Traces,
    TrueSize,
    TrueSizeExports,
    UnusedDepth,
)

from lemica_trt.core.metrics import margin_95
from lemica_trt.core.progress import duration, size

RESAMPLES = 10_000
"""Of the bootstrap."""

SOLVERS = {
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "DPMSolverMultistepScheduler": "DPM-Solver++ 2M",
    "UniPCMultistepScheduler": "UniPC",
}
"""diffusers scheduler of a baseline → its name in the literature."""

NAMES = {
    "lemica": "LeMiCa",
    "uniform": "equal distances, residual reuse",
    "fewer-steps": "the sampler itself, B steps",
    **{scheduler: f"{name}, B steps" for scheduler, name in SOLVERS.items()},
}
"""Method → words."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "right") -> str:
    """A Markdown table; all columns but the first are aligned `left` or `right`."""
    rule = "---" if align == "left" else "--:"
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_run(run: Run) -> str:
    """One line: where, with what and when a result was made."""
    threads = "" if run.threads is None else f", OMP_NUM_THREADS={run.threads}"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return (
        f"`{run.command}`, {run.date}{f', commit {run.commit}' if run.commit else ''}; {run.processor}, "
        f"{run.cores} cores{threads}, load {run.load:.1f} before, {run.system}; Python {run.python}, {versions}."
    )


def mean_p5(numbers: Sequence[float]) -> str:
    """`43.9 / 30.2`: mean and 5th percentile."""
    return f"{np.mean(numbers):.1f} / {np.percentile(numbers, 5):.1f}"


def gain(better: Sequence[float], worse: Sequence[float]) -> str:
    """Mean difference and its 95 % bootstrap interval, clip by clip."""
    differences = np.subtract(better, worse)
    means = np.random.default_rng(0).choice(differences, (RESAMPLES, len(differences))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{differences.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def tail_gain(better: Sequence[float], worse: Sequence[float]) -> str:
    """Difference of the 5th percentiles and its 95 % bootstrap interval; the same clips are drawn of both."""
    pair = np.array([better, worse])
    drawn = pair[:, np.random.default_rng(0).integers(pair.shape[1], size=(RESAMPLES, pair.shape[1]))]
    first, second = np.percentile(drawn, 5, axis=2)
    low, high = np.percentile(first - second, [2.5, 97.5])
    one, other = np.percentile(pair, 5, axis=1)
    return f"{one - other:+.1f} [{low:+.1f}, {high:+.1f}]"


def quality_table(result: Quality) -> str:
    """A row a plan: PSNR mean / 5th percentile / worst clip and SSIM against N steps, the plan's lead, and PSNR
    against the fine reference; FLIP mean / 95th percentile / worst clip where it was measured."""
    rows, seen = [], any(row.flip for row in result.rows)
    for budget in result.budgets:
        plans = result.of_budget(budget)
        own = next((row for row in plans if row.own), None)
        for row in plans:
            name = f"**the plan** ({row.method})" if row.own else NAMES.get(row.method, row.method)
            lead = "" if row.own or own is None else gain(own.psnr, row.psnr)
            flip = [flips(row.flip)] if seen else []
            psnr, ssim = mean_p5_worst(row.psnr), f"{np.mean(row.ssim):.4f}"
            rows.append([name, str(budget), psnr, ssim, *flip, lead, mean_p5(row.fine_psnr)])
    n, fine = result.steps, result.fine_steps
    flip = [f"FLIP to {n} steps"] if seen else []
    head = ["", "full steps", f"PSNR to {n} steps", "SSIM", *flip, "the plan's lead, dB", f"PSNR to {fine} steps"]
    return table(head, rows)


def quality_caption(result: Quality) -> str:
    """What the table is of."""
    clips = len(result.uncached_fine_psnr)
    return (
        f"{result.model} (revision {(result.revision or 'none')[:12]}), {result.steps} steps of {result.scheduler}, "
        f"guidance {result.guidance_scale:g}; {clips} held-out clips, seeds from {result.first_seed}. Calibration: "
        f"{result.calibration}, {result.samples} samples; {result.validation_samples} samples chose between plans. The "
        f"uncached {result.steps} steps have {np.mean(result.uncached_fine_psnr):.1f} dB to {result.fine_steps} steps."
    )


def speedup(row: SpeedRow, reference: SpeedRow) -> float:
    """Median over rounds of the reference's time over the row's, both of the same round."""
    return median(slow / fast for slow, fast in zip(reference.seconds, row.seconds))


def speed_table(result: Speed) -> str:
    """A row a way of running the loop; speed-ups are medians of paired ratios."""
    eager, uncached = result.rows[:2]
    rows = []
    for row in result.rows:
        steps = ["" if seconds is None else f"{seconds * 1e3:.1f} ms" for seconds in (row.full_step, row.skipped_step)]
        name = {"eager": "diffusers, eager", "uncached": "runtime, uncached"}.get(row.name, "")
        rows.append(
            [
                (name or f"runtime, {row.method or 'uncached'}") + (f", {row.engines}" if row.engines else ""),
                str(row.full_steps),
                f"{median(row.seconds):.3g} s",
                f"{speedup(row, eager):.2f}×",
                f"{speedup(row, uncached):.2f}×",
                *steps,
                "" if row.beyond is None else f"{row.beyond:+.1%}",
            ]
        )
    head = ["", "full steps", "time", "to eager", "to uncached", "full step", "skipped step", "beyond its steps"]
    return table(head, rows)


def model_line(result: Speed | UnusedDepth) -> str:
    """The model that was timed."""
    weights = "random weights" if result.revision is None else f"revision {result.revision[:12]}"
    latents = "×".join(map(str, result.latent_shape))
    parameters = f"{result.parameters / 1e6:.1f} M parameters"
    return f"{result.model} ({weights}), {parameters}, latents {latents}, {result.dtype}"


def speed_caption(result: Speed) -> str:
    """What the table is of."""
    return (
        f"{model_line(result)}, {result.steps} steps, {result.backend}, "
        f"threads of PyTorch and of the engines: {result.threads}; {len(result.rows[0].seconds)} rounds."
    )


def serving_tables(result: Serving) -> str:
    """Latency of single requests, and throughput of clients at once."""
    rows = []
    for row in result.latency:
        percentiles = [f"{np.percentile(row.seconds, percent) * 1e3:.0f} ms" for percent in (50, 95)]
        rows.append([row.name, *percentiles, f"{row.beyond * 1e3:.1f} ms"])
    latency = table(["", "p50", "p95", "beyond denoising and decoding, mean"], rows)
    throughput = table(
        ["clients at once", "clips a second", "requests in an engine call"],
        [[str(row.clients), f"{row.clips:.2f}", f"{row.batch:.2f}"] for row in result.throughput],
    )
    return f"{latency}\n\n{throughput}"


def serving_caption(result: Serving) -> str:
    """What the tables are of."""
    requests = len(result.latency[0].seconds)
    return (
        f"{result.model}, plan {result.plan} ({result.full_steps} of {result.steps} steps), Triton {result.server}; "
        f"{requests} requests a row."
    )


def engine_table(result: EngineBuild) -> str:
    """A row an export or an engine."""
    rows = []
    for row in result.rows:
        layers = ", ".join(f"{count} {dtype}" for dtype, count in sorted(row.layers.items()))
        fused = "" if row.fused is None else f"{row.fused} of {row.attentions}"
        rows.append([row.what, str(row.opset), duration(row.seconds), size(row.memory), size(row.size), layers, fused])
    return table(["", "opset", "time", "peak memory", "files", "layers", "fused attentions"], rows)


def engine_caption(result: EngineBuild) -> str:
    """What the table is of."""
    shape = f"{result.frames} frames {result.height}×{result.width}"
    return (
        f"{result.model} with random weights, {result.layers} layers, {result.parameters / 1e9:.2f} G parameters, "
        f"{result.dtype}, {shape}, {result.backend}."
    )


def extra_time(result: UnusedDepth) -> tuple[float, float, float]:
    """What the deep graph takes beyond the small one, as a fraction of it: geometric mean over rounds of the median
    ratio over pairs, and the ends of its 95 % bootstrap interval. A round counts with the next, in which the other was
    opened first: of two ratios r and 1/r only the geometric mean is 1."""
    rounds = np.log(np.median(np.divide(result.deep_seconds, result.seconds), axis=1)).reshape(-1, 2).mean(axis=1)
    means = np.random.default_rng(0).choice(rounds, (RESAMPLES, len(rounds))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.expm1(rounds.mean())), float(np.expm1(low)), float(np.expm1(high))


def depth_table(result: UnusedDepth) -> str:
    """Both graphs, and what the larger one takes more."""
    middle, low, high = extra_time(result)
    small, deep = (f"{np.median(seconds) * 1e3:.4g} ms" for seconds in (result.seconds, result.deep_seconds))
    nodes = result.extra_node_seconds
    share = f"{nodes * 1e3:.2g} ms ({nodes / np.median(result.seconds):.2%})"
    paired = f"{middle:+.2%} [{low:+.2%}, {high:+.2%}]"
    rows = [
        ["smallest graph", str(result.outputs[0]), "", small, "", ""],
        ["graph of the layout", f"{result.outputs[1]}, and guidance terms", "yes", deep, paired, share],
    ]
    return table(["", "outputs kept", "residual kept", "full step, median", "difference", "its extra nodes"], rows)


def depth_caption(result: UnusedDepth) -> str:
    """What the table is of."""
    rounds, pairs = len(result.seconds), len(result.seconds[0])
    return f"{model_line(result)}, {result.backend}, one thread; {rounds} rounds of {pairs} pairs."


def cost_table(result: BuildCost) -> str:
    """A row a way of building, with what it cost and what its plans are worth, by seed; below it stock solvers."""
    first = result.of_way(result.ways[0])
    parts = ("draft", "early", "calibrate", "fit", "select", "verify")
    parts = tuple(part for part in parts if any(part in row.full_steps for row in result.rows))
    rows = []
    for way in result.ways:
        builds = result.of_way(way)
        samplings = [np.mean([row.full_steps.get(part, 0) for row in builds]) / result.steps for part in parts]
        total = np.mean([row.total for row in builds]) / result.steps
        both = [np.concatenate([row.psnr for row in each]).tolist() for each in (builds, first)]
        rows.append(
            [
                f"{way} ({', '.join(map(str, builds[0].budgets))})",
                *(f"{number:.1f}" for number in samplings),
                f"**{total:.1f}**",
                *(mean_p5(row.psnr) for row in builds),
                *(["", ""] if way == result.ways[0] else [gain(*both), tail_gain(*both)]),
            ]
        )
    blank = [""] * (len(parts) + 1)
    rows += [[name, *blank, *[mean_p5(each)] * len(first), "", ""] for name, each in result.stock.items()]
    seeds = [f"seed {row.seed}" for row in first]
    return table(["build (full steps)", *parts, "samplings", *seeds, "dB more than before", "its 5th percentile"], rows)


def cost_caption(result: BuildCost) -> str:
    """What is in the table."""
    return (
        f"`{result.model}`, {result.steps} steps: samplings that builds ran, by stage and in all (mean over seeds); "
        f"PSNR mean / 5th percentile of their first plan on {len(result.rows[0].psnr)} held-out clips, by calibration "
        "seed; in the last two columns over all seeds, with 95 % intervals."
    )


def guidance_table(result: Guidance) -> str:
    """A row a plan, a column a guidance scale."""
    scales = list(dict.fromkeys(row.scale for row in result.rows))
    methods = list(dict.fromkeys(row.method for row in result.rows))
    found = {(row.method, row.scale): mean_p5(row.psnr) for row in result.rows}
    rows = [[NAMES.get(method, method), *(found[method, scale] for scale in scales)] for method in methods]
    return table(["plan", *(f"{scale:g}" for scale in scales)], rows)


def guidance_caption(result: Guidance) -> str:
    """What is in the table."""
    return (
        f"`{result.model}`, {result.budget} of {result.steps} steps, plans made at guidance {result.guidance_scale:g}: "
        f"PSNR mean / 5th percentile of {len(result.rows[0].psnr)} held-out clips, by guidance scale of the request."
    )


def quantized_table(result: Quantized) -> str:
    """A row a plan, and what it has more than the fp32 engines' plan on the same quantised engines."""
    _, _, *others = result.rows
    rows = []
    for row in result.rows:
        lead = gain(row.psnr, others[0].psnr) if row in others[1:] else ""
        mean = f"{np.mean(row.psnr):.1f} ± {margin_95(row.psnr):.1f}"
        name = f"{row.plan}, {len(row.full_steps)} steps"
        rows.append([name, row.engines, f"{mean} / {np.percentile(row.psnr, 5):.1f} / {min(row.psnr):.1f}", lead])
    head = ["plan", "engines", "PSNR mean / 5th percentile / worst", f"more than the {others[0].plan}, dB"]
    return table(head, rows)


def quantized_caption(result: Quantized) -> str:
    """What was quantised, what it saves, and what the table is of."""
    kept = [layer for layer in result.layers if layer.precision == "fp32"]
    worst = ", ".join(f"`{layer.name}` {layer.decibels:.1f}" for layer in kept)
    return (
        f"`{result.model}`: {len(result.layers) - len(kept)} of {len(result.layers)} linear layers in "
        f"{result.precision}; kept in fp32 (dB of the output if it alone were {result.precision}): {worst}. The graph: "
        f"{size(result.sizes[0])} in fp32, {size(result.sizes[1])} quantised. {quantized_step(result)}"
        f"PSNR against the uncached {result.steps} steps in fp32, {len(result.rows[0].psnr)} held-out clips, ± 95 %."
    )


def quantized_step(result: Quantized) -> str:
    """What a full step takes on the CPU where that was measured, and what the engine for GPUs is."""
    if result.rtx:
        rtx = result.rtx
        products = ", ".join(f"{number} products in {name}" for name, number in sorted(rtx.precisions.items()))
        return (
            f"The engine of TensorRT for RTX {rtx.version} for {rtx.target}: {size(rtx.sizes[0])} in fp32, "
            f"{size(rtx.sizes[1])} quantised ({products}; layers that share an input are one); built, "
            "not run. "
        )
    if not result.seconds[0]:
        return ""
    plain, quantized = (median(each) * 1e3 for each in result.seconds)
    ratio = median(slow / fast for slow, fast in zip(*result.seconds))
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    clock = {"wall": "wall-clock time", "cpu": "CPU time"}[result.clock]
    return (
        f"A full step: {plain:.1f} ms in fp32, {quantized:.1f} ms quantised, {ratio:.2f}× ({clock}, medians of "
        f"{len(result.seconds[0])} rounds in turns, {threads}). "
    )


def traces_table(result: Traces) -> str:
    """A row a pipeline."""
    rows = []
    for row in result.rows:
        if row.refusal:
            rows.append([f"`{row.pipeline}` ({row.name})", f"refused: {row.refusal}", *[""] * 5])
            continue
        kinds = f"; {row.kinds} kinds of steps" if row.kinds > 1 else ""
        streams = f"{row.streams} streams" if row.streams > 1 else "yes" if row.streams else "not found"
        rows.append(
            [
                f"`{row.pipeline}` ({row.name})",
                row.guidance + kinds,
                ", ".join(f"`{name}`" for name in row.conditions),
                {"fixed": "padded", "free": "free", "none": "–"}[row.text],
                ", ".join(f"`{name}`" for name in dict.fromkeys(row.sampler)),
                streams,
                f"{row.error:.0e}",
            ]
        )
    head = ["pipeline", "guidance", "inputs of a request", "text", "sampler", "trunk", "error of the replay"]
    return table(head, rows, "left")


def true_size_table(result: TrueSize) -> str:
    """A row a model."""
    rows = [
        [
            f"`{row.model}`",
            "×".join(map(str, row.latents)),
            size(row.weights),
            *(f"{cpu:.0f} s, {size(memory)}" for _, cpu, memory in (row.trace, row.dry_run)),
            size(row.disk),
            size(row.export_memory),
            size(row.engine_memory),
        ]
        for row in result.rows
    ]
    head = ["model", "latents", "weights", "trace", "dry run", "disk of a build", "memory of its export", "of engines"]
    return table(head, rows, "left")


def exports_table(result: TrueSizeExports) -> str:
    """A row a model."""
    rows = [
        [
            f"`{row.model}`",
            row.dtype,
            size(row.weights),
            ", ".join(f"`{role}` {size(its)}" for role, its in row.graphs.items()),
            f"{row.export[1]:.0f} s",
            size(row.before),
            size(row.export[2]),
        ]
        for row in result.rows
    ]
    head = ["model", "dtype", "transformer", "graphs", "export", "memory before", "memory at its peak"]
    return table(head, rows, "left")


def rtx_table(result: RtxBuilds) -> str:
    """A row a pipeline."""
    rows = [
        [
            f"`{row.pipeline}` ({row.name})",
            f"refused: {row.refusal}" if row.refusal else ", ".join(f"`{name}`" for name in row.engines),
            row.version,
        ]
        for row in result.rows
    ]
    return table(["pipeline", "engines built", "TensorRT for RTX"], rows, "left")


def drawing_table(result: Drawing) -> str:
    """A row a model: how many clips show what was asked for, in all words and word by word."""
    rows = []
    for row in result.rows:
        pairs = [(asked.split()[1:], shown.split()[1:]) for asked, shown in zip(row.asked, row.shown)]
        words = [sum(asked[i] == shown[i] for asked, shown in pairs) for i in range(3)]
        last = sum(asked[3:] == shown[3:] for asked, shown in pairs)
        every = sum(asked == shown for asked, shown in pairs)
        rows.append([f"`{row.model}`, guidance {row.guidance_scale:g}", *map(str, (len(pairs), *words, last, every))])
    return table(["", "prompts", "size", "colour", "shape", "motion or place", "all four"], rows)


def drawing_caption(result: Drawing) -> str:
    """What is in the table."""
    return (
        f"Held-out prompts of which the clip or the picture shows each word; {result.steps} steps, uncached, in fp32, "
        f"seeds from {result.first_seed}."
    )


def attention_table(result: AttentionMemory) -> str:
    """A row a run, beside what its scores alone would take."""
    rows = []
    for row in result.rows:
        scores = size(4 * result.heads * row.tokens**2)
        rows.append([row.how, str(row.tokens), scores, size(row.memory), duration(row.seconds)])
    return table(["", "tokens", "all scores", "peak memory", "first run"], rows)


def attention_caption(result: AttentionMemory) -> str:
    """What the table is of."""
    mask = "with a mask of keys" if result.masked else "without a mask"
    return (
        f"One attention, fp32, {result.heads} heads of {result.width}, {mask}, one thread; memory beyond inputs and "
        "outputs."
    )


def scaling_table(result: Scaling) -> str:
    """A row a way and link."""
    rows = [
        [row.model, row.way, str(row.devices), row.link, duration(row.step), duration(row.latency),
         f"{3600 * row.throughput / row.devices:.3g}"]
        for row in result.rows
    ]  # fmt: skip
    head = ["", "", "GPUs", "link", "full step", "one request", "requests an hour and GPU"]
    return table(head, rows)


def scaling_caption(result: Scaling) -> str:
    """What was assumed, and what was counted."""
    links = ", ".join(f"{name} {rate / 1e9:g} GB/s" for name, rate in result.links.items())
    counted = "; ".join(
        f"{name}: {text / 1e12:.1f}, {step / 1e12:.0f} and {decode / 1e12:.0f}"
        for name, (text, step, decode) in result.operations.items()
    )
    return (
        f"**Calculated, not measured.** {result.speed / 1e12:g} TFLOPS a GPU, of which {result.utilisation:.0%} are "
        f"reached; {links} in one direction; {1e6 * result.latency:g} µs a collective; {result.full_steps} full steps. "
        f"TFLOP of text encoder, full step and decoder: {counted}."
    )


OURS, PLAN = "lemica-trt", "the plan"
"""Library of what `lemica_trt.apply` runs, and which of it is this tool's own choice; the rest are others' planners."""

PLANNERS = {
    "lemica": "LeMiCa",
    "stock:dpmsolver++": "DPM-Solver++ 2M",
    "stock:unipc": "UniPC",
    "dpcache": "DPCache",
    "teacache": "TeaCache, replayed",
    "magcache": "MagCache, replayed",
    "mean-velocity": "mean velocity (after MeanCache)",
    "l2p": "L2P",
}
"""Planner → words."""

BUDGETS = (10, 15, 20, 25)
"""Full steps that peers may take, in the short table."""


def mean_p5_worst(numbers: Sequence[float], digits: int = 1, *, high_is_bad: bool = False) -> str:
    """`43.9 / 30.2 / 28.4`: mean, and at the bad end the 5th percentile (95th where high numbers are bad) and the worst
    clip."""
    tail, percent = (max(numbers), 95) if high_is_bad else (min(numbers), 5)
    return " / ".join(f"{each:.{digits}f}" for each in (np.mean(numbers), np.percentile(numbers, percent), tail))


def flips(numbers: Sequence[float]) -> str:
    """FLIP, of which high numbers are bad: mean / 95th percentile / worst clip; empty: not measured."""
    return mean_p5_worst(numbers, 3, high_is_bad=True) if numbers else ""


def peer_name(row: PeerRow) -> str:
    """Library and method."""
    method = PLANNERS.get(row.method, row.method) if row.library == OURS else row.method
    return f"{row.library}, {method}"


def is_plan(row: PeerRow) -> bool:
    """Whether it is the plan of this tool's own choice."""
    return (row.library, row.method) == (OURS, PLAN)


def best_settings(rows: Iterable[PeerRow]) -> list[PeerRow]:
    """Of the settings of one method those with a higher mean PSNR than all that take no more work; by work."""
    found: list[PeerRow] = []
    for row in sorted(rows, key=lambda row: (np.mean(row.full_steps), -np.mean(row.psnr))):
        if not found or np.mean(row.psnr) > np.mean(found[-1].psnr):
            found.append(row)
    return found


def peers_summary(result: Peers) -> str:
    """A row a method: of its settings that take at most so many full steps, the one with the highest mean PSNR."""
    rows = []
    for name in dict.fromkeys(map(peer_name, result.rows)):
        runs = [row for row in result.rows if peer_name(row) == name and not row.refusal]
        cells = []
        for budget in BUDGETS:
            within = [row for row in runs if np.mean(row.full_steps) <= budget + 1e-6]
            best = max(within, key=lambda row: np.mean(row.psnr), default=None)
            cells.append("" if best is None else mean_p5_worst(best.psnr))
        if runs:
            rows.append([f"**{name}**" if is_plan(runs[0]) else name, *cells])
    return table(["", *(f"at most {budget}" for budget in BUDGETS)], rows)


def peers_table(result: Peers) -> str:
    """A row a setting, by method and cost; then what was refused."""
    rows, refused = [], []
    names = list(dict.fromkeys(map(peer_name, result.rows)))
    cost = {id(row): float(np.mean(row.full_steps)) if row.full_steps else 0.0 for row in result.rows}
    for row in sorted(result.rows, key=lambda row: (names.index(peer_name(row)), -cost[id(row)])):
        if row.refusal:
            refused.append([peer_name(row), row.setting, row.refusal])
            continue
        rows.append(
            [
                f"**{peer_name(row)}**" if is_plan(row) else peer_name(row),
                row.setting,
                f"{cost[id(row)]:.1f}",
                f"{median(row.seconds):.3f} s",
                f"{median(slow / fast for slow, fast in zip(row.uncached_seconds, row.seconds)):.2f}×",
                mean_p5_worst(row.psnr),
                f"{np.mean(row.ssim):.4f}",
                flips(row.flip),
            ]
        )
    head = ["method", "setting", "full steps", "CPU time", "speed-up", "PSNR", "SSIM", "FLIP"]
    tables = [table(head, rows)]
    if refused:
        same = {(name, text): [other[1] for other in refused if (other[0], other[2]) == (name, text)]
                for name, _, text in refused}  # fmt: skip
        lines = [[name, "; ".join(filter(None, several)), text.replace("|", "\\|")]
                 for (name, text), several in same.items()]  # fmt: skip
        tables.append(table(["refused", "settings", "message"], lines, "left"))
    return "\n\n".join(tables)


def peers_caption(result: Peers) -> str:
    """What the tables are of."""
    clips = next(len(row.psnr) for row in result.rows if not row.refusal)
    return (
        f"{result.model} (revision {(result.revision or 'none')[:12]}), {result.blocks} blocks, {result.steps} steps "
        f"of {result.scheduler}, guidance {result.guidance_scale:g}; {clips} held-out clips, seeds from "
        f"{result.first_seed}, in PyTorch, one thread. First the best mean PSNR of each method by the work of the "
        "blocks, in full steps: mean / 5th percentile / worst clip."
    )


def described(result: Result) -> str:
    """Caption, table, and the line of its run."""
    if isinstance(result, Quality):
        parts = [quality_caption(result), quality_table(result)]
    elif isinstance(result, Speed):
        parts = [speed_caption(result), speed_table(result)]
    elif isinstance(result, Serving):
        parts = [serving_caption(result), serving_tables(result)]
    elif isinstance(result, BuildCost):
        parts = [cost_caption(result), cost_table(result)]
    elif isinstance(result, Guidance):
        parts = [guidance_caption(result), guidance_table(result)]
    elif isinstance(result, Peers):
        parts = [peers_caption(result), peers_summary(result), peers_table(result)]
    elif isinstance(result, Quantized):
        parts = [quantized_caption(result), quantized_table(result)]
    elif isinstance(result, Traces):
        parts = [traces_table(result)]
    elif isinstance(result, RtxBuilds):
        parts = [rtx_table(result)]
    elif isinstance(result, TrueSize):
        parts = [true_size_table(result)]
    elif isinstance(result, Drawing):
        parts = [drawing_caption(result), drawing_table(result)]
    elif isinstance(result, TrueSizeExports):
        parts = [exports_table(result)]
    elif isinstance(result, AttentionMemory):
        parts = [attention_caption(result), attention_table(result)]
    elif isinstance(result, Scaling):
        parts = [scaling_caption(result), scaling_table(result)]
    elif isinstance(result, UnusedDepth):
        parts = [depth_caption(result), depth_table(result)]
    else:
        parts = [engine_caption(result), engine_table(result)]
    return "\n\n".join([*parts, of_run(result.run)])


def best_stock(plans: Sequence[QualityRow]) -> QualityRow | None:
    """The standard solver with the highest mean PSNR."""
    return max((row for row in plans if row.method in SOLVERS), key=lambda row: np.mean(row.psnr), default=None)


def main_qualities(results: Sequence[Result]) -> list[Quality]:
    """One quality a model, of plans that stand for its own steps: with the most, and of these that from the first
    calibration seed."""
    every = (result for result in results if isinstance(result, Quality) and result.reference_steps is None)
    found = sorted(every, key=lambda one: (-one.steps, one.seed))
    return sorted({one.model: one for one in reversed(found)}.values(), key=lambda one: one.model)


def standing_table(results: Sequence[Result]) -> str:
    """A row a model, number of steps, calibration seed and budget: the plan beside the best of all others in each of
    mean, 5th percentile and worst clip, whose name is given; bold where it is ahead beyond the interval. All are
    compared with what the plan stands for."""
    found = [result for result in results if isinstance(result, Quality)]
    rows = []
    for result in sorted(
        found, key=lambda one: (one.model, one.reference_steps or 0, -one.steps, one.guidance_scale, one.seed)
    ):
        guided = f"guidance {result.guidance_scale:g}"
        shift = "" if result.flow_shift is None else f", shift {result.flow_shift:g}"
        finer = "" if result.reference_steps is None else f", to {result.reference_steps} steps"
        for budget in result.budgets:
            plans = [_as_compared(row, result) for row in result.of_budget(budget)]
            own = next(row for row in plans if row.own)
            others = [row for row in plans if not row.own]
            cells = [
                f"{result.model}, {guided}{shift}{finer}",
                f"{budget} of {result.steps}",
                str(result.seed),
                mean_p5_worst(own.psnr),
                _rival(own, others, np.mean, gain),
                _rival(own, others, lambda psnr: np.percentile(psnr, 5), tail_gain),
            ]
            worst = max(others, key=lambda row: min(row.psnr))
            cells.append(f"{min(own.psnr) - min(worst.psnr):+.1f} ({NAMES.get(worst.method, worst.method)})")
            rows.append(cells)
    head = ["", "full steps", "seed", "the plan", "mean: lead over the best other", "5th percentile", "worst clip"]
    return table(head, rows) if rows else ""


def _as_compared(row: QualityRow, result: Quality) -> QualityRow:
    """A row whose PSNR is against what the plans stand for."""
    if result.reference_steps is None:
        return row
    assert result.reference_steps == result.fine_steps
    return msgspec.structs.replace(row, psnr=row.fine_psnr)


def _rival(
    own: QualityRow,
    others: Sequence[QualityRow],
    score: Callable[[Sequence[float]], Any],
    lead: Callable[[Sequence[float], Sequence[float]], str],
) -> str:
    """The lead over the other with the best score, and its name; bold where the plan is behind beyond the interval."""
    best = max(others, key=lambda row: score(row.psnr))
    found = f"{lead(own.psnr, best.psnr)} ({NAMES.get(best.method, best.method)})"
    return f"**{found}**" if "+" not in found else found


def summary_table(results: Sequence[Result]) -> str:
    """The README's table: a row a model and budget; PSNR mean / 5th percentile over held-out clips."""
    qualities = main_qualities(results)
    speeds = {
        (speed.model, row.full_steps): speedup(row, speed.rows[1])
        for speed in results
        if isinstance(speed, Speed)
        for row in speed.rows[2:]
        if row.skipped_step is None and not row.engines
    }
    rows = []
    for result in qualities:
        for budget in result.budgets:
            plans = result.of_budget(budget)
            by_method = {row.method: mean_p5(row.psnr) for row in plans if not row.own}
            own = next((row for row in plans if row.own), None)
            stock = best_stock(plans)
            speed = speeds.get((result.model, budget))
            rows.append(
                [
                    f"{result.model}, {result.scheduler}",
                    f"{budget} of {result.steps}",
                    "" if speed is None else f"{speed:.1f}×",
                    "" if own is None else f"**{mean_p5(own.psnr)}**",
                    by_method.get("lemica", ""),
                    by_method.get("fewer-steps", ""),
                    "" if stock is None else f"{mean_p5(stock.psnr)} ({SOLVERS[stock.method]})",
                ]
            )
    head = ["", "full steps", "speed-up", "the plan", "LeMiCa", "same sampler, fewer steps", "best standard solver"]
    return table(head, rows) if rows else ""
