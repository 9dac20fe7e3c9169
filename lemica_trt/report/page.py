"""A bundle as one HTML page: values in, text out. It asks for nothing from anywhere, and runs one script of its own.

The template escapes whatever it is given. A content security policy names the digests of the page's style and script,
so that nothing that a manifest or a prompt says could run even where it was not escaped.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import UNSET

from lemica_trt.core.errors import MissingDependencyError, install_command
from lemica_trt.core.progress import count, duration, size
from lemica_trt.ir.budget import FrontRow, format_seconds
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.kept import Kept, KeptClip
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import PLAN, BundleSummary, Quality, VerifyReport
from lemica_trt.ir.timeline import guidance_text
from lemica_trt.ir.trials import TrialTables
from lemica_trt.report.charts import front_chart, schedule_chart
from lemica_trt.report.summary import layers_text
from lemica_trt.report.ways import BASELINES, Way, strips_of, ways_of

WEB = Path(__file__).with_name("web")
"""Template, style and script."""

PLACES = ("worst", "median", "best")
"""The clips that are kept, by the PSNR of the default plan."""


class PageFacts(NamedTuple):
    """What a page shows.

    Attributes:
        bundle: what it is.
        digest: of its manifest.
        report: of its last verification; None: it was not verified.
        kept: clips; None: there are none.
        graph: error graph; None: nothing was calibrated.
        trials: how candidates did; None: nothing was tried.
        front: quality by budget on validation clips, where it was measured.
    """

    bundle: BundleSummary
    digest: str
    report: VerifyReport | None
    kept: Kept | None
    graph: ErrorGraph | None
    trials: TrialTables | None
    front: tuple[FrontRow, ...]


def page_html(facts: PageFacts) -> str:
    """The page.

    Raises:
        MissingDependencyError: Jinja is not installed.
    """
    style, script = ((WEB / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    plan, report = facts.bundle.default, facts.report
    ways = [] if report is None else ways_of(report, plan)
    own = next((way for way in ways if way.method == PLAN), None)
    strips = strips_of(report, facts.kept, facts.bundle.plans, plan)
    return str(
        _template().render(
            bundle=facts.bundle,
            plan=plan,
            report=report,
            kept=facts.kept,
            graph=facts.graph,
            trials=facts.trials,
            style=style,
            script=script,
            policy=_policy(style, script),
            is_stale=report is not None and report.manifest_digest != facts.digest,
            failures=[] if report is None else report.failures(),
            tiles=list(_tiles(own, plan)),
            ways=ways,
            plans=[_plan_cells(each, report) for each in sorted(facts.bundle.plans, key=lambda each: -each.budget)],
            clip_names=[way.name for way in ways if way.quality is not None],
            clip_rows=_clip_rows(ways, facts.kept),
            viewer=_viewer(facts, ways),
            front=None if report is None else front_chart(report, facts.bundle.plans, ways, facts.front),
            schedule=None if facts.graph is None else schedule_chart(facts.graph, strips),
            engines=[cells for entry in facts.bundle.engines for cells in _engine_rows(entry)],
            provenance=list(_provenance(facts)),
        )
    )


@functools.cache
def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("a report page needs Jinja", fix=install_command("report")) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "size": size, "seconds": format_seconds}
    return environment.get_template("page.html")


def _policy(style: str, script: str) -> str:
    """Nothing is loaded, and nothing runs but this style and this script."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _tiles(own: Way | None, plan: StepPlan) -> Iterator[tuple[str, str, str]]:
    """The few numbers that a page is opened for: what, how much, and of what."""
    yield "full steps", f"{plan.budget} of {plan.num_steps}", f"plan {plan.name}, {plan.method}"
    if own is None or own.quality is None:
        return
    if own.speedup is not None and own.seconds is not None:
        yield "speed-up", f"{own.speedup:.1f}×", f"denoising loop, {format_seconds(own.seconds)}"
    quality = own.quality
    margin = "" if quality.psnr_margin is None else f" ± {quality.psnr_margin:.1f} (95 %)"
    yield "PSNR", f"{quality.psnr:.1f} dB", f"mean of {count(len(quality.each_psnr), 'held-out clip')}{margin}"
    yield "worst clip", f"{quality.psnr_worst:.1f} dB", f"SSIM {quality.ssim:.4f} on average"


def _plan_cells(plan: StepPlan, report: VerifyReport | None) -> dict[str, Any]:
    timing = quality = None
    if report is not None:
        timing = next((timing for timing in report.timing if timing.plan == plan.name), None)
        quality = next((row for row in report.quality if (row.plan, row.method) == (plan.name, PLAN)), None)
    return {"plan": plan, "guidance": guidance_text(plan), "timing": timing, "quality": quality}


def _clip_rows(ways: list[Way], kept: Kept | None) -> list[dict[str, Any]]:
    """Held-out clips, worst first: number, prompt, seed, dB by each way."""
    qualities: list[Quality] = [way.quality for way in ways if way.quality is not None]
    if not qualities:
        return []
    samples = kept.clips.samples if kept is not None else ()
    rows = []
    for number, psnr in sorted(enumerate(qualities[0].each_psnr), key=lambda pair: pair[1]):
        held_out = samples[number] if number < len(samples) else None
        each = [quality.each_psnr[number] if number < len(quality.each_psnr) else None for quality in qualities]
        best = max(value for value in each if value is not None)
        rows.append({"number": number, "held_out": held_out, "each": each, "best": best, "psnr": psnr})
    return rows


def _viewer(facts: PageFacts, ways: list[Way]) -> dict[str, Any] | None:
    """What the script draws: pictures as data addresses."""
    kept = facts.kept
    if kept is None:
        return None
    value, fps = kept.clips, facts.bundle.profile.shape.fps
    names = {way.method: way.name for way in ways}

    def address(path: str | None) -> str | None:
        return None if path is None else f"data:image/webp;base64,{base64.b64encode(kept.pictures[path]).decode()}"

    def clip_of(clip: KeptClip, place: str) -> dict[str, Any]:
        runs = [
            {
                "name": names.get(run.method, BASELINES.get(run.method, run.method)),
                "text": _run_text(run.psnr, run.flip),
                "frames": address(run.frames),
                "difference": address(run.difference),
                "flip": address(run.flip_map),
            }
            for run in clip.runs
        ]
        return {"place": place, "sample": clip.sample, "prompt": clip.prompt, "seed": clip.seed, "runs": runs}

    places = PLACES if len(value.clips) == len(PLACES) else ("worst", "best") if len(value.clips) == 2 else ("only",)
    return {
        "width": value.width,
        "height": value.height,
        "frames": len(value.frames),
        "milliseconds": 1000 * value.source[0] / fps / len(value.frames),
        "flip": any(run.flip is not None for clip in value.clips for run in clip.runs),
        "clips": [clip_of(clip, place) for clip, place in zip(value.clips, places)],
    }


def _run_text(psnr: float | None, flip: float | None) -> str:
    if psnr is None:
        return "others are compared with this"
    return f"{psnr:.1f} dB" + ("" if flip is None else f", FLIP {flip:.4f}")


def _engine_rows(entry: EngineEntry) -> Iterator[tuple[str, ...]]:
    """Backend, graph, what building took, memory, precisions, attention."""
    for role in sorted(entry.files):
        build = entry.builds.get(role)
        if build is None:
            yield entry.key.title, role, "loaded as exported", "", entry.key.dtype, ""
            continue
        memory = [] if build.host_memory is None else [size(build.host_memory)]
        memory += [] if build.device_memory is None else [f"{size(build.device_memory)} GPU"]
        counts = build.precisions if build.engine_precisions is None else build.engine_precisions
        precisions = ", ".join(f"{number} layers {dtype}" for dtype, number in sorted(counts.items()))
        if build.quantized:
            precisions = layers_text(entry, role)
        fused = build.fused_attention
        attention = "not looked into" if fused is None else f"{fused} of {build.attentions} fused"
        took = "" if build.seconds is None else duration(build.seconds)
        yield (
            entry.key.title, role, took, ", ".join(memory), precisions or entry.key.dtype,
            attention if build.attentions else "",
        )  # fmt: skip


def _provenance(facts: PageFacts) -> Iterator[tuple[str, str]]:
    bundle, graph, report = facts.bundle, facts.graph, facts.report
    profile, plan = bundle.profile, bundle.default
    yield "model", f"{profile.name} ({profile.family}) from {profile.source}"
    for lora in profile.loras or ():
        yield "LoRA", lora.text
    yield "revision", bundle.revision or "none"
    yield "sampler", f"{plan.scheduler}, {plan.num_steps} steps, digest {plan.sampler_digest}"
    yield "guidance", f"scale {plan.guidance_scale:g}; plans hold for {guidance_text(plan)}"
    if graph is not None:
        how = f"{graph.method}, {count(graph.samples, 'sample')}, at most {graph.max_skip} steps left out"
        yield "calibration", f"{how}; prompts {graph.prompts_digest[:16]}, seed {graph.seed}"
    if report is not None:
        yield "verified on", f"{report.machine}; {report.backend}; {count(report.samples, 'held-out clip')}"
        if report.precision is not UNSET:
            yield "compared with", f"the uncached run in PyTorch, in {report.dtype} as are other methods"
        yield "report is of", f"manifest {report.manifest_digest}"
    yield "manifest", facts.digest
    yield "engines for", ", ".join(f"{e.key.title} {e.key.target}" for e in bundle.engines)
    yield "size", f"{size(bundle.size)} in {bundle.files} files"
    yield "built with", ", ".join(f"{name} {version}" for name, version in sorted(bundle.versions.items()))
