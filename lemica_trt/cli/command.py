"""click's commands, with what a newcomer needs: sections of options, examples, hints for what other tools call it.

Flag       an option in a section of the help; `advanced` ones are shown by --help-all only
Command    --help in sections with examples, --help-all, hints for options that there are not
Group      commands in sections, hints for commands that there are not
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import click

from lemica_trt.cli.hints import COMMANDS, hint_of_option
from lemica_trt.core.errors import UsageError
from lemica_trt.core.progress import count

F = TypeVar("F", bound=Callable[..., Any])

SECTIONS = (
    *("Model", "Request", "Budget", "Method", "Plans of a bundle", "Calibration", "Verification", "Measuring"),
    *("Engines", "Serving", "Trust"),
)
"""Sections of a help, in order; others follow, and `OUTPUT` is the last."""

OUTPUT = "Output"

HELP_ALL = "lemica_trt.help_all"
"""Key of `Context.meta`: whether all options are shown."""

MODEL = "lemica_trt.model"
"""Key of `Context.meta`: what --model says, as far as it is typed before --help or behind it."""


def kebab(token: str) -> str:
    """How options are written here: trtexec's `--memPoolSize` and diffusers' `num_frames` are the same options."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"-\1", token).replace("_", "-").lower()


class Flag(click.Option):
    """An option of a section.

    Args:
        advanced: shown by --help-all only.
        aliases: other names that are accepted: what diffusers, trtexec or optimum-cli call the same.
        otherwise: what is taken where it is not given, in words; as `[default: …]`.
        profile: the profile of the model has its default, under its name in `cli.flags.PROFILE_FIELDS`.

    Attributes:
        group: its section; None: `OUTPUT`.
    """

    def __init__(
        self,
        param_decls: Sequence[str],
        *,
        advanced: bool = False,
        aliases: Sequence[str] = (),
        otherwise: str | None = None,
        profile: bool = False,
        **attributes: Any,
    ) -> None:
        super().__init__([*param_decls, *aliases], **attributes)
        self.group: str | None = None
        self.advanced, self.aliases = advanced, tuple(aliases)
        self._otherwise, self._profile = otherwise, profile

    def default_text(self, model: str | None = None) -> str | None:
        """What is taken where the option is not given.

        Args:
            model: what --model says; None: nothing.
        """
        if self._profile:
            from lemica_trt.cli.flags import default_from_profile

            return default_from_profile(str(self.name), model)
        return self._otherwise

    def get_error_hint(self, ctx: click.Context | None) -> str:
        return f"'{self.opts[0]}'"

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        shown = copy.copy(self)
        shown.opts = [name for name in self.opts if name not in self.aliases]
        record = super(Flag, shown).get_help_record(ctx)
        if record is None:
            return None
        name, text = record
        default = self.default_text(ctx.meta.get(MODEL))
        if ctx.meta.get(HELP_ALL) and self.aliases:
            text += f"  (also {', '.join(self.aliases)})"
        return name, text if default is None else f"{text}  [default: {default}]"


flag = functools.partial(click.option, cls=Flag)
"""`click.option`, of a `Flag`."""


def flags(section: str, *decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options of one section as one decorator, shown in the order given."""

    def apply(function: F) -> F:
        before = len(getattr(function, "__click_params__", ()))
        for decorator in reversed(decorators):
            function = decorator(function)
        for parameter in function.__click_params__[before:]:  # type: ignore[attr-defined]
            if isinstance(parameter, Flag) and parameter.group is None:
                parameter.group = section
        return function

    return apply


class Command(click.Command):
    """A command whose help has sections and examples.

    Args:
        examples: commands as they are typed, without the program's name.
        short_help: what it does, on one line of the list of commands.
    """

    allow_extra_args = True  # they are refused below, with a hint

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.examples = tuple(examples)
        self.params.append(
            Flag(
                ["--help-all"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_show_all,
                help="Show all options and exit.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        typed = {kebab(word.partition("=")[0]): word.partition("=")[0] for word in args if word.startswith("--")}
        args = list(_normalized(args))
        ctx.meta[MODEL] = _value_of("--model", args)
        try:
            rest = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = {name for parameter in self.params for name in parameter.opts}
            if (fix := hint_of_option(str(self.name), error.option_name, known)) is not None:
                name = typed.get(error.option_name, error.option_name)
                raise UsageError(f"{self.name} has no option {name}", fix=fix) from None
            raise
        if ctx.args and not ctx.resilient_parsing:
            raise UsageError(
                f"{self.name} takes {self._arguments or 'no arguments'}, got {' '.join(ctx.args)!r} too",
                fix=self._hint_of_arguments(ctx),
            )
        return rest

    @property
    def _arguments(self) -> str:
        return " and ".join((p.name or "").upper() for p in self.params if isinstance(p, click.Argument))

    def _hint_of_arguments(self, ctx: click.Context) -> str:
        names = {parameter.name for parameter in self.params}
        if "model" in names:
            return f"{ctx.command_path} --model {ctx.args[0]}"
        if "prompt" in names:
            return "put the prompt in quotes"
        return f"see '{ctx.command_path} --help'"

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}lemica-trt {example}\n")
        self.format_options(ctx, formatter)
        self.format_epilog(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        shown = [p for p in parameters if ctx.meta.get(HELP_ALL) or not getattr(p, "advanced", False)]
        for section, options in in_sections(shown).items():
            records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)
        if left := len(parameters) - len(shown):
            formatter.write_paragraph()
            formatter.write_text(f"{count(left, 'more option')}: {ctx.command_path} --help-all")


def in_sections(options: Iterable[click.Option]) -> dict[str, list[click.Option]]:
    """Options by section, the sections in order."""
    found: dict[str, list[click.Option]] = {}
    for option in options:
        found.setdefault(getattr(option, "group", None) or OUTPUT, []).append(option)
    order = [*SECTIONS, *(name for name in found if name not in SECTIONS and name != OUTPUT), OUTPUT]
    return {name: found[name] for name in order if name in found}


class Group(click.Group):
    """A group whose help shows its commands in sections.

    Args:
        sections: title → names of commands; the rest are shown below `Other`.
    """

    command_class = Command

    def __init__(self, *arguments: Any, sections: Mapping[str, Sequence[str]], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.sections = sections

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = kebab(args[0])
        if self.get_command(ctx, name) is None and name in COMMANDS:
            raise UsageError(f"there is no command {args[0]!r}", fix=COMMANDS[name])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left = dict(self.commands)
        for title, names in (*self.sections.items(), ("Other", None)):
            here = [left.pop(name) for name in (list(left) if names is None else names) if name in left]
            if here:
                limit = formatter.width - 6 - max(map(len, self.commands))
                with formatter.section(title):
                    formatter.write_dl([(str(c.name), c.get_short_help_str(limit)) for c in here])


def _show_all(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[HELP_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def _normalized(typed: Iterable[str]) -> Iterator[str]:
    """Words with the names of long options as they are written here, up to `--`."""
    words = iter(typed)
    for word in words:
        name, equals, value = word.partition("=")
        yield f"{kebab(name)}{equals}{value}" if name.startswith("--") else word
        if word == "--":
            yield from words


def _value_of(option: str, typed: Sequence[str]) -> str | None:
    """The value of an option among words that are not parsed yet."""
    for word, following in zip(typed, [*typed[1:], None]):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
