"""Commands on a finished bundle: `verify`, `report`, `run`, `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lemica_trt.cli import options
from lemica_trt.cli.options import Screen, common, flags


@click.command()
@click.argument("bundle", type=options.PATH)
@flags(
    click.option("--weights", metavar="DIR|HUB_ID", help="Where the model is, if the bundle does not know."),
    click.option("--verify-samples", "--samples", type=click.IntRange(1), default=8, show_default=True,
                 help="Held-out clips."),
    click.option("--prompts", type=options.FILE, help="Held-out prompts, one a line, instead of the profile's."),
    click.option("--backend", metavar="NAME", help="Which engines  [default: the first that run here]"),
    options.device,
)  # fmt: skip
@common
def verify(
    screen: Screen,
    bundle: Path,
    weights: str | None,
    verify_samples: int,
    prompts: Path | None,
    backend: str | None,
    device: str | None,
) -> None:
    """Check BUNDLE: digests, engines and plans against PyTorch and diffusers, held-out quality, time."""
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.compiler import bundle_commands
    from lemica_trt.compiler.inspection import summarize
    from lemica_trt.report import summary

    opened = Bundle.open(bundle)
    report = bundle_commands.verify(opened, weights, verify_samples, device, backend, screen.reporter, prompts=prompts)
    screen.print(report, lambda: summary.build_table(summarize(opened), report, bundle))


@click.command()
@click.argument("bundle", type=options.PATH)
@flags(
    click.option("--output", "-o", type=options.FILE, metavar="FILE.html",
                 help="Where to  [default: BUNDLE/reports/report.html]"),
)  # fmt: skip
@common
def report(screen: Screen, bundle: Path, output: Path | None) -> None:
    """Write all that is known of BUNDLE as one HTML page: clips, quality, cost, plans, engines. Takes no PyTorch.

    The page is one file that asks for nothing from anywhere; `build` and `verify` write it too.
    """
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.compiler.inspection import write_page
    from lemica_trt.core.progress import size

    path = write_page(Bundle.open(bundle), output)
    count = path.stat().st_size
    screen.print({"output": str(path), "bytes": count}, lambda: f"{path}  ({size(count)})")


@click.command()
@click.argument("bundle", type=options.PATH)
@click.argument("prompt")
@flags(
    click.option("--plan", metavar="NAME", default="default", show_default=True, help="One of the bundle's plans."),
    click.option("--seed", type=int, default=0, show_default=True,
                 help="The noise that diffusers draws with this seed on a CPU generator."),
    click.option("--guidance-scale", type=float, help="Classifier-free guidance  [default: the plan's]"),
    click.option("--negative-prompt", help="What to steer away from  [default: the profile's]"),
    click.option("--backend", metavar="NAME", help="Which engines  [default: the preferred ones]"),
    click.option("--capture", type=click.Choice(["plan", "step", "none"]), default="step", show_default=True,
                 help="TensorRT: what becomes a CUDA graph; the whole plan runs without progress."),
    click.option("--output", "-o", type=options.FILE, required=True,
                 help=".mp4, .gif, .png (frames side by side) or .npy"),
    click.option("--scale", type=click.IntRange(1, 16),
                 help="Draw every pixel as a square of so many; 1: the clip as it is.  "
                 "[default: 4 for clips of at most 128 pixels, except .npy]"),
)  # fmt: skip
@common
def run(
    screen: Screen,
    bundle: Path,
    prompt: str,
    plan: str,
    seed: int,
    backend: str | None,
    capture: Any,
    output: Path,
    scale: int | None,
    **given: Any,
) -> None:
    """Generate a clip from BUNDLE and PROMPT. Takes no PyTorch."""
    from time import perf_counter

    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.core.progress import duration
    from lemica_trt.runtime.pipeline import Pipeline
    from lemica_trt.runtime.video import check_suffix, default_scale, write_video

    check_suffix(output)
    report, start = screen.reporter, perf_counter()
    pipe = Pipeline(Bundle.open(bundle), plan=None if plan == "default" else plan, backend=backend, capture=capture)
    report.stage("load", f"plan {pipe.default_plan}, {duration(perf_counter() - start)}")
    on_step = None if capture == "plan" else lambda row: report.advance(row.index + 1, row.rows)
    result = pipe(prompt, seed=seed, on_step=on_step, **given)
    factor = scale or default_scale(result.frames, output)
    write_video(result.frames, output, fps=pipe.fps, scale=factor)
    enlarged = f"; {factor} times as large, --scale 1: as it is" if factor > 1 and scale is None else ""
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in result.seconds.items())
    found = {"output": str(output), "plan": pipe.default_plan, "seed": seed, "seconds": result.seconds, "scale": factor}
    screen.print(found, lambda: f"{output}  ({parts}{enlarged})")


@click.command()
@click.argument("path", type=options.PATH)
@click.option("--plan", metavar="NAME", help="Show one plan of a bundle row by row.")
@common
def inspect(screen: Screen, path: Path, plan: str | None) -> None:
    """Show a bundle, a plan, or an error graph. Takes no PyTorch."""
    from lemica_trt.compiler import inspection
    from lemica_trt.report import summary

    value, shown = inspection.inspect(path, plan)
    screen.print(value, lambda: summary.inspected_table(shown))
