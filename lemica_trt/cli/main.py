"""The command line: parse, call `pipeline`, print, exit code.

Flags carry the names that users know from trtexec, Polygraphy, optimum-cli and diffusers. Results go to standard
output, progress and notes to standard error, so that `--json` can be piped. Decides nothing itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lemica_trt import __version__
from lemica_trt.core.errors import EXIT_CODES, LemicaError, UsageError

if TYPE_CHECKING:
    from lemica_trt.core.progress import Reporter

PIPE_WIDTH = 160
"""Columns of a table where there is no terminal to ask."""

F = TypeVar("F", bound=Callable[..., Any])

_EPILOG = "Exit codes: 0 done; " + "; ".join(
    f"{code} {text[0].lower()}{text[1:-1]}" for code, text in EXIT_CODES.items()
)


class Integers(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in new releases only
    """A comma-separated list of integers."""

    name = "int,int,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"expected integers separated by commas, got {value!r}", param, ctx)


class Listed(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in new releases only
    """A comma-separated list of budgets in one unit; `kind` names the function of `budget` that reads one."""

    name = "list"

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        from lemica_trt.ir import budget

        if isinstance(value, tuple):
            return value
        try:
            return tuple(getattr(budget, f"{self._kind}_from_text")(part) for part in str(value).split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Group(click.Group):
    """Turns every error that a user can cause into one line on standard error and its exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        debug = "--debug" in sys.argv
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
            if debug or not _out_of_memory(error):
                raise
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


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, shown in the order given."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_common = _options(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."),
    click.option("--quiet", "-q", is_flag=True, help="No progress on standard error."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)

_model = _options(
    click.option("--model", metavar="NAME|FILE.toml", help="Build profile (see `lemica-trt doctor`)."),
    click.option("--weights", metavar="DIR|HUB_ID", help="diffusers folder or hub id instead of the profile's own."),
    click.option("--denoising-steps", type=int, metavar="N", help="Sampling steps of the uncached model."),
    click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 or less: one branch only."),
    click.option("--scheduler", metavar="CLASS", help="diffusers scheduler class instead of the pipeline's own."),
    click.option("--flow-shift", type=float, help="Shift of the sigmas of a flow-matching scheduler."),
    click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Precision of the DiT."),
    click.option("--frames", type=int, help="Video frames."),
    click.option("--height", type=int, help="Pixels."),
    click.option("--width", type=int, help="Pixels."),
    click.option("--max-batch", type=int, help="Largest number of requests in one engine call."),
    click.option("--opset", type=int, help="ONNX opset."),
)

_device = click.option(
    "--device", help="torch device that calibrates and verifies  [default: a GPU where there is one]"
)
_engine = _options(
    click.option("--backend", "backends", multiple=True, default=("onnxruntime",), show_default=True,
                 help="Engines to build; repeat for several, the first is preferred."),
    click.option("--provider", type=click.Choice(["cpu", "cuda"]),
                 help="Execution provider of ONNX Runtime  [default: cpu]"),
    click.option("--builder-optimization-level", type=click.IntRange(0, 5),
                 help="TensorRT: how long to look for better kernels  [default: 3]"),
    click.option("--mem-pool-size", metavar="POOL:SIZE[,…]",
                 help="TensorRT: limits of the builder's memory pools, for example workspace:4G."),
    click.option("--weight-streaming", is_flag=True, default=None,
                 help="TensorRT: weights may stay in host memory when the engine runs."),
    click.option("--compute-capabilities", metavar="X.Y[,…]|current",
                 help="TensorRT for RTX: GPUs to build for  [default: 8.0 and later]"),
    click.option("--version-compatible", is_flag=True, default=None,
                 help="TensorRT: the engine also runs on the lean runtime of that version."),
    click.option("--hardware-compatibility-level",
                 type=click.Choice(["none", "ampere_plus", "same_compute_capability"]),
                 help="TensorRT: which other GPUs run the engine  [default: none]"),
    click.option("--profiling-verbosity", type=click.Choice(["layer_names_only", "detailed", "none"]),
                 help="TensorRT: what the engine tells of its layers  [default: detailed]"),
)  # fmt: skip

ENGINE_OPTIONS = (
    "provider",
    "builder_optimization_level",
    "mem_pool_size",
    "weight_streaming",
    "compute_capabilities",
    "version_compatible",
    "hardware_compatibility_level",
    "profiling_verbosity",
)
"""Flags of `_engine` that are builder options, by their names there."""
_bundle = click.argument("bundle", type=click.Path(path_type=Path))

_calibration = _options(
    click.option("--calibration", type=click.Choice(["exact", "secant"]),
                 help="How edges are weighed: each one replayed, or estimated from few samplings  [default: secant]"),
    click.option("--samples", type=int, help="Calibration samples: (prompt, seed) pairs."),
    click.option("--validation-samples", type=int, help="Samples that the best of several ways is chosen on."),
    click.option("--max-skip", type=int, metavar="K", help="Most steps that one segment skips."),
    click.option("--seed", type=int, help="Seed of the first calibration sample."),
    click.option(
        "--prompts",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Calibration prompts, one a line, instead of the profile's.",
    ),
    click.option("--calibration-from", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
                 help="Carry over the calibration of a bundle or work folder of this model, made by secant for other "
                 "steps, shift or guidance: one sampling a sample."),
    click.option("--ray", metavar="ADDRESS",
                 help="Calibrate on a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT, as ray.init has it."),
)  # fmt: skip

_planning = _options(
    click.option("--budget", "budgets", type=Integers(), default="15", show_default=True, metavar="B[,B…]",
                 help="Full steps; several make several plans, the first is the default."),
    click.option("--speedup", "speedups", type=Listed("speedup"), metavar="S[,S…]",
                 help="Or so many times faster than all steps in full, as this machine's engines run them."),
    click.option("--latency", "latencies", type=Listed("latency"), metavar="T[,T…]",
                 help="Or so long for the denoising loop of one request here, text encoder and VAE not in it: "
                 "2.5s, 800ms."),
    click.option("--min-psnr", "min_psnrs", type=Listed("min_psnr"), metavar="DB[,DB…]",
                 help="Or as few full steps as have this PSNR against the uncached run, the mean over clips that "
                 "calibration has not seen."),
    click.option("--pareto", is_flag=True,
                 help="Also look at budgets all along: quality and speed-up of each, as a table and a plot."),
    click.option("--method", "methods", default="auto", show_default=True, metavar="NAME[,NAME…]",
                 help="How plans are made; of several the best is found by trial."),
    click.option("--reference-steps", type=click.IntRange(1), metavar="M",
                 help="Hold plans against the sampler with M steps: fit, integrate, choose and verify by that  "
                 "[default: its own N]"),
    click.option("--schedule", type=Integers(), metavar="STEP,STEP,…",
                 help="Full steps as given; nothing is calibrated."),
)  # fmt: skip


@main.command()
@_model
@_calibration
@_planning
@_engine
@_device
@_options(
    click.option("--error-graph", type=click.Path(dir_okay=False, path_type=Path),
                 help="Use this error graph instead of calibrating."),
    click.option("--verify-samples", type=click.IntRange(0), default=8, show_default=True,
                 help="Held-out clips that the plans are judged by; 0: no verification."),
    click.option("--output", "-o", type=click.Path(path_type=Path), help="Bundle folder  [default: out/MODEL]"),
    click.option("--triton", "repository", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
                 help="Also write a Triton model repository from the bundle."),
    click.option("--dry-run", is_flag=True, help="Print what would be done, with time, disk and memory; do nothing."),
)  # fmt: skip
@_common
def build(
    model: str | None,
    weights: str | None,
    budgets: tuple[int, ...],
    speedups: tuple[Any, ...] | None,
    latencies: tuple[Any, ...] | None,
    min_psnrs: tuple[Any, ...] | None,
    pareto: bool,
    methods: str,
    reference_steps: int | None,
    schedule: tuple[int, ...] | None,
    error_graph: Path | None,
    calibration_from: Path | None,
    prompts: Path | None,
    backends: tuple[str, ...],
    device: str | None,
    ray: str | None,
    verify_samples: int,
    output: Path | None,
    repository: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **overrides: Any,
) -> None:
    """Calibrate, plan, export, build engines, and verify: one command from a model to a bundle.

    Finished stages are kept beside the bundle (OUTPUT.work): after an interruption, or with other flags, the same
    command does only what is missing.
    """
    from lemica_trt import compiler as pipeline
    from lemica_trt.report import summary

    calibration = ("samples", "max_skip", "seed", "prompts", "calibration", "calibration_from")
    _refuse_unused("schedule", *BUDGETS, "pareto", "methods", "error_graph", *calibration)
    _refuse_unused("error_graph", *calibration)
    _refuse_unused("calibration_from", "calibration", "samples", "seed")
    profile = _profile(model, weights, overrides)
    output = output or Path("out") / profile.name
    if repository is not None:
        from lemica_trt.triton.repository import require_repository, write_repository

        require_repository(repository)
    request = pipeline.Request(
        budgets=_budget_given(speedups, latencies, min_psnrs) or budgets,
        pareto=pareto,
        methods=tuple(methods.split(",")),
        schedule=schedule,
        error_graph=None if error_graph is None else str(error_graph),
        calibration_from=None if calibration_from is None else str(calibration_from),
        prompts=None if prompts is None else str(prompts),
        device=device,
        ray=ray,
        backends=backends,
        options=_builder_options(overrides),
        verify_samples=verify_samples,
        reference_steps=reference_steps,
    )
    if dry_run:
        steps = pipeline.dry_run(profile, output, request)
        _print(steps, as_json, summary.dry_run_table)
        return
    bundle, report, unverified, answers, front = pipeline.build(profile, output, request, _reporter(quiet or as_json))
    if repository is not None:
        write_repository(bundle, repository)
    _print(
        {
            "bundle": str(output),
            "plans": bundle.plans,
            "verify": report,
            "unverified": unverified,
            "answers": answers,
            "front": front,
        },
        as_json,
        lambda _: summary.with_answers(summary.build_table(bundle, report, output, unverified), answers, front),
    )


BUDGETS = ("budgets", "speedups", "latencies", "min_psnrs")
"""Flags of `_planning` that say what a plan may cost; one of them can be given."""


def _budget_given(*others: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """The budgets that are no numbers of full steps, if there are any.

    Raises:
        UsageError: they are given in several units.
    """
    for index, flag in enumerate(BUDGETS):
        _refuse_unused(flag, *BUDGETS[index + 1 :])
    return next((given for given in others if given is not None), None)


def _refuse_unused(flag: str, *others: str) -> None:
    """Raise UsageError if `flag` was given together with flags that it makes meaningless.

    Args:
        flag, others: parameter names of the running command; unknown ones were not given.
    """
    flags = {parameter.name: parameter.opts[0] for parameter in click.get_current_context().command.params}
    given = [name for name in (flag, *others) if _given(name)]
    if flag in given and len(given) > 1:
        unused = ", ".join(flags[name] for name in given[1:])
        raise UsageError(
            f"{flags[flag]} cannot be used together with {unused}", fix=f"leave out {unused}, or {flags[flag]}"
        )


def _given(name: str) -> bool:
    """Whether a parameter of the running command was given."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _profile(model: str | None, weights: str | None, overrides: dict[str, Any]) -> Any:
    """The profile of --model with every given flag applied."""
    import msgspec

    from lemica_trt.compiler import absolute_source
    from lemica_trt.ir.resources import load_profile

    replace = msgspec.structs.replace
    if model is None:
        raise UsageError("expected --model, got none", fix="name a profile, for example --model cogvideox-tiny")
    profile = load_profile(model)
    given = {name: value for name, value in overrides.items() if value is not None}
    names = {"denoising_steps": "steps", "calibration": "method"}
    given = {names.get(name, name): value for name, value in given.items()}
    try:
        parts = {
            part: replace(
                getattr(profile, part),
                **{k: v for k, v in given.items() if k in getattr(profile, part).__struct_fields__},
            )
            for part in ("shape", "sampling", "calibration")
        }
        top = {name: value for name, value in given.items() if name in ("dtype", "opset")}
        top["source"] = absolute_source(profile.source if weights is None else weights)
        return replace(profile, **parts, **top)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _builder_options(flags: dict[str, Any]) -> dict[str, Any]:
    """The builder options among the flags, as far as they were given."""
    return {name: flags[name] for name in ENGINE_OPTIONS if flags[name] is not None}


def _reporter(quiet: bool) -> Reporter:
    from lemica_trt.core.progress import reporter

    made = reporter(quiet=quiet)
    click.get_current_context().call_on_close(made.close)
    return made


def _print(result: Any, as_json: bool, table: Callable[[Any], Any]) -> None:
    """The result on standard output: JSON for machines, a table for people."""
    if as_json:
        import msgspec

        click.echo(json.dumps(json.loads(msgspec.json.encode(result)), indent=2))
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console = Console(width=PIPE_WIDTH)
        console.print(table(result), markup=False)


@main.command()
@_model
@_calibration
@_device
@_options(click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Work folder."))
@_common
def calibrate(
    model: str | None, weights: str | None, prompts: Path | None, device: str | None, ray: str | None,
    calibration_from: Path | None, output: Path,
    as_json: bool, quiet: bool, debug: bool, **overrides: Any,
) -> None:  # fmt: skip
    """Measure the error graph: OUTPUT/error_graph.json, beside the sampler and the profile that it belongs to.

    Killed at any point, the same command goes on from the last finished unit.
    """
    from lemica_trt import compiler as pipeline
    from lemica_trt.report import summary

    _refuse_unused("calibration_from", "calibration", "samples", "seed")
    profile, work = _profile(model, weights, overrides), pipeline.Work(output)
    graph = pipeline.calibrate_stage(profile, work, prompts, device, ray, calibration_from, _reporter(quiet or as_json))
    _print({"error_graph": str(pipeline.Work(output).error_graph), "samples": graph.samples, "edges": len(graph.edges)},
           as_json, lambda _: summary.error_graph_table(graph))  # fmt: skip


@main.command()
@click.argument("target", type=click.Path(path_type=Path))
@_planning
@_options(
    click.option("--default", "default", metavar="NAME", help="Plan of requests that name none."),
)
@_common
def plan(
    target: Path, budgets: tuple[int, ...], speedups: tuple[Any, ...] | None, latencies: tuple[Any, ...] | None,
    min_psnrs: tuple[Any, ...] | None, pareto: bool, methods: str,
    reference_steps: int | None, schedule: tuple[int, ...] | None, default: str | None,
    as_json: bool, quiet: bool, debug: bool,
) -> None:  # fmt: skip
    """Make plans for TARGET, a work folder or a finished bundle, from its error graph: no PyTorch, one second.

    Of a bundle, --pareto shows the qualities that it was built with and adds no plan unless a budget is given.
    """
    from lemica_trt import compiler as pipeline
    from lemica_trt.report import summary

    _refuse_unused("schedule", *BUDGETS, "pareto", "methods")
    made = pipeline.plan_stage(
        target,
        budgets=_budget_given(speedups, latencies, min_psnrs) or (budgets if _given("budgets") else None),
        methods=tuple(methods.split(",")),
        schedule=schedule,
        default=default,
        pareto=pareto,
        reporter=_reporter(quiet or as_json),
        reference_steps=reference_steps,
    )
    _print(made, as_json, lambda _: summary.with_answers(summary.plans_table(made.plans), made.answers, made.front))


@main.command()
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_common
def export(work: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Export the graphs for the plans in WORK to ONNX: WORK/export."""
    from lemica_trt import compiler as pipeline
    from lemica_trt.report import summary

    exported = pipeline.export_stage(pipeline.Work(work), _reporter(quiet or as_json))
    _print(exported.graphs, as_json, summary.graphs_table)


@main.command()
@click.argument("target", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_engine
@_options(click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Bundle folder."))
@_common
def engine(
    target: Path, backends: tuple[str, ...], output: Path, as_json: bool, quiet: bool, debug: bool, **flags: Any
) -> None:
    """Build engines from the graphs in TARGET, a work folder or a bundle of another machine, and write a bundle."""
    from lemica_trt import compiler as pipeline
    from lemica_trt.report import summary

    options = _builder_options(flags)
    bundle = pipeline.engine_stage(target, output, backends, options, _reporter(quiet or as_json))
    _print(bundle.manifest, as_json, lambda _: summary.build_table(bundle, None, output))


@main.command()
@_bundle
@_options(
    click.option("--weights", metavar="DIR|HUB_ID", help="Where the model is, if the bundle does not know."),
    click.option("--verify-samples", "--samples", type=click.IntRange(1), default=8, show_default=True,
                 help="Held-out clips."),
)  # fmt: skip
@_options(click.option("--backend", metavar="NAME", help="Which engines  [default: the first that run here]"))
@_device
@_common
def verify(
    bundle: Path, weights: str | None, verify_samples: int, backend: str | None, device: str | None,
    as_json: bool, quiet: bool, debug: bool,
) -> None:  # fmt: skip
    """Check BUNDLE: digests, engines and plans against PyTorch and diffusers, held-out quality, time."""
    from lemica_trt import compiler as pipeline
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.report import summary

    opened = Bundle.open(bundle)
    report = pipeline.verify_stage(opened, weights, verify_samples, device, backend, _reporter(quiet or as_json))
    _print(report, as_json, lambda _: summary.build_table(opened, report, bundle))


@main.command()
@_bundle
@click.argument("prompt")
@_options(
    click.option("--plan", metavar="NAME", default="default", show_default=True, help="One of the bundle's plans."),
    click.option("--seed", type=int, default=0, show_default=True,
                 help="The noise that diffusers draws with this seed on a CPU generator."),
    click.option("--guidance-scale", type=float, help="Classifier-free guidance  [default: the plan's]"),
    click.option("--negative-prompt", help="What to steer away from  [default: the profile's]"),
    click.option("--backend", metavar="NAME", help="Which engines  [default: the preferred ones]"),
    click.option("--capture", type=click.Choice(["plan", "step", "none"]), default="step", show_default=True,
                 help="TensorRT: what becomes a CUDA graph; the whole plan runs without progress."),
    click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), required=True,
                 help=".mp4, .gif, .png (frames side by side) or .npy"),
)  # fmt: skip
@_common
def run(
    bundle: Path, prompt: str, plan: str, seed: int, guidance_scale: float | None, negative_prompt: str | None,
    backend: str | None, capture: Any, output: Path, as_json: bool, quiet: bool, debug: bool,
) -> None:  # fmt: skip
    """Generate a clip from BUNDLE and PROMPT. Takes no PyTorch."""
    from time import perf_counter

    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.core.progress import duration
    from lemica_trt.runtime.pipeline import Pipeline
    from lemica_trt.runtime.video import check_suffix, write_video

    check_suffix(output)
    report = _reporter(quiet or as_json)
    start = perf_counter()
    pipe = Pipeline(Bundle.open(bundle), plan=None if plan == "default" else plan, backend=backend, capture=capture)
    report.stage("load", f"plan {pipe.default_plan}, {duration(perf_counter() - start)}")
    result = pipe(
        prompt,
        seed=seed,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        on_step=None if capture == "plan" else lambda row: report.advance(row.index + 1, row.rows),
    )
    write_video(result.frames, output, fps=pipe.fps)
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in result.seconds.items())
    found = {"output": str(output), "plan": pipe.default_plan, "seed": seed, "seconds": result.seconds}
    _print(found, as_json, lambda _: f"{output}  ({parts})")


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_options(click.option("--plan", metavar="NAME", help="Show one plan of a bundle row by row."))
@_common
def inspect(path: Path, plan: str | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """Show a bundle, a plan, or an error graph. Takes no PyTorch."""
    from lemica_trt.report import summary

    value, table = summary.inspect(path, plan)
    _print(value, as_json, table)


@main.command()
@_common
def doctor(as_json: bool, quiet: bool, debug: bool) -> None:
    """Show what is here: Python, libraries, backends, devices, model profiles."""
    from lemica_trt.compiler import diagnosis
    from lemica_trt.report import summary

    _print(diagnosis.examine(), as_json, summary.doctor_table)


@main.command()
@click.argument("bundle", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@_options(
    click.option("--output", "-o", type=click.Path(file_okay=False, path_type=Path),
                 help="Model repository to write; one that lemica-trt wrote is written again."),
    click.option("--check", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
                 help="Check a model repository instead: configs, digests, shapes between the models."),
    click.option("--instances", type=click.IntRange(1), default=1, show_default=True,
                 help="Processes of each denoiser, on each GPU; each holds the engines."),
    click.option("--queue", type=click.IntRange(1), default=64, show_default=True,
                 help="Requests that may wait at each model."),
    click.option("--timeout", type=click.IntRange(1), default=600, show_default=True,
                 help="Seconds that a request may wait there."),
    click.option("--threads", type=click.IntRange(0), default=0, show_default=True,
                 help="CPU threads of an engine; 0: as the bundle was built."),
    click.option("--batching", type=click.Choice(["exact", "off"]), default="exact", show_default=True,
                 help="Whether requests share batches; exact: where that changes no bit of them."),
)  # fmt: skip
@_common
def triton(
    bundle: Path | None, output: Path | None, check: Path | None, instances: int, queue: int, timeout: int,
    threads: int, batching: str, as_json: bool, quiet: bool, debug: bool,
) -> None:  # fmt: skip
    """Write a model repository of Triton Inference Server from BUNDLE, or --check one. Takes no PyTorch."""
    if check is not None:
        if bundle is not None or output is not None:
            raise UsageError("expected BUNDLE --output DIR or --check DIR, got both")
        from lemica_trt.triton.check import require_sound

        notes = require_sound(check)
        lines = [f"{check}: sound", *(f"{note.path}: {note.message}" for note in notes)]
        _print({"repository": str(check), "notes": notes}, as_json, lambda _: "\n".join(lines))
        return
    if bundle is None or output is None:
        raise UsageError("expected BUNDLE and --output, or --check DIR", fix="lemica-trt triton BUNDLE --output DIR")
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.triton.repository import Settings, write_repository

    settings = Settings(instances=instances, queue=queue, timeout=timeout, threads=threads, batching=batching)
    models = write_repository(Bundle.open(bundle), output, settings)
    _print({"repository": str(output), "models": models}, as_json, lambda _: f"{output}: {', '.join(models)}")


@main.command()
@click.argument("prompt")
@_options(
    click.option("--url", default="localhost:8001", show_default=True, help="gRPC endpoint of the server."),
    click.option("--plan", metavar="NAME", help="One of the bundle's plans  [default: the bundle's]"),
    click.option("--steps", type=int, metavar="B", help="Or: the plan with so many full steps."),
    click.option("--seed", type=int, default=0, show_default=True, help="The noise that it starts from."),
    click.option("--guidance-scale", type=float, help="Classifier-free guidance  [default: the plan's]"),
    click.option("--negative-prompt", help="What to steer away from  [default: the profile's]"),
    click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
                 help="When to give up  [default: the server's limit]"),
    click.option("--fps", type=click.IntRange(1), default=8, show_default=True, help="Frames a second of a .gif."),
    click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), required=True,
                 help=".mp4 (made by the server), .gif, .png (frames side by side) or .npy"),
)  # fmt: skip
@_common
def client(
    prompt: str, url: str, timeout: float | None, fps: int, output: Path, as_json: bool, quiet: bool, debug: bool,
    **parameters: Any,
) -> None:  # fmt: skip
    """Generate a clip from PROMPT on a Triton server, with progress. Ctrl-C cancels it there too."""
    from lemica_trt.core.values import write_bytes
    from lemica_trt.runtime.video import check_suffix, write_video
    from lemica_trt.triton.client import generate

    check_suffix(output)
    report = _reporter(quiet or as_json)
    report.stage("generate", url)
    given = {name: value for name, value in parameters.items() if value is not None}
    mp4 = output.suffix.lower() == ".mp4"
    clip = generate(url, prompt, parameters=given, mp4=mp4, timeout=timeout, on_step=report.advance)
    if isinstance(clip, bytes):
        write_bytes(clip, output)
    else:
        write_video(clip, output, fps=fps)
    _print({"output": str(output), "seed": given["seed"]}, as_json, lambda _: str(output))
