"""Engines of a finished bundle with quantised linear layers; no PyTorch.

Ranges and errors are measured on the bundle's own engines, on the uncached runs of its calibration's first samples.
The bundle keeps the graphs that the quantised ones were made from (`unquantized`). Plans of the quantised engines are
fitted to the uncached runs of those (`compiler.refit`), and compared with them (`compiler.plan_quality`).
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
from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.progress import Reporter, Tally, count
from lemica_trt.evaluate.samples import Samples
from lemica_trt.evaluate.step_inputs import SAMPLES, observed_steps
from lemica_trt.evaluate.step_timer import require_runnable
from lemica_trt.ir.engine import QUANTIZE, EngineBuild, EngineEntry, Option
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.report.summary import layers_lines


def without_quantization(options: Mapping[str, Option]) -> dict[str, Option]:
    """The same options, where nothing is quantised."""
    return {name: value for name, value in options.items() if name != QUANTIZE}


def unquantized(bundle: Bundle) -> Bundle:
    """A bundle whose engines are quantised with those that they were made from, as it was before."""

    def plain(entry: EngineEntry) -> EngineEntry:
        builds = {
            role: msgspec.structs.replace(
                build, layers=UNSET, error=UNSET, seconds=None, host_memory=None, device_memory=None, precisions={},
                engine_precisions=None,
            ) if build.quantized else build
            for role, build in entry.builds.items()
        }  # fmt: skip
        return EngineEntry(
            key=msgspec.structs.replace(entry.key, options=without_quantization(entry.key.options), observed=UNSET),
            files=entry.files | (entry.sources or {}),
            builds={role: build for role, build in builds.items() if build != EngineBuild()},
        )

    if not any(entry.quantized for entry in bundle.manifest.engines):
        return bundle
    buckets = {
        name: msgspec.structs.replace(bucket, engines=tuple(map(plain, bucket.engines)))
        for name, bucket in bundle.manifest.buckets.items()
    }
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, buckets=buckets), bundle.digest)


def require_quantized_engines(bundle: Bundle, request: BuildRequest) -> str:
    """Refuse what `quantized_engines` could not do, before any engine is built.

    Returns:
        The backend that step inputs are observed on.

    Raises:
        MissingDependencyError: none of the bundle's engines run here, or a package is missing.
        UnsupportedError: it has no text encoder; or as `backends.build.require_quantizable`.
    """
    if not bundle.manifest.encoders:
        raise UnsupportedError(
            "--quantize runs samples of the calibration on the bundle's engines, and the bundle has no text encoder",
            fix="leave it out",
        )
    for name in request.backends:
        require_quantizable(name, bundle.manifest.graphs, bundle.path)
    return require_runnable(
        unquantized(bundle), fix="build engines for this machine first: lemica-trt engine BUNDLE --output …"
    )


def quantized_engines(
    bundle: Bundle,
    entries: Sequence[EngineEntry],
    request: BuildRequest,
    out: Path,
    *,
    backend: str,
    trajectories: Path,
    reporter: Reporter,
) -> list[EngineEntry]:
    """Engines with quantised linear layers.

    Args:
        bundle: whose graphs the engines are of, with engines that run here.
        entries: of the request's backends, unquantised.
        out: folder of the engines.
        backend: as `require_quantized_engines` gives it.
        trajectories: where the uncached runs are kept.

    Raises:
        LemicaError: as `backends.build.quantize`.
    """
    source, profile, graphs = unquantized(bundle), bundle.manifest.profile, bundle.manifest.graphs
    options = options_by_backend(request.backends, request.options)
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
        found.append(quantize(entry, graphs, bundle.path, out, options[entry.key.backend], observed, reporter))
        for line in layers_lines(found[-1]):
            reporter.note(line)
    return found


def precisions(entries: Sequence[EngineEntry]) -> str:
    """What linear layers of engines compute in, in words."""
    return " and ".join(sorted({entry.precision for entry in entries}))
