"""Everything that can go wrong on purpose, and the exit code that it gives.

    LemicaError                 1   base; never raised itself
    ├── UsageError              2   what was typed cannot be: a name that there is not, a value that nothing takes,
    │                               flags that exclude each other, a place that cannot be written
    ├── InputError              3   what is named is not there or is not what it must be, or does not take a value
    │   └── IntegrityError      4   a bundle file is missing, altered or not listed
    ├── UnsupportedError        5   understood, but this tool cannot do it (non-linear sampler, unknown family)
    ├── InfeasibleError         6   no plan has the budget that was asked for: under the skip limit, in the time
    ├── MissingDependencyError  7   a library, driver, device, memory or disk space is missing
    ├── EngineError             8   building or running an engine failed
    └── VerificationError       9   a built bundle does not do what it must, or not as well as was asked

70 is a fault of this program (EX_SOFTWARE of sysexits.h); 130 is Ctrl-C, as in every shell tool.

A message is one line in three parts: what was expected, what came, how to fix it. Names and values in it may come from
files that nobody trusts: control characters are shown escaped.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from lemica_trt.core.text import printable


class LemicaError(Exception):
    """Base of all errors that a user can cause.

    Args:
        what: what was expected and what came, without a trailing full stop.
        fix: what the user can do about it, imperative; shown behind an arrow.
    """

    exit_code = 1

    def __init__(self, what: str, *, fix: str | None = None) -> None:
        self.what = printable(what)
        self.fix = None if fix is None else printable(fix)
        super().__init__(self.what if self.fix is None else f"{self.what} → {self.fix}")


class UsageError(LemicaError):
    """What was typed cannot be: an unknown name, a value that nothing takes, flags that exclude each other."""

    exit_code = 2


class InputError(LemicaError):
    """A file or model that is named is not there, is not what it must be, or does not take a value."""

    exit_code = 3


class IntegrityError(InputError):
    """A bundle file is missing, altered, or not listed in the manifest."""

    exit_code = 4


class UnsupportedError(LemicaError):
    """Understood, but outside what this tool can do."""

    exit_code = 5


class InfeasibleError(LemicaError):
    """No plan has the budget that was asked for."""

    exit_code = 6


class MissingDependencyError(LemicaError):
    """A library, driver, device, memory or disk space that this needs is not here."""

    exit_code = 7


class EngineError(LemicaError):
    """Building or running an engine failed."""

    exit_code = 8


class VerificationError(LemicaError):
    """A built bundle does not do what it must, or not as well as was asked."""

    exit_code = 9


INTERNAL_ERROR = 70
"""Exit code of what nobody has thought of."""

INTERRUPTED = 130
"""Exit code of Ctrl-C."""

EXIT_CODES: dict[int, str] = {
    **{
        cls.exit_code: (cls.__doc__ or "").splitlines()[0]
        for cls in (
            UsageError,
            InputError,
            IntegrityError,
            UnsupportedError,
            InfeasibleError,
            MissingDependencyError,
            EngineError,
            VerificationError,
        )
    },
    INTERNAL_ERROR: "A fault of lemica-trt itself; --debug shows where.",
}
"""Exit code → meaning; the README's table and `lemica-trt --help` are printed from it."""


def install_command(extra: str) -> str:
    """The command that installs what an extra needs; the package itself need be on no index.

    Where it is installed, from a wheel or a checkout, pip finds it by its name. A checkout that is not installed has to
    be.
    """
    root = Path(__file__).parents[2]
    try:
        importlib.metadata.distribution("lemica-trt")
    except importlib.metadata.PackageNotFoundError:
        if (root / "pyproject.toml").is_file():
            return f"pip install --editable '{root}[{extra}]'"
    return f"pip install 'lemica-trt[{extra}]'"
