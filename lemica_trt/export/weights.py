"""Which initializer of an exported graph is which parameter of a network: what LoRA weights are added to at run time.

The exporter's optimizer computes constants and gives them names of its own: the weight of a linear layer becomes its
transpose, `val_95`. So parameters are followed through the graph before it is optimized, by their memory, and looked
for in the graph after it. One that went into a constant in another way than whole or transposed cannot be changed:
it is in no table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lemica_trt.ir.graphs import Weight

MATRIX = (1, 0)
"""The permutation that transposes one."""

MOST_MERGED = 1 << 16
"""Elements up to which equal initializers are looked for; the optimizer makes one of them up to 1024 (onnx_ir 0.2,
`DeduplicateInitializersPass`)."""


class Parameter(NamedTuple):
    """A parameter of a component of a pipeline."""

    part: str
    name: str


class Constant(NamedTuple):
    """What a constant of a graph is computed from.

    Attributes:
        of: parameters.
        whole: it is the only one, whole.
        transposed: its transpose.
    """

    of: frozenset[Parameter] = frozenset()
    whole: bool = False
    transposed: bool = False


class Constants(NamedTuple):
    """The constants of a graph before it is optimized.

    Attributes:
        by_name: value → what it is computed from.
        used: values that something else than a constant is computed from.
        arrays: initializers that are parameters.
    """

    by_name: dict[str, Constant]
    used: frozenset[str]
    arrays: dict[Parameter, Any]


def named_weights(parts: Mapping[str, nn.Module]) -> dict[int, tuple[Parameter, Tensor]]:
    """Address → the parameter of at least two dimensions there that is some module's `weight`."""
    return {
        value.data_ptr(): (Parameter(part, name), value)
        for part, network in parts.items()
        for name, value in network.named_parameters()
        if value.dim() >= 2 and name.endswith(".weight")
    }


def constants_of(graph: Any, known: Mapping[int, tuple[Parameter, Tensor]]) -> Constants:
    """Follow parameters through the constants of a graph.

    Args:
        graph: `onnx_ir.Graph` as the exporter translates it, not optimized.
        known: as `named_weights`.
    """
    found: dict[str, Constant] = {}
    arrays: dict[Parameter, Any] = {}
    for name, value in graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        found[name] = Constant()
        if isinstance(raw, Tensor) and (entry := known.get(raw.data_ptr())) is not None:
            parameter, own = entry
            found[name] = Constant(frozenset({parameter}), raw.shape == own.shape and raw.dtype == own.dtype)
            arrays[parameter] = value.const_value
    live, used = _live(graph), {value.name for value in graph.outputs}
    for node in graph:
        inputs = [value.name for value in node.inputs if value is not None]
        if all(name in found for name in inputs):
            found |= {value.name: _computed(node, [found[name] for name in inputs]) for value in node.outputs}
        elif id(node) in live:
            used.update(name for name in inputs if name in found)
    return Constants(found, frozenset(used & found.keys()), arrays)


def _computed(node: Any, inputs: list[Constant]) -> Constant:
    """What a node makes of constants."""
    if len(inputs) == 1 and inputs[0].whole:
        if node.op_type == "Identity":
            return inputs[0]
        perm = node.attributes.get("perm") if node.op_type == "Transpose" else None
        if perm is not None and tuple(perm.as_ints()) == MATRIX:
            return inputs[0]._replace(transposed=not inputs[0].transposed)
    return Constant(frozenset().union(*(its.of for its in inputs)))


def _live(graph: Any) -> set[int]:
    """Nodes that an output of a graph is computed from, by id."""
    found: set[int] = set()
    left = [value.producer() for value in graph.outputs]
    while left:
        node = left.pop()
        if node is not None and id(node) not in found:
            found.add(id(node))
            left += [value.producer() for value in node.inputs if value is not None]
    return found


def weight_table(graph: Any, before: Constants) -> tuple[dict[str, Weight], set[Parameter]]:
    """The weights of a graph, and the parameters that cannot be changed in it.

    Args:
        graph: the same graph, optimized.
        before: as `constants_of`.
    """
    named = {name: before.by_name[name] for name in graph.initializers if name in before.by_name}
    fixed = {parameter for its in named.values() if not its.whole for parameter in its.of}
    whole = {name: its for name, its in named.items() if its.whole}
    for its in {before.by_name[name] for name in before.used}:
        if not its.whole:
            fixed |= its.of
            continue
        (parameter,) = its.of
        own = [other for other in whole.values() if other.of == its.of]
        if its not in own:  # one of equal ones stands for all: another parameter's may, too
            twins = _twins(graph, whole, before.arrays[parameter], its)
            fixed |= twins | (set() if own and not twins else {parameter})
    table = {}
    for name, its in whole.items():
        (parameter,) = its.of
        shape = tuple(int(size) for size in before.arrays[parameter].shape)
        table[name] = Weight(part=parameter.part, name=parameter.name, shape=shape, **_flag(its.transposed))
    return table, fixed


def _twins(graph: Any, whole: Mapping[str, Constant], array: Any, its: Constant) -> set[Parameter]:
    """Other parameters whose initializers have the values of one that is gone."""
    if array.size > MOST_MERGED:
        return set()
    values = array.numpy().T if its.transposed else array.numpy()
    found: set[Parameter] = set()
    for name, other in whole.items():
        constant = graph.initializers[name].const_value
        alike = other.of != its.of and tuple(constant.shape) == values.shape
        if alike and constant.numpy().tobytes() == values.tobytes():
            found |= other.of
    return found


def _flag(transposed: bool) -> dict[str, Any]:
    return {"transposed": True} if transposed else {}


def without(table: Mapping[str, Weight], fixed: Iterable[Parameter]) -> dict[str, Weight]:
    """A table without parameters that cannot be changed in every graph."""
    gone = set(fixed)
    return {name: its for name, its in sorted(table.items()) if Parameter(its.part, its.name) not in gone}
