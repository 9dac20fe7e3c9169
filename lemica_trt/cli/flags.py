"""Flags of the command line, by name → profile and request. `lemica_trt.build` takes them as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import Workspace
from lemica_trt.compiler.requests import BuildRequest, BuildResult, PlanResult
from lemica_trt.core.errors import UsageError
from lemica_trt.core.progress import Quiet, Reporter
from lemica_trt.ir import budget
from lemica_trt.ir.budget import Budget, Latency, MinPsnr, Speedup
from lemica_trt.ir.profile import EFFORTS, Effort, Profile
from lemica_trt.ir.resources import absolute_source, is_pipeline, load_named, require_buildable

PROFILE_FIELDS = {
    **{name: ("shape", name) for name in ("frames", "height", "width", "max_batch")},
    "denoising_steps": ("sampling", "steps"),
    **{name: ("sampling", name) for name in ("guidance_scale", "scheduler", "flow_shift", "sigmas", "timesteps")},
    "calibration": ("calibration", "method"),
    **{name: ("calibration", name) for name in ("samples", "rollouts", "validation_samples", "max_skip", "seed")},
    "dtype": ("", "dtype"),
    "max_sequence_length": ("", "text_length"),
    "opset": ("", "opset"),
}
"""Flag → the part of a profile, and the field there, that it sets."""

BUDGETS: dict[str, Callable[[str], Budget]] = {
    "budget": int,
    "speedup": budget.speedup_from_text,
    "latency": budget.latency_from_text,
    "min_psnr": budget.min_psnr_from_text,
}
"""Flags that say what a plan may cost, and how one is read; one of them can be given."""

SEARCH_SAMPLES = 8
"""Validation samples at least, unless a flag says how many, where qualities are measured and not only compared."""

REQUEST_FIELDS = frozenset(BuildRequest.__struct_fields__)

PLANNING_FIELDS = ("budgets", "pareto", "methods", "schedule", "reference_steps")
"""Fields of a request that `plan` asks for anew."""

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
            Times and PSNR may be text with a unit: `latency="800ms"`.

    Raises:
        UsageError: unknown flag, or one with a value that it does not take.
        LemicaError: as `work_commands.build`.
    """
    from lemica_trt.compiler.work_commands import build as build_bundle

    profile = profile_from_flags(model, weights, flags)
    rest = {name: value for name, value in flags.items() if name not in PROFILE_FIELDS and value is not None}
    request = BuildRequest(**request_fields(rest))
    return build_bundle(profile, Path(output or Path("out") / profile.name), request, reporter or Quiet())


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
    effort = effort_from_flags(flags)
    if effort is not None:
        names = ("samples", "rollouts", "validation_samples")
        parts["calibration"] = {name: getattr(effort, name) for name in names}
    if flags.get("min_psnr") is not None or flags.get("pareto"):
        few = parts["calibration"].get("validation_samples", profile.calibration.validation_samples)
        parts["calibration"]["validation_samples"] = max(few, SEARCH_SAMPLES)
    for name, (part, field) in PROFILE_FIELDS.items():
        if flags.get(name) is not None:
            parts[part][field] = flags[name]
    for name in ("sigmas", "timesteps"):
        if flags.get(name) is not None:
            parts["sampling"].setdefault("steps", len(flags[name]))
    try:
        changed = {part: replace(getattr(profile, part), **fields) for part, fields in parts.items() if part}
        source = absolute_source(profile.source if weights is None else weights)
        profile = replace(profile, source=source, **changed, **parts[""])
    except ValueError as error:
        raise UsageError(str(error)) from None
    profile.require_possible()
    return profile


def effort_from_flags(flags: Mapping[str, Any]) -> Effort | None:
    """What `effort` stands for, if it was given.

    Raises:
        UsageError: it is none that there is.
    """
    name = flags.get("effort")
    if name is not None and name not in EFFORTS:
        raise UsageError(f"effort: expected {', '.join(EFFORTS)}, got {name!r}")
    return None if name is None else EFFORTS[name]


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
        raise UsageError(f"--{name.replace('_', '-')}: {what}{got}") from None


def plan_target(
    target: Path,
    flags: Mapping[str, Any],
    reporter: Reporter,
    *,
    default: str | None = None,
    samples: str | None = None,
) -> PlanResult:
    """Plans of a work folder or of a bundle.

    Args:
        flags: of planning, by name.
        default: the bundle's new default plan.
        samples: of the calibration, which goes on; see `work_commands.with_samples`.

    Raises:
        UsageError: `default` for a work folder: only a bundle has one.
    """
    from lemica_trt.compiler import bundle_commands, work_commands

    fields = request_fields(flags)
    if Workspace(target).is_there:
        if default is not None:
            raise UsageError("--default is for bundles", fix="a work folder's first budget becomes the default")
        fields = {**(request_defaults(PLANNING_FIELDS) if samples is None else {}), **fields}
        return work_commands.plan(target, fields, reporter, samples=samples)
    bundle = Bundle.open(target)
    if samples is not None:
        if default is not None:
            raise UsageError("--default cannot be used together with --samples", fix="name it afterwards")
        found = work_commands.extend(target, samples, fields, reporter)
        plans = tuple(found.bundle.plan(name) for name in found.bundle.plans)
        return PlanResult(plans=plans, outcomes=found.outcomes, front=found.front)
    if unused := sorted(fields.keys() - {*PLANNING_FIELDS}):
        raise UsageError(
            f"expected flags of planning only, got {', '.join(unused)}: a bundle is planned without the model, on the "
            "engines that it has",
            fix="leave them out, or plan in the work folder",
        )
    shown = default is not None or "pareto" in fields
    if "budgets" not in fields and shown and not fields.keys() & {"methods", "schedule", "reference_steps"}:
        fields["budgets"] = ()
    return bundle_commands.plan_bundle(bundle, BuildRequest(**fields), reporter, default=default)


def engine_target(target: Path, output: Path, flags: Mapping[str, Any], reporter: Reporter) -> Bundle:
    """Engines of a work folder or of a bundle → a bundle."""
    from lemica_trt.compiler import bundle_commands, work_commands

    if Workspace(target).is_there:
        return work_commands.engine(
            target, output, {**request_defaults(ENGINE_FIELDS), **request_fields(flags)}, reporter
        )
    return bundle_commands.rebuild_engines(Bundle.open(target), output, request_fields(flags), reporter)
