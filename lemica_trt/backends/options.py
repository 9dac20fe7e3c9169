"""Which backends there are, and the options of each, declared once.

A vendor declares a frozen struct whose fields carry type, default, help and limits:

    class OrtOptions(Options, frozen=True):
        provider: Annotated[Literal["cpu", "cuda"], Meta(description="execution provider")] = "cpu"

From it follow the checks (`options_from`), the complete options in `EngineKey.options`, what a build process is sent,
the flags of the command line (`option_fields`) and the table of the documentation (`options_table`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Annotated, ClassVar, Literal, get_args

import msgspec

from lemica_trt import backends
from lemica_trt.core.errors import MissingDependencyError, UnsupportedError, UsageError
from lemica_trt.core.values import Value
from lemica_trt.ir.engine import NONE, QUANTIZE, EngineKey, Option

Threads = Annotated[
    int,
    msgspec.Meta(
        ge=0,
        le=1024,
        description="CPU threads within an operator; 0: OMP_NUM_THREADS, or all CPUs that the process may use",
    ),
]
"""The option of those that run on the CPU."""

Quantize = Annotated[
    Literal["none", "int8", "fp8"],
    msgspec.Meta(
        description="what linear layers of the whole DiT compute in, except those that its output is sensitive to; "
        "of a finished bundle in fp32; ranges and errors are measured by ONNX Runtime on the CPU"
    ),
]
"""The option `ir.engine.QUANTIZE`."""


class Options(Value, frozen=True):
    """Base of a backend's options. Each field has a default and a `msgspec.Meta` with its description.

    Attributes:
        changes_weights: whether the backend's run half is a `base.ChangesWeights`.
    """

    changes_weights: ClassVar[bool] = False

    def as_dict(self) -> dict[str, Option]:
        """All options by name, defaults written out: `EngineKey.options`. `quantize` only where something is, so that
        keys of other engines stay as they were."""
        found: dict[str, Option] = msgspec.structs.asdict(self)
        return {name: value for name, value in found.items() if (name, value) != (QUANTIZE, NONE)}


@dataclass(frozen=True)
class OptionField:
    """One option.

    Attributes:
        name: of the field.
        type: of its value.
        default: its value where none is given.
        help: what it does, in one sentence without a full stop.
        choices: the values that it takes; (): any of its type.
        minimum, maximum: of an integer; None: no limit.
        backends: those that have it.
    """

    name: str
    type: type[str] | type[int] | type[bool]
    default: Option
    help: str
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    maximum: int | None = None
    backends: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """On the command line: `--mem-pool-size`."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def values(self) -> str:
        """What it takes, in words: `one of cpu, cuda`, `an integer, 0 … 5`."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kind = {str: "text", int: "an integer", bool: "true or false"}[self.type]
        if self.minimum is None:
            return kind
        return f"{kind}, {self.minimum} or more" if self.maximum is None else f"{kind}, {self.minimum} … {self.maximum}"


# ---------------------------------------------------------------- the folders


@functools.cache
def _folders() -> dict[str, str]:
    """Backend → the package of its vendor, in alphabetical order of the folders."""
    found = {}
    for module in pkgutil.iter_modules(backends.__path__, f"{backends.__name__}."):
        if module.ispkg:
            found.update(dict.fromkeys(importlib.import_module(module.name).BACKENDS, module.name))
    return found


def backend_names() -> tuple[str, ...]:
    """All backends."""
    return tuple(_folders())


@functools.cache
def builder_names() -> tuple[str, ...]:
    """The backends that build engines."""
    return tuple(name for name, package in _folders().items() if importlib.util.find_spec(f"{package}.build"))


def vendor_module(backend: str, half: Literal["build", "run", "quantize"]) -> ModuleType:
    """One half of a backend's vendor, or its quantiser.

    Raises:
        MissingDependencyError: the half cannot be loaded without a package that is not installed.
    """
    try:
        return importlib.import_module(f"{_folders()[backend]}.{half}")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the {backend} backend needs the package {error.name}", fix=f"pip install {error.name}"
        ) from None


def options_class(backend: str) -> type[Options]:
    """The struct of a backend's options.

    Raises:
        UsageError: unknown backend.
    """
    if backend not in _folders():
        raise UsageError(f"unknown backend {backend!r}", fix=f"use one of: {', '.join(builder_names())}")
    found: type[Options] = importlib.import_module(_folders()[backend]).BACKENDS[backend]
    return found


# ---------------------------------------------------------------- what follows from the structs


def option_fields(names: Iterable[str] | None = None) -> dict[str, OptionField]:
    """The options of these backends by name, in the order of their declaration.

    Args:
        names: backends; None: those that build engines.
    """
    found: dict[str, OptionField] = {}
    for backend in builder_names() if names is None else names:
        for field in _declared(options_class(backend)):
            known = found.get(field.name, field)
            found[field.name] = replace(field, backends=(*known.backends, backend))
    return found


def options_table(names: Iterable[str] | None = None) -> str:
    """The options as a Markdown table; see `option_fields`."""
    lines = ["| option | backends | values | default | |", "|---|---|---|---|---|"]
    for field in option_fields(names).values():
        default = json.dumps(field.default).strip('"')
        cells = (f"`{field.flag}`", ", ".join(field.backends), field.values, default, field.help)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def options_from(backend: str, given: Mapping[str, Option]) -> Options:
    """A backend's options, checked and complete.

    Args:
        given: by name; the others get their defaults.

    Raises:
        UsageError: unknown backend, unknown option, or a value that an option does not take.
    """
    cls = options_class(backend)
    options_by_backend([backend], given)
    try:
        return msgspec.convert(dict(given), cls)
    except msgspec.ValidationError as error:
        match = re.search(r" - at `\$\.(\w+)`$", str(error))
        if match is None:  # an invariant of the struct, which names the option itself
            raise UsageError(f"{backend}: {error}") from None
        field = option_fields([backend])[match[1]]
        raise UsageError(f"{backend}: {field.flag} must be {field.values}, got {given[field.name]!r}") from None


def options_from_key(key: EngineKey, *, threads: int | None = None) -> Options:
    """The options that engines were built with; one that an older version did not have has its default.

    Args:
        key: of the engines.
        threads: instead of the option of that name; None: as built.

    Raises:
        UnsupportedError: a newer version of lemica-trt wrote the key.
        UsageError: no such number of threads.
    """
    try:
        found = options_from(key.backend, key.options)
    except UsageError as error:
        raise UnsupportedError(
            f"the engines were built with options that this version of lemica-trt does not know: {error.what}",
            fix="pip install --upgrade lemica-trt, or build them again",
        ) from None
    return found if threads is None else options_from(key.backend, found.as_dict() | {"threads": threads})


def options_by_backend(backends: Sequence[str], given: Mapping[str, Option]) -> dict[str, dict[str, Option]]:
    """Backend → those of the given options that it has.

    Raises:
        UsageError: unknown backend, or an option that none of these has.
    """
    offered = {backend: options_class(backend).__struct_fields__ for backend in backends}
    for name in given:
        if not any(name in known for known in offered.values()):
            fields = option_fields(backend_names())
            others = fields[name].backends if name in fields else ()
            known_here = ", ".join(sorted(field.flag for field in option_fields(backends).values()))
            raise UsageError(
                f"{' and '.join(offered)} has no option --{name.replace('_', '-')}",
                fix=f"leave it out, or use --backend {' or '.join(others)}" if others else f"use one of: {known_here}",
            )
    return {backend: {name: given[name] for name in given if name in known} for backend, known in offered.items()}


def _declared(cls: type[Options]) -> list[OptionField]:
    """The options of a struct, without the backends that have it."""
    found = []
    for field in msgspec.structs.fields(cls):
        kind, meta = get_args(field.type)  # Annotated[type or Literal, Meta]
        choices = () if isinstance(kind, type) else get_args(kind)
        found.append(
            OptionField(
                name=field.name,
                type=str if choices else kind,
                default=field.default,
                help=meta.description,
                choices=choices,
                minimum=meta.ge,
                maximum=meta.le,
            )
        )
    return found
