"""`trace`: what a diffusers pipeline does around its networks."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click

from lemica_trt.cli import options
from lemica_trt.cli.options import Screen, common, flags
from lemica_trt.core.errors import UsageError
from lemica_trt.ir.resources import load_profile, profile_names
from lemica_trt.ir.trace import TraceRequest


@click.command()
@flags(
    click.option("--model", required=True, metavar="NAME|DIR|HUB_ID",
                 help="Build profile, diffusers folder or hub id."),
    click.option("--steps", "--num-inference-steps", "--denoising-steps", type=click.IntRange(2), default=4,
                 show_default=True, help="Denoising steps of each run."),
    click.option("--frames", "--num-frames", type=int, help="Video frames  [default: the profile's or pipeline's]"),
    click.option("--height", type=int, help="Pixels  [default: the profile's or pipeline's]"),
    click.option("--width", type=int, help="Pixels  [default: the profile's or pipeline's]"),
    click.option("--guidance-scale", type=float, help="First guidance parameter of the pipeline's call."),
    click.option("--max-sequence-length", type=int, help="Tokens of a prompt."),
    click.option("--image", is_flag=True, help="Give an image also where the pipeline does not require one."),
    click.option("--argument", "arguments", multiple=True, metavar="NAME=VALUE",
                 help="Another argument of the pipeline's call; repeat for several."),
    click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]),
                 help="Precision of all networks  [default: the profile's, or fp32]"),
    options.device,
)  # fmt: skip
@common
def trace(screen: Screen, model: str, arguments: tuple[str, ...], dtype: Any, device: str | None, **given: Any) -> None:
    """Run a pipeline a few times and show how its denoising loop works; the last run checks what was found.

    Shows its kinds of steps, conditions, columns, guidance, encoders and trunk, and whether shapes follow the prompt.
    No family is known by name; what cannot be traced is refused with the reason. Nothing is built.
    """
    import msgspec

    source, known = _source(model)
    fields = {**known, **options.given(given), "arguments": dict(map(_argument, arguments))}
    precision = dtype or fields.pop("dtype", "fp32")
    fields.pop("dtype", None)
    request = msgspec.convert(fields, TraceRequest, strict=True)

    from lemica_trt.models.load import load_pipeline, usable_device
    from lemica_trt.models.trace import trace_pipeline
    from lemica_trt.report.trace import trace_table

    screen.reporter.stage("load", source)
    pipeline = load_pipeline(source, dtype=precision, device=usable_device(device))
    screen.reporter.stage("trace", f"{type(pipeline).__name__}, {request.steps} steps a run")
    found = trace_pipeline(pipeline, request)
    screen.print(found, lambda: trace_table(found))


def _source(model: str) -> tuple[str, dict[str, Any]]:
    """Where a model is, and what its profile says of a call.

    Raises:
        UsageError: neither a profile nor a folder nor a hub id.
    """
    names = profile_names()
    if model in names or model.endswith(".toml"):
        profile = load_profile(model)
        shape = profile.shape
        return profile.source, {
            "height": shape.height,
            "width": shape.width,
            "frames": shape.frames,
            "guidance_scale": profile.sampling.guidance_scale,
            "max_sequence_length": profile.text_length,
            "dtype": profile.dtype,
        }
    if Path(model).is_dir() or model.count("/") == 1:
        return model, {}
    near = difflib.get_close_matches(model, names, n=3, cutoff=0.5)
    raise UsageError(
        f"expected a profile, a diffusers folder or a hub id, got {model!r}",
        fix=f"did you mean {' or '.join(near)}?" if near else f"profiles: {', '.join(names)}",
    )


def _argument(text: str) -> tuple[str, bool | int | float | str]:
    """`NAME=VALUE`; a value is a truth value or a number where it reads as one."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(
            f"--argument must be NAME=VALUE, got {text!r}", fix="for example --argument clean_caption=false"
        )
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
