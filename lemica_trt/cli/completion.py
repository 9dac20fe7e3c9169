"""What a shell offers behind an option: names of models, methods, plans and backends. Reads folders, runs nothing."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem

from lemica_trt.core.errors import LemicaError

Items = list[CompletionItem]


def models(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Build profiles; where none begins like that, files and folders."""
    from lemica_trt.ir.resources import profile_names

    return _beginning(profile_names(), incomplete) or [CompletionItem(incomplete, type="file")]


def methods(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Planners; of a list its last part."""
    from lemica_trt.planning.planner import planners

    before, comma, last = incomplete.rpartition(",")
    summaries = {"auto": "the best of a few", "all": "the best of all", **{n: p.summary for n, p in planners().items()}}
    return [
        CompletionItem(f"{before}{comma}{name}", help=text) for name, text in summaries.items() if name.startswith(last)
    ]


def plans(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Plans of the bundle that is named before."""
    return _of_bundle(ctx, "plans", incomplete)


def shapes(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Shapes of the bundle that is named before."""
    return _of_bundle(ctx, "shapes", incomplete)


def backends(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Backends that build engines."""
    from lemica_trt.backends.options import builder_names

    return _beginning(builder_names(), incomplete)


def _of_bundle(ctx: click.Context, names: str, incomplete: str) -> Items:
    """`plans` or `shapes` of the bundle that is named before."""
    from lemica_trt.bundle.reading import Bundle

    named = [ctx.params[name] for name in ("bundle", "target", "path") if ctx.params.get(name)]
    folder = next(iter([*named, *ctx.args]), None)  # behind an option that has no value yet click gives up early
    try:
        return _beginning(getattr(Bundle.open(folder), names), incomplete) if folder is not None else []
    except LemicaError:
        return []


def _beginning(names: Iterable[str], incomplete: str) -> Items:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
