"""`shape`, and `build` with further shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import change_buckets, require_further
from lemica_trt.compiler import work_commands
from lemica_trt.compiler.bundle_plans import note_signatures
from lemica_trt.compiler.bundle_verify import profile_of_bundle
from lemica_trt.compiler.inspection import shape_summary
from lemica_trt.compiler.requests import BuildRequest, BuildResult, prompts_of
from lemica_trt.compiler.shapes import add_shapes, shaped
from lemica_trt.core.errors import UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.ir.profile import Lora, Profile, Shape, sizes_from_name
from lemica_trt.ir.report import ShapeSummary, StageEstimate


def shape(
    bundle: Bundle,
    add: Sequence[str],
    reporter: Reporter,
    *,
    samples: int,
    remove: Sequence[str] = (),
    weights: str | None = None,
    loras: tuple[Lora, ...] = (),
    prompts: Path | None = None,
    device: str | None = None,
) -> tuple[Bundle, list[ShapeSummary]]:
    """Add shapes to a bundle, or remove some.

    Args:
        add, remove: `FRAMESxHEIGHTxWIDTH`; neither: nothing changes. Of one that is there the plans are measured again.
        samples: held-out clips that each plan runs on.
        weights, loras, prompts, device: as `bundle_verify.verify` takes them.

    Returns:
        The bundle as it is then, and its further shapes, or those that were added.

    Raises:
        UsageError: a shape is malformed, given twice, or the bundle's own; or one to remove is not there.
        LemicaError: as `shapes.add_shapes`.
    """
    names = [Shape(**sizes_from_name(text)).name for text in remove]
    if both := [name for name in names if name in {Shape(**sizes_from_name(text)).name for text in add}]:
        raise UsageError(f"--remove: {both[0]} is to be added, too", fix="leave out one of the two")
    profile = profile_of_bundle(bundle, weights, loras) if add else bundle.manifest.profile
    profiles = shaped(profile, add, bundle.shapes[:1])
    held_out = prompts_of(profile, None if prompts is None else str(prompts), split="held_out") if add else ()
    require_further(bundle, names)
    found: list[ShapeSummary] = []
    if profiles:
        bundle, found = add_shapes(bundle, profiles, held_out, samples, reporter, device=device)
    if names:
        note_signatures(bundle, reporter)
        bundle = change_buckets(bundle, remove=names)
    return bundle, found or [shape_summary(bundle, name) for name in bundle.shapes[1:]]


def build(
    profile: Profile, further: Sequence[str], output: Path, request: BuildRequest, reporter: Reporter
) -> BuildResult:
    """`work_commands.build`, and further shapes of the bundle behind it.

    Where a further shape fails, the bundle of the first one is there; the same command, or `shape`, goes on.

    Raises:
        UsageError: a shape is malformed or given twice, or nothing is to be verified.
        LemicaError: as `work_commands.build` and `shapes.add_shapes`.
    """
    profiles = _profiles(profile, further, request)
    work_commands.note_gone(output, {each.shape.name for each in profiles}, reporter)
    made = work_commands.build(profile, output, request, reporter)
    if not profiles:
        return made
    held_out = prompts_of(profile, None, split="held_out")
    bundle, shapes = add_shapes(
        made.bundle, profiles, held_out, request.verify_samples, reporter, device=request.device
    )
    return made._replace(bundle=bundle, shapes=tuple(shapes))


def dry_run(profile: Profile, further: Sequence[str], output: Path, request: BuildRequest) -> list[StageEstimate]:
    """`work_commands.dry_run`, and a line for each further shape."""
    profiles = _profiles(profile, further, request)
    what = f"graphs, engines; every plan on {request.verify_samples} held-out clips"
    shapes = [StageEstimate(name=each.shape.name, what=what) for each in profiles]
    return [*work_commands.dry_run(profile, output, request), *shapes]


def _profiles(profile: Profile, further: Sequence[str], request: BuildRequest) -> list[Profile]:
    """The profile at each further shape.

    Raises:
        UsageError: see `build`.
    """
    if further and not request.verify_samples:
        raise UsageError(
            "--shape: plans must be measured at a further shape, and --verify-samples is 0", fix="--verify-samples 1"
        )
    return shaped(profile, further, [profile.shape.name])
