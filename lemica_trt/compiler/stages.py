"""The stages of a build, each a function; it joins the rooms that do the work, and keeps what they made."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lemica_trt import __version__
from lemica_trt.backends.builders import build as build_engine
from lemica_trt.backends.builders import options_by_backend, prune
from lemica_trt.bundle.manifest import (
    ERROR_GRAPH_FILE,
    FRONT_FILE,
    GRAMS_FILE,
    MANIFEST,
    REFERENCE_FILE,
    REPORTS,
    SAMPLER_FILE,
    SELECTION_FILE,
    SENSITIVITY_FILE,
)
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import write_bundle
from lemica_trt.compiler.work import TOKENIZER_FILE, Exported, Findings, Work, exported_in, sensitivity_at
from lemica_trt.core.errors import MissingDependencyError, UnsupportedError
from lemica_trt.core.progress import Reporter, size
from lemica_trt.core.values import json_bytes, write_bytes, write_value
from lemica_trt.ir.calibration import Sensitivity
from lemica_trt.ir.engine import EngineEntry, Option
from lemica_trt.ir.graphs import COMBINE, GraphSet, StepLayout
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.resources import calibration_path
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.trials import TrialTables
from lemica_trt.planning.fold import nearest_steps

if TYPE_CHECKING:
    from lemica_trt.calibrate.exact import Cost
    from lemica_trt.calibrate.workers import Workers
    from lemica_trt.ir.report import VerifyReport
    from lemica_trt.models import Model


VERSIONS_OF = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")
"""Libraries that decide what is measured and exported."""


def open_model(profile: Profile, reporter: Reporter, *, device: str | None = None) -> Model:
    """Load the model of a profile.

    Args:
        device: torch device; None: a GPU where there is one.

    Raises:
        MissingDependencyError: the build extra is not installed, or there is no such device.
        InputError, UnsupportedError: as `models.load_model`.
    """
    reporter.stage("model", f"{profile.name} from {profile.source}, {profile.dtype}")
    try:
        from lemica_trt.models import load_model, usable_device
    except ImportError as error:
        raise MissingDependencyError(
            f"building needs PyTorch and diffusers, got: {error}", fix="pip install 'lemica-trt[build]'"
        ) from None
    model = load_model(profile, device=usable_device(device))
    parameters = sum(p.numel() for p in model.pipeline.transformer.parameters())
    shape = "×".join(str(n) for n in model.latent_shape)
    reporter.note(f"DiT with {parameters / 1e6:.1f} M parameters, latents {shape}, revision {model.revision[:12]}")
    return model


def lower_sampler(model: Model, reporter: Reporter) -> SamplerTable:
    """The model's sampler as a table."""
    from lemica_trt.models.scheduler import sampler_table

    table = sampler_table(model.scheduler(), dynamic_guidance=model.profile.sampling.dynamic_guidance)
    kind = "stochastic" if table.stochastic else "deterministic"
    reporter.stage(
        "sampler",
        f"{table.scheduler}, {table.num_steps} steps, {kind}; reads {table.latent_history} latents and "
        f"{table.output_history} outputs back",
    )
    return table


def reference_sampler(model: Model, table: SamplerTable, steps: int | None) -> SamplerTable | None:
    """The sampler at M steps, which plans are held against; None where M is its own N.

    Args:
        steps: M; None: N.

    Raises:
        UsageError: as `fold.nearest_steps`.
    """
    from lemica_trt.models.scheduler import sampler_table

    if steps is None or steps == table.num_steps:
        return None
    fine = sampler_table(model.scheduler(steps), dynamic_guidance=model.profile.sampling.dynamic_guidance)
    nearest_steps(table, fine)
    return fine


def calibration_prompts(profile: Profile, file: Path | None, *, split: str = "calibration") -> tuple[str, ...]:
    """The prompts of a profile, or of a file.

    Raises:
        InputError: no such file, or no prompt in it.
    """
    from lemica_trt.calibrate.prompts import read_prompts

    return tuple(read_prompts(file or calibration_path(profile.calibration.prompts) / f"{split}.txt"))


@contextlib.contextmanager
def hired(model: Model, ray: str | None, reporter: Reporter) -> Iterator[Workers]:
    """Who runs the model: this process, or workers on the Ray cluster at an address, for as long as this lasts.

    Raises:
        MissingDependencyError: as `calibrate.cluster.RayWorkers`.
    """
    from lemica_trt.calibrate.workers import InProcess

    if ray is None:
        yield InProcess(model)
        return
    from lemica_trt.calibrate.cluster import RayWorkers
    from lemica_trt.models import load_model

    load = partial(load_model, model.profile, device=model.device.type)
    with RayWorkers(ray, model, load, note=reporter.note) as workers:
        yield workers


def calibrate(
    model: Model,
    table: SamplerTable,
    prompts: Sequence[str],
    work: Work,
    reporter: Reporter,
    workers: Workers,
    sensitivity: Sensitivity | None = None,
) -> Findings:
    """Measure or estimate the error graph, going on from what the work folder already has.

    Args:
        sensitivity: of another calibration, where the profile's method is `retargeted`.
    """
    from lemica_trt.calibrate.estimate import calibrate_cheaply, cheap_measurement
    from lemica_trt.calibrate.exact import measure, measurement_digest

    settings = model.profile.calibration
    wanted = calibration_cost(model, table)
    reporter.stage(
        "calibrate",
        f"{settings.method}: {settings.samples} samples, up to {settings.max_skip} steps skipped: "
        f"{wanted.samplings:.0f} samplings' work, {wanted.samplings / settings.samples:.1f} a sample",
    )
    for stale in (work.grams, work.sensitivity):
        stale.unlink(missing_ok=True)
    common: dict[str, Any] = {"seed": settings.seed, "max_skip": settings.max_skip}
    running: dict[str, Any] = {"samples": settings.samples, "progress": reporter.advance, "workers": workers}
    if settings.method == "exact":
        journal = work.journal(measurement_digest(model, table, prompts, **common))
        graph, grams = measure(model, table, prompts, journal=journal, **running, **common)
        write_value(grams, work.grams)
        write_value(graph, work.error_graph)
        return Findings(graph=graph, grams=grams)
    common |= {"method": settings.method, "sensitivity": sensitivity}
    journal = work.journal(cheap_measurement(model, table, prompts, **common).digest)
    found = calibrate_cheaply(model, table, prompts, journal=journal, **running, **common)
    counted = found.cost
    reporter.note(
        f"{counted.full} full steps, {counted.skip} skipped steps were run: "
        f"{counted.samplings / settings.samples:.1f} samplings a sample"
    )
    write_value(found.grams, work.grams)
    known = sensitivity or found.sensitivity
    if known is not None:
        write_value(known, work.sensitivity)
    write_value(found.graph, work.error_graph)
    return Findings(graph=found.graph, grams=found.grams, sensitivity=known)


def retargeted(profile: Profile, source: Path | None) -> tuple[Profile, Sensitivity | None]:
    """A profile calibrated from another calibration, on the samples of that; as it is where there is none.

    Args:
        source: work folder or bundle.

    Raises:
        InputError: as `sensitivity_at`.
    """
    if source is None:
        return profile, None
    known = sensitivity_at(source)
    settings = msgspec.structs.replace(profile.calibration, method="retargeted", samples=known.samples, seed=known.seed)
    return msgspec.structs.replace(profile, calibration=settings), known


def calibration_cost(model: Model, table: SamplerTable) -> Cost:
    """What the profile's calibration costs from its beginning."""
    from lemica_trt.calibrate.estimate import cheap_cost
    from lemica_trt.calibrate.exact import cost

    settings = model.profile.calibration
    if settings.method == "exact":
        return cost(table.num_steps, settings.max_skip, settings.samples)
    return cheap_cost(
        table.num_steps,
        settings.max_skip,
        settings.samples,
        method=settings.method,
    )


def export(model: Model, layout: StepLayout, work: Work, reporter: Reporter) -> Exported:
    """Export all graphs, unless the work folder has them from the same input."""
    profile = model.profile
    key = export_key(profile, model.revision, layout)
    exported = exported_in(work)
    if exported is not None and exported.key == key:
        reporter.stage("export", "unchanged")
        exported = msgspec.structs.replace(exported, source=profile.source, shape=profile.shape)
        write_value(exported, work.export_record)
        return exported
    from lemica_trt.export import export_graphs

    reporter.stage("export", f"ONNX opset {profile.opset}, {profile.dtype}")
    staged = work.root / "export.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    graphs = export_graphs(model, layout, staged)
    tokenizer = staged / TOKENIZER_FILE
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_bytes(model.tokenizer_json())
    exported = Exported(
        key=key,
        source=profile.source,
        revision=model.revision,
        shape=profile.shape,
        versions=library_versions(),
        graphs=graphs,
        encoder=model.text_spec(TOKENIZER_FILE),
    )
    write_value(exported, staged / work.export_record.name)
    # Only a folder that is whole has a record: a kill before the rename leaves `export.tmp`, or an `export` without.
    work.export_record.unlink(missing_ok=True)
    shutil.rmtree(work.export, ignore_errors=True)
    staged.rename(work.export)
    for graph in graphs.graphs:
        total = sum((work.export / name).stat().st_size for name in {graph.file, *graph.data_files})
        reporter.note(f"{graph.role}: {size(total)}")
    return exported


def export_key(profile: Profile, revision: str, layout: StepLayout) -> str:
    """Digest of everything that changes the graphs: model, shapes, precision, layout, libraries, and our own code."""
    package = Path(__file__).parent.parent
    sources = sorted(path for room in ("models", "export") for path in (package / room).glob("*.py"))
    made_from = {
        "revision": revision,
        "family": profile.family,
        "dtype": profile.dtype,
        "text_length": profile.text_length,
        "opset": profile.opset,
        "shape": msgspec.structs.replace(profile.shape, fps=1),
        "layout": layout,
        "versions": library_versions(),
        "sources": [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources],
    }
    return hashlib.sha256(json_bytes(made_from)).hexdigest()


def engines(
    graphs: GraphSet,
    root: Path,
    work: Work,
    backends: Sequence[str],
    options: dict[str, Option],
    reporter: Reporter,
) -> list[EngineEntry]:
    """Build engines with each backend; those that the work folder has are taken from there, it keeps no others.

    Args:
        root: folder of the graphs.
    """
    chosen = options_by_backend(backends, options)
    entries = []
    for backend in chosen:
        reporter.stage("engine", backend)
        entries.append(build_engine(backend, graphs, root, work.root, chosen[backend], reporter))
    prune(entries, work.root)
    return entries


def assemble(
    profile: Profile,
    table: SamplerTable,
    findings: Findings,
    plans: Sequence[StepPlan],
    exported: Exported,
    entries: Sequence[EngineEntry],
    work: Work,
    output: Path,
    reporter: Reporter,
    *,
    before: Path | None = None,
) -> Bundle:
    """Write the bundle.

    Args:
        output: its folder.
        before: an older bundle; where it is the same, what was verified of it is taken over. None: that at `output`.
    """
    reporter.stage("bundle", str(output))
    files: dict[str, Path | bytes] = {TOKENIZER_FILE: work.export / TOKENIZER_FILE, SAMPLER_FILE: json_bytes(table)}
    if findings.graph is not None:
        files[ERROR_GRAPH_FILE] = json_bytes(findings.graph)
    if findings.grams is not None:
        files[GRAMS_FILE] = json_bytes(findings.grams)
    if findings.sensitivity is not None:
        files[SENSITIVITY_FILE] = json_bytes(findings.sensitivity)
    if findings.reference is not None:
        files[REFERENCE_FILE] = json_bytes(findings.reference)
    if findings.selections:
        files[SELECTION_FILE] = json_bytes(TrialTables(tables=findings.selections))
    if findings.front is not None:
        files[FRONT_FILE] = json_bytes(findings.front)
    for spec in exported.graphs.graphs:
        files.update({name: work.export / name for name in (spec.file, *spec.data_files)})
    for entry in entries:  # ONNX Runtime's engines are the ONNX files; other builders write their own
        files.update({name: work.root / name for name in entry.files.values() if name not in files})
    old_manifest, old_reports = _manifest_and_reports(before or output)
    bundle = write_bundle(
        output,
        profile=profile,
        graphs=exported.graphs,
        plans=plans,
        default_plan=plans[0].name,
        encoders=(exported.encoder,),
        engines=entries,
        files=files,
        revision=exported.revision,
        versions=exported.versions,
    )
    manifest, reports = _manifest_and_reports(output)
    if old_manifest == manifest and not reports:  # the same bundle: what was verified of it still holds
        for name, content in old_reports.items():
            write_bytes(content, output / REPORTS / name)
    reporter.note(size(sum(entry.size for entry in bundle.manifest.files.values())))
    return bundle


def _manifest_and_reports(output: Path) -> tuple[bytes | None, dict[str, bytes]]:
    """What lies at `output`: the manifest, and the reports by name."""
    if not (output / MANIFEST).is_file():
        return None, {}
    files = (output / REPORTS).glob("*") if (output / REPORTS).is_dir() else ()
    return (output / MANIFEST).read_bytes(), {path.name: path.read_bytes() for path in files if path.is_file()}


def library_versions() -> dict[str, str]:
    """Versions of lemica-trt and of the libraries that decide what is measured and exported; absent ones left out."""
    versions = {"lemica-trt": __version__}
    for name in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def verifiable(bundle: Bundle) -> tuple[str | None, dict[str, str]]:
    """The first backend, in order of preference, whose engines can run here; and why the others are not verified.

    One is enough: engines are of the same graphs, and on a GPU machine nobody waits for the same plans on a CPU.
    `verify --backend` asks for another.
    """
    from lemica_trt.runtime.pipeline import Pipeline

    smallest = (COMBINE,)  # its engine speaks for all of them
    chosen, reasons = None, {}
    for entry in bundle.manifest.engines:
        name = entry.key.backend
        if chosen is not None:
            reasons[name] = f"{chosen} was; ask for it with --backend {name}"
            continue
        try:
            Pipeline(bundle, backend=name, roles=smallest)
            chosen = name
        except (MissingDependencyError, UnsupportedError) as error:
            reasons[name] = error.what
    return chosen, reasons


def verify_bundle(
    bundle: Bundle,
    model: Model,
    samples: int,
    reporter: Reporter,
    *,
    backend: str | None = None,
    anew: bool = True,
) -> VerifyReport:
    """Verify, store the report and its pictures in the bundle, and fail if something is not as it must be.

    Args:
        backend: which engines; None: the preferred ones.
        anew: False: of a bundle that is whole, and was verified on this machine, the report is taken as it is.

    Raises:
        IntegrityError: the bundle is not whole.
        MissingDependencyError, UnsupportedError: these engines cannot run here.
        VerificationError: after the report was stored.
    """
    from lemica_trt.evaluate.evaluator import held_out_samples
    from lemica_trt.evaluate.verify import require_verified, stored_report, verify
    from lemica_trt.report.folder import write_reports

    held_out = held_out_samples(calibration_prompts(model.profile, None, split="held_out"), samples)
    report = None if anew else stored_report(bundle)
    if report is not None and _is_current(report, bundle, samples, backend) and not report.failures():
        bundle.check()
        reporter.stage("verify", "unchanged")
        return report
    report, clips = verify(bundle, model, held_out, reporter=reporter, backend=backend)
    write_reports(bundle, report, clips)
    require_verified(report, bundle.path)
    return report


def _is_current(report: VerifyReport, bundle: Bundle, samples: int, backend: str | None) -> bool:
    from lemica_trt.evaluate.timing import backend_name, machine

    return report.is_of(
        manifest_digest=bundle.manifest.digest,
        backend=backend_name(bundle.engine(backend).key),
        samples=samples,
        machine=machine(),
    )


def begin(profile: Profile, work: Work, device: str | None, reporter: Reporter) -> tuple[Model, SamplerTable]:
    """Load the model and lower its sampler; what the work folder has of another profile is taken away, journals not."""
    if not work.profile.is_file() or work.profile.read_bytes() != json_bytes(profile):
        for path in (work.error_graph, work.grams, work.sensitivity, work.selection, work.front):
            path.unlink(missing_ok=True)
        shutil.rmtree(work.plans, ignore_errors=True)
        write_value(profile, work.profile)
    model = open_model(profile, reporter, device=device)
    table = lower_sampler(model, reporter)
    write_value(table, work.sampler)
    return model, table
