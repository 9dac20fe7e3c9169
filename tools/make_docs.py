"""Write the generated parts of README.md and docs/*.md, and refresh the pictures.

    python tools/make_docs.py                        write them
    python tools/make_docs.py --check                say which files are not up to date; exit code 1 if any
    python tools/make_docs.py --pictures out/quality make the pictures too, from a bundle that was built and verified by

        lemica-trt build --model cogvideox-tiny --budget 15,10,20,25 --pareto --verify-samples 8 \\
            --output out/quality

    python tools/make_docs.py --draw                 write them, and draw anew what is drawn from benchmarks/results/

The pictures are drawn from values: plans, error graph, report and kept clips of that bundle, which are copied to
docs/pictures. Times are left out of both: those of docs/ come from benchmarks.

A generated part lies between `<!-- make_docs: NAME -->` and `<!-- /make_docs -->`; `PARTS` has the names. Tables of
figures come from the JSON files in benchmarks/results/, all else from the package itself.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from mistakes import mistakes_table
from plots import peers_picture, plot_peers
from record import (
    AttentionMemory,
    BuildCost,
    Drawing,
    EngineBuild,
    Guidance,
    Peers,
    Quantized,
    Result,
    RtxBuilds,
    Scaling,
    Serving,
    Speed,
    Traces,
    TrueSize,
    TrueSizeExports,
    UnusedDepth,
    read_results,
)
from tables import described, main_qualities, standing_table, summary_table, table

from lemica_trt.backends.options import options_table
from lemica_trt.cli.command import Command, Flag, in_sections
from lemica_trt.cli.main import main as cli
from lemica_trt.compiler.stages import STAGES
from lemica_trt.core.errors import EXIT_CODES
from lemica_trt.ir.profile import FEW_STEPS, NamedModel
from lemica_trt.ir.resources import load_named, profile_names
from lemica_trt.planning.planner import AUTO, auto_methods, planners
from lemica_trt.report.models import shape_text

ROOT = Path(__file__).parents[1]

DRAWN = ROOT / "docs" / "pictures"
"""What the pictures are drawn from: a bundle without graphs, engines and times."""

BUDGETS = (15, 10, 20, 25)
"""Of its plans."""


def exit_codes() -> str:
    """A row an exit code."""
    codes = {0: "Done.", **EXIT_CODES, 130: "Interrupted; finished work is kept."}
    return table(["code", "meaning"], [[str(code), meaning.rstrip(".")] for code, meaning in codes.items()], "left")


def commands() -> str:
    """Every command of `lemica-trt`: usage, help, and a table of its options."""
    return "\n\n".join(
        part for name, command in cli.commands.items() for part in _command(f"lemica-trt {name}", command)
    )


def _command(path: str, command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _command(f"{path} {name}", child)
        return
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    usage = [
        path,
        *(name if argument.required else f"[{name}]" for argument, name in zip(arguments, map(_metavar, arguments))),
    ]
    yield f"## {path}"
    yield f"```text\n{' '.join(usage)} [OPTIONS]\n```"
    yield from (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", command.help or "") if paragraph)
    if isinstance(command, Command) and command.examples:
        yield "```\n" + "".join(f"lemica-trt {example}\n" for example in command.examples) + "```"
    options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
    rows = [[*_option(option), title] for title, several in in_sections(options).items() for option in several]
    yield table(["option", "default", "meaning", "section"], rows, "left")


def _metavar(argument: click.Argument) -> str:
    return argument.metavar or (argument.name or "").upper()


def _option(option: click.Option) -> list[str]:
    """Name and value, default, meaning."""
    text = " ".join((option.help or "").split())
    own = option.default_text() if isinstance(option, Flag) else None
    default = own or ("" if option.is_flag or not option.show_default else _text(option.default))
    names = ", ".join(f"`{name}`" for name in sorted([*option.opts, *option.secondary_opts], key=len, reverse=True))
    value = "" if option.is_flag else f" {_value(option)}"
    return [_cell(names + value), _cell(default), _cell(text)]


def _value(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return " / ".join(map(str, option.type.choices))
    return option.type.name.upper()


def _text(default: object) -> str:
    return ", ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def shown_without(model: NamedModel, results: Sequence[Result]) -> str:
    """What committed results show of a model without its weights: on tiny pipelines of its class, and at its size."""
    kind, name = model.card.pipeline, model.profile.name
    traced = {
        row.pipeline for result in results if isinstance(result, Traces) for row in result.rows if not row.refusal
    }
    built = {row.pipeline for result in results if isinstance(result, RtxBuilds) for row in result.rows if row.engines}
    sizes = {row.model for result in results if isinstance(result, TrueSize) for row in result.rows}
    exported = {row.model for result in results if isinstance(result, TrueSizeExports) for row in result.rows}
    tiny = ["traced"] * (kind in traced) + ["RTX engines built"] * (kind in built)
    true = ["traced", "dry run"] * (name in sizes) + ["step graphs exported"] * (name in exported)
    found = [f"{how}: {', '.join(what)}" for how, what in (("tiny", tiny), ("true size", true)) if what]
    return "; ".join(found) or "nothing"


def profiles(results: Sequence[Result]) -> str:
    """A row a named model, and why those that cannot be built cannot."""
    rows = []
    for model in map(load_named, profile_names()):
        profile, card, sampling = model.profile, model.card, model.profile.sampling
        bundled = profile.source.startswith("package:")
        shift = "" if sampling.flow_shift is None else f"{sampling.flow_shift:g}"
        rows.append(
            [
                f"`{profile.name}`",
                "ships with the package" if bundled else f"[{profile.source}]({card.links[0]})",
                f"{sampling.steps}",
                f"{sampling.guidance_scale:g}",
                shift,
                shape_text(profile.shape),
                profile.dtype,
                f"no: {card.refused}" if card.refused else card.note,
                shown_without(model, results),
                "; ".join(card.ran) or "nothing",
            ]
        )
    head = ["name", "weights", "steps", "guidance", "flow shift", "shape", "dtype", "builds"]
    head += ["shown without its weights", "run with its weights"]
    return table(head, rows, "left")


def stages() -> str:
    """A row a stage of a build, in order."""
    rows = []
    for stage in STAGES:
        reads = dict.fromkeys(name.partition(".")[0] for name in stage.reads)
        rows.append([f"`{stage.name}`", ", ".join(reads), ", ".join(stage.writes), ", ".join(stage.packages)])
    return table(["stage", "reads", "writes", "packages"], rows, "left")


def methods() -> str:
    """A row a planner, by name."""
    rows = []
    for name, planner in planners().items():
        needs = ", ".join(sorted(planner.needs)) or "nothing"
        tried = "yes" if name in AUTO else f"up to {FEW_STEPS} steps" if name in auto_methods(FEW_STEPS) else ""
        rows.append([f"`{name}`", tried, needs, planner.summary])
    return table(["method", "in `auto`", "needs", "what it does"], rows, "left")


def _results(kind: type[Result]) -> Callable[[Sequence[Result]], str]:
    return lambda results: "\n\n".join(described(result) for result in results if isinstance(result, kind))


def peers(results: Sequence[Result]) -> str:
    """The picture of each result, then its tables."""
    found = [result for result in results if isinstance(result, Peers)]
    alternative = "PSNR against full steps, a line a method"
    return "\n\n".join(f"![{alternative}]({peers_picture(result)})\n\n{described(result)}" for result in found)


PARTS: dict[str, Callable[[Sequence[Result]], str]] = {
    "commands": lambda _: commands(),
    "mistakes": lambda _: mistakes_table(),
    "exit-codes": lambda _: exit_codes(),
    "options": lambda _: options_table().strip(),
    "stages": lambda _: stages(),
    "methods": lambda _: methods(),
    "profiles": profiles,
    "summary": summary_table,
    "quality": lambda results: "\n\n".join(map(described, main_qualities(results))),
    "standing": standing_table,
    "drawing": _results(Drawing),
    "speed": _results(Speed),
    "serving": _results(Serving),
    "engine-build": _results(EngineBuild),
    "attention-memory": _results(AttentionMemory),
    "traces": _results(Traces),
    "true-size": _results(TrueSize),
    "true-size-exports": _results(TrueSizeExports),
    "rtx-builds": _results(RtxBuilds),
    "scaling": _results(Scaling),
    "unused-depth": _results(UnusedDepth),
    "build-cost": _results(BuildCost),
    "guidance": _results(Guidance),
    "peers": peers,
    "quantized": _results(Quantized),
}
"""Name → what makes the part from all results."""

PART = re.compile(r"(<!-- make_docs: ([\w-]+) -->\n).*?(<!-- /make_docs -->)", re.DOTALL)


def rendered(text: str, results: Sequence[Result]) -> str:
    """A page with its generated parts as they should be.

    Raises:
        KeyError: a part has a name that is not in `PARTS`.
    """

    def part(found: re.Match[str]) -> str:
        made = PARTS[found[2]](results)
        return found[1] + (f"\n{made}\n\n" if made else "") + found[3]

    return PART.sub(part, text)


def pages(root: Path = ROOT) -> list[Path]:
    """The files that may have generated parts."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def keep_drawn(bundle: Path) -> None:
    """Copy what the pictures are drawn from to `DRAWN`."""
    from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE, MANIFEST, MANIFEST_DIGEST, plan_path
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.bundle.reports import store_kept, store_report, stored_kept, stored_report

    opened = Bundle.open(bundle)
    shutil.rmtree(DRAWN, ignore_errors=True)
    for path in (MANIFEST, MANIFEST_DIGEST, ERROR_GRAPH_FILE, *map(plan_path, opened.plans)):
        (DRAWN / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / path, DRAWN / path)
    report, kept = stored_report(opened), stored_kept(opened)
    assert report is not None and kept is not None, "verify it"
    drawn = Bundle.open(DRAWN)
    store_report(msgspec.structs.replace(report, timing=(), steps=None, machine=""), drawn)
    store_kept(kept, drawn)


def draw_results(folder: Path) -> None:
    """The pictures of benchmark results into a folder."""
    for result in read_results():
        if isinstance(result, Peers):
            plot_peers(result, folder / peers_picture(result))


def draw_pictures(folder: Path) -> None:
    """The pictures of docs/ into a folder, from `DRAWN` and benchmark results."""
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.bundle.reports import stored_kept, stored_report
    from lemica_trt.evaluate.quality import error_graph_of
    from lemica_trt.report import CONTACT_SHEET, SCHEDULES
    from lemica_trt.report.pictures import write_contact_sheet
    from lemica_trt.report.plots import plot_schedules
    from lemica_trt.report.ways import strips_of

    bundle = Bundle.open(DRAWN)
    report, kept, graph, plan = stored_report(bundle), stored_kept(bundle), error_graph_of(bundle), bundle.plan()
    assert report is not None and kept is not None and graph is not None
    write_contact_sheet(folder / CONTACT_SHEET, report, kept, plan, model=graph.model, timed=False)
    plans = [bundle.plan(name) for name in bundle.plans]
    plot_schedules(graph, strips_of(report, kept, plans, plan), folder / SCHEDULES)
    draw_results(folder)


def main() -> int:
    """Write, or with --check compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file is out of date")
    parser.add_argument("--pictures", type=Path, metavar="BUNDLE", help="also make the pictures, from this bundle")
    parser.add_argument("--draw", action="store_true", help="also draw the pictures of benchmark results")
    given = parser.parse_args()
    if given.draw:
        draw_results(ROOT / "docs")
    if given.pictures is not None:
        keep_drawn(given.pictures)
        draw_pictures(ROOT / "docs")
    results, stale = read_results(), []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        made = rendered(text, results)
        if made != text:
            stale.append(path.relative_to(ROOT))
            if not given.check:
                path.write_text(made, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'not up to date → python tools/make_docs.py' if given.check else 'written'}")
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
