"""A tape → one program an iteration of the denoising loop, and programs run again.

An iteration ends with `scheduler.step`. Its program holds the operators and calls that depend on x_i or on what a
network returns; everything else it reads is a *slot*: a tensor or a number from outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.models.trace.tape import Event, Op, Ref, Tape, refs

VALUE_FREE = {
    *("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like"),
    *("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty"),
}
"""Operators that read only shape, dtype and device of a tensor."""

STEP_INPUTS = ("model_output", "sample")
"""What the body of the loop gives a scheduler; timesteps are its own, and further arguments its own state
(CogVideoX-DPM's `old_pred_original_sample`)."""


@dataclass(frozen=True)
class Node:
    """Output `output` of an earlier node of the program."""

    node: int
    output: int


@dataclass(frozen=True)
class Slot:
    """A tensor or a number from outside the iteration."""

    index: int


@dataclass(frozen=True)
class X:
    """x_i of a sampler's state."""

    state: int


@dataclass(frozen=True)
class Step:
    """A node: an operator (`what` is the aten overload), or an event (`what` is the component or the state)."""

    kind: str
    what: Any
    tree: Any


@dataclass(frozen=True)
class Program:
    """One iteration.

    Attributes:
        index: i.
        nodes: in order.
        values: of the slots.
        births: of the slots: the tensor, None for numbers.
        x, after: x_i of each state, and what its sampler made of it.
        span: of the tape's items.
        host: nodes' outputs that became Python's: (method, leaf).
        made: ids of the tensors that nodes made.
    """

    index: int
    nodes: tuple[Step, ...]
    values: tuple[Any, ...]
    births: tuple[Ref | None, ...]
    x: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    span: tuple[int, int]
    host: tuple[tuple[str, Any], ...]
    made: frozenset[int]

    def without_latents(self) -> Program:
        """The same; of latents, shapes and dtypes alone."""
        x, after = (tuple(tensor.to("meta") for tensor in tensors) for tensors in (self.x, self.after))
        return replace(self, x=x, after=after)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the structure: what is equal for two iterations that are of one kind."""
        digest = hashlib.sha256()
        for node in self.nodes:
            leaves, shape = pytree.tree_flatten(node.tree)
            shown = ["generator" if isinstance(leaf, torch.Generator) else repr(leaf) for leaf in leaves]
            digest.update(f"{node.kind} {node.what} {shape} {shown}\n".encode())
        return digest.hexdigest()

    @property
    def calls(self) -> list[Step]:
        """The calls of networks."""
        return [node for node in self.nodes if node.kind == "call"]

    def destination(self, slot: int) -> tuple[str, str]:
        """What a slot is for: (component, argument) of the first call that it reaches; ("", "output"): of none.

        Operators that take it to a call's argument are not counted.
        """
        reached: set[Any] = {Slot(slot)}
        for k, node in enumerate(self.nodes):
            for path, leaf in pytree.tree_flatten_with_path(node.tree)[0]:
                if leaf in reached if isinstance(leaf, Slot | Node) else False:
                    if node.kind == "call":
                        return str(node.what), ".".join(
                            str(getattr(key, "key", getattr(key, "idx", ""))) for key in path
                        )
                    reached |= {Node(k, j) for j in range(8)}
        return "", "output"

    def operator(self, slot: int) -> str:
        """The first operator that reads a slot, or the component."""
        for node in self.nodes:
            if Slot(slot) in pytree.tree_leaves(node.tree):
                return str(node.what)
        return "nothing"


def programs(tape: Tape, networks: Collection[str] = ()) -> list[Program]:
    """The iterations of a recording.

    Args:
        networks: components that iteration 0 may call and no other does.

    Raises:
        UnsupportedError: the loop cannot be cut; says why.
    """
    spans, order = _spans(tape)
    denoisers = {
        item.name
        for start, end in spans[1:]
        for item in tape.items[start:end]
        if isinstance(item, Event) and item.kind == "call"
    }
    if denoisers:
        denoisers |= set(networks)
    if len(spans) < 2 or not denoisers:
        raise UnsupportedError(
            f"expected a loop that calls scheduler.step once a step, got {len(spans)} of its iterations"
            + ("" if denoisers else ", none of which calls a network")
        )
    found = []
    for i, (start, end) in enumerate(spans):
        roots: dict[int, int] = {}
        if i == 0:
            for event in _steps(tape.items[:end]):
                roots[event.inputs["sample"].id] = order.index(event.scheduler or 0)
            start = _first(tape, end, roots, denoisers)
        else:
            for event in _steps(tape.items[spans[i - 1][0] : spans[i - 1][1]]):
                roots[refs(event.outs)[0].id] = order.index(event.scheduler or 0)
        found.append(Extraction(tape, (start, end), roots, order).program(i))
    if found[0].digest != found[1].digest:
        found[0] = _adopted(tape, found, denoisers)
    return found


def _adopted(tape: Tape, found: Sequence[Program], denoisers: set[str]) -> Program:
    """Step 0 as the program of step 1, where that does what step 0 did.

    They may differ only in how x_0 came about: as a view of a buffer (Kandinsky 5), cut from what an image filled
    (LTX), or in fp32 where later latents are in half precision (HunyuanVideo). What is an argument of a network has
    step 0's value; what else step 1 reads is tried as it is.
    """
    own, next_one = found[0], found[1]
    calls = [
        k
        for k, item in enumerate(tape.items[: own.span[1]])
        if isinstance(item, Event) and item.kind == "call" and item.name in denoisers
    ][-len(next_one.calls) :]
    values, events = list(next_one.values), [tape.items[k] for k in calls]
    if [node.what for node in next_one.calls] != [event.name for event in events if isinstance(event, Event)]:
        return own
    for node, event in zip(next_one.calls, events):
        its = dict(pytree.tree_flatten_with_path(event.inputs)[0]) if isinstance(event, Event) else {}
        for path, leaf in pytree.tree_flatten_with_path(node.tree)[0]:
            if isinstance(leaf, Slot) and path in its:
                values[leaf.index] = tape.value(its[path])
    begin = calls[0] if len(calls) == len(next_one.calls) else own.span[0]
    scales = [k for k, item in enumerate(tape.items[:begin]) if isinstance(item, Event) and item.kind == "scale"]
    span = (scales[-1] if scales else begin, own.span[1])
    x = tuple(mine.to(its.dtype) for mine, its in zip(own.x, next_one.x))
    adopted = replace(
        next_one, index=0, values=tuple(values), x=x, after=own.after, span=span, host=own.host, made=own.made
    )
    step = _steps(tape.items[slice(*span)])
    wanted = [tape.value(ref) for event in events if isinstance(event, Event) for ref in refs(event.inputs)]
    wanted += [tape.value(event.inputs["model_output"]) for event in step]
    for tried in (adopted, _with_numbers(adopted, own)):
        try:
            given = list(effects(tape, tried, tried.values))
        except (RuntimeError, IndexError, StopIteration, TypeError):  # of another structure altogether
            continue
        if len(given) == len(wanted) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(given, wanted)):
            return tried
    return own


def _with_numbers(program: Program, other: Program) -> Program:
    """A program with the numbers of another one, in order, where both have as many."""
    mine, its = ([k for k, born in enumerate(each.births) if born is None] for each in (program, other))
    values = list(program.values)
    if len(mine) == len(its):
        for k, number in zip(mine, its):
            values[k] = other.values[number]
    return replace(program, values=tuple(values))


def _steps(items: Sequence[Op | Event]) -> list[Event]:
    return [item for item in items if isinstance(item, Event) and item.kind == "step"]


def _spans(tape: Tape) -> tuple[list[tuple[int, int]], list[int]]:
    """Ranges of items, each ending behind the last sampler's step of an iteration; and the schedulers."""
    order = list(dict.fromkeys(event.scheduler for event in _steps(tape.items) if event.scheduler is not None))
    spans, start, pending = [], 0, list[int | None]()
    for k, item in enumerate(tape.items):
        if isinstance(item, Event) and item.kind == "step":
            pending.append(item.scheduler)
            if len(pending) >= len(order):
                if len(set(pending)) != len(order):
                    raise UnsupportedError("its loop steps one of several samplers more often than the others")
                spans.append((start, k + 1))
                start, pending = k + 1, []
    return spans, order


def _first(tape: Tape, end: int, roots: dict[int, int], denoisers: set[str]) -> int:
    """Where iteration 0 begins: behind the last event before the first denoiser call, and behind x_0's birth."""
    calls = [k for k, item in enumerate(tape.items[:end]) if isinstance(item, Event) and item.name in denoisers]
    begin = calls[0] if calls else end
    events = [k + 1 for k, item in enumerate(tape.items[:begin]) if isinstance(item, Event) and item.kind != "host"]
    born = [
        k + 1
        for k, item in enumerate(tape.items[:begin])
        if isinstance(item, Op) and any(ref.id in roots for ref in item.outs)
    ]
    scaled = [k for k, item in enumerate(tape.items[:begin]) if isinstance(item, Event) and item.kind == "scale"]
    events = [k for k in events if not scaled or k <= scaled[-1]]
    return max([0, *events, *born])


class Extraction:
    """A part of a recording as a program of what depends on some tensors.

    Args:
        tape, span: the part.
        roots: id of a tensor → number of the input that it is.
        order: ids of schedulers, one a state.
        of_inputs: calls are part of it only where they are given what depends on the roots; else all are.
        of_calls: id of a tensor → number of the input that it is for calls alone; elsewhere it is a slot.

    Attributes:
        values: of the slots.
        host: nodes' outputs that became Python's: (method, leaf).
    """

    def __init__(
        self,
        tape: Tape,
        span: tuple[int, int],
        roots: dict[int, int],
        order: list[int],
        *,
        of_inputs: bool = False,
        of_calls: Mapping[int, int] | None = None,
    ) -> None:
        self._tape, self._span, self._order, self._of_inputs = tape, span, order, of_inputs
        self._items = tape.items[span[0] : span[1]]
        self._places: dict[int, Any] = {number: X(state) for number, state in roots.items()}
        self._of_calls = {number: X(state) for number, state in (of_calls or {}).items()}
        self._tainted = self._taint(set(roots))
        self._slots: dict[Any, int] = {}
        self.values: list[Any] = []
        self.host: list[tuple[str, Any]] = []
        self._births: list[Ref | None] = []

    def _taint(self, roots: set[int]) -> set[int]:
        """Storages that hold x_i, what a network returned, or what is computed of them."""
        tape = self._tape
        tainted = {tape.storage(Ref(number, 0)) for number in roots}
        size = -1
        while size != len(tainted):
            size = len(tainted)
            for item in self._items:
                if isinstance(item, Op):
                    if self._depends(item, tainted):
                        tainted |= {tape.storage(ref) for ref in item.outs} | item.mutates
                elif self._includes(item, tainted):
                    tainted |= {tape.storage(ref) for ref in refs(item.outs)}
        return tainted

    def _depends(self, op: Op, tainted: set[int]) -> bool:
        read = [] if op.func._schema.name in VALUE_FREE else refs((op.args, op.kwargs))
        return bool(op.mutates & tainted) or any(self._tape.storage(ref) in tainted for ref in (*read, *op.outs))

    def _includes(self, event: Event, tainted: set[int]) -> bool:
        return not self._of_inputs or (
            event.kind == "call" and any(self._tape.storage(ref) in tainted for ref in refs(event.inputs))
        )

    def place(self, leaf: Any) -> Any:
        """What a leaf of a recorded tree is in the program."""
        if isinstance(leaf, Ref):
            if leaf.id in self._places:
                return self._places[leaf.id]
            written = self._tape.storage(leaf) in self._tainted  # in place, later: one slot at all versions
            return self._slot(leaf.id if written else leaf, self._tape.values[leaf], leaf)
        if isinstance(leaf, int | float) and not isinstance(leaf, bool):
            return self._slot(len(self.values), leaf, None)
        return leaf

    def _slot(self, key: Any, value: Any, born: Ref | None) -> Slot:
        key = ("number", key) if born is None else key
        if key not in self._slots:
            self._slots[key] = len(self.values)
            self.values.append(value)
            self._births.append(born)
        return Slot(self._slots[key])

    def constant(self, value: Tensor) -> Slot:
        """A slot of its own for a tensor."""
        self.values.append(value)
        self._births.append(None)
        return Slot(len(self.values) - 1)

    def nodes(self) -> list[Step]:
        """The program's nodes, in order; to be called once."""
        nodes: list[Step] = []
        for item in self._items:
            if self._is_given(item):
                continue
            if isinstance(item, Event) and item.kind == "host":
                ref = refs(item.inputs)[0]
                if self._tape.storage(ref) in self._tainted:
                    self.host.append((item.name, self._places.get(ref.id)))
                continue
            if isinstance(item, Op):
                if not self._depends(item, self._tainted):
                    continue
                tree = pytree.tree_map(self.place, (item.args, item.kwargs))
                step, outs = Step("op", item.func, tree), item.outs
            else:
                if not self._includes(item, self._tainted):
                    continue
                step, outs = self._event(item), tuple(refs(item.outs))
            nodes.append(step)
            for j, ref in enumerate(outs):
                if not isinstance(item, Op) or not item.mutates or ref.id not in self._places:
                    self._places[ref.id] = Node(len(nodes) - 1, j)
        return nodes

    def _is_given(self, item: Op | Event) -> bool:
        """Whether an operator makes nothing but inputs of a part that begins before them."""
        if not self._of_inputs or not isinstance(item, Op) or item.mutates:
            return False
        return bool(item.outs) and all(isinstance(self._places.get(ref.id), X) for ref in item.outs)

    def program(self, index: int) -> Program:
        """The program of an iteration."""
        nodes = self.nodes()
        by_state = {self._order.index(event.scheduler or 0): event for event in _steps(self._items)}
        steps = [by_state[k] for k in range(len(self._order))]
        return Program(
            index, tuple(nodes), tuple(self.values), tuple(self._births),
            tuple(self._tape.value(event.inputs["sample"]) for event in steps),
            tuple(self._tape.value(refs(event.outs)[0]) for event in steps), self._span, tuple(self.host),
            frozenset(number for number, place in self._places.items() if isinstance(place, Node)),
        )  # fmt: skip

    def _event(self, event: Event) -> Step:
        if event.kind in ("scale", "step"):
            names = ("sample",) if event.kind == "scale" else STEP_INPUTS
            tree = {name: self.place(event.inputs[name]) for name in names}
            return Step(event.kind, self._order.index(event.scheduler or 0), tree)

        def place(leaf: Any) -> Any:
            return self._of_calls.get(leaf.id) or self.place(leaf) if isinstance(leaf, Ref) else self.place(leaf)

        return Step(event.kind, event.name, pytree.tree_map(place, event.inputs))


def run_program(
    program: Program,
    x: Sequence[Tensor],
    values: Sequence[Any],
    call: Callable[[str, Any], list[Tensor]],
    scale: Callable[[int, Tensor], Tensor],
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Run a program again.

    Args:
        x: x_i of each state.
        values: of the slots; they are not changed.
        call: (component, arguments) → its output tensors, in order.
        scale: (state, sample) → what `scale_model_input` makes of it.

    Returns:
        What each state's sampler is given: model outputs, and samples.
    """
    made: list[list[Tensor]] = []
    given = [value.clone() if isinstance(value, Tensor) else value for value in values]
    outputs, samples = dict[int, Tensor](), dict[int, Tensor]()

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Node):
            return made[leaf.node][leaf.output]
        if isinstance(leaf, Slot):
            return given[leaf.index]
        return x[leaf.state] if isinstance(leaf, X) else leaf

    for node in program.nodes:
        tree = pytree.tree_map(take, node.tree)
        if node.kind == "op":
            args, kwargs = tree
            result = node.what(*args, **kwargs)
            made.append([leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)])
        elif node.kind == "scale":
            made.append([scale(node.what, tree["sample"])])
        elif node.kind == "step":
            outputs[node.what], samples[node.what] = tree["model_output"], tree["sample"]
            made.append([])
        else:
            made.append(call(node.what, tree))
    return outputs, samples


def effects(tape: Tape, program: Program, values: Sequence[Any]) -> Iterator[Tensor]:
    """What networks and samplers are given, where networks return what they returned in a recording.

    Args:
        values: of the slots.
    """
    events = [item for item in tape.items[slice(*program.span)] if isinstance(item, Event)]
    calls = iter([[tape.values[ref] for ref in refs(event.outs)] for event in events if event.kind == "call"])
    scales = iter([tape.values[refs(event.outs)[0]] for event in events if event.kind == "scale"])
    seen: list[Tensor] = []

    def call(name: str, tree: Any) -> list[Tensor]:
        seen.extend(leaf.clone() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
        return [output.clone() for output in next(calls)]

    with torch.no_grad():
        outputs, _ = run_program(
            program, [x.clone() for x in program.x], values, call, lambda state, sample: next(scales)
        )
    yield from seen
    yield from (outputs[state] for state in sorted(outputs))
