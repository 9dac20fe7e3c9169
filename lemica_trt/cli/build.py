"""Commands that make bundles: `build`, its stages one by one, and what there is to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lemica_trt.cli import completion, options
from lemica_trt.cli.command import OUTPUT, Command, flag, flags
from lemica_trt.cli.options import Screen, common
from lemica_trt.ir.profile import NORMAL


@click.command(
    cls=Command,
    short_help="A model → a verified bundle: all stages in one command.",
    examples=(
        "build --model cogvideox-tiny --budget 15",
        "build --model cogvideox --budget 15,10,25 -o out/video --dry-run",
        "build --model cogvideox --speedup 3 --backend tensorrt",
    ),
)
@options.model
@flags(
    "Model",
    flag(
        "--shape",
        multiple=True,
        metavar="FxHxW",
        help="Frames, height and width in one; repeat for further shapes of the bundle.",
    ),
)
@options.calibration
@options.samples_run_by
@options.planning
@options.engines
@flags(
    "Calibration",
    flag("--error-graph", type=options.FILE, advanced=True, help="Use this error graph instead of calibrating."),
    flag(
        "--verify-samples",
        type=click.IntRange(0),
        otherwise="by --effort",
        advanced=True,
        help="Held-out clips that the plans are judged by; 0: no verification.",
    ),
)
@flags(
    OUTPUT,
    flag("--output", "-o", type=options.PATH, otherwise="out/MODEL", help="Bundle folder."),
    flag("--triton", "repository", type=options.FOLDER, metavar="DIR", advanced=True,
         help="Also write a Triton model repository from the bundle."),
    flag("--dry-run", is_flag=True, help="Print what would be done, with time, disk and memory; do nothing."),
)  # fmt: skip
@common
def build(
    screen: Screen,
    model: str | None,
    weights: str | None,
    output: Path | None,
    repository: Path | None,
    dry_run: bool,
    **given: Any,
) -> None:
    """Calibrate, plan, export, build engines, and verify: one command from a model to a bundle.

    Finished stages are kept beside the bundle (OUTPUT.work): after an interruption, or with other flags, the same
    command does only what is missing. With --model NAME, --help shows the defaults of that model.
    """
    from lemica_trt.cli.flags import sizes_of_shapes
    from lemica_trt.compiler import shape_commands
    from lemica_trt.compiler.inspection import summarize
    from lemica_trt.report import summary

    options.refuse_contradictions()
    given, further = sizes_of_shapes(given)
    profile, request = _profile_and_request(model, weights, given)
    output = output or Path("out") / profile.name
    if repository is not None:
        from lemica_trt.triton.repository import require_repository, write_repository

        require_repository(repository)
    if dry_run:
        stages = shape_commands.dry_run(profile, further, output, request)
        screen.print(stages, lambda: summary.dry_run_table(stages))
        return
    bundle, report, unverified, outcomes, front, shapes = shape_commands.build(
        profile, further, output, request, screen.reporter
    )
    if repository is not None:
        write_repository(bundle, repository)
    screen.print(
        {
            "bundle": str(output),
            "plans": bundle.plans,
            "verify": report,
            "unverified": unverified,
            "outcomes": outcomes,
            "front": front,
            "shapes": shapes,
        },
        lambda: summary.with_outcomes(
            summary.build_table(summarize(bundle), report, output, unverified), outcomes, front
        ),
    )


@click.command(
    cls=Command,
    short_help="Further shapes of a bundle, and which of its plans hold there.",
    examples=("shape out/tiny --shape 9x64x96", "shape out/video --shape 81x480x832 --weights DIR"),
)
@click.argument("bundle", type=options.PATH)
@flags(
    "Model",
    flag(
        "--shape",
        "shapes",
        multiple=True,
        metavar="FxHxW",
        help="Frames, height and width to add, or to measure again; repeat for several.",
    ),
    options.weights,
    options.lora,
    options.lora_2,
    options.device,
)
@flags(
    "Verification",
    flag(
        "--verify-samples",
        "--samples",
        type=click.IntRange(1),
        default=NORMAL.verify_samples,
        show_default=True,
        help="Held-out clips that every plan runs on there.",
    ),
    options.held_out,
)
@flags(
    "Plans of a bundle",
    flag(
        "--remove",
        multiple=True,
        metavar="FxHxW",
        shell_complete=completion.shapes,
        help="Remove a further shape; repeat for several.",
    ),
)
@common
def shape(
    screen: Screen,
    bundle: Path,
    shapes: tuple[str, ...],
    weights: str | None,
    lora: tuple[str, ...],
    lora_2: tuple[str, ...],
    device: str | None,
    verify_samples: int,
    prompts: Path | None,
    remove: tuple[str, ...],
) -> None:
    """Add shapes to BUNDLE: its model is exported at each, engines are built, and every plan is measured there.

    A plan holds at a shape where, on held-out clips, it is no worse in the mean than the sampler with as few steps;
    others are refused there, and the uncached plan always is there. The bundle stays as it was until all of a shape is
    there. Without --shape and --remove the further shapes are shown.
    """
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.cli.flags import loras_from_flags
    from lemica_trt.compiler import shape_commands
    from lemica_trt.report import summary

    _, found = shape_commands.shape(
        Bundle.open(bundle), shapes, screen.reporter, samples=verify_samples, remove=remove, weights=weights,
        loras=loras_from_flags(lora, lora_2), prompts=prompts, device=device,
    )  # fmt: skip
    screen.print(found, lambda: summary.shapes_table(found, bundle))


def _profile_and_request(model: str | None, weights: str | None, given: dict[str, Any]) -> tuple[Any, Any]:
    from lemica_trt.cli.flags import PROFILE_FIELDS, profile_from_flags, request_fields
    from lemica_trt.compiler.requests import BuildRequest

    rest = {name: value for name, value in options.given(given).items() if name not in PROFILE_FIELDS}
    fields = request_fields(rest)
    return profile_from_flags(model, weights, given), BuildRequest(**fields)


@click.command(
    cls=Command,
    short_help="Stage by stage: measure the model, in a work folder.",
    examples=("calibrate --model cogvideox-tiny --effort quick -o work", "plan work --budget 15"),
)
@options.model
@options.calibration
@options.samples_run_by
@options.engines
@flags(OUTPUT, flag("--output", "-o", type=options.PATH, required=True, help="Work folder."))
@common
def calibrate(screen: Screen, model: str | None, weights: str | None, output: Path, **given: Any) -> None:
    """Measure the error graph: OUTPUT/calibration/error_graph.json, beside the sampler that it belongs to.

    Killed at any point, the same command goes on from the last finished unit.
    """
    from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE
    from lemica_trt.compiler import work_commands
    from lemica_trt.report import summary

    options.refuse_contradictions()
    profile, request = _profile_and_request(model, weights, given)
    graph = work_commands.calibrate(profile, output, request, screen.reporter)
    found = {"error_graph": str(output / ERROR_GRAPH_FILE), "samples": graph.samples, "edges": len(graph.edges)}
    screen.print(found, lambda: summary.error_graph_table(graph))


@click.command(
    cls=Command,
    short_help="Make, remove and rename plans of a bundle or work folder.",
    examples=(
        "plan out/tiny --budget 12",
        "plan out/tiny --speedup 3",
        "plan out/tiny --default b10 --remove b25 --rename b15=good",
        "plan out/tiny --samples +4",
    ),
)
@click.argument("target", type=options.PATH)
@options.planning
@flags(
    "Plans of a bundle",
    flag("--default", metavar="NAME", shell_complete=completion.plans, help="The plan of requests that name none."),
    flag(
        "--remove",
        metavar="NAME",
        multiple=True,
        shell_complete=completion.plans,
        help="Remove a plan; repeat for several. The uncached one stays.",
    ),
    flag(
        "--rename",
        metavar="OLD=NEW",
        multiple=True,
        shell_complete=completion.plans,
        help="Give a plan another name; repeat for several.",
    ),
    flag(
        "--verify-samples",
        type=click.IntRange(0),
        otherwise="2",
        advanced=True,
        help="Held-out clips that new plans run on, on the bundle's engines; 0: none.",
    ),
)
@options.samples_run_by
@flags(
    "Calibration",
    flag(
        "--samples",
        metavar="+K|S",
        advanced=True,
        help="Continue calibrating with K more samples, or S in all, and plan again; of a bundle in the work folder "
        "beside it.",
    ),
)
@options.engines  # fmt: skip
@common
def plan(
    screen: Screen,
    target: Path,
    default: str | None,
    samples: str | None,
    remove: tuple[str, ...],
    rename: tuple[str, ...],
    **given: Any,
) -> None:
    """Make plans for TARGET, a work folder or a finished bundle.

    In a work folder solvers are fitted and plans compared on the model, and stages before are run if something of
    theirs has changed. A bundle gets plans from what it knows of its calibration, without the model and PyTorch, and
    they run on a few clips on its engines: where a plan that it has is as fast and better, none is added. --pareto
    shows the qualities that the bundle was built with, and adds no plan unless a budget is given. With --samples the
    build goes on where it ended, with the same budgets unless others are given.
    """
    from lemica_trt.cli.flags import plan_target
    from lemica_trt.report import summary

    options.refuse_contradictions()
    names = options.pairs("--rename", rename)
    made = plan_target(
        target, options.given(given), screen.reporter, default=default, samples=samples, remove=remove, rename=names
    )

    def shown() -> Any:
        plans = summary.with_outcomes(summary.plans_table(made.plans, made.measured), made.outcomes, made.front)
        return summary.with_unverified(plans, made.added, target)

    screen.print(made, shown)


@click.command(
    cls=Command, short_help="Stage by stage: ONNX graphs of the model in a work folder.", examples=("export work",)
)
@click.argument("work", type=options.PATH)
@options.method
@options.schedule
@flags("Calibration", options.device)
@common
def export(screen: Screen, work: Path, **given: Any) -> None:
    """Export the graphs of the model in WORK to ONNX: WORK/onnx. They run the plans of all methods named."""
    from lemica_trt.cli.flags import request_fields
    from lemica_trt.compiler import work_commands
    from lemica_trt.report import summary

    graphs = work_commands.export(work, request_fields(options.given(given)), screen.reporter)
    screen.print(graphs, lambda: summary.graphs_table(graphs))


@click.command(
    cls=Command,
    short_help="Engines for this machine, from a bundle or work folder.",
    examples=("engine work --output out/tiny", "engine out/tiny --backend tensorrt --output out/tiny-here"),
)
@click.argument("target", type=options.PATH)
@options.engines
@flags(OUTPUT, flag("--output", "-o", type=options.PATH, required=True, help="Bundle folder."))
@common
def engine(screen: Screen, target: Path, output: Path, **given: Any) -> None:
    """Build engines from the graphs in TARGET, a work folder or a bundle of another machine, and write a bundle.

    Takes no PyTorch.
    """
    from lemica_trt.cli.flags import engine_target
    from lemica_trt.compiler.inspection import summarize
    from lemica_trt.report import summary

    bundle = engine_target(target, output, options.given(given), screen.reporter)
    screen.print(bundle.manifest, lambda: summary.build_table(summarize(bundle), None, output))


@click.command(cls=Command, short_help="The methods that make plans, and what each needs.", examples=("methods",))
@common
def methods(screen: Screen) -> None:
    """List the methods that make plans (--method), and what each needs."""
    from lemica_trt.planning.planner import AUTO, planners
    from lemica_trt.report import summary

    found = [
        {
            "name": planner.name,
            "summary": planner.summary,
            "needs": sorted(planner.needs),
            "calls": "full steps" if planner.folds else "full steps, short ones between",
            "auto": planner.name in AUTO,
        }
        for planner in planners().values()
    ]
    screen.print(found, lambda: summary.methods_table(found))


@click.command(cls=Command, short_help="What this machine can do, and which models are known.", examples=("doctor",))
@common
def doctor(screen: Screen) -> None:
    """Show what is here: Python, libraries, backends, devices, model profiles."""
    from lemica_trt.compiler.doctor import run_checks
    from lemica_trt.report import summary

    checks = run_checks()
    screen.print(checks, lambda: summary.doctor_table(checks))
