"""`serve`: an endpoint for OpenAI's clients."""

from __future__ import annotations

from pathlib import Path

import click

from lemica_trt.cli import completion, options
from lemica_trt.cli.command import Command, flag, flags
from lemica_trt.cli.options import Screen, common
from lemica_trt.core.errors import MissingDependencyError, UsageError, install_command


@click.command(
    cls=Command,
    short_help="Serve a bundle to OpenAI's clients.",
    examples=("serve out/tiny", "serve out/tiny --host 0.0.0.0 --port 9000 --api-key-file key.txt"),
)
@click.argument("bundle", type=options.PATH)
@flags(
    "Serving",
    flag(
        "--plan",
        metavar="NAME",
        otherwise="the bundle's own",
        shell_complete=completion.plans,
        help="The plan of requests that name none.",
    ),
    flag(
        "--host",
        default="127.0.0.1",
        show_default=True,
        help="Where to listen; other than on this machine with an API key only.",
    ),
    flag("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."),
    flag(
        "--api-key-file",
        type=options.FILE,
        metavar="FILE",
        otherwise="LEMICA_TRT_API_KEY, if set",
        help="Requests must have the key in this file as bearer token.",
    ),
    flag(
        "--triton",
        metavar="HOST:PORT",
        help="Have a Triton server make the clips, whose gRPC endpoint this is; BUNDLE is what it serves.",
    ),
    flag(
        "--workers",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        advanced=True,
        help="Requests that run at a time: with --triton as many as share a batch there.",
    ),
    flag(
        "--queue",
        type=click.IntRange(1),
        default=16,
        show_default=True,
        advanced=True,
        help="Requests that may wait; more are told to come again.",
    ),
    flag(
        "--keep",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        advanced=True,
        help="Finished videos in memory.",
    ),
    flag(
        "--expire",
        type=click.IntRange(1),
        default=3600,
        show_default=True,
        metavar="SECONDS",
        advanced=True,
        help="How long they stay there.",
    ),
    flag(
        "--grace",
        type=click.FloatRange(0),
        default=25,
        show_default=True,
        metavar="SECONDS",
        advanced=True,
        help="How long requests that run may go on after SIGTERM.",
    ),
)
@flags(
    "Engines",
    options.backend,
    flag("--device", type=click.IntRange(0), default=0, show_default=True, help="Which GPU."),
    flag("--threads", type=click.IntRange(0), otherwise="as built", help="CPU threads of an engine; 0: all."),
)  # fmt: skip
@options.signed
@common
def serve(
    screen: Screen,
    bundle: Path,
    plan: str | None,
    backend: str | None,
    device: int,
    threads: int | None,
    triton: str | None,
    api_key_file: Path | None,
    verify_with: tuple[Path, ...],
    require_signature: bool,
    **settings: float,
) -> None:
    """Serve BUNDLE to OpenAI's clients: /v1/videos, /v1/images/generations. Takes no PyTorch. See docs/serving.md."""
    try:
        from lemica_trt.endpoint.server import Settings, read_key
        from lemica_trt.endpoint.server import serve as run
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs Starlette and uvicorn, got: {error}", fix=install_command("serve")
        ) from None
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.endpoint.makers import Engines, Maker, TritonServer
    from lemica_trt.endpoint.requests import Model
    from lemica_trt.runtime.pipeline import Pipeline
    from lemica_trt.runtime.video import check_suffix

    if triton is None and settings["workers"] > 1:
        raise UsageError(
            "expected --workers 1 without --triton: one pipeline runs one request at a time",
            fix="leave out --workers, or give --triton HOST:PORT",
        )
    if triton is not None:
        options.refuse_together("triton", "backend", "device", "threads")
    key, opened = read_key(api_key_file), Bundle.open(bundle, trusted=options.trusted(verify_with, require_signature))
    model = Model(opened, plan)
    if triton is None and not model.makes_images:
        check_suffix("clip.mp4")
    maker: Maker
    if triton is None:
        maker = Engines(Pipeline(opened, plan, backend=backend, device=device, threads=threads, capture="step"))
    else:
        maker = TritonServer(triton, opened, model.default)
    screen.reporter.stage("serve", f"{model.name}, plan {model.default}")
    found = Settings(**settings, key=key)  # type: ignore[arg-type]  # click has made the types
    run(model, maker, found, lambda url: screen.print({"url": url}, lambda: f"listening on {url}"))
