"""Flags of the command line, by name → profile and request. `lemica_trt.build` takes them as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import Workspace
from lemica_trt.bundle.writing import change_plans
from lemica_trt.compiler.requests import BuildRequest, BuildResult, PlanResult
from lemica_trt.core.errors import LemicaError, UsageError
from lemica_trt.core.progress import Quiet, Reporter
from lemica_trt.ir import budget
from lemica_trt.ir.budget import Budget, Latency, MinPsnr, Speedup
from lemica_trt.ir.profile import (
    EFFORTS,
    FEW,
    FEW_STEPS,
    NORMAL,
    CalibrationSettings,
    Effort,
    Lora,
    Profile,
    Sampling,
    Shape,
    sizes_from_name,
)
from lemica_trt.ir.resources import (
    absolute_source,
    is_pipeline,
    load_named,
    load_profile,
    lora_from_text,
    require_buildable,
)

PROFILE_FIELDS = {
    **{name: ("shape", name) for name in ("frames", "height", "width", "max_batch")},
    "denoising_steps": ("sampling", "steps"),
    **{name: ("sampling", name) for name in ("guidance_scale", "guidance_range", "scheduler", "flow_shift")},
    **{name: ("sampling", name) for name in ("guidance_scale_2", "sigmas", "timesteps")},
    "calibration": ("calibration", "method"),
    **{name: ("calibration", name) for name in ("samples", "rollouts", "validation_samples", "max_skip", "seed")},
    "dtype": ("", "dtype"),
    "max_sequence_length": ("", "text_length"),
    "opset": ("", "opset"),
    **dict.fromkeys(("lora", "lora_2"), ("", "loras")),
}
"""Flag → the part of a profile, and the field there, that it sets."""

DIFFUSERS_NAMES = {
    "num_inference_steps": "denoising_steps",
    "steps": "denoising_steps",
    "num_frames": "frames",
    "cfg_scale": "guidance_scale",
    "torch_dtype": "dtype",
    "shift": "flow_shift",
    "batch_size": "max_batch",
}
"""What diffusers and others call some of them; `build` takes these too, as the command line does."""

BUDGETS: dict[str, Callable[[str], Budget]] = {
    "budget": int,
    "speedup": budget.speedup_from_text,
    "latency": budget.latency_from_text,
    "min_psnr": budget.min_psnr_from_text,
}
"""Flags that say what a plan may cost, and how one is read; one of them can be given."""

EXAMPLES = {
    "budget": "--budget 15 or --budget 15,10",
    "speedup": "--speedup 3",
    "latency": "--latency 800ms",
    "min_psnr": "--min-psnr 35",
}
"""How they are written."""

SEARCH_SAMPLES = 8
"""Validation samples at least, unless a flag says how many, where qualities are measured and not only compared."""

REQUEST_FIELDS = frozenset(BuildRequest.__struct_fields__)

PLANNING_FIELDS = ("budgets", "pareto", "methods", "schedule", "reference_steps")
"""Fields of a request that `plan` asks for anew."""

PLAN_CLIPS = 2
"""Held-out clips that a plan runs on when it is added to a bundle, unless a flag says how many."""

ENGINE_FIELDS = ("backends", "options")
"""Those that `engine` asks for anew."""


def request_defaults(names: Iterable[str]) -> dict[str, Any]:
    """Fields of a request that were not asked for."""
    return {name: getattr(BuildRequest(), name) for name in names}


def build(
    model: str,
    *,
    output: str | Path | None = None,
    weights: str | None = None,
    reporter: Reporter | None = None,
    **flags: Any,
) -> BuildResult:
    """Build a bundle: `lemica-trt build` as a function.

        lemica_trt.build(model="cogvideox-tiny", budget=15, output="out/tiny")

    Args:
        model: name of a build profile, or path of a .toml file.
        output: folder of the bundle; None: `out/MODEL`.
        weights: diffusers folder or hub id instead of the profile's own.
        reporter: told what happens; None: nobody.
        flags: as on the command line, with `_` for `-`: `budget=(15, 10)`, `method="lemica,linear"`, `frames=17`.
            Times and PSNR may be text with a unit: `latency="800ms"`. Names of diffusers are taken too:
            `num_inference_steps=50`.

    Raises:
        UsageError: unknown flag, or one with a value that it does not take.
        LemicaError: as `work_commands.build`.
    """
    from lemica_trt.compiler.shape_commands import build as build_bundle

    flags, further = sizes_of_shapes({DIFFUSERS_NAMES.get(name, name): value for name, value in flags.items()})
    profile = profile_from_flags(model, weights, flags)
    rest = {name: value for name, value in flags.items() if name not in PROFILE_FIELDS and value is not None}
    request = BuildRequest(**request_fields(rest))
    return build_bundle(profile, further, Path(output or Path("out") / profile.name), request, reporter or Quiet())


def sizes_of_shapes(flags: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Flags with `frames`, `height` and `width` of the first `shape`, if there is one; and the further shapes.

    Raises:
        UsageError: a shape is malformed, or given beside one of the three.
    """
    rest = dict(flags)
    given = rest.pop("shape", None) or ()
    shapes = (given,) if isinstance(given, str) else tuple(given)
    if not shapes:
        return rest, ()
    for name in ("frames", "height", "width"):
        if rest.get(name) is not None:
            raise UsageError(f"--shape cannot be used together with --{name}", fix=f"leave out --{name}, or --shape")
    return rest | sizes_from_name(shapes[0]), shapes[1:]


def profile_from_flags(model: str | None, weights: str | None, flags: Mapping[str, Any]) -> Profile:
    """The profile of a model with every given flag applied.

    Args:
        flags: by name; those of no profile, and None, are left out.

    Raises:
        UsageError: no such profile, or a value that a field does not take.
        InputError: not a valid profile.
        UnsupportedError: the model is known not to build.
    """
    if model is None:
        raise UsageError("expected --model, got none", fix="name a profile, for example --model cogvideox-tiny")
    profile, replace = _profile(model), msgspec.structs.replace
    parts: dict[str, dict[str, Any]] = {"": {}, "shape": {}, "sampling": {}, "calibration": {}}
    parts["calibration"] = _samples_from_flags(flags, profile)
    for name, (part, field) in PROFILE_FIELDS.items():
        if flags.get(name) not in (None, ()):
            parts[part][field] = flags[name]
    if flags.get("guidance_range") is not None:
        parts["sampling"]["guidance_range"] = _range(flags["guidance_range"])
    given = [flags.get(name) or () for name in ("lora", "lora_2")]
    loras = loras_from_flags(*((each,) if isinstance(each, str) else each for each in given)) or profile.loras
    if loras:
        parts[""]["loras"] = tuple(replace(lora, source=absolute_source(lora.source)) for lora in loras)
    for name in ("sigmas", "timesteps"):
        if flags.get(name) is not None:
            try:
                parts["sampling"][name] = numbers = tuple(map(float, flags[name]))
            except (TypeError, ValueError):
                raise UsageError(f"{name}: expected numbers, got {flags[name]!r}", fix="give a list of them") from None
            parts["sampling"].setdefault("steps", len(numbers))
    try:
        changed = {part: replace(getattr(profile, part), **fields) for part, fields in parts.items() if part}
        source = absolute_source(profile.source if weights is None else weights)
        profile = replace(profile, source=source, **changed, **parts[""])
    except ValueError as error:
        raise UsageError(str(error), fix="give another value, or leave it to the profile") from None
    profile.require_possible()
    return profile


def _samples_from_flags(flags: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """Numbers of samples, where they are not the profile's: by the effort, the steps, and what is searched for.

    Raises:
        UsageError: no such effort.
    """
    own, effort = profile.calibration, effort_from_flags(flags)
    given = [len(flags[name]) for name in ("sigmas", "timesteps") if flags.get(name)]
    steps = flags.get("denoising_steps") or next(iter(given), profile.sampling.steps)
    if effort is None and isinstance(steps, int) and steps <= FEW_STEPS:
        effort = FEW
    found = dict[str, Any]()
    for name in ("samples", "rollouts", "validation_samples"):
        if effort is not None and (effort is not FEW or getattr(own, name) == getattr(NORMAL, name)):
            found[name] = getattr(effort, name)
    if flags.get("min_psnr") is not None or flags.get("pareto"):
        few = found.get("validation_samples", own.validation_samples)
        found["validation_samples"] = max(few, SEARCH_SAMPLES)
    return found


def default_from_profile(flag: str, model: str | None) -> str | None:
    """What the profile of a model says where a flag is not given, in words.

    Args:
        flag: one of `PROFILE_FIELDS`.
        model: as `--model` takes it; of a pipeline that is traced nothing is known without looking at it.

    Returns:
        None: nothing is said; the pipeline's own.
    """
    part, name = PROFILE_FIELDS[flag]
    try:
        profile = None if model is None else load_profile(model)
    except LemicaError:
        profile = None
    if profile is not None:
        value = getattr(getattr(profile, part) if part else profile, name)
        return None if value is None else f"{_in_words(value)}, from the profile"
    kind: Any = {"shape": Shape, "sampling": Sampling, "calibration": CalibrationSettings, "": Profile}[part]
    value = next(field for field in msgspec.structs.fields(kind) if field.name == name).default
    if value is None:
        return "the pipeline's own"
    return "the profile's" if value is msgspec.NODEFAULT else f"{_in_words(value)}, or the profile's"


def _in_words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def effort_from_flags(flags: Mapping[str, Any]) -> Effort | None:
    """What `effort` stands for, if it was given.

    Raises:
        UsageError: it is none that there is.
    """
    name = flags.get("effort")
    if name is not None and name not in EFFORTS:
        raise UsageError(f"effort: expected {', '.join(EFFORTS)}, got {name!r}", fix="name one of them")
    return None if name is None else EFFORTS[name]


def loras_from_flags(given: Sequence[str], second: Sequence[str] = ()) -> tuple[Lora, ...]:
    """LoRA weights of FILE_OR_HUB_ID[:SCALE] each.

    Args:
        second: those that go into a second transformer.

    Raises:
        UsageError: a scale is no number.
        InputError: there is no such file, and it is no hub id.
    """
    found = []
    for text, flag in [*((text, "--lora") for text in given), *((text, "--lora-2") for text in second)]:
        lora = lora_from_text(text, flag)
        expert: Any = "transformer_2" if flag == "--lora-2" else UNSET
        found.append(msgspec.structs.replace(lora, source=absolute_source(lora.source), expert=expert))
    return tuple(found)


def _range(given: Any) -> tuple[float, float]:
    """Two numbers of LOW:HIGH, or as they are."""
    try:
        low, high = map(float, given.split(":") if isinstance(given, str) else given)
    except (TypeError, ValueError):
        raise UsageError(
            f"--guidance-range: expected LOW:HIGH, got {given!r}", fix="for example --guidance-range 2:7"
        ) from None
    return low, high


def _profile(model: str) -> Profile:
    """A profile by name, hub id or file; of another diffusers folder or hub id, what its pipeline's class says."""
    if not is_pipeline(model):
        found = load_named(model)
        require_buildable(found)
        return found.profile
    from lemica_trt.models.load import profile_from_pipeline

    return profile_from_pipeline(model)


def request_fields(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `BuildRequest` from flags; builder options become `options`, `effort` what it stands for.

    Raises:
        UsageError: budgets in several units, or one that is not what it must be; an unknown flag is left to the
            backends, which say what options they have.
    """
    effort = effort_from_flags(flags)
    fields: dict[str, Any] = {}
    if effort is not None:
        fields = {"methods": effort.methods, "verify_samples": effort.verify_samples}
    units = [name for name in BUDGETS if flags.get(name) is not None]
    if len(units) > 1:
        first, *others = (f"--{name.replace('_', '-')}" for name in units)
        raise UsageError(f"{first} cannot be used together with {', '.join(others)}", fix=f"leave out {first}")
    for name, value in flags.items():
        if value is None or name == "effort":
            continue
        if name in BUDGETS:
            fields["budgets"] = _budgets(name, value)
        elif name in ("method", "backend", "schedule"):
            target = {"method": "methods", "backend": "backends"}.get(name, name)
            fields[target] = tuple(value.split(",") if isinstance(value, str) else value)
        elif name in REQUEST_FIELDS:
            fields[name] = str(value) if isinstance(value, Path) else value
        else:
            fields.setdefault("options", {})[name] = value
    return fields


def _budgets(name: str, given: Any) -> tuple[Budget, ...]:
    if isinstance(given, str):
        given = given.split(",")
    parts: Iterable[Any] = given if isinstance(given, Iterable) else [given]
    read = BUDGETS[name]
    try:
        return tuple(part if isinstance(part, (Speedup, Latency, MinPsnr)) else read(f"{part}") for part in parts)
    except ValueError as error:
        what = "expected integers separated by commas" if name == "budget" else str(error)
        got = f", got {given!r}" if name == "budget" else ""
        fix = EXAMPLES[name]
        raise UsageError(f"--{name.replace('_', '-')}: {what}{got}", fix=f"for example {fix}") from None


def plan_target(
    target: Path,
    flags: Mapping[str, Any],
    reporter: Reporter,
    *,
    default: str | None = None,
    samples: str | None = None,
    remove: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> PlanResult:
    """Plans of a work folder or of a bundle.

    Args:
        flags: of planning, by name.
        default: the bundle's new default plan.
        samples: of the calibration, which goes on; see `work_commands.with_samples`.
        remove, rename: plans of the bundle, after others were made; see `bundle.writing.change_plans`.

    Raises:
        UsageError: something that only a bundle has of a work folder, or the other way round.
    """
    from lemica_trt.compiler import work_commands

    fields = request_fields(flags)
    if Workspace(target).is_there:
        if default is not None:
            raise UsageError("--default is for bundles", fix="a work folder's first budget becomes the default")
        if remove or rename or "verify_samples" in fields:
            raise UsageError("--remove, --rename and --verify-samples are for bundles", fix="leave them out")
        fields = {**(request_defaults(PLANNING_FIELDS) if samples is None else {}), **fields}
        return work_commands.plan(target, fields, reporter, samples=samples)
    changes = {"remove": remove, "rename": rename} if remove or rename else {}
    refits = fields.get("calibrate_on") == "engine"
    if refits and not changes:
        return _refit(Bundle.open(target), fields, reporter, default=default, samples=samples)
    if refits or (samples is not None and (changes or default is not None)):
        flag, others = ("--calibrate-on", "") if refits else ("--samples", "--default, ")
        raise UsageError(
            f"{flag} cannot be used together with {others}--remove or --rename",
            fix="give them afterwards, in a command of their own",
        )
    if samples is not None:
        found = work_commands.extend(target, samples, fields, reporter)
        plans = tuple(found.bundle.plan(name) for name in found.bundle.plans)
        return PlanResult(plans=plans, outcomes=found.outcomes, front=found.front)
    return _plan_bundle(target, fields, reporter, default, changes)


def _plan_bundle(
    target: Path, fields: dict[str, Any], reporter: Reporter, default: str | None, changes: dict[str, Any]
) -> PlanResult:
    """Plans of a bundle from what it has; `changes`: as `bundle.writing.change_plans` removes and renames."""
    from lemica_trt.compiler import bundle_plans

    bundle = Bundle.open(target)
    if unused := sorted(fields.keys() - {*PLANNING_FIELDS, "verify_samples"}):
        raise UsageError(
            f"expected flags of planning only, got {', '.join(unused)}: a bundle is planned without the model, from "
            "what it has",
            fix="leave them out, calibrate on its engines (--calibrate-on engine), or plan in the work folder",
        )
    planned = fields.keys() & {"budgets", "methods", "schedule", "reference_steps"}
    if not planned and (default is not None or changes or "pareto" in fields):
        fields["budgets"] = ()
    fields.setdefault("verify_samples", PLAN_CLIPS)
    request = BuildRequest(**fields)
    if changes:
        bundle_plans.note_signatures(bundle, reporter)
    if not request.budgets and changes:  # the default may be a new name
        bundle = change_plans(bundle, default=default, **changes)
        return bundle_plans.plan_bundle(bundle, request, reporter)
    made = bundle_plans.plan_bundle(bundle, request, reporter, default=default)
    if not changes:
        return made
    bundle = change_plans(Bundle.open(target), **changes)
    return msgspec.structs.replace(made, plans=tuple(bundle.plan(name) for name in bundle.plans))


def _refit(
    bundle: Bundle, fields: dict[str, Any], reporter: Reporter, *, default: str | None, samples: str | None
) -> PlanResult:
    """Plans of a bundle that is calibrated again, on its engines."""
    from lemica_trt.compiler.refit import refit

    if unused := sorted(fields.keys() - {*PLANNING_FIELDS, "calibrate_on", "prompts"}):
        raise UsageError(
            f"expected flags of planning and --prompts only, got {', '.join(unused)}: the engines are the bundle's own",
            fix="leave them out",
        )
    request = BuildRequest(**{"budgets": (), **fields})
    return refit(bundle, request, reporter, samples=samples, default=default)


def engine_target(target: Path, output: Path, flags: Mapping[str, Any], reporter: Reporter) -> Bundle:
    """Engines of a work folder or of a bundle → a bundle."""
    from lemica_trt.compiler import bundle_engines, work_commands

    if Workspace(target).is_there:
        return work_commands.engine(
            target, output, {**request_defaults(ENGINE_FIELDS), **request_fields(flags)}, reporter
        )
    return bundle_engines.rebuild_engines(Bundle.open(target), output, request_fields(flags), reporter)
