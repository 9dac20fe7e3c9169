"""What a stage is given: inputs, artifacts, and a model and workers that are opened when first used."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lemica_trt import __version__
from lemica_trt.backends.machine import describe_machine
from lemica_trt.bundle.contents import calibration_in, read_from, read_if_listed
from lemica_trt.bundle.manifest import (
    REFERENCE_FILE,
    SAMPLER_FILE,
    Bucket,
    FileEntry,
    Manifest,
    plan_path,
    portable_profile,
)
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import View, Workspace, digest_of
from lemica_trt.compiler import artifacts
from lemica_trt.compiler.artifacts import Engines, Exported, ModelFacts
from lemica_trt.compiler.requests import Inputs
from lemica_trt.compiler.stage import Stage
from lemica_trt.core.errors import MissingDependencyError, install_command
from lemica_trt.core.progress import Reporter
from lemica_trt.core.values import V
from lemica_trt.ir.budget import StepTimes
from lemica_trt.ir.calibration import Calibration
from lemica_trt.ir.graphs import StepLayout
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.report import Measured
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.planning.planner import Fit, Problem, SolverTable
from lemica_trt.planning.step_plan import UNCACHED

if TYPE_CHECKING:
    from lemica_trt.calibrate.workers import E, Job, U, Workers
    from lemica_trt.ir.step_model import StepModel
    from lemica_trt.models import Model

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "ftfy")
"""What decides what is measured and exported."""

ENGINE_LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")
"""What builds and runs engines."""


class Context(contextlib.ExitStack):
    """What stages of one build share. A context manager: at its end the workers are released.

    Args:
        work: the work folder.
        inputs: what the build is made from.
        stages: those that take part: only their artifacts are there.
        reporter: told what happens.
        output: folder of the bundle; None: none is written.

    Attributes:
        work, inputs, reporter, output: as given.
        view: the artifacts.
    """

    def __init__(self, work: Workspace, inputs: Inputs, reporter: Reporter, *, output: Path | None = None) -> None:
        super().__init__()
        self.work, self.inputs, self.reporter, self.output = work, inputs, reporter, output
        self.view = View(work, [])

    @property
    def trajectories(self) -> Path:
        """Where uncached runs are kept."""
        return self.work.trajectories

    def select(self, stages: Sequence[Stage]) -> list[Stage]:
        """Let these stages, and no others, take part."""
        self.view = View(self.work, [stage.name for stage in stages])
        return list(stages)

    # ------------------------------------------------------------ what stages read

    def read(self, kind: type[V], path: str) -> V:
        """A value that an earlier stage has written; as `bundle.contents.read_from`."""
        return read_from(self.view, kind, path)

    def read_if_there(self, kind: type[V], path: str) -> V | None:
        """The same; None where no stage that takes part has written it."""
        return read_if_listed(self.view, kind, path)

    @property
    def table(self) -> SamplerTable:
        """The sampler."""
        return self.read(SamplerTable, SAMPLER_FILE)

    @property
    def reference(self) -> SamplerTable | None:
        """The sampler at M steps, where plans are compared with that."""
        return self.read_if_there(SamplerTable, REFERENCE_FILE)

    @property
    def layout(self) -> StepLayout:
        """The interface of the step graphs."""
        return self.read(StepLayout, artifacts.LAYOUT_FILE)

    @property
    def times(self) -> StepTimes | None:
        """Of the steps; None: no stage that takes part has measured them."""
        measured = self.read_if_there(Measured, artifacts.TIMES_FILE)
        return None if measured is None else measured.steps

    @property
    def calibration(self) -> Calibration | None:
        """What was calibrated; None: nothing."""
        return calibration_in(self.view)

    @property
    def known(self) -> Sequence[StepPlan]:
        """Plans that new ones of their budgets must not be far below."""
        return ()

    @property
    def target(self) -> StepModel | None:
        """Whose uncached runs plans shall end where they end; None: those of `step_model`."""
        return None

    @property
    def solves(self) -> bool:
        """Whether a method may need standard solvers."""
        return any("solver" in planner.needs for planner in self.inputs.request.planners)

    @property
    def bundle_files(self) -> dict[str, FileEntry]:
        """The files of the work folder that go into a bundle as they are: those in folders, apart from plans."""
        return {path: entry for path, entry in self.view.listed.items() if path.split("/")[0] not in ("plans", path)}

    @property
    def engines(self) -> Bundle:
        """The work folder looked at as a bundle with the uncached plan, once there are engines."""
        exported, profile = self.read(Exported, artifacts.EXPORT_FILE), self.built_profile
        uncached = plan_path(UNCACHED)
        facts = self.read_if_there(ModelFacts, artifacts.MODEL_FILE)
        manifest = Manifest(
            profile=portable_profile(profile),
            revision=None if facts is None else facts.revision,
            buckets={
                profile.shape.name: Bucket(
                    shape=profile.shape,
                    graphs=exported.graphs,
                    engines=self.read(Engines, artifacts.ENGINES_FILE).entries,
                )
            },
            plans=(UNCACHED,),
            default_plan=UNCACHED,
            encoders=exported.encoders,
            files=self.bundle_files | {uncached: self.view.listed[uncached]},
        )
        return Bundle(self.work.root.resolve(), manifest, manifest.digest)

    @property
    def built_profile(self) -> Profile:
        """The profile with what was found of its sources: the digests of LoRA weights."""
        profile, facts = self.inputs.profile, self.read_if_there(ModelFacts, artifacts.MODEL_FILE)
        if facts is None or not (profile.loras and facts.loras):
            return profile
        replace = msgspec.structs.replace
        found = zip(profile.loras, facts.loras)
        return replace(profile, loras=tuple(replace(lora, sha256=digest) for lora, digest in found))

    def problem(self, calibration: Calibration | None, *, fit: Fit | None = None) -> Problem:
        """What plans are made for; with standard solvers where a method may need them."""
        table, profile = self.table, self.inputs.profile
        return Problem(
            table=table,
            guidance_scale=profile.sampling.guidance_scale,
            calibration=calibration,
            reference=self.reference,
            model=profile.name,
            fit=fit,
            fit_range=profile.sampling.guidance_range,
            solver=solver_tables(table) if self.solves else None,
        )

    def digest(self, name: str) -> str:
        """Digest of something that a stage reads: an input or a field of one, an artifact, weights, libraries or
        machine."""
        if name in self._environment:
            return self._environment[name]()
        if name.split(".")[0] in Inputs.__struct_fields__:
            return self.inputs.digest_of(name)
        return self.view.digest(name)

    def is_of_environment(self, name: str) -> bool:
        """Whether it is of this machine rather than of what is asked for."""
        return name in self._environment or name == "times"

    def takes_part(self, stage: str) -> bool:
        """Whether a stage is one of those that were selected."""
        return stage in self.view.stages

    @cached_property
    def _environment(self) -> dict[str, functools._lru_cache_wrapper[str]]:
        return {
            "weights": functools.cache(lambda: _revision(self.inputs.profile)),
            "libraries": functools.cache(lambda: digest_of(library_versions())),
            "machine": functools.cache(lambda: digest_of([describe_machine(), versions_of(ENGINE_LIBRARIES)])),
        }

    # ------------------------------------------------------------ who does the work

    @cached_property
    def model(self) -> Model:
        """The model, on its device."""
        return open_model(self.inputs.profile, self.reporter, device=self.inputs.request.device)

    @cached_property
    def step_model(self) -> StepModel:
        """What calibration, fits and trials run on: the model, or the engines as the request has it.

        Raises:
            MissingDependencyError: none of the engines run here.
        """
        if self.inputs.request.calibrate_on == "torch":
            return self.model
        return self.open_engines(self.engines)

    def open_engines(self, bundle: Bundle) -> StepModel:
        """The first engines of a bundle that run here, until the end of the context.

        Raises:
            MissingDependencyError: there are none.
        """
        from lemica_trt.evaluate.engine_model import EngineModel
        from lemica_trt.evaluate.step_timer import require_runnable
        from lemica_trt.runtime.pipeline import Pipeline

        backend = require_runnable(bundle, fix="calibrate in PyTorch: --calibrate-on torch")
        return EngineModel(self.enter_context(Pipeline(bundle, backend=backend)), backend)

    def work_on(self, job: Job[U, E], units: Sequence[U]) -> Iterator[tuple[U, Sequence[E]]]:
        """`calibrate.workers.Workers`: this process, or the Ray cluster of the request; opened when first used.

        Raises:
            MissingDependencyError: as `calibrate.cluster.RayWorkers`.
        """
        return self._workers(job, units)

    @cached_property
    def _workers(self) -> Workers:
        from lemica_trt.calibrate.workers import InProcess

        if self.inputs.request.ray is None:
            return InProcess(self.step_model)
        from lemica_trt.calibrate.cluster import RayWorkers
        from lemica_trt.models import load_model

        load = functools.partial(load_model, self.model.profile, device=self.model.device.type)
        return self.enter_context(RayWorkers(self.inputs.request.ray, self.model, load, note=self.reporter.note))


def solver_tables(table: SamplerTable) -> SolverTable:
    """Standard solvers set to some steps of a sampler; needs PyTorch and diffusers."""
    from lemica_trt.models.scheduler import solver_table

    return lambda schedule, solver: solver_table(table, schedule.full_steps, solver)


def open_model(profile: Profile, reporter: Reporter, *, device: str | None = None) -> Model:
    """Load the model of a profile.

    Args:
        device: torch device; None: a GPU where there is one.

    Raises:
        MissingDependencyError: the build extra is not installed, or there is no such device.
        InputError, UnsupportedError: as `models.load_model`.
    """
    reporter.stage("model", f"{profile.name} from {profile.source}, {profile.dtype}")
    with _build_libraries():
        from lemica_trt.models import load_model, usable_device
        from lemica_trt.models.load import limit_threads
    limit_threads()
    model = load_model(profile, device=usable_device(device))
    parts = [model.pipeline.components[name] for name in dict.fromkeys(model.experts)]
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    shape = "×".join(str(n) for n in model.latent_shape)
    reporter.note(f"DiT with {parameters / 1e6:.1f} M parameters, latents {shape}, revision {model.revision[:12]}")
    return model


def _revision(profile: Profile) -> str:
    with _build_libraries():
        from lemica_trt.models.load import revision_of
    return revision_of(profile)


def require_build_libraries() -> None:
    """Raise MissingDependencyError where PyTorch or diffusers cannot be imported, before anything is done."""
    with _build_libraries():
        import lemica_trt.models  # noqa: F401


@contextlib.contextmanager
def _build_libraries() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f"building needs PyTorch and diffusers, got: {error}", fix=install_command("build")
        ) from None


def library_versions() -> dict[str, str]:
    """Versions of lemica-trt and of the libraries that decide what is measured and exported."""
    return {"lemica-trt": __version__, **versions_of(LIBRARIES)}


def versions_of(names: Sequence[str]) -> dict[str, str]:
    """Library → version; those that are not installed are left out."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
