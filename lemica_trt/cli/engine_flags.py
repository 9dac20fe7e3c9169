"""The flags of the backends' options, derived from what each backend declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from lemica_trt.backends.options import OptionField, option_fields
from lemica_trt.ir.engine import Option


def option_flags() -> list[Callable[[Any], Any]]:
    """A click option for each option of the backends that build engines; None where it is not given."""
    return [_flag(field) for field in option_fields().values()]


def given_options(flags: Mapping[str, Any]) -> dict[str, Option]:
    """The options among a command's flags, as far as they were given."""
    return {name: flags[name] for name in option_fields() if flags[name] is not None}


def _flag(field: OptionField) -> Callable[[Any], Any]:
    default = "" if field.type is bool or field.default == "" else f"  [default: {field.default}]"
    text = f"{', '.join(field.backends)}: {field.help}{default or '.'}"
    if field.type is bool:
        return click.option(field.flag, field.name, is_flag=True, default=None, help=text)
    kind: Any = field.type
    if field.choices:
        kind = click.Choice(field.choices)
    elif field.type is int:
        kind = click.IntRange(field.minimum, field.maximum)
    return click.option(field.flag, field.name, type=kind, help=text)
