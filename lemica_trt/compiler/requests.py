"""What a build is asked for, what it is made from, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from lemica_trt.backends.build import check as check_engine
from lemica_trt.backends.options import option_fields, options_by_backend
from lemica_trt.bundle.contents import calibration_at, read_from, sensitivity_at
from lemica_trt.bundle.manifest import MANIFEST
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import INPUTS, View, Workspace, digest_of, work_folder
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.values import Value, write_bytes, write_value
from lemica_trt.ir.budget import Budget, FrontRow, Latency, MinPsnr, Speedup
from lemica_trt.ir.calibration import Calibration, Sensitivity
from lemica_trt.ir.engine import NONE, QUANTIZE, Option
from lemica_trt.ir.measured import MeasuredPlans
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import FEW_STEPS, NORMAL, DType, Profile
from lemica_trt.ir.prompts import prompt_from_line
from lemica_trt.ir.report import BudgetOutcome, ShapeSummary
from lemica_trt.ir.resources import calibration_path
from lemica_trt.planning.planner import Planner, planners_named

if TYPE_CHECKING:
    from lemica_trt.ir.report import VerifyReport

DEFAULT_BUDGETS: tuple[Budget, ...] = (15,)

CALIBRATED = frozenset({"error-graph", "grams"})
"""Needs of planners that a calibration meets."""


class BuildRequest(Value, frozen=True):
    """What a build is asked for beyond the profile; the flags of the command line have these names.

    Attributes:
        budgets: of each plan, in full steps or another unit; the first plan is the default.
        pareto: whether the quality of budgets over the whole range is measured too.
        methods: names of planners, `auto` or `all`; see `planning.planner`.
        schedule: full steps as given; then budgets and methods are not used and nothing is calibrated.
        error_graph: path of an error graph to use instead of calibrating; `grams.json` beside it is used too.
        calibration_from: path of a work folder or bundle of the same model whose calibration is carried over.
        prompts: path of calibration prompts instead of the profile's.
        calibrate_on: where calibration, fits and trials run the model: in PyTorch, or on the engines that are built.
        device: torch device that calibrates and verifies; None: a GPU where there is one.
        ray: address of the Ray cluster that calibrates and runs trials; None: this process.
        backends: engines to build, in order of preference.
        options: builder options; each backend takes those that it has.
        verify_samples: held-out clips of the verification, see `further_samples`; 0: no verification.
        reference_steps: M: plans are compared with the sampler at M steps; None: its own N.
    """

    budgets: tuple[Budget, ...] = DEFAULT_BUDGETS
    pareto: bool = False
    methods: tuple[str, ...] = ("auto",)
    schedule: tuple[int, ...] | None = None
    error_graph: str | None = None
    calibration_from: str | None = None
    prompts: str | None = None
    calibrate_on: Literal["torch", "engine"] = "torch"
    device: str | None = None
    ray: str | None = None
    backends: tuple[str, ...] = ("onnxruntime",)
    options: dict[str, Option] = {}
    verify_samples: int = NORMAL.verify_samples
    reference_steps: int | None = None

    @property
    def planners(self) -> list[Planner]:
        """The planners that may be asked for a plan; which of them `auto` can use is known after calibration.

        Raises:
            UsageError: there is no such planner.
        """
        return [] if self.schedule is not None else planners_named(self.methods)

    @property
    def needs_calibration(self) -> bool:
        """Whether some planner reads what a calibration measures."""
        return any(planner.needs & CALIBRATED for planner in self.planners)

    @property
    def has_draft(self) -> bool:
        """Whether the plans take so long that there is a draft of the bundle before them."""
        return self.schedule is None and self.needs_calibration

    @property
    def further_samples(self) -> int:
        """Held-out clips of the plans beside the default one: a third of its own, at least one."""
        return -(-self.verify_samples // 3)

    def tries_all(self, num_steps: int) -> bool:
        """Whether every budget tries every method: `auto` tries those of budgets that are not near one that has, and
        all of a sampler of few steps, where the best method changes from one budget to the next."""
        return self.methods != ("auto",) or num_steps <= FEW_STEPS

    @property
    def is_timed(self) -> bool:
        """Whether a budget is in a unit of time."""
        return self.schedule is None and any(isinstance(budget, (Speedup, Latency)) for budget in self.budgets)

    @property
    def quantizes(self) -> bool:
        """Whether linear layers of some engines are to be quantised."""
        return self.options.get(QUANTIZE, NONE) != NONE

    def check(self, dtype: DType | None, *, validation_samples: int | None = None, finished: bool = False) -> None:
        """Refuse before any work what could only fail behind it.

        Args:
            dtype: of the engines; None: none are built.
            validation_samples: of the calibration settings; None: no plan is tried.
            finished: whether the engines are built of a finished bundle.

        Raises:
            UsageError: unknown method, backend or option; budgets to be searched of a method that has only its own;
                engines on a Ray cluster; quantised engines of what is no finished bundle, or beside others.
            UnsupportedError, MissingDependencyError: as `backends.build.check`.
        """
        if self.schedule is None:
            planners_named(self.methods)
        if self.calibrate_on == "engine" and self.ray is not None:
            raise UsageError(
                "--ray runs the model in PyTorch, on other machines than these engines", fix="leave out --ray"
            )
        if "published" in self.methods and (self.pareto or not all(isinstance(b, int) for b in self.budgets)):
            raise UsageError("published schedules have budgets of their own", fix="name one of them with --budget")
        searches = self.pareto or any(isinstance(budget, MinPsnr) for budget in self.budgets)
        if self.schedule is None and searches and validation_samples == 0:
            raise UsageError(
                "--min-psnr and --pareto measure quality on validation samples, and there are none",
                fix="--validation-samples 8, or another --effort",
            )
        if self.quantizes and not finished:
            raise UsageError(
                "--quantize is of a finished bundle: ranges and errors are measured on its engines",
                fix="build without it, then: lemica-trt engine BUNDLE --quantize int8 --output BUNDLE-int8",
            )
        if self.quantizes and len(set(self.backends)) > 1:
            self._require_same_rounding()
        if dtype is not None:
            for backend, options in options_by_backend(self.backends, self.options).items():
                check_engine(backend, dtype, options)

    def _require_same_rounding(self) -> None:
        """Raise UsageError unless plans of the quantised engines of one backend hold for those of the others."""
        able = option_fields()[QUANTIZE].backends
        if self.options[QUANTIZE] != "fp8" or not set(self.backends) <= set(able):
            raise UsageError(
                "--quantize: expected one backend, because a bundle's plans are of engines of one precision; or fp8 "
                f"and some of {', '.join(able)}, got {self.options[QUANTIZE]} and {', '.join(self.backends)}",
                fix="give each a bundle of its own",
            )


EARLY_SAMPLES = 2
"""Samples whose calibration is enough for a first fitted plan: errors of two choose nearly the steps that those of all
do. It is fitted to the first of them."""


class Given(Value, frozen=True):
    """Calibrations that were made elsewhere.

    Attributes:
        calibration: used as it is (`--error-graph`).
        sensitivity: what a new calibration is made from (`--calibration-from`).
    """

    calibration: Calibration | None = None
    sensitivity: Sensitivity | None = None


class Inputs(Value, frozen=True):
    """Everything that a build is made from, apart from weights, libraries and machine.

    Attributes:
        profile: what to build, flags applied.
        request: what is asked for; paths in it are not read again.
        prompts, held_out: of calibration and of verification.
        given: see there.
    """

    profile: Profile
    request: BuildRequest
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    given: Given = Given()

    @property
    def early_samples(self) -> int:
        """Samples of the calibration after which the draft gets a fitted plan; 0: it gets none.

        Only where most of the calibration is still to come then, and where a solver is fitted to its own samples.
        """
        request, settings = self.request, self.profile.calibration
        few = min(EARLY_SAMPLES, settings.rollouts)
        possible = (
            request.has_draft
            and request.verify_samples > 0
            and request.reference_steps is None
            and self.given.calibration is None
            and settings.method == "secant"
            and settings.samples >= 4 * few
            and not isinstance(request.budgets[0], MinPsnr)
            and any("fit" in planner.needs for planner in request.planners)
        )
        return few if possible else 0

    def digest_of(self, name: str) -> str:
        """Digest of an input, or of a field of one: `prompts`, `profile.sampling`, `request.budgets`."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        if name in ("prompts", "held_out"):  # the content of pictures, wherever they lie
            value = [prompt_from_line(line).content for line in value]
        return digest_of(value)

    def store(self, work: Workspace) -> None:
        """Write the inputs into a work folder, and record them; unchanged ones are left as they are."""
        with work.staged() as folder:
            prefix = folder / INPUTS
            write_value(self.profile, prefix / "profile.json")
            paths: dict[str, Any] = dict.fromkeys(("error_graph", "calibration_from", "prompts", "device", "ray"))
            write_value(msgspec.structs.replace(self.request, **paths), prefix / "request.json")
            write_value(self.given, prefix / "given.json")
            for name in ("prompts", "held_out"):
                write_bytes("".join(f"{text}\n" for text in getattr(self, name)).encode(), prefix / f"{name}.txt")
            files = [f"{INPUTS}/{path.name}" for path in prefix.iterdir()]
            work.commit(INPUTS, "", {}, {INPUTS: files}, folder)


def inputs_from_request(profile: Profile, request: BuildRequest) -> Inputs:
    """Read what a request names.

    Raises:
        InputError: a prompt file, error graph or calibration cannot be read.
    """
    sensitivity = None
    if request.calibration_from is not None:
        sensitivity = sensitivity_at(Path(request.calibration_from))
        settings = msgspec.structs.replace(profile.calibration, method="retargeted")
        profile = msgspec.structs.replace(profile, calibration=settings)
    calibration = None if request.error_graph is None else calibration_at(Path(request.error_graph))
    return Inputs(
        profile=profile,
        request=request,
        prompts=prompts_of(profile, request.prompts),
        held_out=prompts_of(profile, None, split="held_out") if request.verify_samples else (),
        given=Given(calibration=calibration, sensitivity=sensitivity),
    )


def stored_inputs(work: Workspace) -> Inputs:
    """What a work folder was made for.

    Raises:
        InputError: it is no work folder, or a file of its inputs was altered.
    """
    files = View(work, [INPUTS])
    if not work.is_there and (work.root / MANIFEST).is_file():
        raise InputError(
            f"{work.root}: expected a work folder, got a bundle, whose graphs are exported",
            fix=f"give the work folder of the build: {work_folder(work.root).name} if it lies beside the bundle",
        )
    if not work.is_there:
        raise InputError(
            f"{work.root}: expected a work folder or a bundle, got neither",
            fix="make a work folder with lemica-trt calibrate or a bundle with lemica-trt build",
        )

    def lines(name: str) -> tuple[str, ...]:
        return tuple(files.read_bytes(f"{INPUTS}/{name}.txt").decode().splitlines())

    return Inputs(
        profile=read_from(files, Profile, f"{INPUTS}/profile.json"),
        request=read_from(files, BuildRequest, f"{INPUTS}/request.json"),
        given=read_from(files, Given, f"{INPUTS}/given.json"),
        prompts=lines("prompts"),
        held_out=lines("held_out"),
    )


def profile_with_samples(profile: Profile, samples: str) -> Profile:
    """A profile with more calibration samples, or fewer.

    Args:
        samples: how many in all, or how many more: `+4`.

    Raises:
        UsageError: it is neither.
    """
    settings = profile.calibration
    try:
        wanted = int(samples) + (settings.samples if samples.startswith("+") else 0)
        changed = msgspec.structs.replace(settings, samples=wanted)
    except ValueError:
        raise UsageError(
            f"--samples: expected how many in all, or +K more than {settings.samples}, got {samples!r}",
            fix="for example --samples +4",
        ) from None
    return msgspec.structs.replace(profile, calibration=changed)


def prompts_of(profile: Profile, file: str | None, *, split: str = "calibration") -> tuple[str, ...]:
    """The prompts of a profile, or of a file.

    Args:
        split: `calibration` or `held_out`.

    Raises:
        InputError: no such file, or no prompt in it.
    """
    from lemica_trt.calibrate.prompts import read_prompts

    return tuple(read_prompts(file or calibration_path(profile.calibration.prompts) / f"{split}.txt"))


class BuildResult(NamedTuple):
    """What `build` made.

    Attributes:
        bundle: on disk.
        report: of the engines that were verified; None where none were.
        unverified: backends whose engines were built and not verified, and why.
        outcomes: what came of budgets that are not numbers of full steps.
        front: quality and predicted time of the budgets whose quality was measured.
        shapes: further ones, and which plans hold there.
    """

    bundle: Bundle
    report: VerifyReport | None
    unverified: dict[str, str]
    outcomes: tuple[BudgetOutcome, ...]
    front: tuple[FrontRow, ...]
    shapes: tuple[ShapeSummary, ...] = ()


class PlanResult(Value, frozen=True):
    """What `plan` made.

    Attributes:
        plans: all that the bundle has now; of a work folder, those made.
        outcomes: what came of budgets that are not numbers of full steps.
        front: quality and predicted time by budget, if it was asked for.
        measured: what is known of the plans of a bundle, on its engines.
        added: names of the plans that a bundle was given; none of them was compared with PyTorch.
    """

    plans: tuple[StepPlan, ...]
    outcomes: tuple[BudgetOutcome, ...] = ()
    front: tuple[FrontRow, ...] = ()
    measured: MeasuredPlans = MeasuredPlans()
    added: tuple[str, ...] = ()
