"""A finished bundle verified again, against the model that it was built from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lemica_trt.bundle.manifest import shape_report
from lemica_trt.bundle.reading import Bundle
from lemica_trt.compiler.bundle_stages import verify_bundle
from lemica_trt.compiler.context import open_model
from lemica_trt.compiler.requests import prompts_of
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.progress import Reporter
from lemica_trt.core.values import write_value
from lemica_trt.evaluate.step_timer import require_runnable
from lemica_trt.ir.profile import Lora, Profile
from lemica_trt.ir.resources import absolute_source

if TYPE_CHECKING:
    from lemica_trt.ir.report import VerifyReport
    from lemica_trt.models import Model


def verify(
    bundle: Bundle,
    weights: str | None,
    samples: int,
    device: str | None,
    backend: str | None,
    reporter: Reporter,
    *,
    prompts: Path | None = None,
    loras: tuple[Lora, ...] = (),
) -> VerifyReport:
    """Verify a bundle against the model that it was built from, on the backend named or the first that runs here.

    Args:
        prompts: file of held-out prompts; None: the profile's.
        loras: the LoRA weights that were fused; empty: as the bundle names them.

    Raises:
        MissingDependencyError: none of its engines can run here.
        InputError: these are other weights; or no prompts can be read, which is found before the model is loaded.
    """
    backend = backend or require_runnable(bundle, fix="verify the bundle where they run")
    profile = profile_of_bundle(bundle, weights, loras)
    held_out = prompts_of(profile, None if prompts is None else str(prompts), split="held_out")
    model = open_model(profile, reporter, device=device)
    require_same_weights(bundle, model.revision, model.profile)
    if bundle.manifest.default_bucket != bundle.shapes[0]:
        return verify_shape(bundle, model, held_out, samples, reporter, backend=backend)
    return verify_bundle(bundle, model, held_out, samples, reporter, backend=backend)


def verify_shape(
    bundle: Bundle, model: Model, prompts: Sequence[str], samples: int, reporter: Reporter, *, backend: str
) -> VerifyReport:
    """Verify a bundle at a further shape, each plan beside the sampler at as few steps, and store the report.

    Args:
        bundle: looked at as one of that shape.
        model: at that shape.
        prompts, samples, backend: as `bundle_stages.verify_bundle` takes them.

    Raises:
        VerificationError: after the report was stored.
    """
    from lemica_trt.evaluate.samples import held_out_samples
    from lemica_trt.evaluate.verify import require_verified
    from lemica_trt.evaluate.verify import verify as run

    held_out, name = held_out_samples(prompts, samples), bundle.manifest.profile.shape.name
    report, _, _ = run(bundle, model, held_out, reporter=reporter, backend=backend, every=True)
    write_value(report, bundle.path / shape_report(name))
    require_verified(report, bundle.path)
    return report


def require_same_weights(bundle: Bundle, revision: str, profile: Profile) -> None:
    """Raise InputError unless a model's weights are those that a bundle was built from.

    Args:
        revision: of the model.
        profile: that it was loaded for.
    """
    if revision != bundle.manifest.revision:
        raise InputError(
            f"expected the weights that the bundle was built from ({str(bundle.manifest.revision)[:12]}), "
            f"got {revision[:12]} in {profile.source}",
            fix="name the right folder with --weights and LoRA weights with --lora and --lora-2, or rebuild the bundle",
        )


def profile_of_bundle(bundle: Bundle, weights: str | None, loras: tuple[Lora, ...] = ()) -> Profile:
    """The profile that a bundle was built as, pointing at weights that are here.

    Raises:
        UsageError: the bundle was built from a local folder, or from LoRA weights in a file, and that is not named.
    """
    profile = bundle.manifest.profile
    if loras:
        profile = msgspec.structs.replace(profile, loras=loras)
    elif local := [lora for lora in profile.loras or () if lora.on_hub is None]:
        raise UsageError(
            f"the bundle was built with LoRA weights of a local file {local[0].source!r}, which it does not carry",
            fix="name all that were fused, in their order: " + " ".join(lora.flag for lora in profile.loras or ()),
        )
    if weights is not None:
        return msgspec.structs.replace(profile, source=absolute_source(weights))
    if ":" in profile.source or "/" in profile.source:  # package:NAME or a hub id; of folders only the name is kept
        return profile
    raise UsageError(
        f"the bundle was built from a local folder {profile.source!r}, which it does not carry",
        fix="name it: --weights DIR",
    )
