"""What tracing found in a pipeline, as `lemica-trt trace` prints it: 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lemica_trt.ir.trace import StepKind, Trace, TraceSlot, TraceState
from lemica_trt.report.summary import table

WIDTH = 80

SHOWN = 6
"""Constants that are named; the rest are counted."""

LINEAR = 1e-4
"""Guidance is linear in what the networks return up to this, relative."""

ROLES = {
    "condition": "Conditions: inputs of a request",
    "column": "Columns: another value each step",
    "guidance": "Guidance: follows a scale",
}


def trace_table(trace: Trace) -> RenderableType:
    """A trace for a person."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold", max_width=WIDTH - 12)
    for name, text in _facts(trace):
        facts.add_row(name, text)
    parts: list[RenderableType] = [Text(_title(trace), style="bold"), Text(""), facts]
    for role, title in ROLES.items():
        slots = [slot for slot in trace.slots if slot.role == role]
        if slots:
            parts += [Text(""), slots_table(title, slots)]
    if trace.encoders:
        parts += [Text(""), _encoders_table(trace)]
    return Group(*parts)


def _title(trace: Trace) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in trace.libraries.items())
    return f"{trace.pipeline}  ({libraries})"


def _facts(trace: Trace) -> Iterator[tuple[str, str]]:
    yield "traced at", ", ".join(f"{name}={value}" for name, value in trace.arguments.items())
    for state in trace.states:
        yield "latents", _state(state)
    for kind in trace.kinds:
        yield "steps", _kind(kind)
    yield "guidance", guidance_text(trace)
    for trunk in trace.trunks:
        if trunk.streams:
            lists = ", ".join(f"{name} ({count})" for name, count in trunk.lists.items())
            streams = " and ".join(dict.fromkeys(name for name, _ in trunk.streams))
            yield "trunk", f"{trunk.component}: {lists}; {trunk.share:.0%} of its parameters; adds to {streams}"
        else:
            yield "trunk", f"{trunk.component}: none that can be left out; {trunk.reason}"
    yield "text", text_text(trace)
    baked = [f"{slot.name} {_shape(slot.shape)}" for slot in trace.role("constant")]
    if baked:
        rest = f", and {len(baked) - SHOWN} more" if len(baked) > SHOWN else ""
        yield "baked", ", ".join(baked[:SHOWN]) + rest
    if trace.python:
        yield "in Python", f"{', '.join(trace.python)}: an export would bake it"
    if trace.without_weights:
        yield "weights", "none were read: networks by their configuration, the loop around them in numbers"
    agree = "latents agree" if trace.dtype == "float32" else f"each step in {trace.dtype} agrees"
    yield "check", f"another prompt, seed and guidance scale: {agree} to {trace.error:.0e} of the largest"


def _state(state: TraceState) -> str:
    sampler = state.table
    kept = f"keeps {sampler.latent_history} latents and {sampler.output_history} outputs"
    noise = "draws noise" if sampler.stochastic else "deterministic"
    return f"{_shape(state.shape)} {state.dtype}; {sampler.scheduler}: {kept}, {noise}"


def _kind(kind: StepKind) -> str:
    first, last = kind.steps[0], kind.steps[-1]
    which = f"{first} … {last}" if last > first else str(first)
    calls = ", ".join(f"{name} {count}×" for name, count in Counter(kind.calls).items())
    return f"{which}: {calls}; {sum(kind.operators.values())} operators around"


def guidance_text(trace: Trace) -> str:
    """How a pipeline guides, in words."""
    guidance = trace.guidance
    if not guidance.parameters:
        return "none"
    embedded = [slot for slot in trace.role("guidance") if slot.component]
    names = ", ".join(guidance.parameters)
    if embedded and guidance.calls == 1 and not guidance.doubled:
        return f"{names}: an input of the network"
    how = f"{guidance.calls} calls" if guidance.calls > 1 else "one call"
    both = " of both branches" if guidance.doubled and guidance.calls == 1 else ""
    return f"{names}: {how}{both}, {'linear' if guidance.nonlinearity < LINEAR else 'not linear'}"


def text_text(trace: Trace) -> str:
    """Whether shapes follow the prompt, in words."""
    if trace.text == "none":
        return "there is no prompt"
    if trace.text == "fixed":
        return "padded: no shape follows the length of the prompt"
    return f"shapes follow the length of the prompt: {', '.join(trace.text_slots) or 'operators too'}"


def slots_table(title: str, slots: Iterable[TraceSlot]) -> Table:
    """Name, shape, what changes it, and where it goes."""
    made = _wide("input", "shape", "follows", "of", title=title)
    for slot in slots:
        target = (slot.component or "sampler") + ("*" if slot.operator else "")
        made.add_row(slot.name, f"{_shape(slot.shape)} {slot.dtype}", ", ".join(slot.of), target)
    if any(slot.operator for slot in slots):
        made.caption, made.caption_justify = "* through operators", "left"
    return made


def _wide(*columns: str, title: str) -> Table:
    made = table(*columns, title=title)
    made.width = WIDTH
    for column in made.columns:
        column.overflow = "fold"
    return made


def _encoders_table(trace: Trace) -> Table:
    made = _wide("component", "class", "gives", title="Before the loop")
    for encoder in trace.encoders:
        shapes = [_shape(shape) for shape in dict.fromkeys(encoder.outputs)]
        around = " ".join(encoder.template.split())
        template = f"; text: {around[:40]}…" if len(around) > 48 else f"; text: {around}" if around else ""
        made.add_row(encoder.component, encoder.kind, ", ".join(shapes[:3]) + ("…" if shapes[3:] else "") + template)
    return made


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "number"
