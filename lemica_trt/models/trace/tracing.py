"""A loaded pipeline → its `Trace`."""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import InputError, LemicaError, MissingDependencyError, UnsupportedError
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.trace import (
    StepKind,
    Trace,
    TraceEncoder,
    TraceGuidance,
    TraceRequest,
    TraceSlot,
    TraceState,
    TraceTrunk,
)
from lemica_trt.models.load import quiet
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.models.trace.arguments import (
    BASE,
    GUIDER,
    LONGER,
    LONGER_NEGATIVE,
    OTHER,
    OTHER_NEGATIVE,
    SHORTER,
    SHORTER_NEGATIVE,
    Arguments,
)
from lemica_trt.models.trace.program import Program, programs
from lemica_trt.models.trace.replay import Replay, nonlinearity
from lemica_trt.models.trace.slots import IMAGE, NEGATIVE, PROMPT, SEED, Found, Run, find_slots, kinds_of
from lemica_trt.models.trace.tape import Event, Recorder, Tape, refs
from lemica_trt.models.trace.trunk import find_trunk

GUIDANCE_STEP = 1.25
"""How much a guidance scale is raised in the run that shows what follows it; twice in the run of the check."""

REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError, ImportError)
"""What a pipeline raises for arguments that it does not take."""


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
    arguments = Arguments(pipeline, request)
    runs, components = Runs(pipeline, arguments), pipeline.components
    base = runs.base
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
            TraceState(shape=tuple(x.shape), dtype=_dtype(x), table=table)
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
    )
    return Traced(trace, arguments, runs, found, named)


def record(pipeline: Any, arguments: Arguments, *, last_step: int | None = None, **changes: Any) -> tuple[Tape, Any]:
    """One call of a pipeline, recorded.

    Args:
        last_step: the recording ends before this step; None: with the call.
        changes: of the arguments, see `Arguments.at`.

    Returns:
        The recording, and what the call returned; None where it was ended.

    Raises:
        InputError: the pipeline refuses its arguments.
        MissingDependencyError: it needs a library that is not installed.
    """
    kind, recorder = type(pipeline).__name__, Recorder(pipeline.components, last_step=last_step)
    output = None
    try:
        with torch.no_grad(), quiet(), _guider(pipeline, {**arguments.scales, **changes.get("scales", {})}), recorder():
            output = pipeline(**arguments.at(**changes))
    except LemicaError:
        raise
    except NameError as error:  # diffusers imports optional libraries only where they are there
        raise MissingDependencyError(f"{kind} needs a library that is not installed: {error}") from error
    except REFUSALS as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{kind} refuses its arguments: {line}") from error
    return recorder.tape, output


class Runs:
    """All runs of a trace.

    Attributes:
        base: every argument as requested.
        others: what differs in it → a run that differs from the base run in one thing.
        longer: runs with a longer prompt or negative prompt whose shapes or operators follow its length.
        check: everything is new in it. Its prompt has another length than the base run's, unless shapes follow it.
    """

    def __init__(self, pipeline: Any, arguments: Arguments) -> None:
        self._pipeline, self._arguments = pipeline, arguments
        self.longer: list[Run] = []
        self.base = self._run()
        self.others: dict[str, Run] = {}
        if arguments.has_prompt:
            self.others[PROMPT] = self._other("prompt", LONGER, OTHER)
        if arguments.has_negative:
            self.others[NEGATIVE] = self._other("negative", LONGER_NEGATIVE, OTHER_NEGATIVE)
        if arguments.has_image:
            self.others[IMAGE] = self._run(image=2)
        self.others[SEED] = self._run(seed=12)
        for name, value in arguments.scales.items():
            self.others[name] = self._run(scales={name: value * GUIDANCE_STEP})
        texts = {"prompt": OTHER, "negative": OTHER_NEGATIVE}
        if not self.longer:
            texts = {"prompt": SHORTER, "negative": SHORTER_NEGATIVE}
        scales = {name: value * GUIDANCE_STEP**2 for name, value in arguments.scales.items()}
        self.check = self._run(seed=77, image=3, scales=scales, **texts)

    def _run(self, **changes: Any) -> Run:
        tape, _ = record(self._pipeline, self._arguments, **changes)
        return Run(tape, programs(tape), {**self._arguments.scales, **changes.get("scales", {})})

    def _other(self, what: str, longer: str, other: str) -> Run:
        """A run with a longer text, so that masks show; where shapes follow its length, with one of equal length."""
        run = self._run(**{what: longer})
        if _alike(self.base, run):
            return run
        self.longer.append(run)
        return self._run(**{what: other})

    def following(self, kinds: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """(kind, slot) of the tensors whose shapes follow the length of a text."""
        return [
            (k, slot)
            for k, steps in enumerate(kinds)
            for slot, mine in enumerate(self.base.programs[steps[0]].values)
            if isinstance(mine, Tensor) and any(_follows(mine, run, steps[0], slot) for run in self.longer)
        ]


@contextlib.contextmanager
def _guider(pipeline: Any, scales: Mapping[str, float]) -> Iterator[None]:
    """A guidance scale that is an attribute, set for a run."""
    if GUIDER not in scales:
        yield
        return
    old = pipeline.guider.guidance_scale
    pipeline.guider.guidance_scale = scales[GUIDER]
    try:
        yield
    finally:
        pipeline.guider.guidance_scale = old


def _alike(one: Run, other: Run) -> bool:
    """Whether two runs have the same operators on tensors of the same shapes."""
    return all(
        a.digest == b.digest and all(v.shape == w.shape for v, w in zip(a.values, b.values) if isinstance(v, Tensor))
        for a, b in zip(one.programs, other.programs)
    )


def _follows(mine: Tensor, run: Run, step: int, slot: int) -> bool:
    values = run.programs[step].values
    return slot < len(values) and isinstance(values[slot], Tensor) and values[slot].shape != mine.shape


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


class Slots:
    """Slots by name; those of several kinds of steps that are the same have one.

    Attributes:
        slots: by name, in order.
        of_kind: names of each kind's slots.
    """

    def __init__(
        self, base: Run, ends: Mapping[str, Run], kinds: Sequence[Sequence[int]], found: Sequence[Sequence[Found]]
    ) -> None:
        self.slots: dict[str, TraceSlot] = {}
        self.of_kind: list[list[str]] = []
        self._numbers: dict[tuple[int, int], str] = {}
        by_birth: dict[Any, str] = {}
        for k, (steps, its) in enumerate(zip(kinds, found)):
            names = []
            first = base.programs[steps[0]]
            for number, slot in enumerate(its):
                if slot.role == "constant" and first.births[number] is None:
                    continue
                birth = first.births[number]
                known = by_birth.get((birth, slot)) if slot.role in ("constant", "condition") else None
                name = known or self._add(base, ends, steps, number, slot)
                by_birth[birth, slot] = self._numbers[k, number] = name
                names.append(name)
            self.of_kind.append(names)

    def name(self, kind: int, number: int) -> str | None:
        """The name of a slot; None: it is a constant number."""
        return self._numbers.get((kind, number))

    def _add(self, base: Run, ends: Mapping[str, Run], steps: Sequence[int], number: int, slot: Found) -> str:
        program = base.programs[steps[0]]
        component, argument = program.destination(number)
        value = program.values[number]
        name = stem = "guidance" if slot.role == "guidance" and not component else argument.split(".")[0]
        for k in range(2, 1000):
            if name not in self.slots:
                break
            name = f"{stem}_{k}"
        column, factor = _column(base, ends, steps, number, slot)
        self.slots[name] = TraceSlot(
            name=name,
            role=slot.role,
            of=slot.of,
            component=component,
            argument=argument,
            operator=program.operator(number) if program.operator(number) != component else "",
            dtype=_dtype(value),
            shape=tuple(value.shape) if isinstance(value, Tensor) else (),
            column=column,
            factor=factor,
        )
        return name


def _column(
    base: Run, ends: Mapping[str, Run], steps: Sequence[int], number: int, slot: Found
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Offset and factor of each step, where all elements of the slot are equal."""
    if slot.role not in ("column", "guidance"):
        return (), ()
    starts = [_uniform(base.programs[i].values[number]) for i in steps]
    if any(start is None for start in starts):
        return (), ()
    values = [start for start in starts if start is not None]
    if slot.role == "column":
        return tuple(values), ()
    name = slot.of[-1]
    run = ends[name]
    factors = []
    for i, start in zip(steps, values):
        end = _uniform(run.programs[i].values[number])
        factors.append(((start if end is None else end) - start) / (run.scales[name] - base.scales[name]))
    return tuple(v - f * base.scales[name] for v, f in zip(values, factors)), tuple(factors)


def _uniform(value: Any) -> float | None:
    if isinstance(value, Tensor):
        first = value.double().flatten()[0] if value.numel() else None
        return None if first is None or not bool((value.double() == first).all()) else float(first)
    return float(value)


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__


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
