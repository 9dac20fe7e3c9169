"""The stages that make graphs and engines of a further shape of a finished bundle; see `shapes`.

Those of a build, at the other size and with the interface that the bundle's step graphs have, in a work folder of their
own (`BUNDLE.FxHxW.work`): what was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from lemica_trt.backends.build import build as build_engine
from lemica_trt.backends.build import prune
from lemica_trt.bundle.manifest import Bucket, bucket_folder
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import Workspace, digest_of, work_folder
from lemica_trt.compiler import artifacts
from lemica_trt.compiler.artifacts import Engines, Exported, ModelFacts
from lemica_trt.compiler.bundle_verify import require_same_weights
from lemica_trt.compiler.context import Context
from lemica_trt.compiler.requests import Inputs
from lemica_trt.compiler.stage import Stage, Writes
from lemica_trt.compiler.stages import STAGES
from lemica_trt.core.errors import InputError
from lemica_trt.core.progress import Reporter
from lemica_trt.core.values import write_value
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.graphs import GraphSet, StepLayout

BUNDLE_LAYOUT = "bundle.layout"
"""What the stage `layout` reads of the bundle."""

BUNDLE_ENGINES = "bundle.engines"
"""What the stage `engine` reads of it: backends and options."""


class ShapeContext(Context):
    """What the stages are given of a bundle, at another shape."""

    def __init__(self, bundle: Bundle, inputs: Inputs, reporter: Reporter) -> None:
        root = work_folder(beside(bundle, inputs.profile.shape.name))
        super().__init__(Workspace(root), inputs, reporter, output=bundle.path)
        self.bundle = bundle

    def digest(self, name: str) -> str:
        manifest = self.bundle.manifest
        if name == BUNDLE_LAYOUT:
            return digest_of([manifest.graphs.layout, manifest.revision])
        if name == BUNDLE_ENGINES:
            return digest_of([[entry.key.backend, entry.key.options] for entry in manifest.engines])
        return super().digest(name)


def beside(bundle: Bundle, shape: str) -> Path:
    """The name beside a bundle that those of the work folder and the candidate of a shape begin with."""
    return bundle.path.with_name(f"{bundle.path.name}.{shape}")


def _require_same_model(context: Context) -> None:
    """Raise InputError unless the model is the bundle's, at another size."""
    assert isinstance(context, ShapeContext)
    facts, manifest = context.read(ModelFacts, artifacts.MODEL_FILE), context.bundle.manifest
    require_same_weights(context.bundle, facts.revision, context.inputs.profile)
    known, layout = [spec.name for spec in facts.conditions], manifest.graphs.layout
    if known != [spec.name for spec in layout.conditions] or facts.guided != layout.guided:
        raise InputError(
            f"at {context.inputs.profile.shape.name} the model takes {', '.join(known)}, the bundle's graphs take "
            + ", ".join(spec.name for spec in layout.conditions),
            fix="build a bundle for that shape",
        )


def run_layout(context: Context, folder: Path) -> Writes:
    """The interface of the bundle's step graphs, at the other size: its plans run on it, as it is."""
    assert isinstance(context, ShapeContext)
    facts = context.read(ModelFacts, artifacts.MODEL_FILE)
    own: StepLayout = context.bundle.manifest.graphs.layout
    layout = msgspec.structs.replace(own, latent_shape=facts.latent_shape, conditions=facts.conditions)
    write_value(layout, folder / artifacts.LAYOUT_FILE)
    return {"layout": [artifacts.LAYOUT_FILE]}


def run_engine(context: Context, folder: Path) -> Writes:
    """Graphs → engines of the bundle's backends, with their options."""
    assert isinstance(context, ShapeContext)
    graphs, root = context.read(Exported, artifacts.EXPORT_FILE).graphs, context.work.root
    entries = same_engines(context.bundle.manifest.engines, graphs, root, root, context.reporter)
    write_value(Engines(entries=tuple(entries)), folder / artifacts.ENGINES_FILE)
    built = {name for entry in entries for name in entry.files.values()} - {graph.file for graph in graphs.graphs}
    return {"engines": [artifacts.ENGINES_FILE, *sorted(built)]}


def same_engines(
    known: Sequence[EngineEntry], graphs: GraphSet, root: Path, out: Path, reporter: Reporter
) -> list[EngineEntry]:
    """Engines of other graphs, by the same backends with the same options."""
    entries = []
    for entry in known:
        reporter.stage("engine", entry.key.backend)
        entries.append(build_engine(entry.key.backend, graphs, root, out, entry.key.options, reporter))
    prune(entries, out)
    return entries


def _shape_stages() -> tuple[Stage, ...]:
    stages = {stage.name: replace(stage, command="lemica-trt shape BUNDLE --shape …") for stage in STAGES}
    return (
        replace(stages["lower"], ensures=_require_same_model),
        replace(stages["layout"], reads=("libraries", "model", BUNDLE_LAYOUT), run=run_layout),
        stages["export"],
        replace(stages["engine"], reads=("machine", "graphs", BUNDLE_ENGINES), run=run_engine),
    )


SHAPE_STAGES = _shape_stages()
"""Those of a build that make graphs and engines; what the plans may need is what the bundle's graphs have."""


def moved_graphs(graphs: GraphSet, folder: str) -> GraphSet:
    """Graphs whose files lie in a folder of the bundle."""
    return msgspec.structs.replace(
        graphs,
        graphs=tuple(
            msgspec.structs.replace(
                graph,
                file=f"{folder}/{graph.file}",
                data_files=tuple(f"{folder}/{path}" for path in graph.data_files),
            )
            for graph in graphs.graphs
        ),
    )


def moved_engines(entry: EngineEntry, folder: str) -> EngineEntry:
    """Engines whose files lie in a folder of the bundle."""
    files = {role: f"{folder}/{path}" for role, path in entry.files.items()}
    return msgspec.structs.replace(entry, files=files)


def moved_here(bucket: Bucket) -> GraphSet:
    """The graphs of a further shape as they lie in `bucket_folder`, in which engines are built from them."""
    folder = f"{bucket_folder(bucket.shape.name)}/"
    return msgspec.structs.replace(
        bucket.graphs,
        graphs=tuple(
            msgspec.structs.replace(
                graph,
                file=graph.file.removeprefix(folder),
                data_files=tuple(path.removeprefix(folder) for path in graph.data_files),
            )
            for graph in bucket.graphs.graphs
        ),
    )
