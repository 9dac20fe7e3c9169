"""Tables that the command line prints: rich on a terminal, plain in a pipe. Values in, renderables out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec import UNSET
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lemica_trt.core.progress import count, duration, size
from lemica_trt.ir.budget import FrontRow, StepTimes, format_seconds
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.graphs import GraphSet, Role
from lemica_trt.ir.measured import MeasuredPlan, MeasuredPlans
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import (
    PLAN,
    BudgetOutcome,
    BundleSummary,
    Check,
    Quality,
    ShapeSummary,
    StageEstimate,
    VerifyReport,
)
from lemica_trt.ir.timeline import guidance_text, timeline_text
from lemica_trt.report.timeline import plan_table
from lemica_trt.report.ways import BASELINES

TIMELINE_WIDTH = 80
"""Columns of a plan on one line, its name before it."""


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the house's style; a column whose name begins with `>` is flushed right."""
    made = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    for number, column in enumerate(columns):
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        made.add_column(column.lstrip(">"), justify=side, overflow="fold", no_wrap=number == 0)  # names stay whole
    return made


def build_table(
    bundle: BundleSummary, report: VerifyReport | None, output: Path, unverified: Mapping[str, str] | None = None
) -> RenderableType:
    """What a build made: plans, speed and quality beside the baselines, agreement, and where things lie.

    Args:
        output: where the bundle is.
        unverified: backend → why its engines were built and not verified.
    """
    shape, sampling = bundle.profile.shape, bundle.profile.sampling
    title = (
        f"{bundle.profile.name}: {shape.frames} frames {shape.height}×{shape.width}, {sampling.steps} steps, "
        f"{bundle.dtype}"
    )
    parts: list[RenderableType] = []
    if report is None:
        parts.append(plans_table(bundle.plans, title=title))
    else:
        parts.append(quality_table(report, title=title))
        parts.append(agreement_text(report))
    for entry in bundle.engines:
        parts.append(labelled(("engine", text) for text in engine_lines(entry)))
    for backend, reason in (unverified or {}).items():
        parts.append(line(f"BUILT, NOT VERIFIED: {backend} ({reason})"))
    if unverified and report is None:
        parts.append(line(f"verify   lemica-trt verify {output}  (on a machine that runs these engines)"))
    parts.append(line(f"bundle   {output}"))
    parts.extend(line(f"picture  {output / path}  ({what})") for path, what in bundle.pictures.items())
    images = " --image first.png" * bundle.image + " --last-image last.png" * bundle.last_image
    parts.append(line(f'try      lemica-trt run {output} "a prompt"{images} --output clip.mp4'))
    return Group(*parts)


def engine_lines(entry: EngineEntry) -> Iterator[str]:
    """What building each engine took, and what is in it; nothing for graphs that are loaded as they are."""
    for role, build in sorted(entry.builds.items()):
        counts = build.precisions if build.engine_precisions is None else build.engine_precisions
        parts = [] if build.seconds is None else [duration(build.seconds)]
        if build.host_memory is not None:
            gpu = "" if build.device_memory is None else f" and {size(build.device_memory)} of GPU memory"
            parts.append(f"peak {size(build.host_memory)}{gpu}")
        parts += [f"{count} layers in {dtype}" for dtype, count in sorted(counts.items())]
        fused = build.fused_attention
        parts.append("not looked into" if fused is None else f"{fused} of {build.attentions} attentions fused")
        yield f"{entry.key.backend} {role}: {', '.join(parts)}"
    yield from layers_lines(entry)


def layers_lines(entry: EngineEntry) -> Iterator[str]:
    """What is quantised, and what is not and why; a line a graph, nothing where none is."""
    yield from (f"{role}: {layers_text(entry, role)}" for role in entry.quantized)


def layers_text(entry: EngineEntry, role: Role) -> str:
    """How many linear layers of a graph are quantised, and which are not and why."""
    build = entry.builds[role]
    layers = build.layers or ()
    kept = [f"{layer.name} {layer.decibels:.1f}" for layer in layers if layer.precision == "fp32"]
    text = f"{len(layers) - len(kept)} of {len(layers)} linear layers in {entry.precision}"
    if build.decibels is not None:
        text += f", the output {build.decibels:.1f} dB"
    if kept:
        text += f"; kept in fp32 (dB of the output if it alone were {entry.precision}): {', '.join(kept)}"
    return text


LABEL_WIDTH = 8
"""Columns of the word that a line begins with."""


def line(text: str) -> Text:
    """A line that is not wrapped: a path in it can be copied."""
    return Text(text, no_wrap=True, overflow="ignore")


def quality_table(report: VerifyReport, *, title: str | None = None) -> Table:
    """Each plan's time and held-out quality, its baselines below it."""
    made = table("plan", ">full", ">time", ">speed-up", ">PSNR dB", ">5th pct.", ">worst", ">SSIM", title=title)
    perceptual = any(row.lpips is not None for row in report.quality)
    if perceptual:
        made.add_column("LPIPS", justify="right")
    for timing in report.timing:
        rows = [row for row in report.quality if row.plan == timing.plan]
        speed = "" if timing.speedup is None else f"{timing.speedup:.2f}×"
        head = [timing.plan, str(timing.budget), duration(timing.total), speed]
        plan = next((row for row in rows if row.method == PLAN), None)
        made.add_row(*head, *_scores(plan, perceptual), style="bold" if plan else "")
        for row in rows:
            if row.method != PLAN:
                cells = [f"  {BASELINES[row.method]}", str(row.budget), "", ""]
                made.add_row(*cells, *_scores(row, perceptual), style="dim")
    return made


def _scores(row: Quality | None, perceptual: bool) -> list[str]:
    if row is None:
        return ["ref."]
    margin = "" if row.psnr_margin is None else f" ±{row.psnr_margin:.1f}"
    scores = [f"{row.psnr:.1f}{margin}", f"{row.psnr_p5:.1f}", f"{row.psnr_worst:.1f}", f"{row.ssim:.4f}"]
    return [*scores, "" if row.lpips is None else f"{row.lpips:.3f}"] if perceptual else scores


def _clips(report: VerifyReport) -> str:
    """How many clips the plans ran on."""
    fewer: dict[int, list[str]] = {}
    for row in report.quality:
        if row.method == PLAN and len(row.each_psnr) < report.samples:
            fewer.setdefault(len(row.each_psnr), []).append(row.plan)
    beside = [f"{', '.join(plans)}: {count(clips, 'clip')}" for clips, plans in sorted(fewer.items())]
    return count(report.samples, "held-out clip") + (f" ({'; '.join(beside)})" if beside else "")


def _references(report: VerifyReport) -> str:
    """What the plans were compared with."""
    others = {row.plan: row.reference_steps for row in report.quality if row.reference_steps is not None}
    if others and len(others) == len({row.plan for row in report.quality}):
        return f"the sampler with {' or '.join(map(str, sorted(set(others.values()))))} steps"
    uncached = "the uncached run"
    if report.precision is not UNSET:
        uncached = f"the uncached run in PyTorch, in {report.dtype} as are the other methods below each plan"
    return ", ".join([uncached, *(f"{plan} against {steps} steps" for plan, steps in others.items())])


def agreement_text(report: VerifyReport) -> RenderableType:
    """How far runtime, PyTorch and diffusers agree, what steps take, and what the loop costs beyond them."""
    notes = [("quality", f"{_clips(report)} against {_references(report)}, ± 95 %; {report.backend}, {report.machine}")]
    worst = max(report.graphs, key=lambda check: check.difference / max(check.scale, 1e-9), default=None)
    if worst is not None:
        found = f"{worst.difference:.1e} of {worst.scale:.3g} ({worst.role})"
        notes.append(("graphs", f"differ from PyTorch by at most {found}"))
    for against in ("diffusers", "torch"):
        runs = [f"{run.plan} {run.difference:.1e}" for run in report.agreement if run.against == against]
        if runs:
            notes.append(("latents", f"largest difference from {against} after all steps: {', '.join(runs)}"))
    if report.steps is not None:
        notes.append(("steps", steps_text(report.steps)))
    costs = ", ".join(f"{timing.plan} {timing.overhead:+.1%} ({timing.ratio:.3f})" for timing in report.timing)
    notes.append(("loop", f"time beyond the steps' own (and over full steps alone): {costs}"))
    return labelled(notes)


def steps_text(times: StepTimes) -> str:
    """What steps take."""
    skipped = "" if times.skipped is None else f", a skipped one {format_seconds(times.skipped)}"
    return f"a full step takes {format_seconds(times.full)}{skipped}"


def labelled(notes: Iterable[tuple[str, str]]) -> Table:
    """Lines that begin with a word, and go on below it where they are long."""
    made = Table.grid(padding=(0, 1, 0, 0))
    made.add_column(min_width=LABEL_WIDTH, no_wrap=True)
    made.add_column(overflow="fold")
    for label, text in notes:
        made.add_row(label, Text(text))
    return made


def with_outcomes(
    shown: RenderableType, outcomes: Sequence[BudgetOutcome], front: Sequence[FrontRow]
) -> RenderableType:
    """A table, and below it the front and what came of budgets in other units, where there are any."""
    parts = [shown, *([front_table(front)] if front else [])]
    if outcomes:
        parts.append(labelled(("asked", outcome_text(outcome)) for outcome in outcomes))
    return Group(*parts) if len(parts) > 1 else shown


def outcome_text(outcome: BudgetOutcome) -> str:
    """What was asked for, what was predicted, what was measured."""
    parts = [f"{outcome.asked}: plan {outcome.plan}, {outcome.full_steps} full steps"]
    for name, speed in (("predicted", outcome.predicted), ("measured", outcome.measured)):
        parts += [f"{name} {format_seconds(speed.seconds)}, {speed.speedup:.2f}×"] if speed is not None else []
    row = outcome.quality
    if row is not None:
        low = "" if row.psnr_low is None else f" (95 % of the mean: from {row.psnr_low:.1f})"
        parts.append(
            f"validation clips {row.psnr:.1f} dB{low}, 5th percentile {row.psnr_p5:.1f}, worst {row.psnr_worst:.1f}"
        )
    if outcome.met is False:
        parts.append("NOT MET")
    return "; ".join(parts)


def front_table(rows: Sequence[FrontRow]) -> Table:
    """Quality and predicted time by budget; what is not on the Pareto front is dim."""
    made = table(
        "plan",
        ">full steps",
        ">PSNR dB",
        ">95 % from",
        ">5th pct.",
        ">worst",
        ">predicted",
        ">speed-up",
        "method",
        "",
        title="Quality on validation clips by budget",
    )
    for row in rows:
        made.add_row(
            row.plan,
            str(row.budget),
            f"{row.psnr:.1f}",
            "" if row.psnr_low is None else f"{row.psnr_low:.1f}",
            f"{row.psnr_p5:.1f}",
            f"{row.psnr_worst:.1f}",
            "" if row.seconds is None else format_seconds(row.seconds),
            "" if row.speedup is None else f"{row.speedup:.2f}×",
            row.method,
            "dominated" if row.dominated else "",
            style="dim" if row.dominated else "",
        )
    return made


def plans_table(
    plans: Sequence[StepPlan], measured: MeasuredPlans | None = None, *, title: str | None = None
) -> RenderableType:
    """Plans with what is known of each, and as timelines.

    Args:
        measured: quality and times, on a bundle's engines; None: nothing is known.
    """
    ordered = sorted(plans, key=lambda plan: -plan.budget)
    found = {plan.name: known for plan in ordered if measured is not None and (known := measured.of(plan)) is not None}
    made = table("plan", ">full steps", *((">PSNR dB", ">time", ">speed-up") if found else ()), "method",
                 "guidance", title=title)  # fmt: skip
    for plan in ordered:
        numbers = _measured_cells(found.get(plan.name)) if found else []
        made.add_row(plan.name, f"{plan.budget}/{plan.num_steps}", *numbers, plan.method, guidance_text(plan))
    width = max((len(plan.name) for plan in ordered), default=0)
    lines = [
        line(f"{plan.name:<{width}}  {timeline_text(plan, max(TIMELINE_WIDTH - width - 2, 20))}") for plan in ordered
    ]
    notes = []
    if found:
        several = {(known.backend, known.machine) for known in found.values()}
        clips = sorted({len(known.psnr) for known in found.values() if known.psnr})
        against = sorted({known.reference_steps or 0 for known in found.values() if known.psnr})
        reference = " or ".join("the uncached run" if steps == 0 else f"{steps} steps" for steps in against)
        held_out = f"held-out clips ({' or '.join(map(str, clips))}) against {reference}; " if clips else ""
        notes = [Text(f"{held_out}{'; '.join(sorted(', '.join(each) for each in several))}", style="dim")]
    return Group(made, *notes, *lines)


def _measured_cells(known: MeasuredPlan | None) -> list[str]:
    if known is None:
        return ["–"] * 3
    quality = "ref." if known.mean is None else f"{known.mean:.1f}"
    return [quality, duration(known.seconds), "" if known.speedup is None else f"{known.speedup:.2f}×"]


def with_unverified(shown: RenderableType, added: Sequence[str], target: Path) -> RenderableType:
    """A table, and below it that plans were added which nobody has compared with PyTorch."""
    if not added:
        return shown
    what = f"added    {', '.join(added)}; not compared with PyTorch: lemica-trt verify {target}"
    return Group(shown, line(what))


def graphs_table(graphs: GraphSet) -> Table:
    """Exported graphs with their interfaces."""
    made = table("graph", "file", "inputs", "outputs")
    for graph in graphs.graphs:
        sides = [
            "\n".join(f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in side)
            for side in (graph.inputs, graph.outputs)
        ]
        made.add_row(graph.role, graph.file, *sides)
    return made


def error_graph_table(graph: ErrorGraph) -> Table:
    """The error graph by segment start: errors (×1000) at a few lengths."""
    skips = [skip for skip in (1, 2, 3, 5, 8, 13, 21) if skip <= graph.max_skip]
    made = table(
        ">start",
        *(f">skip {skip}" for skip in skips),
        title=f"{graph.model}: mean |Δx0| × 1000 of {graph.samples} samples ({graph.method}), "
        "by full step and steps skipped behind it",
    )
    edges = {(edge.start, edge.stop): edge.error for edge in graph.edges}
    for start in range(0, graph.num_steps - 1, max(1, graph.num_steps // 16)):
        errors = [edges.get((start, start + skip + 1)) for skip in skips]
        made.add_row(str(start), *("" if error is None else f"{error * 1000:.2f}" for error in errors))
    return made


def dry_run_table(stages: Sequence[StageEstimate]) -> RenderableType:
    """What a build would do, and what all of it takes."""
    made = table("stage", "what", ">samplings", ">time", ">disk", ">memory")
    for stage in stages:
        made.add_row(
            stage.name,
            stage.what,
            f"{stage.samplings:.1f}" if stage.samplings else "",
            "–" if stage.seconds is None else f"~{duration(stage.seconds)}",
            "–" if stage.disk is None else f"~{size(stage.disk)}",
            "–" if stage.memory is None else f"~{size(stage.memory)}",
        )
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    disk = [stage.disk for stage in stages if stage.disk is not None]
    memory = [stage.memory for stage in stages if stage.memory is not None]
    made.add_section()
    made.add_row(
        "total",
        ""
        if len(known) == len(stages)
        else "times of steps are not known before the pipeline is traced"
        if memory
        else "times and sizes are not known without the model",
        f"{sum(stage.samplings for stage in stages):.1f}",
        f"~{duration(sum(known))}" if len(known) == len(stages) else "–",
        f"~{size(sum(disk))}" if len(known) == len(stages) or memory else "–",
        f"~{size(max(memory))}" if memory else "–",
        style="bold",
    )
    return made


def methods_table(methods: Sequence[Mapping[str, Any]]) -> Table:
    """The planners, what each needs, and which of them `auto` tries; see `lemica-trt methods --json`."""
    made = table("method", "auto", "what it does", "needs", "engine calls")
    for method in methods:
        needs = ", ".join(method["needs"]) or "nothing"
        made.add_row(method["name"], "✓" if method["auto"] else "", method["summary"], needs, method["calls"])
    return made


def doctor_table(checks: Sequence[Check]) -> Table:
    """What is on this machine."""
    made = table("", "what", "found")
    for check in checks:
        mark = {True: "✓", False: "✗", None: "·"}[check.ok]
        made.add_row(mark, check.what, check.found)
    return made


def bundle_table(bundle: BundleSummary) -> RenderableType:
    """What a bundle is, and its plans."""
    shape, sampling = bundle.profile.shape, bundle.profile.sampling
    facts = table("", "")
    facts.show_header = False
    for name, text in (
        ("model", f"{bundle.profile.name} ({bundle.profile.family}) from {bundle.profile.source}"),
        *(("LoRA", lora.text) for lora in bundle.profile.loras or ()),
        *([("run --lora", f"can change {bundle.changeable} weights")] if bundle.changeable else []),
        ("revision", (bundle.revision or "–")[:16]),
        (
            "makes",
            f"{shape.frames} frames {shape.height}×{shape.width} at {shape.fps} fps, up to {shape.max_batch} at once",
        ),
        *(("also makes", further_text(further)) for further in bundle.further),
        (
            "sampling",
            f"{sampling.steps} steps, guidance {sampling.guidance_scale:g}, {bundle.dtype}, "
            f"sampler {bundle.default.sampler_digest[:16]}",
        ),
        ("engines", ", ".join(f"{e.key.title} {e.key.target}" for e in bundle.engines)),
        *(("quantised", text) for entry in bundle.engines for text in layers_lines(entry)),
        ("default plan", bundle.default_plan),
        ("size", f"{size(bundle.size)} in {bundle.files} files"),
        ("built with", ", ".join(f"{name} {version}" for name, version in sorted(bundle.versions.items()))),
    ):
        facts.add_row(name, text)
    return Group(facts, plans_table(bundle.plans, bundle.measured))


def further_text(shape: ShapeSummary) -> str:
    """A further shape of a bundle, and its plans, in one line."""
    held = [f"{name} ({text})" if text else name for name, text in shape.held.items()]
    refused = f"; refused: {', '.join(shape.refused)}" if shape.refused else ""
    return f"{shape.name} (frames x height x width): {', '.join(held)}{refused}"


def shapes_table(shapes: Sequence[ShapeSummary], bundle: Path) -> RenderableType:
    """Which plans of a bundle hold at its further shapes.

    Args:
        bundle: where it is.
    """
    made = table("shape", "plan", "", "")
    for shape in shapes:
        for name, text in shape.held.items():
            made.add_row(shape.name, name, "✓", text)
        for name, why in shape.refused.items():
            made.add_row(shape.name, name, "✗", why)
    found: list[RenderableType] = [made]
    if shapes:
        found.append(line(f'try      lemica-trt run {bundle} "a prompt" --shape {shapes[0].name} --output clip.mp4'))
    return Group(*found)


def inspected_table(value: BundleSummary | StepPlan | ErrorGraph) -> RenderableType:
    """What `lemica-trt inspect` shows of a value."""
    if isinstance(value, StepPlan):
        return plan_table(value)
    return error_graph_table(value) if isinstance(value, ErrorGraph) else bundle_table(value)
