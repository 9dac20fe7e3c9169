"""Benchmarks and comparisons for people."""

from __future__ import annotations

from statistics import median

from rich.console import Group, RenderableType

from lemica_trt.core.metrics import PSNR_CAP
from lemica_trt.core.progress import count, duration, size
from lemica_trt.ir.budget import format_seconds
from lemica_trt.ir.measured import Bench, ComparedSide, Comparison, PlanTimes, summary_of
from lemica_trt.report.summary import labelled, table


def bench_table(found: Bench) -> RenderableType:
    """Latency and throughput of each plan, its parts, and its rows."""
    made = table("plan", ">p50", ">p95", ">p99", ">requests/s", ">text", ">denoise", ">decode")
    for plan in found.plans:
        made.add_row(
            plan.plan,
            *(format_seconds(plan.percentile(part)) for part in (50, 95, 99)),
            f"{found.batch / (sum(plan.latency) / len(plan.latency)):.3g}",
            *(duration(median(part)) for part in (plan.text, plan.denoise, plan.decode)),
        )
    lines = [("rows", f"{plan.plan}: {_rows_text(plan)}") for plan in found.plans]
    first, *others = found.plans
    if others:
        ratios = ", ".join(f"{plan.plan} {_ratio(first, plan):.2f}×" for plan in others)
        lines.append(("ratio", f"latency of {first.plan} / that of {ratios}; median of the same rounds"))
    many = f"{len(first.latency)} requests of each plan" + (f", {found.batch} at once" if found.batch > 1 else "")
    lines.append(("of", f"{many}, after {duration(found.warm_up)} of warm-up; {found.backend}, {found.machine}"))
    if found.memory:
        lines.append(("memory", f"{size(found.memory)}, the peak of this process on the host"))
    if found.device_memory is not None:
        lines.append(("", f"{size(found.device_memory)} of the GPU held after the last request, by all processes"))
    return Group(made, labelled(lines))


def _ratio(first: PlanTimes, other: PlanTimes) -> float:
    return median(a / b for a, b in zip(first.latency, other.latency))


def _rows_text(plan: PlanTimes) -> str:
    """What the rows of each kind take."""
    kinds: dict[str, list[float]] = {}
    for row in plan.rows:
        kinds.setdefault(row.variant or "no graph of the DiT", []).append(median(row.seconds))
    return ", ".join(f"{len(times)} × {kind} {format_seconds(median(times))}" for kind, times in kinds.items())


def comparison_table(found: Comparison) -> RenderableType:
    """How alike two plans' clips are, what each takes, and where the plans differ."""
    made = table("", "plan", ">full steps", "method", ">time", ">full step", ">skipped")
    for name, side in (("A", found.a), ("B", found.b)):
        made.add_row(
            name,
            side.plan,
            f"{len(side.full_steps)}/{side.num_steps}",
            side.method,
            format_seconds(median(side.seconds)),
            format_seconds(side.full_step),
            "" if side.skipped_step is None else format_seconds(side.skipped_step),
        )
    alike = table("B against A", ">mean", ">5th pct.", ">worst")
    alike.add_row("PSNR dB", *(f"{value:.1f}" for value in summary_of(found.psnr)))
    if found.ssim is not None:
        alike.add_row("SSIM", *(f"{value:.4f}" for value in summary_of(found.ssim)))
    lines = [
        ("speed", f"B takes {1 / found.speedup:.2f} of the time of A ({found.speedup:.2f}×), median of the same clips"),
        *_plan_lines(found),
        ("of", f"{count(len(found.samples), 'clip')}; {_engines(found)}, {found.machine}"),
    ]
    if min(found.psnr) >= PSNR_CAP:
        lines.insert(0, ("clips", "identical"))
    return Group(made, alike, labelled(lines))


def _plan_lines(found: Comparison) -> list[tuple[str, str]]:
    """Which steps one of the two runs in full and the other does not."""
    if found.same_plan:
        return [("steps", "the same full steps")]
    if found.a.num_steps != found.b.num_steps:
        return [("steps", f"samplers of {found.a.num_steps} and {found.b.num_steps} steps")]

    def only(one: ComparedSide, other: ComparedSide) -> str:
        return " ".join(str(step) for step in one.full_steps if step not in other.full_steps) or "none"

    both = len(set(found.a.full_steps) & set(found.b.full_steps))
    return [
        ("steps", f"{both} full in both"),
        ("", f"only in A: {only(found.a, found.b)}"),
        ("", f"only in B: {only(found.b, found.a)}"),
    ]


def _engines(found: Comparison) -> str:
    return found.a.backend if found.a.backend == found.b.backend else f"{found.a.backend} and {found.b.backend}"
