"""Commands of serving: `triton` writes or checks a model repository, `client` asks a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lemica_trt.cli import options
from lemica_trt.cli.command import OUTPUT, Command, flag, flags
from lemica_trt.cli.options import Screen, common
from lemica_trt.core.errors import UsageError


@click.command(
    cls=Command,
    short_help="Write or check a model repository of Triton Inference Server.",
    examples=("triton out/tiny --output out/repository", "triton --check out/repository"),
)
@click.argument("bundle", required=False, type=options.PATH)
@flags(
    OUTPUT,
    flag(
        "--output",
        "-o",
        type=options.FOLDER,
        help="Model repository to write; one that lemica-trt wrote is written again.",
    ),
    flag(
        "--check",
        type=options.PATH,
        metavar="DIR",
        help="Check a model repository instead: configs, digests, shapes between the models.",
    ),
)
@flags(
    "Serving",
    flag("--instances", type=click.IntRange(1), default=1, show_default=True,
                 help="Processes of each denoiser, on each GPU; each holds the engines."),
    flag("--queue", type=click.IntRange(1), default=64, show_default=True,
                 help="Requests that may wait at each model."),
    flag("--timeout", type=click.IntRange(1), default=600, show_default=True,
                 help="Seconds that a request may wait there."),
    flag("--threads", type=click.IntRange(0), default=0, show_default=True,
                 help="CPU threads of an engine; 0: as the bundle was built."),
    flag("--batching", type=click.Choice(["exact", "off"]), default="exact", show_default=True,
                 help="Whether requests share batches; exact: where that changes no bit of them."),
)  # fmt: skip
@options.signed
@common
def triton(
    screen: Screen,
    bundle: Path | None,
    output: Path | None,
    check: Path | None,
    verify_with: tuple[Path, ...],
    require_signature: bool,
    **settings: Any,
) -> None:
    """Write a model repository of Triton Inference Server from BUNDLE, or --check one. Takes no PyTorch."""
    trusted = options.trusted(verify_with, require_signature)
    if check is not None:
        if bundle is not None or output is not None:
            raise UsageError(
                "expected BUNDLE --output DIR or --check DIR, got both", fix="two commands: write, then check"
            )
        from lemica_trt.triton.check import require_sound

        notes = require_sound(check, trusted)
        lines = [f"{check}: sound", *(f"{note.path}: {note.message}" for note in notes)]
        screen.print({"repository": str(check), "notes": notes}, lambda: "\n".join(lines))
        return
    if bundle is None or output is None:
        raise UsageError("expected BUNDLE and --output, or --check DIR", fix="lemica-trt triton BUNDLE --output DIR")
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.triton.repository import Settings, write_repository

    wanted = Settings(**settings, require_signature=bool(trusted))
    models = write_repository(Bundle.open(bundle, trusted=trusted), output, wanted)
    screen.print({"repository": str(output), "models": models}, lambda: f"{output}: {', '.join(models)}")


@click.command(
    cls=Command,
    short_help="A prompt → a clip, from a Triton server.",
    examples=('client "a big red circle moves left" -o clip.mp4',),
)
@click.argument("prompt")
@flags(
    "Request",
    flag("--url", default="localhost:8001", show_default=True, help="gRPC endpoint of the server."),
    flag("--plan", metavar="NAME", help="One of the bundle's plans.", otherwise="the bundle's"),
    flag("--steps", type=int, metavar="B", help="Or: the plan with so many full steps."),
    flag("--seed", type=int, default=0, show_default=True, help="The noise that it starts from."),
    flag("--guidance-scale", type=float, help="Classifier-free guidance.", otherwise="the plan's"),
    flag("--negative-prompt", help="What to steer away from.", otherwise="the profile's"),
    options.image,
    options.last_image,
    flag(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        metavar="SECONDS",
        help="When to give up.",
        otherwise="the server's limit",
    ),
    flag("--fps", type=click.IntRange(1), default=8, show_default=True, help="Frames a second of a .gif."),
)
@flags(
    OUTPUT,
    flag("--output", "-o", type=options.FILE, required=True,
                 help=".mp4 (made by the server), .gif, .png (frames side by side) or .npy"),
)  # fmt: skip
@common
def client(
    screen: Screen,
    prompt: str,
    url: str,
    timeout: float | None,
    fps: int,
    image: Path | None,
    last_image: Path | None,
    output: Path,
    **parameters: Any,
) -> None:
    """Generate a clip from PROMPT on a Triton server, with progress. Ctrl-C cancels it there too."""
    from lemica_trt.core.pictures import decoded_picture, picture_file
    from lemica_trt.core.values import write_bytes
    from lemica_trt.runtime.video import check_suffix, write_video
    from lemica_trt.triton.client import generate

    check_suffix(output, made_here=False)
    options.require_output(output, screen)
    files = {name: path for name, path in (("image", image), ("last_image", last_image)) if path is not None}
    pictures = {name: picture_file(path) for name, path in files.items()}
    for name, data in pictures.items():
        decoded_picture(data, name=str(files[name]))
    screen.reporter.stage("generate", url)
    given, mp4 = options.given(parameters), output.suffix.lower() == ".mp4"
    clip = generate(
        url,
        prompt,
        parameters=given,
        mp4=mp4,
        timeout=timeout,
        image=pictures.get("image"),
        last_image=pictures.get("last_image"),
        on_step=screen.reporter.advance,
    )
    if isinstance(clip, bytes):
        write_bytes(clip, output)
    else:
        write_video(clip, output, fps=fps)
    screen.print({"output": str(output), "seed": given["seed"]}, lambda: str(output))
