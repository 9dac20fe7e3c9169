"""`trace`: what a diffusers pipeline does around its networks; `models`: those that have a name."""

from __future__ import annotations

from typing import Any

import click

from lemica_trt.cli import completion, options
from lemica_trt.cli.command import Command, flag, flags
from lemica_trt.cli.options import Screen, common
from lemica_trt.core.errors import UsageError
from lemica_trt.ir.resources import is_pipeline, load_named, load_profile, profile_names
from lemica_trt.ir.trace import TraceRequest


@click.command(
    cls=Command,
    short_help="Show how a diffusers pipeline denoises, and what was found.",
    examples=("trace --model DIR", "trace --model OWNER/NAME --steps 4 --json"),
)
@flags(
    "Model",
    flag("--model", required=True, metavar="NAME|DIR|HUB_ID", shell_complete=completion.models,
         help="Named model (see `lemica-trt models`), diffusers folder or hub id."),
    options.lora,
    options.lora_2,
    flag("--steps", type=click.IntRange(2), default=4, show_default=True,
         aliases=("--num-inference-steps", "--denoising-steps"), help="Denoising steps of each run."),
    flag("--frames", type=int, otherwise="the profile's or pipeline's", aliases=("--num-frames",),
         help="Video frames."),
    flag("--height", type=int, otherwise="the profile's or pipeline's", help="Pixels."),
    flag("--width", type=int, otherwise="the profile's or pipeline's", help="Pixels."),
    flag("--guidance-scale", type=float, aliases=("--cfg-scale",),
         help="First guidance parameter of the pipeline's call."),
    flag("--max-sequence-length", type=int, advanced=True, help="Tokens of a prompt."),
    flag("--image", is_flag=True, help="Give an image also where the pipeline does not require one."),
    flag("--argument", "arguments", multiple=True, metavar="NAME=VALUE",
         help="Another argument of the pipeline's call; repeat for several."),
    flag("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), otherwise="the profile's, or fp32",
         aliases=("--torch-dtype",), help="Precision of all networks."),
    flag("--without-weights", is_flag=True, otherwise="on where there are none",
         help="Read configurations alone: seconds and little memory at any size."),
    options.device,
)  # fmt: skip
@common
def trace(
    screen: Screen,
    model: str,
    lora: tuple[str, ...],
    lora_2: tuple[str, ...],
    arguments: tuple[str, ...],
    dtype: Any,
    without_weights: bool,
    device: str | None,
    **given: Any,
) -> None:
    """Run a pipeline a few times and show how its denoising loop works; the last run checks what was found.

    Shows its kinds of steps, conditions, columns, guidance, encoders and trunk, and whether shapes follow the prompt.
    No family is known by name; what cannot be traced is refused with the reason. Nothing is built. Without weights its
    networks are run on shapes, and the loop around them in numbers.
    """
    import msgspec

    from lemica_trt.cli.flags import loras_from_flags

    profile = None if is_pipeline(model) else load_profile(model)
    source = model if profile is None else profile.source
    loras = loras_from_flags(lora, lora_2) or (profile.loras if profile is not None and profile.loras else ())
    fields = {**options.given(given), "arguments": dict(map(_argument, arguments))}
    request = msgspec.convert(fields, TraceRequest, strict=True)

    from lemica_trt.models.load import is_bare, load_pipeline, usable_device
    from lemica_trt.models.trace import trace_pipeline
    from lemica_trt.models.traced import request_from_profile
    from lemica_trt.report.trace import trace_table

    screen.reporter.stage("load", source)
    pipeline = load_pipeline(
        source,
        dtype=dtype or (profile.dtype if profile is not None else "fp32"),
        device=usable_device(device),
        sampling=None if profile is None else profile.sampling,
        loras=loras,
        weights=not without_weights and not is_bare(source),
    )
    if profile is not None:
        own = request_from_profile(profile, pipeline)
        request = msgspec.structs.replace(own, **{**fields, "arguments": {**own.arguments, **request.arguments}})
    screen.reporter.stage("trace", f"{type(pipeline).__name__}, {request.steps} steps a run")
    found = trace_pipeline(pipeline, request)
    screen.print(found, lambda: trace_table(found))


@click.command(cls=Command, short_help="The named models: weights, settings, what was run.", examples=("models",))
@common
def models(screen: Screen) -> None:
    """List the named models: weights, sampling and shape as their cards have them, and what was run so far.

    --model takes these names, other hub ids, and folders of diffusers pipelines.
    """
    from lemica_trt.report.models import models_table

    found = [load_named(name) for name in profile_names()]
    screen.print(found, lambda: models_table(found))


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
