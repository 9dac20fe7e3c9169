"""Commands that measure finished bundles: `bench`, `compare`."""

from __future__ import annotations

from pathlib import Path

import click

from lemica_trt.cli import completion, options
from lemica_trt.cli.command import OUTPUT, Command, flag, flags
from lemica_trt.cli.options import Screen, common


@click.command(
    cls=Command,
    short_help="Latency, throughput and memory of plans, in turns.",
    examples=("bench out/tiny", "bench out/tiny --plan b10,uncached --iterations 20"),
)
@click.argument("bundle", type=options.PATH)
@flags(
    "Measuring",
    flag(
        "--plan",
        "plans",
        metavar="NAME[,NAME…]",
        otherwise="the bundle's own",
        shell_complete=completion.plans,
        help="Plans; several run in turns, so that a machine that drifts is the same to all.",
    ),
    options.shape,
    flag(
        "--warm-up",
        type=click.FloatRange(0),
        metavar="MS",
        default=200.0,
        show_default=True,
        help="Milliseconds of requests before, at least one of each plan.",
    ),
    flag("--iterations", type=click.IntRange(1), default=10, show_default=True, help="Requests of each plan at least."),
    flag(
        "--duration",
        type=click.FloatRange(0),
        metavar="S",
        default=3.0,
        show_default=True,
        help="And run for at least this many seconds.",
    ),
    flag(
        "--batch",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        aliases=("--batch-size",),
        help="Requests at once.",
    ),
    flag("--prompts", type=options.FILE, otherwise="held-out ones of the profile", help="File of prompts, one a line."),
)
@flags("Engines", options.backend)
@flags(
    OUTPUT,
    flag("--export-times", type=options.FILE, metavar="FILE.json",
         help="Write the times of every request and every row as JSON, in seconds."),
)  # fmt: skip
@common
def bench(
    screen: Screen,
    bundle: Path,
    plans: str | None,
    shape: str | None,
    warm_up: float,
    iterations: int,
    duration: float,
    batch: int,
    prompts: Path | None,
    backend: str | None,
    export_times: Path | None,
) -> None:
    """Time whole requests on BUNDLE's engines. Takes no PyTorch.

    Percentiles of latency, requests a second, memory, what text encoder, denoising loop and VAE take, and the times of
    single rows, from a few more runs that wait for the device after every row.
    """
    from lemica_trt.compiler import measure_commands
    from lemica_trt.core.values import write_value
    from lemica_trt.evaluate.bench import Load
    from lemica_trt.report.measured import bench_table

    if export_times is not None:
        options.require_output(export_times, screen)
    names = [] if plans is None else plans.split(",")
    load = Load(warm_up=warm_up / 1e3, iterations=iterations, duration=duration, batch=batch)
    found = measure_commands.bench(bundle, names, load, screen.reporter, backend=backend, prompts=prompts, shape=shape)
    if export_times is not None:
        write_value(found, export_times)
    screen.print(found, lambda: bench_table(found))


@click.command(
    cls=Command,
    short_help="Two plans or bundles on the same prompts and seeds.",
    examples=("compare out/tiny:b10 uncached", "compare out/tiny out/video --samples 8 --min-psnr 35"),
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@flags(
    "Measuring",
    flag("--samples", type=click.IntRange(1), default=3, show_default=True, help="Clips."),
    flag(
        "--prompts",
        type=options.FILE,
        otherwise="held-out ones of the profile of A",
        help="File of prompts, one a line.",
    ),
    flag(
        "--min-psnr",
        type=click.FloatRange(0),
        metavar="DB",
        help="Exit code 9 if the mean PSNR between the two is less.",
    ),
)
@flags("Engines", options.backend)  # fmt: skip
@common
def compare(
    screen: Screen, a: str, b: str, samples: int, prompts: Path | None, min_psnr: float | None, backend: str | None
) -> None:
    """Run A and B on the same prompts and seeds, in turns: how alike their clips are, and what they take.

    A and B are bundles, or plans of them: BUNDLE or BUNDLE:PLAN; B may be the name of a plan of the same bundle. Exit
    code 0: compared; 9: less alike than --min-psnr. Takes no PyTorch.
    """
    from lemica_trt.compiler import measure_commands
    from lemica_trt.report.measured import comparison_table

    found = measure_commands.compare(a, b, samples, screen.reporter, backend=backend, prompts=prompts)
    screen.print(found, lambda: comparison_table(found))
    measure_commands.require_alike(found, min_psnr)
