"""What stands between PyTorch's program of a module and ONNX: sizes that must stay symbols, attention without a
dimension of heads, stable sorts, complex numbers.

Models that take a size through `int()` (Qwen-Image's rotary embedding of the text) would fix it: `symbolic_int`.

The exporter takes attention of four dimensions alone; autoencoders have some of three (HunyuanImage 2.1):
`with_heads`.

The exporter knows no stable sort. Each that it makes is one: ONNX's TopK puts the first of equal numbers first. LTX-2
moves the tokens of a prompt before its padding so: `with_plain_sorts`.

ONNX has no complex tensors. Rotary embeddings that are written as complex products (Qwen-Image, Z-Image) become four
real products: a program is run again operator by operator and exported a second time. A complex tensor is on the way as
a real one whose last dimension of 2 has real and imaginary part.
"""

from __future__ import annotations

import builtins
import contextlib
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError

aten = torch.ops.aten


class _Sizes(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, builtins.int)


class _Int(builtins.int, metaclass=_Sizes):
    """`int` that gives a symbolic size back as it is."""

    def __new__(cls, value: Any = 0, *base: Any) -> Any:
        return value if isinstance(value, torch.SymInt) else builtins.int(value, *base)


@contextlib.contextmanager
def symbolic_int(module: nn.Module) -> Iterator[None]:
    """Within, the code of a module's parts that are diffusers' can take a size through `int()` without fixing it."""
    names = {type(part).__module__ for part in module.modules()}
    files = [vars(sys.modules[name]) for name in sorted(names) if name.startswith("diffusers.")]
    for file in files:
        file["int"] = _Int
    try:
        yield
    finally:
        for file in files:
            del file["int"]


def with_heads(program: torch.export.ExportedProgram) -> None:
    """Give attention of [rows, tokens, width] a dimension in front, in place."""
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        if node.meta["val"].dim() != 3:
            continue
        with graph.inserting_before(node):
            node.args = tuple(_called(graph, aten.unsqueeze.default, it) if _is_tensor(it) else it for it in node.args)
            node.kwargs = {
                name: _called(graph, aten.unsqueeze.default, it) if _is_tensor(it) else it
                for name, it in node.kwargs.items()
            }
        users = list(node.users)
        with graph.inserting_after(node):
            node.meta["val"] = node.meta["val"].unsqueeze(0)
            without = _called(graph, aten.squeeze.dim, node)
        for user in users:
            user.replace_input_with(node, without)
        program.graph_signature.replace_all_uses(node.name, without.name)


def with_plain_sorts(program: torch.export.ExportedProgram) -> None:
    """Write stable sorts as sorts, in place."""
    for stable, plain in ((aten.sort.stable, aten.sort.default), (aten.argsort.stable, aten.argsort.default)):
        names = [argument.name for argument in stable._schema.arguments]
        for node in program.graph.find_nodes(op="call_function", target=stable):
            given = dict(zip(names, node.args)) | node.kwargs
            node.target = plain
            node.args, node.kwargs = (given["self"], given.get("dim", -1), given.get("descending", False)), {}


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, torch.fx.Node)


def _called(graph: torch.fx.Graph, operator: Any, node: torch.fx.Node) -> torch.fx.Node:
    """A call of an operator on the first dimension."""
    made = graph.call_function(operator, (node, 0))
    made.meta["val"] = operator(node.meta["val"], 0)
    return made


class Pair(NamedTuple):
    """A complex tensor. `parts`: real [*shape, 2]."""

    parts: Tensor


def is_complex(program: torch.export.ExportedProgram) -> bool:
    """Whether a program computes with complex numbers."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(isinstance(value, Tensor) and value.is_complex() for value in values)


class RealProgram(nn.Module):
    """An exported program on real numbers; called as the program is.

    Args:
        program: its inputs and outputs are real.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.program = program.module(check_guards=False)
        self._constants: dict[str, str] = {}
        graph: Any = self.program.graph
        for target in dict.fromkeys(node.target for node in graph.nodes if node.op == "get_attr"):
            value = operator.attrgetter(target)(self.program)
            if isinstance(value, Tensor) and value.is_complex():
                self._constants[target] = name = f"real_{len(self._constants)}"
                self.register_buffer(name, torch.view_as_real(value).clone(), persistent=False)
                owner, _, attribute = target.rpartition(".")
                delattr(self.program.get_submodule(owner), attribute)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run it.

        Raises:
            UnsupportedError: it has an operator on complex numbers that is not known here.
        """
        graph: Any = self.program
        constants = {target: Pair(self.get_buffer(name)) for target, name in self._constants.items()}
        made: dict[str, Tensor] = _Interpreter(graph, constants).run(
            *pytree.tree_leaves(inputs), enable_io_processing=True
        )
        return made


class _Interpreter(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, constants: dict[str, Pair]) -> None:
        super().__init__(module)
        self._constants = constants

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._constants[target] if target in self._constants else super().get_attr(target, args, kwargs)

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        return Pair(torch.view_as_real(result)) if isinstance(result, Tensor) and result.is_complex() else result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is aten.view_as_complex.default:
            return Pair(args[0])
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Pair))
        if not any(isinstance(leaf, Pair) for leaf in leaves):
            return super().call_function(target, args, kwargs)
        if target not in RULES:
            raise UnsupportedError(f"{target} of complex numbers has no form in real ones yet")
        return RULES[target](*args, **kwargs)


def _product(one: Any, other: Any) -> Pair:
    if not (isinstance(one, Pair) and isinstance(other, Pair)):
        pair, factor = (one, other) if isinstance(one, Pair) else (other, one)
        return Pair(pair.parts * (factor[..., None] if isinstance(factor, Tensor) else factor))
    (a, b), (c, d) = one.parts.unbind(-1), other.parts.unbind(-1)
    return Pair(torch.stack([a * c - b * d, a * d + b * c], -1))


def _dim(pair: Pair, dim: int) -> int:
    return dim if dim >= 0 else dim + pair.parts.dim() - 1


def _along(function: Callable[..., Tensor]) -> Callable[..., Pair]:
    """An operator whose second argument is a dimension."""
    return lambda pair, dim=0, *rest: Pair(function(pair.parts, _dim(pair, dim), *rest))


def _shaped(function: Callable[..., Tensor]) -> Callable[..., Pair]:
    """An operator whose second argument is a shape."""
    return lambda pair, shape: Pair(function(pair.parts, [*shape, 2]))


def _split(pair: Pair, sizes: Any, dim: int = 0) -> list[Pair]:
    return [Pair(part) for part in torch.split(pair.parts, sizes, _dim(pair, dim))]


RULES: dict[Any, Callable[..., Any]] = {
    operator.getitem: operator.getitem,
    aten.view_as_real.default: lambda pair: pair.parts,
    aten._assert_tensor_metadata.default: lambda pair, *_, **__: None,
    aten.mul.Tensor: _product,
    aten.cat.default: lambda pairs, dim=0: Pair(torch.cat([p.parts for p in pairs], _dim(pairs[0], dim))),
    aten.stack.default: lambda pairs, dim=0: Pair(torch.stack([p.parts for p in pairs], _dim(pairs[0], dim))),
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split,
    aten.slice.Tensor: _along(aten.slice.Tensor),
    aten.unsqueeze.default: lambda pair, dim: Pair(pair.parts.unsqueeze(dim if dim >= 0 else dim - 1)),
    aten.select.int: _along(aten.select.int),
    aten.squeeze.dim: _along(aten.squeeze.dim),
    aten.index.Tensor: lambda pair, indices: Pair(aten.index.Tensor(pair.parts, indices)),
    aten.view.default: _shaped(aten.reshape.default),
    aten.reshape.default: _shaped(aten.reshape.default),
    aten.expand.default: lambda pair, shape: Pair(pair.parts.expand(*shape, 2)),
    aten.clone.default: lambda pair, **_: Pair(pair.parts.clone()),
    aten.to.dtype_layout: lambda pair, **_: pair,
    aten.to.device: lambda pair, *_: pair,
    aten._to_copy.default: lambda pair, **_: pair,
    aten.detach_.default: lambda pair: pair,
    aten.lift_fresh_copy.default: lambda pair: pair,
    aten.contiguous.default: lambda pair, **_: pair,
}
"""Operator → the same on pairs."""
