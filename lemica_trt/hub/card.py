"""The card of a repository: README.md with the metadata that the hub reads, and tables of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from msgspec import UNSET

from lemica_trt.bundle.manifest import Manifest
from lemica_trt.core.progress import size
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import PLAN, Quality, VerifyReport
from lemica_trt.ir.resources import profile_name

LIBRARY = "lemica-trt"


def bundle_card(
    manifest: Manifest,
    digest: str,
    plans: Sequence[StepPlan],
    report: VerifyReport | None,
    pictures: Iterable[str],
    at: str,
) -> str:
    """The card of a bundle.

    Args:
        manifest, digest, plans: of the bundle.
        report: what verification found; None: nothing, or it is of another bundle.
        pictures: paths below the repository.
        at: what to give to `lemica-trt pull`.
    """
    profile = manifest.profile
    shape = profile.shape
    images, taken = shape.is_image, manifest.graphs.image is not UNSET
    image = " --image first.png" * taken + " --last-image last.png" * ("last_image" in manifest.graphs.sources)
    names = list(dict.fromkeys(f"{entry.key.title} for {entry.key.target}" for entry in manifest.engines))
    fused = "".join(f", LoRA {lora.text}" for lora in profile.loras or ())
    weight = size(sum(entry.size for entry in manifest.files.values()))
    parts = [
        _metadata(f"{'image' if taken else 'text'}-to-{'image' if images else 'video'}", profile.source),
        f"# {profile.name}: a bundle of lemica-trt",
        f"{profile.name} ({profile.source}{fused}), {shape.frames} frames {shape.height}×{shape.width}, "
        f"{profile.sampling.steps} steps, {manifest.graphs.dtype}, {weight}. Engines: {', '.join(names)}. For another "
        "machine `lemica-trt engine` builds them again, from the graphs in the bundle.",
        f"```\nlemica-trt pull {at} -o bundle --digest {digest}\n"
        f'lemica-trt run bundle "a prompt"{image} --output clip.{"png" if images else "mp4"}\n```',
        "Engines are machine code: run bundles of people you trust. The digest covers every file of the bundle.",
        "## Plans",
        _plans_table(plans, manifest.default_plan),
    ]
    if report is not None:
        parts += ["## Quality", *_quality(report)]
    parts += [f"![{PurePosixPath(path).stem.replace('_', ' ')}]({path})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def plans_card(plans: Sequence[StepPlan], at: str) -> str:
    """The card of a repository of plans."""
    first = plans[0]
    return (
        "\n\n".join(
            [
                _metadata(None, None),
                "# Step plans of lemica-trt",
                "A step plan says which of a sampler's steps run the diffusion transformer in full. It runs in a "
                "diffusers pipeline with the sampler that it was made for, and is refused in others.",
                f"```\nlemica-trt pull {at} --plan {first.name} -o plans\n```",
                f'```python\nwith lemica_trt.apply(pipe, "plans/{first.name}.json"):\n    pipe("a prompt")\n```',
                _plans_table(plans, None),
            ]
        )
        + "\n"
    )


def _metadata(pipeline: str | None, source: str | None) -> str:
    lines = [f"library_name: {LIBRARY}", f"tags:\n- {LIBRARY}\n- diffusers"]
    if pipeline is not None:
        lines.insert(0, f"pipeline_tag: {pipeline}")
    if source is not None and "/" in source and profile_name(source) is not None:  # else it may be a folder
        lines.insert(0, f"base_model: {source}")
    return "---\n" + "\n".join(lines) + "\n---"


def _plans_table(plans: Sequence[StepPlan], default: str | None) -> str:
    rows = [
        [
            f"`{plan.name}`" + (" (default)" if plan.name == default else ""),
            f"{plan.budget} of {plan.num_steps}",
            plan.scheduler,
            plan.method,
            f"{plan.guidance_scale:g}",
            f"`{plan.digest[:16]}`",
        ]
        for plan in plans
    ]
    return _table(["plan", ">full steps", "sampler", "method", ">guidance", "digest"], rows)


def _quality(report: VerifyReport) -> list[str]:
    """The table of a verification, and what it is of."""
    times = {timing.plan: timing for timing in report.timing}
    rows = []
    for row in report.quality:
        timing = times.get(row.plan) if row.method == PLAN else None
        rows.append(
            [
                f"**`{row.plan}`**" if row.method == PLAN else row.method,
                str(row.budget),
                "" if timing is None or timing.speedup is None else f"{timing.speedup:.1f}×",
                f"{row.psnr:.1f}{_margin(row)}",
                f"{row.psnr_p5:.1f}",
                f"{row.psnr_worst:.1f}",
                f"{row.ssim:.4f}",
            ]
        )
    against = {row.reference_steps for row in report.quality} - {None}
    reference = f"the sampler at {against.pop()} steps" if against else "all steps in full"
    header = ["", ">full steps", ">speed-up", ">PSNR dB", ">5th percentile", ">worst", ">SSIM"]
    about = (
        f"Frames against {reference}, {report.samples} held-out clips; the speed-up is that of the denoising loop, "
        f"{report.backend} on {report.machine}. Below each plan: other methods with as many full steps."
    )
    if report.precision is not UNSET:
        about += f" Plans ran in {report.precision}; the reference and the other methods in {report.dtype}."
    return [about, _table(header, rows)]


def _margin(row: Quality) -> str:
    return "" if row.psnr_margin is None else f" ± {row.psnr_margin:.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [
        [name.removeprefix(">") for name in header],
        ["--:" if name[:1] == ">" else "---" for name in header],
        *rows,
    ]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
