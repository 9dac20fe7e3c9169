"""What tracing finds in a diffusers pipeline: the body of its denoising loop, and where all that it reads comes from.

Knows nothing of torch; `lemica_trt.models.trace` makes it.
"""

from __future__ import annotations

from typing import Literal

from lemica_trt.core.values import Value, require
from lemica_trt.ir.sampler import SamplerTable

SlotRole = Literal["constant", "column", "condition", "guidance"]
"""`constant`: the same in all runs and steps. `column`: another value each step, the same in all runs. `condition`: the
same in all steps of a request, made of its prompt, negative prompt, image or noise. `guidance`: follows a guidance
scale, as offset + factor·scale at each step."""


class TraceRequest(Value, frozen=True):
    """What a pipeline is called with while it is traced; None: its own default.

    Attributes:
        steps: denoising steps.
        height, width: pixels.
        frames: video frames.
        guidance_scale: value of the first guidance parameter.
        max_sequence_length: tokens of a prompt.
        image: whether an image is given where the call does not require one.
        last_image: whether a last one is given beside it.
        arguments: further keyword arguments of the pipeline's call.
    """

    steps: int = 4
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    image: bool = False
    last_image: bool = False
    arguments: dict[str, bool | int | float | str] = {}

    def __post_init__(self) -> None:
        require(self.steps >= 2, f"steps must be at least 2, got {self.steps}")


class TraceSlot(Value, frozen=True):
    """Something that the loop's body reads.

    Attributes:
        name: unique in the trace.
        role: see `SlotRole`.
        of: what changes it: `step`, `prompt`, `negative_prompt`, `image`, `seed`, or a guidance parameter.
        component, argument: what it reaches, through operators where `operator` is one; "" and `output`: the sampler.
        dtype, shape: torch's name of the dtype, `float` or `int` for a number.
        column: of a column whose elements are equal, or a guidance slot: one number a step; of other slots empty.
        factor: of a guidance slot: what the guidance scale is multiplied by, one number a step.
    """

    name: str
    role: SlotRole
    of: tuple[str, ...]
    component: str
    argument: str
    operator: str
    dtype: str
    shape: tuple[int, ...]
    column: tuple[float, ...] = ()
    factor: tuple[float, ...] = ()


class StepKind(Value, frozen=True):
    """Steps whose bodies are the same program.

    Attributes:
        steps: numbers i of the steps.
        calls: components in the order in which they are called.
        operators: name → count, of the operators between the calls and around them.
        slots: names of the slots that the program reads.
        digest: of the program, without values.
    """

    steps: tuple[int, ...]
    calls: tuple[str, ...]
    operators: dict[str, int]
    slots: tuple[str, ...]
    digest: str


class TraceState(Value, frozen=True):
    """Latents that a sampler steps.

    Attributes:
        shape: of x_i, with batch.
        dtype: torch's name.
        table: the sampler at the steps of the trace.
    """

    shape: tuple[int, ...]
    dtype: str
    table: SamplerTable


class TraceGuidance(Value, frozen=True):
    """How guidance is done.

    Attributes:
        parameters: arguments of the pipeline's call that the body follows.
        calls: of networks in a step.
        doubled: whether a call's batch is a multiple of the latents' (both branches at once).
        nonlinearity: how far the guided output is from linear in what the networks return, relative; rounding: about
            1e-7. Rescaled guidance is not linear.
    """

    parameters: tuple[str, ...]
    calls: int
    doubled: bool
    nonlinearity: float


class TraceEncoder(Value, frozen=True):
    """What runs before the loop, in order: a tokenizer, a text or image encoder, a VAE.

    Attributes:
        component: name of the component; `vae.encode` where that is a method.
        kind: class name.
        template: of a tokenizer: what stands around the prompt (`{prompt}` for it); "" where nothing does.
        outputs: shapes of its tensors.
    """

    component: str
    kind: str
    template: str
    outputs: tuple[tuple[int, ...], ...]


class TraceTrunk(Value, frozen=True):
    """The blocks of a transformer, and the hidden streams that they add to.

    Attributes:
        component: of the pipeline.
        lists: names of its block lists → number of blocks.
        share: of the component's parameters that are in them.
        streams: module behind the blocks, and its argument, for each stream that the blocks add to; empty: no way was
            found to leave the blocks out, and `reason` says why.
        error: largest deviation of the output without blocks, their residual added, relative.
        reason: why there is none.
    """

    component: str
    lists: dict[str, int]
    share: float
    streams: tuple[tuple[str, str], ...]
    error: float
    reason: str = ""


class Trace(Value, frozen=True, omit_defaults=True):
    """A pipeline, traced. Nothing of it is believed before a run with another prompt, seed and guidance scale is
    reproduced from it (`error`).

    Attributes:
        pipeline: class name.
        libraries: name → version, of those that it depends on.
        arguments: what the pipeline was called with, as far as it is a number or text.
        states: one sampler each.
        kinds: of steps, in order of their first step.
        slots: what the bodies read, in order.
        guidance, encoders, trunks: see there.
        text: `fixed`: a longer prompt changes no shape. `free`: shapes follow the length of the prompt. `none`: there
            is no prompt.
        text_slots: names of the slots whose shapes follow the prompt.
        python: values that become Python's inside a network (`transformer: tolist`); an export bakes them.
        error: largest deviation of the final latents of another prompt, seed and guidance scale, relative to the
            largest of them; of a pipeline in half precision, largest deviation of any one step.
        dtype: torch's name of the precision: the coarsest of the latents' and the networks' outputs. `float32` is not
            written.
        without_weights: whether networks stood in for themselves, see `models.stand_ins`: the trunk is found by how
            things are computed, and `error` is of the loop around them.
    """

    pipeline: str
    libraries: dict[str, str]
    arguments: dict[str, bool | int | float | str]
    states: tuple[TraceState, ...]
    kinds: tuple[StepKind, ...]
    slots: tuple[TraceSlot, ...]
    guidance: TraceGuidance
    encoders: tuple[TraceEncoder, ...]
    trunks: tuple[TraceTrunk, ...]
    text: Literal["fixed", "free", "none"]
    text_slots: tuple[str, ...]
    python: tuple[str, ...]
    error: float
    dtype: str = "float32"
    without_weights: bool = False

    def __post_init__(self) -> None:
        names = [slot.name for slot in self.slots]
        require(len(set(names)) == len(names), f"slots must have different names, got {', '.join(names)}")
        unknown = {name for kind in self.kinds for name in kind.slots} - set(names)
        require(not unknown, f"kinds of steps read slots that are not there: {', '.join(sorted(unknown))}")
        steps = sorted(step for kind in self.kinds for step in kind.steps)
        require(steps == list(range(len(steps))), "each step must be of one kind")

    def role(self, role: SlotRole) -> tuple[TraceSlot, ...]:
        """The slots of a role."""
        return tuple(slot for slot in self.slots if slot.role == role)
