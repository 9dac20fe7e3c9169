"""A finished bundle with other engines: its graphs and plans as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from lemica_trt.bundle.manifest import FRONT_FILE, SELECTION_FILE, Bucket, bucket_folder, plan_path
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import Workspace, work_folder
from lemica_trt.bundle.writing import require_replaceable, write_bundle
from lemica_trt.compiler.graph_stages import build_engines
from lemica_trt.compiler.quantized import (
    precisions,
    quantized_engines,
    require_quantized_engines,
    without_quantization,
)
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.compiler.shape_stages import moved_engines, moved_here
from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.core.progress import Reporter


def rebuild_engines(bundle: Bundle, output: Path, changes: dict[str, Any], reporter: Reporter) -> Bundle:
    """The same bundle with other engines: its graphs and plans as they are, engines built here; no PyTorch.

    Args:
        changes: backends and options.

    Raises:
        UsageError: `output` is the bundle itself, or something else than a bundle.
        IntegrityError: a file of the bundle is altered or missing.
        LemicaError: as `backends.build.build` and, where linear layers are quantised, `quantized.quantized_engines`.
    """
    require_replaceable(output)
    if output.resolve() == bundle.path.resolve():
        raise UsageError(f"--output: expected another folder than the bundle, got {output}", fix="choose another")
    manifest = bundle.manifest
    request = BuildRequest(**changes)
    request.check(manifest.profile.dtype, finished=True)
    bundle.check()
    _require_one_shape(bundle, request)
    observed_on = require_quantized_engines(bundle, request) if request.quantizes else None
    work = Workspace(work_folder(output))
    with work.locked():
        plain = msgspec.structs.replace(request, options=without_quantization(request.options))
        entries = build_engines(plain, manifest.graphs, bundle.path, work.root, reporter)
        if observed_on is not None:
            entries = quantized_engines(
                bundle, entries, request, work.root,
                backend=observed_on, trajectories=work.trajectories, reporter=reporter,
            )  # fmt: skip
        before, after = precisions(manifest.engines), precisions(entries)
        further = _further(bundle, plain, work.root, reporter)
        replaced = _engine_files(bundle) | {plan_path(name) for name in manifest.plans}
        replaced |= set() if before == after else {FRONT_FILE, SELECTION_FILE}  # qualities on the other engines
        files: dict[str, Path | bytes] = {
            **{name: work.root / name for entry in entries for name in entry.paths},
            **{name: work.root / name for b in further.values() for entry in b.engines for name in entry.paths},
            **{name: bundle.path / name for name in manifest.files if name not in replaced},
        }
        if before != after:
            reporter.note(
                f"the plans were made for {before} engines, these are {after} "
                f"→ lemica-trt plan {output} --calibrate-on engine"
            )
        reporter.stage("bundle", str(output))
        return write_bundle(
            output,
            profile=manifest.profile,
            graphs=manifest.graphs,
            plans=[bundle.plan(name) for name in manifest.plans],
            default_plan=manifest.default_plan,
            encoders=manifest.encoders,
            engines=entries,
            files=files,
            revision=manifest.revision,
            versions=manifest.versions,
            further=further,
        )


def _require_one_shape(bundle: Bundle, request: BuildRequest) -> None:
    """Raise UnsupportedError where engines of a bundle of several shapes are to be quantised."""
    if request.quantizes and bundle.shapes[1:]:
        raise UnsupportedError(
            f"a bundle of quantised engines has one shape, this one has {', '.join(bundle.shapes)}",
            fix=f"remove the others from a copy: lemica-trt shape COPY --remove {' --remove '.join(bundle.shapes[1:])}",
        )


def _engine_files(bundle: Bundle) -> set[str]:
    """Files of the engines of all shapes that are no graphs."""
    buckets = bundle.manifest.buckets.values()
    graphs = {name for bucket in buckets for graph in bucket.graphs.graphs for name in (graph.file, *graph.data_files)}
    return {name for bucket in buckets for entry in bucket.engines for name in entry.paths} - graphs


def _further(bundle: Bundle, request: BuildRequest, root: Path, reporter: Reporter) -> dict[str, Bucket]:
    """The further shapes of a bundle with engines built here, below a work folder."""
    found = {}
    for name in bundle.shapes[1:]:
        bucket, folder = bundle.manifest.buckets[name], bucket_folder(name)
        reporter.stage("shape", name)
        entries = build_engines(request, moved_here(bucket), bundle.path / folder, root / folder, reporter)
        engines = tuple(moved_engines(entry, folder) for entry in entries)
        found[name] = msgspec.structs.replace(bucket, engines=engines)
    return found
