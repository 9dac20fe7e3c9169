"""Exceptions → one line, an exit code, and JSON for `--json`."""

from __future__ import annotations

from typing import Any

import click

from lemica_trt.core.errors import (
    INTERNAL_ERROR,
    INTERRUPTED,
    EngineError,
    InfeasibleError,
    InputError,
    IntegrityError,
    LemicaError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
    VerificationError,
    install_command,
)
from lemica_trt.core.text import first_line

FIXES: dict[type[LemicaError], str] = {
    UsageError: "see '{command} --help'",
    IntegrityError: "copy the bundle again, or rebuild it",
    InputError: "correct it, or name another; --debug shows where it was read",
    UnsupportedError: "lemica-trt trace shows what a pipeline does; lemica_trt.fit takes any that is loaded in Python",
    InfeasibleError: "ask for another budget",
    MissingDependencyError: "lemica-trt doctor shows what is here",
    EngineError: "lemica-trt doctor shows what is here; report it with what --debug prints",
    VerificationError: "do not deploy it; report it with what --debug prints",
    LemicaError: "report it with what --debug prints",
}
"""What to do about errors that do not say it themselves, the more special kinds first."""


def explained(error: BaseException, command: str = "lemica-trt") -> tuple[LemicaError, int]:
    """What is said about an exception, with a fix, and the exit code.

    Args:
        command: that was typed.
    """
    if isinstance(error, LemicaError):
        if error.fix is None:
            fix = next(fix for kind, fix in FIXES.items() if isinstance(error, kind))
            return type(error)(error.what, fix=fix.format(command=command)), error.exit_code
        return error, error.exit_code
    if isinstance(error, click.Abort):
        return LemicaError("interrupted", fix="finished work is kept, the same command goes on from there"), INTERRUPTED
    if isinstance(error, click.ClickException):
        found: LemicaError = _of_click(error)
    elif _out_of_memory(error):
        line = next(iter(str(error).splitlines()), "no more was said")
        found = MissingDependencyError(
            f"out of memory: {line}", fix="free some, use another --device, or build fewer --frames"
        )
    elif isinstance(error, OSError):
        what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        found = MissingDependencyError(what, fix="check the path, its permissions and the free disk space")
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("lemica_trt"):
        found = MissingDependencyError(first_line(error), fix=install_command("build"))
    else:
        what = f"a fault of lemica-trt itself: {type(error).__name__}: {first_line(error)}"
        return LemicaError(what, fix="run the command with --debug, and report what it prints"), INTERNAL_ERROR
    return found, found.exit_code


def _of_click(error: click.ClickException) -> UsageError:
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lemica-trt"
    what, fix = error.format_message().rstrip("."), f"see '{where} --help'"
    if isinstance(error, click.NoSuchOption):
        what = f"{where.removeprefix('lemica-trt ')} has no option {error.option_name}"
        if error.possibilities:
            fix = f"did you mean {' or '.join(error.possibilities)}?"
    elif isinstance(error, click.BadParameter) and error.param and isinstance(error.param.type, click.Choice):
        fix = "name one of them"
    return UsageError(what, fix=fix)


def as_json(error: LemicaError, code: int) -> dict[str, Any]:
    """What `--json` prints of an error."""
    return {"error": {"kind": type(error).__name__, "exit_code": code, "what": error.what, "fix": error.fix}}


def _out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python ran out of memory; on a CPU PyTorch raises a RuntimeError that says so."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's; nothing here imports it
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error))
    )
