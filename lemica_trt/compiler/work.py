"""The work folder of a build: what each stage leaves there, and how it is read again.

WORK/
  profile.json                 what is being built, flags applied
  sampler.json                 SamplerTable
  journal-<digest>.jsonl       what calibration has measured so far
  error_graph.json             ErrorGraph
  grams.json                   TrajectoryGrams
  sensitivity.json             Sensitivity            (calibration by secant, or from one)
  fits-<digest>.jsonl          solvers that were fitted so far
  trials-<digest>.jsonl        how plans did in trials so far
  reference.json               SamplerTable of M steps    (--reference-steps)
  frames-<digest>.jsonl        how plans' frames did in trials so far
  selection.json               TrialTables: what was tried for each budget, and what won
  front.json                   Front: quality by budget (--pareto, --min-psnr)
  steps-<digest>.json          what steps take on this machine's engines (--latency, --speedup)
  plans/<index>-<name>.json    StepPlans, in the order asked for
  export/export.json           what the graphs were made from, and the GraphSet
  export/onnx/…, tokenizer/…   the graphs
  engines/<backend>-<key>/…    engines, by what they were built from (TensorRT)
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lemica_trt.bundle.manifest import SENSITIVITY_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.core.values import V, Value, read_value, write_value
from lemica_trt.ir.budget import Front
from lemica_trt.ir.calibration import Calibration, ErrorGraph, Sensitivity, TrajectoryGrams
from lemica_trt.ir.graphs import EncoderSpec, GraphSet
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Profile, Shape
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.trials import TrialTable, TrialTables
from lemica_trt.planning.step_plan import uncached_plan

TOKENIZER_FILE = "tokenizer/tokenizer.json"


class Exported(Value, frozen=True):
    """`export/export.json`: the graphs, and everything that they were made from.

    Attributes:
        key: see `export_key`.
        source, shape: of the profile.
        revision: of the model.
        graphs: what was exported.
        encoder: how a prompt becomes conditions.
        versions: of the libraries that exported.
    """

    key: str
    source: str
    revision: str
    shape: Shape
    versions: dict[str, str]
    graphs: GraphSet
    encoder: EncoderSpec


class Work:
    """The work folder of one build; at most one process uses it at a time.

    Attributes:
        root: the folder; made when first used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def profile(self) -> Path:
        return self.root / "profile.json"

    @property
    def sampler(self) -> Path:
        return self.root / "sampler.json"

    @property
    def error_graph(self) -> Path:
        return self.root / "error_graph.json"

    @property
    def grams(self) -> Path:
        return self.root / "grams.json"

    @property
    def sensitivity(self) -> Path:
        return self.root / "sensitivity.json"

    @property
    def selection(self) -> Path:
        return self.root / "selection.json"

    @property
    def reference(self) -> Path:
        return self.root / "reference.json"

    @property
    def front(self) -> Path:
        return self.root / "front.json"

    @property
    def plans(self) -> Path:
        return self.root / "plans"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def export_record(self) -> Path:
        return self.export / "export.json"

    def journal(self, digest: str) -> Path:
        """Where calibration keeps what it has measured for one kind of measurement."""
        return self.root / f"journal-{digest[:16]}.jsonl"

    def fits(self, digest: str) -> Path:
        """Where fitted solvers are kept."""
        return self.root / f"fits-{digest[:16]}.jsonl"

    def step_times(self, digest: str) -> Path:
        """Where the times of steps are kept that engines of these graphs were measured to take."""
        return self.root / f"steps-{digest[:16]}.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder.

        Raises:
            UsageError: another process holds it.
        """
        import fcntl

        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"{self.root}: expected a free work folder, another lemica-trt is using it",
                    fix="wait for it, or choose another --output",
                ) from None
            yield


def work_folder(output: Path) -> Path:
    """The work folder that belongs to a bundle: beside it."""
    folder = output.resolve()
    return folder.with_name(f"{folder.name}.work")


def candidate_folder(output: Path) -> Path:
    """Where a bundle lies until it is verified: beside the one that it will replace."""
    folder = output.resolve()
    return folder.with_name(f"{folder.name}.unverified")


def exported_in(work: Work) -> Exported | None:
    """What the work folder's export folder holds; None where it holds nothing whole."""
    try:
        exported = read_value(Exported, work.export_record)
    except InputError:
        return None
    names = [TOKENIZER_FILE, *(name for graph in exported.graphs.graphs for name in (graph.file, *graph.data_files))]
    return exported if all((work.export / name).is_file() for name in names) else None


class Findings(NamedTuple):
    """What is known of a model under a sampler, to make plans from.

    Attributes:
        graph: what caching each segment costs.
        grams: for fitted predictors.
        sensitivity: for calibrations of other steps, shifts and guidance.
        reference: the sampler at M steps, where plans are held against that; None: at its own N.
        selections: how the plans did that were tried.
        front: quality by budget.
    """

    graph: ErrorGraph | None = None
    grams: TrajectoryGrams | None = None
    sensitivity: Sensitivity | None = None
    reference: SamplerTable | None = None
    selections: tuple[TrialTable, ...] = ()

    @property
    def calibration(self) -> Calibration | None:
        """What was calibrated, as one value."""
        return (
            None
            if self.graph is None
            else Calibration(graph=self.graph, grams=self.grams, sensitivity=self.sensitivity)
        )

    front: Front | None = None


def findings_in(work: Work) -> Findings:
    """What the work folder has of a calibration."""

    def found(kind: type[V], path: Path) -> V | None:
        return read_value(kind, path) if path.is_file() else None

    selections = found(TrialTables, work.selection)
    return Findings(
        graph=found(ErrorGraph, work.error_graph),
        grams=found(TrajectoryGrams, work.grams),
        sensitivity=found(Sensitivity, work.sensitivity),
        reference=found(SamplerTable, work.reference),
        selections=selections.tables if selections is not None else (),
        front=found(Front, work.front),
    )


def sensitivity_at(path: Path) -> Sensitivity:
    """What a work folder or a bundle knows for calibrations of other steps, shifts and guidance.

    Raises:
        InputError: it is neither, or was calibrated otherwise than by secant, or from one that was.
    """
    work = Work(path)
    if work.profile.is_file():
        file = work.sensitivity if work.sensitivity.is_file() else None
    else:
        bundle = Bundle.open(path)
        file = bundle.file(SENSITIVITY_FILE) if SENSITIVITY_FILE in bundle.manifest.files else None
    if file is None:
        raise InputError(
            f"{path}: expected what was calibrated by secant, it was not", fix="calibrate it with --calibration secant"
        )
    return read_value(Sensitivity, file)


def write_plans(plans: Sequence[StepPlan], findings: Findings, work: Work, reporter: Reporter) -> None:
    """Plans, how they were selected and compared, and against what → the work folder, in place of those there."""
    shutil.rmtree(work.plans, ignore_errors=True)
    for path in (work.selection, work.front, work.reference):
        path.unlink(missing_ok=True)
    if findings.selections:
        write_value(TrialTables(tables=findings.selections), work.selection)
    if findings.front is not None:
        write_value(findings.front, work.front)
    if findings.reference is not None:
        write_value(findings.reference, work.reference)
    for index, plan in enumerate(plans):
        reporter.stage("plan", f"{plan.name}: {plan.method}; full steps {' '.join(map(str, plan.full_steps))}")
        write_value(plan, work.plans / f"{index}-{plan.name}.json")


def plans_in(work: Work) -> list[StepPlan]:
    """The plans in a work folder, in the order in which they were asked for, and the uncached one.

    Raises:
        InputError: there are none, or they are of another sampler.
    """
    profile, table = read_value(Profile, work.profile), read_value(SamplerTable, work.sampler)
    files = sorted(work.plans.glob("*.json"), key=lambda path: int(path.name.split("-", 1)[0]))
    plans = [read_value(StepPlan, path) for path in files]
    if not plans or any(plan.sampler_digest != table.digest for plan in plans):
        raise InputError(
            f"{work.plans}: expected plans for {work.sampler.name}, got {'others' if plans else 'none'}",
            fix=f"lemica-trt plan {work.root} --budget 15",
        )
    return [*plans, uncached_plan(table, guidance_scale=profile.sampling.guidance_scale)]


def plans_to_run(work: Work) -> list[StepPlan]:
    """The plans in a work folder, and those of its front: what graphs must be able to run.

    Raises:
        InputError: as `plans_in`.
    """
    front = findings_in(work).front
    return [*plans_in(work), *(() if front is None else (point.plan for point in front.points))]


def short(value: object) -> str:
    """Digests by their first 12 digits, everything else as it is."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
