"""What to type where engines are for another machine."""

from __future__ import annotations

import shlex

from lemica_trt.bundle import ERROR_GRAPH_FILE, Bundle
from lemica_trt.resources import load_profile, profile_names
from lemica_trt.spec import Profile

_BUILD_FLAGS = (
    "--weights", "--dtype", "--frames", "--height", "--width", "--max-batch", "--denoising-steps", "--guidance-scale",
    "--scheduler", "--opset",
)  # fmt: skip


def rebuild_command(bundle: Bundle, backend: str) -> str:
    """The command that builds a bundle again, with the same plans, for one backend on the machine where it is typed.

    It goes on from the bundle's own error graph and leaves the old bundle alone.
    """
    manifest = bundle.manifest
    profile = manifest.profile
    known = load_profile(profile.name) if profile.name in profile_names() else None
    command = ["lemica-trt", "build", "--model", profile.name if known else f"{profile.name}.toml"]
    for flag, value, usual in zip(_BUILD_FLAGS, _build_values(profile), _build_values(known or profile)):
        if value != usual:
            command += [flag, str(value)]
    plans = [bundle.plan(name) for name in sorted(bundle.plans, key=lambda name: name != manifest.default_plan)]
    plans = [plan for plan in plans if plan.method != "none"] or plans[:1]
    command += ["--budget", ",".join(str(plan.budget) for plan in plans)]
    if plans[0].method == "given":
        command = [*command[:-2], "--schedule", ",".join(str(step) for step in plans[0].full_steps)]
    elif plans[0].method in ("uniform", "least-sum", "published"):
        command += ["--method", plans[0].method]
    if ERROR_GRAPH_FILE in manifest.files:
        command += ["--error-graph", str(bundle.path / ERROR_GRAPH_FILE)]
    return shlex.join([*command, "--backend", backend, "--output", f"{bundle.path}-here"])


def _build_values(profile: Profile) -> tuple[object, ...]:
    """What `_BUILD_FLAGS` say of a profile."""
    shape, sampling = profile.shape, profile.sampling
    return (
        profile.source, profile.dtype, shape.frames, shape.height, shape.width, shape.max_batch, sampling.steps,
        sampling.guidance_scale, sampling.scheduler, profile.opset,
    )  # fmt: skip
