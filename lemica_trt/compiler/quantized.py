"""Engines of a finished bundle with quantised linear layers; no PyTorch.

Ranges and errors are measured on the bundle's own engines, on the uncached runs of its calibration's first samples.
What a plan of the quantised engines shall end where it ends are the runs of the graphs as they were exported
(`unquantized`): a plan that is fitted to them (`compiler.refit`) corrects what quantisation does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import UNSET

from lemica_trt.backends.build import quantize, require_quantizable
from lemica_trt.backends.options import options_by_backend
from lemica_trt.bundle.contents import read_from
from lemica_trt.bundle.manifest import SAMPLER_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.compiler.requests import BuildRequest, prompts_of
from lemica_trt.core.progress import Reporter, Tally, count
from lemica_trt.evaluate.samples import Samples
from lemica_trt.evaluate.step_inputs import SAMPLES, observed_steps
from lemica_trt.evaluate.step_timer import require_runnable
from lemica_trt.ir.engine import NONE, QUANTIZE, EngineEntry, Option
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.report.summary import layers_lines


def without_quantization(options: Mapping[str, Option]) -> dict[str, Option]:
    """The same options, where nothing is quantised."""
    return {name: value for name, value in options.items() if name != QUANTIZE}


def unquantized(bundle: Bundle) -> Bundle:
    """A bundle whose engines are quantised as one whose are not: those graphs are loaded as they were exported."""
    graphs = bundle.manifest.graphs

    def plain(entry: EngineEntry) -> EngineEntry:
        quantized = set(entry.quantized)
        return EngineEntry(
            key=msgspec.structs.replace(entry.key, options=without_quantization(entry.key.options), observed=UNSET),
            files=entry.files | {role: graphs.graph(role).file for role in quantized},
            builds={role: build for role, build in entry.builds.items() if role not in quantized},
        )

    if not any(entry.quantized for entry in bundle.manifest.engines):
        return bundle
    buckets = {
        name: msgspec.structs.replace(bucket, engines=tuple(map(plain, bucket.engines)))
        for name, bucket in bundle.manifest.buckets.items()
    }
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, buckets=buckets), bundle.digest)


def quantized_engines(
    bundle: Bundle,
    entries: Sequence[EngineEntry],
    request: BuildRequest,
    out: Path,
    *,
    trajectories: Path,
    reporter: Reporter,
) -> list[EngineEntry]:
    """Engines with quantised linear layers where the request asks for them, the others as they are.

    Args:
        bundle: whose graphs the engines are of, with engines that run here.
        entries: of the request's backends, unquantised.
        out: folder of the engines.
        trajectories: where the uncached runs are kept.

    Raises:
        MissingDependencyError: none of the bundle's engines run here.
        UnsupportedError: it has no text encoder; or as `backends.build.quantize`.
    """
    source, profile, graphs = unquantized(bundle), bundle.manifest.profile, bundle.manifest.graphs
    options = options_by_backend(request.backends, request.options)
    wanted = [name for name, given in options.items() if given.get(QUANTIZE, NONE) != NONE]
    for name in wanted:
        require_quantizable(name, graphs, bundle.path)
    backend = require_runnable(source, fix="build engines for this machine first: lemica-trt engine BUNDLE --output …")
    table = read_from(bundle, SamplerTable, SAMPLER_FILE)
    prompts, settings = prompts_of(profile, None), profile.calibration
    trajectories.parent.mkdir(parents=True, exist_ok=True)
    reporter.stage("quantize", f"{count(SAMPLES, 'sample')} of the calibration on {backend}")
    observed = observed_steps(
        source,
        backend,
        table,
        Samples(prompts=prompts, seed=settings.seed, count=SAMPLES),
        trajectories=trajectories,
        done=Tally(reporter, SAMPLES * table.num_steps),
    )
    found = list[EngineEntry]()
    for entry in entries:
        if entry.key.backend in wanted:
            entry = quantize(entry, graphs, bundle.path, out, options[entry.key.backend], observed, reporter)
            for line in layers_lines(entry):
                reporter.note(line)
        found.append(entry)
    return found
