"""The command line: parse, call `compiler` or `runtime`, print, exit code.

Flags carry the names that users know from trtexec, Polygraphy, optimum-cli and diffusers. Results go to standard
output, progress and notes to standard error, so that `--json` can be piped. Decides nothing itself.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from lemica_trt import __version__
from lemica_trt.cli import build, bundle, endpoint, hub, measure, serve, trace
from lemica_trt.cli.command import Group
from lemica_trt.cli.failures import as_json, explained
from lemica_trt.cli.options import print_json
from lemica_trt.core.errors import EXIT_CODES

_EPILOG = "Exit codes: 0 done; " + "; ".join(
    f"{code} {text[0].lower()}{text[1:-1]}" for code, text in EXIT_CODES.items()
)

SECTIONS = {
    "Make a bundle": ("build", "plan", "shape", "engine"),
    "Use a bundle": ("run", "inspect", "verify", "bench", "compare", "report", "sign"),
    "Serve it": ("serve", "triton", "client", "push", "pull"),
    "What there is": ("models", "methods", "trace", "doctor"),
    "Stage by stage": ("calibrate", "export"),
}
"""Commands in the order in which they are needed."""


class _Main(Group):
    """Turns every error that a user can cause into one line on standard error and its exit code."""

    def main(self, args: Any = None, *others: Any, **keywords: Any) -> Any:
        typed = sys.argv[1:] if args is None else list(args)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a console of another encoding shows ? for what it lacks
        try:
            result = super().main(args, *others, **{**keywords, "standalone_mode": False})
            sys.exit(result if isinstance(result, int) else 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except Exception as error:
            if "--debug" in typed and not isinstance(error, (click.ClickException, click.Abort)):
                raise
            name = next((word for word in typed if word in self.commands), None)
            said, code = explained(error, " ".join(filter(None, ("lemica-trt", name))))
            if "--json" in typed:
                print_json(as_json(said, code))
            click.echo(f"lemica-trt: {said}", err=True)
            sys.exit(code)


@click.group(
    "lemica-trt",
    cls=_Main,
    sections=SECTIONS,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="lemica-trt")
def main() -> None:
    """A deployment compiler for diffusion transformers.

    \b
    lemica-trt build --model cogvideox-tiny --budget 15 -o out/tiny
    lemica-trt run out/tiny "a big red circle moves left" -o clip.mp4
    """
    # Before PyTorch is imported: its idle threads sleep. By default they spin, and where other processes want the CPUs
    # they wait for each other: five times slower was measured on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for command in (
    *(build.build, build.calibrate, build.plan, build.shape, build.export, build.engine),
    *(bundle.verify, bundle.report, bundle.run, bundle.inspect, bundle.sign),
    *(measure.bench, measure.compare),
    *(endpoint.serve, serve.triton, serve.client),
    *(hub.push, hub.pull),
    *(trace.models, trace.trace, build.methods, build.doctor),
):
    main.add_command(command)
