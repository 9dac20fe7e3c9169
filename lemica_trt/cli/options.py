"""Flags that several commands share, and how commands print.

A flag has one name, one meaning and one help text wherever it stands: these decorators are put together by command.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lemica_trt.cli.engine_flags import option_flags
from lemica_trt.core.errors import UsageError
from lemica_trt.ir.profile import EFFORTS

if TYPE_CHECKING:
    from lemica_trt.bundle.signing import TrustedKey
    from lemica_trt.core.progress import Reporter

PIPE_WIDTH = 160
"""Columns of a table where there is no terminal to ask."""

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = click.Path(file_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
PATH = click.Path(path_type=Path)


class Integers(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in new releases only
    """A comma-separated list of integers."""

    name = "int,int,…"
    kind: Callable[[str], float] = int

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            what = "integers" if self.kind is int else "numbers"
            self.fail(f"expected {what} separated by commas, got {value!r}", param, ctx)


class Numbers(Integers):
    """A comma-separated list of numbers."""

    name = "number,number,…"
    kind = float


class Screen:
    """Where a command prints: results to standard output, progress to standard error.

    Args:
        as_json: the result is printed as JSON, and no progress.
        quiet: no progress.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json, self._quiet = as_json, quiet

    @functools.cached_property
    def reporter(self) -> Reporter:
        """Told what happens; closed with the command."""
        from lemica_trt.core.progress import reporter

        made = reporter(quiet=self._quiet or self._as_json)
        click.get_current_context().call_on_close(made.close)
        return made

    def print(self, result: Any, table: Callable[[], Any]) -> None:
        """The result: JSON for machines, a table for people.

        Args:
            result: what `--json` prints.
            table: makes what is printed otherwise.
        """
        if self._as_json:
            import msgspec

            click.echo(json.dumps(json.loads(msgspec.json.encode(result)), indent=2))
        else:
            from rich.console import Console

            console = Console()
            if not console.is_terminal:
                console = Console(width=PIPE_WIDTH)
            console.print(table(), markup=False)


def flags(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, shown in the order given."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`, `--quiet`, `--debug`; the command is given a `Screen`."""

    @flags(
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."),
        click.option("--quiet", "-q", is_flag=True, help="No progress on standard error."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    )
    @functools.wraps(function)
    def command(*arguments: Any, as_json: bool, quiet: bool, debug: bool, **given: Any) -> Any:
        return function(Screen(as_json=as_json, quiet=quiet), *arguments, **given)

    return command


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {name: value for name, value in values.items() if value not in (None, ())}


def refuse_together(flag: str, *others: str) -> None:
    """Raise UsageError if `flag` was given together with flags that it makes meaningless.

    Args:
        flag, others: parameter names of the running command; unknown ones were not given.
    """
    context = click.get_current_context()
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    typed = [n for n in (flag, *others) if context.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE]
    if flag in typed and len(typed) > 1:
        unused = ", ".join(names[name] for name in typed[1:])
        raise UsageError(
            f"{names[flag]} cannot be used together with {unused}", fix=f"leave out {unused}, or {names[flag]}"
        )


def refuse_contradictions() -> None:
    """Raise UsageError for flags of planning and calibration that exclude each other."""
    calibration = ("samples", "rollouts", "max_skip", "seed", "prompts", "calibration", "calibration_from")
    refuse_together(
        "schedule", "budget", "speedup", "latency", "min_psnr", "pareto", "method", "error_graph", *calibration
    )
    refuse_together("error_graph", *calibration)
    refuse_together("calibration_from", "calibration", "samples", "rollouts", "seed")
    if click.get_current_context().params.get("calibration") == "exact":
        refuse_together("rollouts", "calibration")
    for name, instead in REPLACED.items():
        if click.get_current_context().params.get(name) is not None:
            raise UsageError(f"--{name} is part of --method now", fix=instead)


model = flags(
    click.option(
        "--model",
        metavar="NAME|FILE.toml|DIR|HUB_ID",
        help="Named model (see `lemica-trt models`), build profile, or a diffusers pipeline that is traced.",
    ),
    click.option("--weights", metavar="DIR|HUB_ID", help="diffusers folder or hub id instead of the profile's own."),
    click.option("--max-sequence-length", type=int, metavar="L", help="Tokens of a prompt."),
    click.option("--denoising-steps", type=int, metavar="N", help="Sampling steps of the uncached model."),
    click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 or less: one branch only."),
    click.option("--scheduler", metavar="CLASS", help="diffusers scheduler class instead of the pipeline's own."),
    click.option("--flow-shift", type=float, help="Shift of the sigmas of a flow-matching scheduler."),
    click.option("--sigmas", type=Numbers(), metavar="S,S,…",
                 help="N falling noise levels instead of the scheduler's spacing, as diffusers' pipelines take them."),
    click.option("--timesteps", type=Numbers(), metavar="T,T,…", help="Or N timesteps."),
    click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Precision of the DiT."),
    click.option("--frames", type=int, help="Video frames."),
    click.option("--height", type=int, help="Pixels."),
    click.option("--width", type=int, help="Pixels."),
    click.option("--max-batch", type=int, help="Largest number of requests in one engine call."),
    click.option("--opset", type=int, help="ONNX opset."),
)  # fmt: skip

calibration = flags(
    click.option("--effort", type=click.Choice(list(EFFORTS)),
                 help="How much is measured for a plan of 15 of 50 steps: about 9, 25 or 190 samplings; stands for "
                 "--samples, --rollouts, --validation-samples, --verify-samples and --method  [default: normal]"),
    click.option("--calibration", type=click.Choice(["exact", "secant"]),
                 help="How edges are weighed: each one replayed, or estimated from few samplings  [default: secant]"),
    click.option("--samples", type=int, help="Calibration samples: (prompt, seed) pairs, one sampling each."),
    click.option("--rollouts", type=int,
                 help="Of those, how many also tell how errors grow: three samplings more each."),
    click.option("--validation-samples", type=int,
                 help="Samples that the best of several plans is chosen on; 0: the first method is taken."),
    click.option("--max-skip", type=int, metavar="K", help="Most steps that one segment skips."),
    click.option("--seed", type=int, help="Seed of the first calibration sample."),
    click.option("--calibration-from", type=EXISTING_FOLDER, metavar="DIR",
                 help="Carry over the calibration of a bundle or work folder of this model, made by secant for other "
                 "steps, shift or guidance: one sampling a sample."),
)  # fmt: skip

device = click.option("--device", help="torch device that runs the model  [default: a GPU where there is one]")

signed = flags(
    click.option("--verify-with", type=PATH, multiple=True, metavar="PUBLIC.pem",
                 help="Take a bundle only if this key signed it; repeat for several, one of which must have. A folder "
                 "stands for its *.pem.  [default: $LEMICA_TRUSTED_KEYS]"),
    click.option("--require-signature", is_flag=True, help="Refuse to go on where no key is given."),
)  # fmt: skip


def trusted(verify_with: tuple[Path, ...], require_signature: bool) -> tuple[TrustedKey, ...]:
    """The keys that `signed` asks for; none: no signature is needed.

    Raises:
        UsageError: a signature is needed, and no key is given.
        LemicaError: as `signing.trusted_keys`.
    """
    from lemica_trt.bundle.signing import TRUSTED_KEYS, environment_keys, trusted_keys

    keys = trusted_keys(verify_with) if verify_with else environment_keys()
    if require_signature and not keys:
        raise UsageError(
            "--require-signature: expected a public key, got none", fix=f"add --verify-with, or set {TRUSTED_KEYS}"
        )
    return keys


samples_run_by = flags(
    click.option("--prompts", type=FILE,
                 help="Prompts, one a line, instead of the profile's: for calibration, fits and trials."),
    device,
    click.option("--ray", metavar="ADDRESS",
                 help="Run the model on a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT, as ray.init has it."),
)  # fmt: skip

method = click.option(
    "--method", metavar="NAME[,NAME…]",
    help="How plans are made (see `lemica-trt methods`); of several the best is found by trial  [default: auto]",
)  # fmt: skip

schedule = click.option(
    "--schedule", type=Integers(), metavar="STEP,STEP,…", help="Full steps as given; nothing is calibrated."
)

REPLACED = {
    "reuse": "--method lemica or uniform reuse residuals, --method linear outputs",
    "predict": "--method linear; the others never won a trial",
    "solver": "--method fitted, or stock:NAME (see lemica-trt methods)",
}
"""Flags of earlier releases → what to write."""

planning = flags(
    click.option("--budget", type=Integers(), metavar="B[,B…]",
                 help="Full steps; several make several plans, the first is the default.  [default: 15]"),
    click.option("--speedup", metavar="S[,S…]",
                 help="Or so many times faster than all steps in full, as this machine's engines run them."),
    click.option("--latency", metavar="T[,T…]",
                 help="Or so long for the denoising loop of one request here, text encoder and VAE not in it: "
                 "2.5s, 800ms."),
    click.option("--min-psnr", metavar="DB[,DB…]",
                 help="Or as few full steps as have this PSNR against the uncached run, the mean over the validation "
                 "samples, 8 at least unless --validation-samples says otherwise."),
    click.option("--pareto", is_flag=True, default=None,
                 help="Also measure budgets over the whole range: quality and speed-up, as a table and a plot."),
    method,
    click.option("--reference-steps", type=click.IntRange(1), metavar="M",
                 help="Compare plans with the sampler at M steps: fit, choose and verify by that  "
                 "[default: its own N]"),
    schedule,
    *(click.option(f"--{name}", hidden=True) for name in REPLACED),
)  # fmt: skip

engines = flags(
    click.option("--backend", multiple=True, metavar="NAME",
                 help="Engines to build; repeat for several, the first is preferred.  [default: onnxruntime]"),
    *option_flags(),
)  # fmt: skip
