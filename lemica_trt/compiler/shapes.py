"""Further shapes of a finished bundle: graphs and engines of its model at another size, and which of its plans hold.

`shape_stages` make the graphs and engines. Then every plan runs on them on held-out clips as `verify` runs it, in a
bundle beside the other one, beside the uncached run and the sampler with as few steps. What was measured goes into the
bundle with the rest, in one step. A plan holds where it is no worse than that sampler (`PlanAtShape.holds`); where the
sampler itself is another at that size, none does.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from lemica_trt.backends.build import check as check_engine
from lemica_trt.bundle.contents import read_from
from lemica_trt.bundle.manifest import SAMPLER_FILE, Bucket, bucket_folder, plan_path, shape_report
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import candidate_folder
from lemica_trt.bundle.writing import change_buckets, require_replaceable
from lemica_trt.compiler import artifacts
from lemica_trt.compiler.artifacts import Engines, Exported
from lemica_trt.compiler.bundle_plans import note_signatures
from lemica_trt.compiler.bundle_verify import verify_shape
from lemica_trt.compiler.context import require_build_libraries
from lemica_trt.compiler.inspection import shape_summary
from lemica_trt.compiler.requests import BuildRequest, Inputs
from lemica_trt.compiler.shape_stages import SHAPE_STAGES, ShapeContext, beside, moved_engines, moved_graphs
from lemica_trt.compiler.stage import run_stages
from lemica_trt.core.atomic_folder import held
from lemica_trt.core.errors import MissingDependencyError, UnsupportedError, UsageError
from lemica_trt.core.progress import Reporter, size
from lemica_trt.core.values import write_value
from lemica_trt.evaluate.step_timer import require_runnable
from lemica_trt.ir.measured import PlanAtShape
from lemica_trt.ir.plan import UNCACHED
from lemica_trt.ir.profile import Profile, sizes_from_name
from lemica_trt.ir.report import PLAN, ShapeSummary, VerifyReport
from lemica_trt.ir.sampler import SamplerTable, same_sampler


def shaped(profile: Profile, shapes: Sequence[str], there: Sequence[str] = ()) -> list[Profile]:
    """A profile at other shapes.

    Args:
        shapes: as `sizes_from_name` reads them.
        there: shapes that none of them may be.

    Raises:
        UsageError: one is malformed, given twice, or one of `there`.
    """
    found = [msgspec.structs.replace(profile.shape, **sizes_from_name(text)) for text in shapes]
    names = [shape.name for shape in found]
    for k, name in enumerate(names):
        if name in (*names[:k], *there):
            what = "is the bundle's own shape" if name in there else "is given twice"
            raise UsageError(f"--shape: {name} {what}", fix="name each further shape once")
    return [msgspec.structs.replace(profile, shape=shape) for shape in found]


def add_shapes(
    bundle: Bundle,
    profiles: Sequence[Profile],
    held_out: Sequence[str],
    samples: int,
    reporter: Reporter,
    *,
    device: str | None = None,
) -> tuple[Bundle, list[ShapeSummary]]:
    """Add shapes to a bundle, or measure its plans again at some that it has, one after the other.

    Args:
        bundle: with an uncached plan, and engines that can be built here.
        profiles: the bundle's, pointing at weights that are here, at each shape; see `shaped`.
        held_out: prompts that plans are measured on.
        samples: clips of each plan, at least 1.
        device: torch device; None: a GPU where there is one.

    Returns:
        The bundle as it is then, and what came of each shape.

    Raises:
        UsageError: the bundle has no uncached plan, or another process writes it.
        UnsupportedError: its engines are quantised.
        InputError: the model does not make such a shape; says the nearest that it makes. Or these are other weights.
        MissingDependencyError: no PyTorch; no such engines here; not enough disk space.
        VerificationError: what was built differs from the model; the bundle stays as it was.
    """
    _require_extensible(bundle, len(profiles))
    for profile in profiles:
        _require_makeable(profile)
    found = []
    request = BuildRequest(verify_samples=samples, device=device)
    for profile in profiles:
        inputs = Inputs(profile=profile, request=request, prompts=(), held_out=tuple(held_out))
        with ShapeContext(bundle, inputs, reporter) as context, context.work.locked():
            inputs.store(context.work)
            run_stages(context.select(SHAPE_STAGES), context)
            bundle, added = _added(context)
        found.append(added)
    return bundle, found


def _require_extensible(bundle: Bundle, shapes: int) -> None:
    """Refuse, before any work, a bundle that no shape can be added to here."""
    require_build_libraries()
    require_replaceable(bundle.path)
    with held(bundle.path):
        pass
    if UNCACHED not in bundle.plans:
        raise UsageError(
            "the bundle has no uncached plan, against which others are measured", fix="build it again with lemica-trt"
        )
    if any(entry.quantized for entry in bundle.manifest.engines):
        raise UnsupportedError(
            "a bundle of quantised engines has one shape",
            fix="build the shape as a bundle of its own, and quantise that: lemica-trt engine BUNDLE --quantize …",
        )
    for entry in bundle.manifest.engines:
        check_engine(entry.key.backend, entry.key.dtype, entry.key.options)
    require_runnable(bundle, fix="add the shape where they run")
    bundle.check()
    paths = {name for graph in bundle.manifest.graphs.graphs for name in (graph.file, *graph.data_files)}
    paths |= {path for entry in bundle.manifest.engines for path in entry.paths}
    needed = 2 * shapes * sum(bundle.listed[path].size for path in paths)  # in the work folder, and in the bundle
    free = shutil.disk_usage(bundle.path.parent).free
    if needed > free:
        raise MissingDependencyError(
            f"further shapes need about {size(needed)} in {bundle.path.parent}, {size(free)} are free",
            fix="free disk space, or add fewer shapes at a time",
        )


def _require_makeable(profile: Profile) -> None:
    """Refuse, before any work, a shape that the model does not make, as far as that is known without its weights."""
    from lemica_trt.models.preflight import require_configuration, require_shape

    require_configuration(profile)
    require_shape(profile)


def _added(context: ShapeContext) -> tuple[Bundle, ShapeSummary]:
    """The bundle with the shape in it, once its plans were measured there."""
    bundle, reporter, name = context.bundle, context.reporter, context.inputs.profile.shape.name
    bucket, files = _bucket(context)
    candidate = candidate_folder(beside(bundle, name))
    copied = {path: context.work.root / path.removeprefix(f"{bucket_folder(name)}/") for path in files}
    reporter.stage("shape", f"{name}: {size(sum(path.stat().st_size for path in copied.values()))}")
    made = change_buckets(bundle, bucket, copied, target=candidate)
    report, there = _measured(context, made.at(name)), made.at(name)
    plans = {plan: there.plan(plan).rows_digest for plan in there.plans if plan != UNCACHED}
    bucket = msgspec.structs.replace(bucket, plans=tuple(_at_shape(report, plan, plans[plan]) for plan in plans))
    note_signatures(bundle, reporter)
    bundle = change_buckets(bundle, bucket, {path: made.path / path for path in files})
    with contextlib.suppress(UsageError), held(bundle.path):
        write_value(msgspec.structs.replace(report, manifest_digest=bundle.digest), bundle.path / shape_report(name))
    shutil.rmtree(candidate)
    added = shape_summary(bundle, name)
    for why in added.refused.values():
        reporter.note(why)
    return bundle, added


def _bucket(context: ShapeContext) -> tuple[Bucket, list[str]]:
    """What the stages made, by the paths that it gets in the bundle; as if every plan held."""
    profile, folder = context.inputs.profile, bucket_folder(context.inputs.profile.shape.name)
    graphs = moved_graphs(context.read(Exported, artifacts.EXPORT_FILE).graphs, folder)
    entries = context.read(Engines, artifacts.ENGINES_FILE).entries
    engines = tuple(moved_engines(entry, folder) for entry in entries)
    files = [path for graph in graphs.graphs for path in (graph.file, *graph.data_files)]
    files += [path for entry in engines for path in entry.paths]
    bucket = Bucket(shape=profile.shape, graphs=graphs, engines=engines)
    if not same_sampler(context.table, read_from(context.bundle, SamplerTable, SAMPLER_FILE)):
        own = f"{folder}/{plan_path(UNCACHED)}"
        files.append(own)
        bucket = msgspec.structs.replace(bucket, plans=(), uncached=own)
        context.reporter.note(
            f"the sampler is another at {profile.shape.name}: its noise levels follow the size; no plan of the bundle "
            "holds but the uncached one"
        )
    return bucket, list(dict.fromkeys(files))


def _measured(context: ShapeContext, bundle: Bundle) -> VerifyReport:
    """Every plan at the shape, on held-out clips; the report lies in the candidate.

    Raises:
        VerificationError: engines or plans differ from PyTorch.
    """
    backend = require_runnable(bundle, fix="add the shape where its engines run")
    held_out, count = context.inputs.held_out, context.inputs.request.verify_samples
    return verify_shape(bundle, context.model, held_out, count, context.reporter, backend=backend)


def _at_shape(report: VerifyReport, plan: str, digest: str) -> PlanAtShape:
    from lemica_trt.evaluate.baselines import FEWER_STEPS

    rows = {row.method: row.each_psnr for row in report.quality if row.plan == plan}
    return PlanAtShape(rows_digest=digest, psnr=rows[PLAN], fewer_steps=rows.get(FEWER_STEPS, UNSET))
