"""Commands on a finished bundle: `verify`, `report`, `run`, `inspect`, `sign`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemica_trt.cli import completion, options
from lemica_trt.cli.command import OUTPUT, Command, flag, flags
from lemica_trt.cli.options import Screen, common
from lemica_trt.core.errors import UsageError

if TYPE_CHECKING:
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.core.pictures import Pixels


@click.command(
    cls=Command,
    short_help="Check a bundle against its model: agreement, quality, time.",
    examples=("verify out/tiny", "verify out/video --weights DIR --verify-samples 16"),
)
@click.argument("bundle", type=options.PATH)
@flags(
    "Model",
    options.weights,
    options.lora,
    options.lora_2,
    options.device,
)
@flags(
    "Verification",
    flag("--verify-samples", "--samples", type=click.IntRange(1), default=8, show_default=True, help="Held-out clips."),
    options.held_out,
    options.shape,
)
@flags("Engines", options.backend)  # fmt: skip
@common
def verify(
    screen: Screen,
    bundle: Path,
    weights: str | None,
    lora: tuple[str, ...],
    lora_2: tuple[str, ...],
    verify_samples: int,
    prompts: Path | None,
    shape: str | None,
    backend: str | None,
    device: str | None,
) -> None:
    """Check BUNDLE: digests, engines and plans against PyTorch and diffusers, held-out quality, time."""
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.cli.flags import loras_from_flags
    from lemica_trt.compiler import bundle_verify
    from lemica_trt.compiler.inspection import summarize
    from lemica_trt.report import summary

    opened, loras = Bundle.open(bundle).at(shape), loras_from_flags(lora, lora_2)
    report = bundle_verify.verify(
        opened, weights, verify_samples, device, backend, screen.reporter, prompts=prompts, loras=loras
    )
    screen.print(report, lambda: summary.build_table(summarize(opened), report, bundle))


@click.command(
    cls=Command,
    short_help="All that is known of a bundle on one page.",
    examples=("report out/tiny", "report out/tiny -o report.html"),
)
@click.argument("bundle", type=options.PATH)
@flags(
    OUTPUT,
    flag("--output", "-o", type=options.FILE, metavar="FILE.html", otherwise="BUNDLE/reports/report.html",
         help="Where to."),
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


@click.command(
    cls=Command,
    short_help="A prompt → a clip.",
    examples=(
        'run out/tiny "a big red circle moves left" -o clip.mp4',
        'run out/tiny "a small blue square" --plan b10 --seed 7 -o clip.gif',
    ),
)
@click.argument("bundle", type=options.PATH)
@click.argument("prompt")
@flags(
    "Request",
    flag(
        "--plan",
        metavar="NAME",
        default="default",
        otherwise="the bundle's own",
        shell_complete=completion.plans,
        help="One of the bundle's plans.",
    ),
    flag(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="The noise that diffusers draws with this seed on a CPU generator.",
    ),
    flag(
        "--guidance-scale",
        type=float,
        otherwise="the plan's",
        aliases=("--cfg-scale",),
        help="Classifier-free guidance.",
    ),
    flag("--negative-prompt", otherwise="the profile's", help="What to steer away from."),
    options.image,
    options.last_image,
    options.shape,
    flag(
        "--frames",
        type=int,
        advanced=True,
        aliases=("--num-frames",),
        help="Of the bundle's shapes the one of so many frames.",
    ),
    flag("--height", type=int, advanced=True, help="The one of so many pixels."),
    flag("--width", type=int, advanced=True, help="The one of so many pixels."),
)
@flags("Model", options.lora_added, options.lora_2_added)
@flags(
    "Engines",
    options.backend,
    flag(
        "--capture",
        type=click.Choice(["plan", "step", "none"]),
        default="step",
        show_default=True,
        advanced=True,
        help="TensorRT: what becomes a CUDA graph; the whole plan runs without progress.",
    ),
)
@options.signed
@flags(
    OUTPUT,
    flag("--output", "-o", type=options.FILE, required=True,
         help=".mp4, .gif, .png (frames side by side) or .npy"),
    flag("--scale", type=click.IntRange(1, 16), otherwise="4 for clips of at most 128 pixels, except .npy",
         help="Draw every pixel as a square of so many; 1: the clip as it is."),
)  # fmt: skip
@common
def run(
    screen: Screen,
    bundle: Path,
    prompt: str,
    plan: str,
    seed: int,
    lora: tuple[str, ...],
    lora_2: tuple[str, ...],
    shape: str | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    backend: str | None,
    capture: Any,
    output: Path,
    scale: int | None,
    verify_with: tuple[Path, ...],
    require_signature: bool,
    **given: Any,
) -> None:
    """Generate a clip from BUNDLE and PROMPT. Takes no PyTorch."""
    from time import perf_counter

    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.cli.flags import loras_from_flags
    from lemica_trt.core.progress import duration
    from lemica_trt.runtime.pipeline import Pipeline
    from lemica_trt.runtime.video import check_suffix, default_scale, write_video

    options.refuse_together("shape", "frames", "height", "width")
    check_suffix(output)
    options.require_output(output, screen)
    loras = loras_from_flags(lora, lora_2)
    bundled = Bundle.open(bundle, trusted=options.trusted(verify_with, require_signature))
    bundled = bundled.at(shape or bundled.shape_named(frames, height, width))
    _require_capture(bundled, backend)
    given |= _pictures(bundled, {name: given[name] for name in ("image", "last_image")})
    report, start = screen.reporter, perf_counter()
    pipe = Pipeline(bundled, plan=None if plan == "default" else plan, backend=backend, capture=capture, loras=loras)
    report.stage("load", f"plan {pipe.default_plan}, {duration(perf_counter() - start)}")
    on_step = None if capture == "plan" else lambda row: report.advance(row.index + 1, row.rows)
    result = pipe(prompt, seed=seed, on_step=on_step, **given)
    factor = scale or default_scale(result.frames, output)
    write_video(result.frames, output, fps=pipe.fps, scale=factor)
    enlarged = f"; {factor} times as large, --scale 1: as it is" if factor > 1 and scale is None else ""
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in result.seconds.items())
    found = {
        "output": str(output),
        "plan": pipe.default_plan,
        "shape": bundled.manifest.profile.shape.name,
        "seed": seed,
        "seconds": result.seconds,
        "scale": factor,
        "warnings": pipe.warnings(prompt),
        **({"loras": pipe.loras} if pipe.loras else {}),
    }
    screen.print(found, lambda: f"{output}  ({parts}{enlarged})")


def _pictures(bundle: Bundle, paths: dict[str, Path | None]) -> dict[str, Pixels]:
    """What is in the files of a request's pictures.

    Args:
        paths: by what the pictures are to the bundle; None: none was given.
    """
    from lemica_trt.core.pictures import read_picture
    from lemica_trt.runtime.validation import require_image

    require_image(bundle.manifest.graphs, **paths)
    return {name: read_picture(path) for name, path in paths.items() if path is not None}


def _require_capture(bundle: Bundle, backend: str | None) -> None:
    """Raise UsageError where --capture was typed, and the engines have nothing to capture."""
    typed = click.get_current_context().get_parameter_source("capture") is click.core.ParameterSource.COMMANDLINE
    name = bundle.engine(backend).key.backend
    if typed and not name.startswith("tensorrt"):
        raise UsageError(f"--capture is for TensorRT, these engines are of {name}", fix="leave it out")


@click.command(
    cls=Command,
    short_help="Show a bundle, a plan or an error graph.",
    examples=("inspect out/tiny", "inspect out/tiny --plan b10"),
)
@click.argument("path", type=options.PATH)
@flags(OUTPUT, flag("--plan", metavar="NAME", shell_complete=completion.plans,
                    help="Show one plan of a bundle row by row."))  # fmt: skip
@common
def inspect(screen: Screen, path: Path, plan: str | None) -> None:
    """Show a bundle, a plan, or an error graph. Takes no PyTorch."""
    from lemica_trt.compiler import inspection
    from lemica_trt.report import summary

    value, shown = inspection.inspect(path, plan)
    screen.print(value, lambda: summary.inspected_table(shown))


@click.command(
    cls=Command,
    short_help="Sign a bundle, so that readers can ask for it.",
    examples=("sign out/tiny --key KEY.pem", 'run out/tiny "a green star" -o clip.mp4 --verify-with PUBLIC.pem'),
)
@click.argument("bundle", type=options.PATH)
@flags("Trust", flag("--key", type=options.FILE, required=True, help="Private key, Ed25519, in PEM."))
@common
def sign(screen: Screen, bundle: Path, key: Path) -> None:
    """Sign BUNDLE, beside the signatures of other keys. Readers ask for it with --verify-with.

    \b
    openssl genpkey -algorithm ed25519 -out KEY.pem
    openssl pkey -in KEY.pem -pubout -out PUBLIC.pem
    """
    from lemica_trt.bundle.manifest import MANIFEST_SIGNATURE
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.bundle.writing import sign_bundle

    signed = sign_bundle(Bundle.open(bundle, trusted=()), key)
    written = str(bundle / MANIFEST_SIGNATURE)
    screen.print({"signature": written, "digest": signed.digest}, lambda: f"{written}  (manifest {signed.digest})")
