"""Trace every tiny pipeline of `lemica_trt.testing.pipelines`, and write what was found: the table in docs/families.md.

    python benchmarks/traces.py --output benchmarks/results/traces.json

Pipelines are random and of a few thousand weights: this says how they compute, not how they draw.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from record import TraceRow, Traces, this_run, write_result
from tables import described

from lemica_trt.core.errors import LemicaError
from lemica_trt.core.progress import reporter
from lemica_trt.models.trace import trace_pipeline
from lemica_trt.report.trace import guidance_text
from lemica_trt.testing.pipelines import CASES, tiny_pipeline


def traced(name: str) -> TraceRow:
    """The row of a case."""
    pipeline = tiny_pipeline(name)
    kind = type(pipeline).__name__
    try:
        found = trace_pipeline(pipeline, CASES[name].request)
    except LemicaError as error:
        return TraceRow(name=name, pipeline=kind, refusal=error.what)
    return TraceRow(
        name=name,
        pipeline=kind,
        sampler=tuple(state.table.scheduler for state in found.states),
        kinds=len(found.kinds),
        guidance=guidance_text(found),
        conditions=tuple(dict.fromkeys(slot.argument.split(".")[0] for slot in found.role("condition"))),
        text=found.text,
        trunk=tuple(trunk.share for trunk in found.trunks),
        streams=max(len(trunk.streams) for trunk in found.trunks),
        error=found.error,
    )


def main() -> None:
    """Trace, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    report, rows = reporter(), []
    for case in CASES.values():
        if case.needs and importlib.util.find_spec(case.needs) is None:
            parser.error(f"expected {case.needs}, which a pipeline needs: pip install {case.needs}")
    for number, name in enumerate(CASES):
        rows.append(traced(name))
        report.advance(number + 1, len(CASES))
    report.close()
    result = Traces(run=this_run(), rows=tuple(rows))
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
