"""Commands that make bundles: `build`, its stages one by one, and what there is to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lemica_trt.cli import options
from lemica_trt.cli.options import Screen, common, flags


@click.command()
@options.model
@options.calibration
@options.samples_run_by
@options.planning
@options.engines
@flags(
    click.option("--error-graph", type=options.FILE, help="Use this error graph instead of calibrating."),
    click.option("--verify-samples", type=click.IntRange(0),
                 help="Held-out clips that the plans are judged by; 0: no verification.  [default: by --effort]"),
    click.option("--output", "-o", type=options.PATH, help="Bundle folder  [default: out/MODEL]"),
    click.option("--triton", "repository", type=options.FOLDER, metavar="DIR",
                 help="Also write a Triton model repository from the bundle."),
    click.option("--dry-run", is_flag=True, help="Print what would be done, with time, disk and memory; do nothing."),
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
    command does only what is missing.
    """
    from lemica_trt.compiler import work_commands
    from lemica_trt.compiler.inspection import summarize
    from lemica_trt.report import summary

    options.refuse_contradictions()
    profile, request = _profile_and_request(model, weights, given)
    output = output or Path("out") / profile.name
    if repository is not None:
        from lemica_trt.triton.repository import require_repository, write_repository

        require_repository(repository)
    if dry_run:
        stages = work_commands.dry_run(profile, output, request)
        screen.print(stages, lambda: summary.dry_run_table(stages))
        return
    bundle, report, unverified, outcomes, front = work_commands.build(profile, output, request, screen.reporter)
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
        },
        lambda: summary.with_outcomes(
            summary.build_table(summarize(bundle), report, output, unverified), outcomes, front
        ),
    )


def _profile_and_request(model: str | None, weights: str | None, given: dict[str, Any]) -> tuple[Any, Any]:
    from lemica_trt.cli.flags import PROFILE_FIELDS, profile_from_flags, request_fields
    from lemica_trt.compiler.requests import BuildRequest

    rest = {name: value for name, value in options.given(given).items() if name not in PROFILE_FIELDS}
    fields = request_fields(rest)
    return profile_from_flags(model, weights, given), BuildRequest(**fields)


@click.command()
@options.model
@options.calibration
@options.samples_run_by
@flags(click.option("--output", "-o", type=options.PATH, required=True, help="Work folder."))
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


@click.command()
@click.argument("target", type=options.PATH)
@options.planning
@options.samples_run_by
@options.engines
@flags(
    click.option("--default", metavar="NAME", help="The bundle's plan of requests that name none."),
    click.option("--samples", metavar="+K|S",
                 help="Calibrate on with K samples more, or S in all, and plan anew; of a bundle in the work folder "
                 "beside it."),
)  # fmt: skip
@common
def plan(screen: Screen, target: Path, default: str | None, samples: str | None, **given: Any) -> None:
    """Make plans for TARGET, a work folder or a finished bundle.

    In a work folder solvers are fitted and plans compared on the model, and stages before are run if something of
    theirs has changed. A bundle gets plans from what it knows of its calibration, without the model and PyTorch;
    --pareto shows the qualities that it was built with, and adds no plan unless a budget is given. With --samples
    the build goes on where it ended, with the same budgets unless others are given.
    """
    from lemica_trt.cli.flags import plan_target
    from lemica_trt.report import summary

    options.refuse_contradictions()
    made = plan_target(target, options.given(given), screen.reporter, default=default, samples=samples)
    screen.print(made, lambda: summary.with_outcomes(summary.plans_table(made.plans), made.outcomes, made.front))


@click.command()
@click.argument("work", type=options.EXISTING_FOLDER)
@options.method
@options.schedule
@options.device
@common
def export(screen: Screen, work: Path, **given: Any) -> None:
    """Export the graphs of the model in WORK to ONNX: WORK/onnx. They run the plans of all methods named."""
    from lemica_trt.cli.flags import request_fields
    from lemica_trt.compiler import work_commands
    from lemica_trt.report import summary

    graphs = work_commands.export(work, request_fields(options.given(given)), screen.reporter)
    screen.print(graphs, lambda: summary.graphs_table(graphs))


@click.command()
@click.argument("target", type=options.EXISTING_FOLDER)
@options.engines
@flags(click.option("--output", "-o", type=options.PATH, required=True, help="Bundle folder."))
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


@click.command()
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


@click.command()
@common
def doctor(screen: Screen) -> None:
    """Show what is here: Python, libraries, backends, devices, model profiles."""
    from lemica_trt.compiler.doctor import run_checks
    from lemica_trt.report import summary

    checks = run_checks()
    screen.print(checks, lambda: summary.doctor_table(checks))
