"""Flags that several commands share, and how commands print.

A flag has one name, one meaning and one help text wherever it stands: these decorators are put together by command.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemica_trt.cli import completion
from lemica_trt.cli.command import OUTPUT, flag, flags
from lemica_trt.cli.engine_flags import option_flags
from lemica_trt.core.errors import UsageError
from lemica_trt.ir.profile import EFFORTS

if TYPE_CHECKING:
    from lemica_trt.bundle.signing import TrustedKey
    from lemica_trt.core.progress import Reporter

PIPE_WIDTH = 160
"""Columns of a table where there is neither a terminal to ask nor COLUMNS."""

SCHEMA_VERSION = 1
"""Of what `--json` prints: `{"schema_version": 1, "result": …}` or `{"schema_version": 1, "error": …}`."""

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(path_type=Path)
FILE.name = "file"  # what is there is looked at where it is read: one exit code for one kind of mistake
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

            print_json({"result": json.loads(msgspec.json.encode(result))})
        else:
            from rich.console import Console

            console = Console()
            if not console.is_terminal:
                console = Console(width=int(os.environ.get("COLUMNS") or PIPE_WIDTH))
            console.print(table(), markup=False, crop=False)  # a long path is whole, whatever the terminal does with it


def print_json(content: Mapping[str, Any]) -> None:
    """Print what `--json` promises, with the version of its schema."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2))


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`, `--quiet`, `--debug`; the command is given a `Screen`."""

    @flags(
        OUTPUT,
        flag("--json", "as_json", is_flag=True, help="Print the result, or the error, as JSON on standard output."),
        flag("--quiet", "-q", is_flag=True, help="No progress on standard error."),
        flag("--debug", is_flag=True, advanced=True, help="Show the traceback of an error."),
    )
    @functools.wraps(function)
    def command(*arguments: Any, as_json: bool, quiet: bool, debug: bool, **given: Any) -> Any:
        return function(Screen(as_json=as_json, quiet=quiet), *arguments, **given)

    return command


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {name: value for name, value in values.items() if value not in (None, ())}


def require_output(path: Path, screen: Screen) -> None:
    """Refuse a file that cannot be written, and tell of a folder that is made for it.

    Raises:
        UsageError: as `core.files.require_writable`.
    """
    from lemica_trt.core.files import require_writable

    if require_writable(path) is not None:
        screen.reporter.stage("output", f"the folder {path.parent} is not there, and will be made")


def pairs(flag: str, values: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE`, several.

    Raises:
        UsageError: one is something else.
    """
    found = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            raise UsageError(f"{flag}: expected NAME=VALUE, got {value!r}", fix=f"for example {flag} b15=good")
        found[name] = text
    return found


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
        "schedule",
        "calibrate_on",
        "budget",
        "speedup",
        "latency",
        "min_psnr",
        "pareto",
        "method",
        "error_graph",
        *calibration,
    )
    refuse_together("error_graph", *calibration)
    refuse_together("calibration_from", "calibration", "samples", "rollouts", "seed")
    if click.get_current_context().params.get("calibration") == "exact":
        refuse_together("rollouts", "calibration")
    for name, instead in REPLACED.items():
        if click.get_current_context().params.get(name) is not None:
            raise UsageError(f"--{name} is part of --method now", fix=instead)


lora = flag("--lora", multiple=True, metavar="FILE|HUB_ID[:SCALE]",
            help="LoRA weights to fuse into the model before anything is measured; repeat for several.")  # fmt: skip
lora_added = flag("--lora", multiple=True, metavar="FILE[:SCALE]",
                  help="LoRA weights to add to the transformer's, without a build; repeat for several.")  # fmt: skip
lora_2_added = flag("--lora-2", multiple=True, metavar="FILE[:SCALE]", advanced=True,
                    help="The same for a second transformer (Wan 2.2: low noise); --lora is the first's.")  # fmt: skip
lora_2 = flag("--lora-2", multiple=True, metavar="FILE|HUB_ID[:SCALE]", advanced=True,
              help="The same for a second transformer (Wan 2.2: low noise); --lora is the first's.")  # fmt: skip

model = flags(
    "Model",
    flag("--model", metavar="NAME|FILE.toml|DIR|HUB_ID", shell_complete=completion.models,
         help="Named model (see `lemica-trt models`), build profile, or a diffusers pipeline that is traced."),
    flag("--weights", metavar="DIR|HUB_ID", otherwise="the profile's own",
         help="Where the weights are: diffusers folder or hub id."),
    lora,
    lora_2,
    flag("--frames", type=int, profile=True, aliases=("--num-frames",), help="Video frames."),
    flag("--height", type=int, profile=True, help="Pixels."),
    flag("--width", type=int, profile=True, help="Pixels."),
    flag("--denoising-steps", type=int, metavar="N", profile=True, aliases=("--num-inference-steps", "--steps"),
         help="Sampling steps of the uncached model."),
    flag("--guidance-scale", type=float, profile=True, aliases=("--cfg-scale",),
         help="Classifier-free guidance; 1 or less: one branch only."),
    flag("--guidance-scale-2", type=float, advanced=True, otherwise="the profile's, or each request's",
         help="Of the steps of a second transformer (Wan 2.2), whatever a request asks for."),
    flag("--guidance-range", metavar="LOW:HIGH", advanced=True,
         otherwise="half to 1.25 times --guidance-scale, fitted at that alone",
         help="Guidance scales that requests may have: solvers are fitted across them."),
    flag("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), profile=True, aliases=("--torch-dtype",),
         help="Precision of the DiT."),
    flag("--scheduler", metavar="CLASS", profile=True, advanced=True,
         help="diffusers scheduler class instead of the pipeline's own."),
    flag("--flow-shift", type=float, profile=True, advanced=True, aliases=("--shift",),
         help="Shift of the sigmas of a flow-matching scheduler."),
    flag("--sigmas", type=Numbers(), metavar="S,S,…", advanced=True, otherwise="the scheduler's spacing",
         help="N falling noise levels, as diffusers' pipelines take them."),
    flag("--timesteps", type=Numbers(), metavar="T,T,…", advanced=True, otherwise="the scheduler's spacing",
         help="Or N timesteps."),
    flag("--max-sequence-length", type=int, metavar="L", profile=True, advanced=True, help="Tokens of a prompt."),
    flag("--max-batch", type=int, profile=True, advanced=True, aliases=("--batch-size",),
         help="Largest number of requests in one engine call."),
    flag("--opset", type=int, profile=True, advanced=True, help="ONNX opset."),
)  # fmt: skip

calibration = flags(
    "Calibration",
    flag("--effort", type=click.Choice(list(EFFORTS)), otherwise="normal",
         help="How much is measured for a plan of 15 of 50 steps: about 9, 25 or 190 samplings; stands for "
         "--samples, --rollouts, --validation-samples, --verify-samples and --method."),
    flag("--calibration", type=click.Choice(["exact", "secant"]), profile=True, advanced=True,
         help="How edges are weighed: each one replayed, or estimated from few samplings."),
    flag("--samples", type=int, profile=True, advanced=True,
         help="Calibration samples: (prompt, seed) pairs, one sampling each."),
    flag("--rollouts", type=int, profile=True, advanced=True,
         help="Of those, how many also tell how errors grow: three samplings more each."),
    flag("--validation-samples", type=int, profile=True, advanced=True,
         help="Samples used to choose the best of several plans; 0: the first method is taken."),
    flag("--max-skip", type=int, metavar="K", profile=True, advanced=True, help="Most steps that one segment skips."),
    flag("--seed", type=int, profile=True, advanced=True, help="Seed of the first calibration sample."),
    flag("--calibration-from", type=PATH, metavar="DIR", advanced=True,
         help="Carry over the calibration of a bundle or work folder of this model, made by secant for other "
         "steps, shift or guidance: one sampling a sample."),
)  # fmt: skip

device = flag("--device", otherwise="a GPU where there is one", help="torch device that runs the model.")

signed = flags(
    "Trust",
    flag("--verify-with", type=PATH, multiple=True, metavar="PUBLIC.pem", otherwise="$LEMICA_TRUSTED_KEYS",
         advanced=True,
         help="Take a bundle only if this key signed it; repeat for several, one of which must have. A folder "
         "stands for its *.pem."),
    flag("--require-signature", is_flag=True, advanced=True, help="Refuse to go on where no key is given."),
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
    "Calibration",
    flag("--prompts", type=FILE, otherwise="the profile's",
         help="File of prompts, one a line, behind tabs the pictures of each: for calibration, fits and trials."),
    flag("--calibrate-on", type=click.Choice(["torch", "engine"]), otherwise="torch",
         help="Where calibration, fits and trials run the model: in PyTorch, or on the bundle's own engines."),
    device,
    flag("--ray", metavar="ADDRESS", advanced=True,
         help="Run the model on a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT, as ray.init has it."),
)  # fmt: skip

method = flags(
    "Method",
    flag("--method", metavar="NAME[,NAME…]", otherwise="auto", shell_complete=completion.methods,
         help="How plans are made (see `lemica-trt methods`); of several the best is found by trial."),
)  # fmt: skip

schedule = flags(
    "Method",
    flag("--schedule", type=Integers(), metavar="STEP,STEP,…", advanced=True,
         help="Full steps as given; nothing is calibrated."),
)  # fmt: skip

REPLACED = {
    "reuse": "--method lemica or uniform reuse residuals, --method linear outputs",
    "predict": "--method linear; the others never won a trial",
    "solver": "--method fitted, or stock:NAME (see lemica-trt methods)",
}
"""Flags of earlier releases → what to write."""

planning = flags(
    "Budget",
    flag("--budget", type=Integers(), metavar="B[,B…]", otherwise="15",
         help="Full steps; several make several plans, the first is the default."),
    flag("--speedup", metavar="S[,S…]",
         help="Or this many times faster than all steps in full, as this machine's engines run them."),
    flag("--latency", metavar="T[,T…]",
         help="Or this time for the denoising loop of one request here, text encoder and VAE not in it: 2.5s, 800ms."),
    flag("--min-psnr", metavar="DB[,DB…]",
         help="Or the fewest full steps that reach this PSNR against the uncached run, the mean over the validation "
         "samples, 8 at least unless --validation-samples says otherwise."),
    flag("--pareto", is_flag=True, default=None, advanced=True,
         help="Also measure budgets over the whole range: quality and speed-up, as a table and a plot."),
    method,
    flags(
        "Method",
        flag("--reference-steps", type=click.IntRange(1), metavar="M", otherwise="its own N", advanced=True,
             help="Compare plans with the sampler at M steps: fit, choose and verify by that."),
    ),
    schedule,
    *(click.option(f"--{name}", hidden=True) for name in REPLACED),
)  # fmt: skip

weights = flag("--weights", metavar="DIR|HUB_ID", otherwise="as the bundle knows", help="Where the model is.")
held_out = flag("--prompts", type=FILE, otherwise="the profile's", help="File of held-out prompts, one a line.")
shape = flag("--shape", metavar="FxHxW", otherwise="the one that it was built for", shell_complete=completion.shapes,
             help="Frames, height and width of another of the bundle's shapes.")  # fmt: skip
image = flag("--image", type=FILE, help="PNG, JPEG or WebP, of bundles that need one: its first frame, say.")

last_image = flag("--last-image", type=FILE, help="The same of bundles that need two: its last frame.")

backend = flag("--backend", metavar="NAME", otherwise="the first that run here", shell_complete=completion.backends,
               help="Which of the bundle's engines.")  # fmt: skip

engines = flags(
    "Engines",
    flag("--backend", multiple=True, metavar="NAME", otherwise="onnxruntime", shell_complete=completion.backends,
         help="Engines to build; repeat for several, the first is preferred."),
    *option_flags(),
)  # fmt: skip
