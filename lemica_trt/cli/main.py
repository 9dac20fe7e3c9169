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
from lemica_trt.cli import build, bundle, serve, trace
from lemica_trt.core.errors import EXIT_CODES, INTERNAL_ERROR, LemicaError
from lemica_trt.core.text import first_line

_EPILOG = "Exit codes: 0 done; " + "; ".join(
    f"{code} {text[0].lower()}{text[1:-1]}" for code, text in EXIT_CODES.items()
)


class _Group(click.Group):
    """Turns every error that a user can cause into one line on standard error and its exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        debug = "--debug" in sys.argv
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a console of another encoding shows ? for what it lacks
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.exit(result if isinstance(result, int) else 0)
        except click.ClickException as error:
            if isinstance(error, click.exceptions.NoArgsIsHelpError):
                click.echo(error.format_message(), err=True)
                sys.exit(2)
            where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lemica-trt"
            click.echo(f"lemica-trt: {error.format_message()} → see '{where} --help'", err=True)
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("lemica-trt: interrupted; finished work is kept, the same command goes on from there", err=True)
            sys.exit(130)
        except LemicaError as error:
            if debug:
                raise
            click.echo(f"lemica-trt: {error}", err=True)
            sys.exit(error.exit_code)
        except (MemoryError, RuntimeError) as error:
            if debug:
                raise
            if not _out_of_memory(error):
                click.echo(f"lemica-trt: {_fault(error)}", err=True)
                sys.exit(INTERNAL_ERROR)
            line = next(iter(str(error).splitlines()), "no more was said")
            click.echo(
                f"lemica-trt: out of memory: {line} → free some, use another --device, or build fewer --frames",
                err=True,
            )
            sys.exit(7)
        except OSError as error:
            if debug:
                raise
            what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            click.echo(f"lemica-trt: {what} → check the path, its permissions and the free disk space", err=True)
            sys.exit(7)
        except Exception as error:
            if debug:
                raise
            if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("lemica_trt"):
                click.echo(f"lemica-trt: {first_line(error)} → pip install 'lemica-trt[build]'", err=True)
                sys.exit(7)
            click.echo(f"lemica-trt: {_fault(error)}", err=True)
            sys.exit(INTERNAL_ERROR)


def _fault(error: Exception) -> LemicaError:
    """What is said about an error that no code expected."""
    return LemicaError(
        f"a fault of lemica-trt itself: {type(error).__name__}: {first_line(error)}",
        fix="run the command with --debug, and report what it prints",
    )


def _out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python ran out of memory; on a CPU PyTorch raises a RuntimeError that says so."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's; nothing here imports it
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


@click.group(
    cls=_Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="lemica-trt")
def main() -> None:
    """A deployment compiler for diffusion transformers.

    One command makes a bundle:  lemica-trt build --model cogvideox-tiny --budget 15
    """
    # Before PyTorch is imported: its idle threads sleep. By default they spin, and where other processes want the CPUs
    # they wait for each other: five times slower was measured on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for command in (
    *(build.build, build.calibrate, build.plan, build.export, build.engine),
    *(bundle.verify, bundle.report, bundle.run, bundle.inspect),
    *(serve.triton, serve.client),
    *(trace.models, trace.trace, build.methods, build.doctor),
):
    main.add_command(command)
