"""A loaded pipeline → its `Trace`."""

from __future__ import annotations

import collections
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.trace import (
    StepKind,
    Trace,
    TraceEncoder,
    TraceGuidance,
    TraceRequest,
    TraceState,
    TraceTrunk,
)
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.models.stand_ins import is_stand_in
from lemica_trt.models.trace.arguments import (
    BASE,
    Arguments,
)
from lemica_trt.models.trace.named import Slots, dtype_name
from lemica_trt.models.trace.program import Program
from lemica_trt.models.trace.replay import Replay, nonlinearity, precision
from lemica_trt.models.trace.runs import Runs
from lemica_trt.models.trace.slots import PROMPT, Found, Run, find_slots, kinds_of
from lemica_trt.models.trace.tape import Event, refs
from lemica_trt.models.trace.trunk import find_trunk


@dataclass(frozen=True)
class Traced:
    """A trace, and what it was made from.

    Attributes:
        arguments: of the pipeline's call.
        runs: the recordings.
        found: what each slot is, by kind of step.
        named: slots by name.
    """

    trace: Trace
    arguments: Arguments
    runs: Runs
    found: list[list[Found]]
    named: Slots


def trace_pipeline(pipeline: Any, request: TraceRequest = TraceRequest()) -> Trace:  # noqa: B008  # frozen
    """Trace a pipeline: five to nine runs of its own `__call__`, a few steps each, and a check on another request.

    Where its steps are of several kinds, these runs are as long as it takes to have three steps of each.

    Args:
        pipeline: a loaded diffusers pipeline; it is called, and not changed. While this runs, `step` of its
            scheduler's class is wrapped: no other thread may use that class.
        request: what it is called with.

    Raises:
        UnsupportedError: its loop cannot be traced; says which slot or operator, and why.
        InputError: it refuses its arguments.
        UsageError: it has no such argument.
    """
    return trace_runs(pipeline, request).trace


def trace_runs(pipeline: Any, request: TraceRequest) -> Traced:
    """The same, with the recordings."""
    runs, components = Runs(pipeline, Arguments(pipeline, request)), pipeline.components
    base, arguments = runs.base, runs.arguments
    tables = _tables(base)
    kinds = kinds_of(base, {**runs.others, "prompt, seed and guidance scale": runs.check})
    _refuse_host_reads(base.programs)
    found = [find_slots(base, runs.others, steps) for steps in kinds]
    _require_prompt(arguments, found)
    ends = {name: runs.others[name] for name in arguments.scales}
    error = Replay(base, kinds, found, ends).check(runs.check, tables, components)
    named = Slots(base, ends, kinds, found)
    trace = Trace(
        pipeline=type(pipeline).__name__,
        libraries={name: importlib.metadata.version(name).partition("+")[0] for name in ("diffusers", "transformers")},
        arguments=arguments.numbers(),
        states=tuple(
            TraceState(shape=tuple(x.shape), dtype=dtype_name(x), table=table)
            for x, table in zip(base.programs[0].x, tables)
        ),
        kinds=tuple(_kind(base.programs[steps[0]], steps, names) for steps, names in zip(kinds, named.of_kind)),
        slots=tuple(named.slots.values()),
        guidance=_guidance(base, named.slots.values()),
        encoders=_encoders(base, components, arguments),
        trunks=_trunks(base, runs.check, components),
        text="free" if runs.longer else "fixed" if arguments.has_prompt else "none",
        text_slots=tuple(dict.fromkeys(filter(None, (named.name(*at) for at in runs.following(kinds))))),
        python=tuple(sorted(f"{name}: {how}" for name, how in base.tape.inside if name in _networks(base))),
        error=error,
        without_weights=any(is_stand_in(part) for part in components.values()),
        **({"dtype": str(dtype).removeprefix("torch.")} if (dtype := precision(base)).itemsize < 4 else {}),
    )
    return Traced(trace, arguments, runs, found, named)


def _tables(base: Run) -> list[SamplerTable]:
    tables = []
    for scheduler in base.tape.schedulers.values():
        table = sampler_table(scheduler)
        if table.num_steps != len(base.programs):
            raise UnsupportedError(
                f"it calls {type(scheduler).__name__}.step {len(base.programs)} times for {table.num_steps} steps"
            )
        tables.append(table)
    return tables


def _refuse_host_reads(found: Sequence[Program]) -> None:
    for program in found:
        for how, _ in program.host:
            raise UnsupportedError(f"step {program.index} reads what depends on the latents by .{how}()")


def _require_prompt(arguments: Arguments, found: Sequence[Sequence[Found]]) -> None:
    if arguments.has_prompt and not any(PROMPT in slot.of for its in found for slot in its):
        raise UnsupportedError(
            "nothing that its loop reads follows the prompt", fix="give a longer --max-sequence-length"
        )


def _kind(program: Program, steps: Sequence[int], names: Sequence[str]) -> StepKind:
    operators = collections.Counter(str(node.what) for node in program.nodes if node.kind == "op")
    return StepKind(
        steps=tuple(steps),
        calls=tuple(str(node.what) for node in program.calls),
        operators=dict(sorted(operators.items())),
        slots=tuple(dict.fromkeys(names)),
        digest=program.digest,
    )


def _guidance(base: Run, slots: Any) -> TraceGuidance:
    program = base.programs[-1]
    batches = [
        base.tape.values[ref].shape[0]
        for item in base.tape.items[slice(*program.span)]
        if isinstance(item, Event) and item.kind == "call"
        for ref in refs(item.outs)[:1]
        if base.tape.values[ref].dim()
    ]
    followed = dict.fromkeys(slot.of[-1] for slot in slots if slot.role == "guidance")
    return TraceGuidance(
        parameters=tuple(followed),
        calls=len(program.calls),
        doubled=any(batch > program.x[0].shape[0] for batch in batches),
        nonlinearity=nonlinearity(base),
    )


def _encoders(base: Run, components: Mapping[str, Any], arguments: Arguments) -> tuple[TraceEncoder, ...]:
    """What runs before the loop, without repetitions."""
    found: dict[TraceEncoder, None] = {}
    loop = _networks(base)
    for item in base.tape.items[: base.programs[0].span[0]]:
        if not isinstance(item, Event) or item.kind not in ("call", "tokenize") or item.name in loop:
            continue
        shapes = tuple(tuple(base.tape.values[ref].shape) for ref in refs(item.outs))
        template = ""
        if item.kind == "tokenize":
            texts = [leaf for leaf in pytree.tree_leaves(item.inputs) if isinstance(leaf, str) and BASE in leaf]
            template = texts[0].replace(BASE, "{prompt}") if texts else ""
            if not texts:  # of a negative prompt: the same component in another call
                continue
        kind = type(components.get(item.name.partition(".")[0])).__name__
        found[TraceEncoder(component=item.name, kind=kind, template=template, outputs=shapes)] = None
    return tuple(found)


def _trunks(base: Run, check: Run, components: Mapping[str, Any]) -> tuple[TraceTrunk, ...]:
    """The trunk of each network that the loop calls, found on the base run and held against the check's."""
    found = []
    for name in _networks(base):
        component, _, path = name.partition(".")
        module = components[component]
        if not isinstance(module, nn.Module) or path in ("encode", "decode"):
            continue
        module = module.get_submodule(path) if path else module
        if not any(True for _ in module.parameters()):
            continue
        calls = [_arguments(run, name) for run in (base, check)]
        found.append(find_trunk(name, module, [call for call in calls if call is not None]))
    return tuple(found)


def _networks(run: Run) -> dict[str, None]:
    """Names of what the loop calls, in order."""
    return dict.fromkeys(str(node.what) for program in run.programs for node in program.calls)


def _arguments(run: Run, name: str) -> dict[str, Any] | None:
    """What the last call of a network was given."""
    for item in reversed(run.tape.items):
        if isinstance(item, Event) and item.kind == "call" and item.name == name:
            given = pytree.tree_map(run.tape.value, item.inputs)
            return {key: value for key, value in given.items() if not key.isdecimal()}
    return None
