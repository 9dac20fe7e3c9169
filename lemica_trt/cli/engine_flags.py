"""The flags of the backends' options, derived from what each backend declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from lemica_trt.backends.options import OptionField, option_fields
from lemica_trt.cli.command import flag
from lemica_trt.ir.engine import Option


def option_flags() -> list[Callable[[Any], Any]]:
    """A click option for each option of the backends that build engines; None where it is not given."""
    return [_flag(field) for field in option_fields().values()]


def given_options(flags: Mapping[str, Any]) -> dict[str, Option]:
    """The options among a command's flags, as far as they were given."""
    return {name: flags[name] for name in option_fields() if flags[name] is not None}


def _flag(field: OptionField) -> Callable[[Any], Any]:
    default = None if field.type is bool or field.default == "" else str(field.default)
    text = f"{', '.join(field.backends)}: {field.help.rstrip('.')}."
    if field.type is bool:
        return flag(field.flag, field.name, is_flag=True, default=None, advanced=True, help=text)
    kind: Any = field.type
    if field.choices:
        kind = click.Choice(field.choices)
    elif field.type is int:
        kind = click.IntRange(field.minimum, field.maximum)
    return flag(field.flag, field.name, type=kind, otherwise=default, advanced=True, help=text)
