"""The trunk of any diffusers transformer, found by watching calls of it, and left out without rewriting a forward.

With its block lists emptied, a transformer still runs: embeddings, then whatever comes behind the blocks. A *stream*
is an argument of a module behind the blocks that differs between the whole run and the emptied one; its residual is
the difference. Nothing is assumed of what lies between the last block and the head.

A transformer without weights is watched on shapes: there a stream differs where it is computed in another way, and a
residual makes it what it was.

Residuals are differences in fp32, and added in fp32. In half precision the sum is the stream to the bit, except where
that is a small part of what comes before the blocks: there it is off by up to a rounding in fp32 of the larger one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lemica_trt.ir.trace import TraceTrunk
from lemica_trt.models.stand_ins import is_stand_in
from lemica_trt.models.trace.replay import relative
from lemica_trt.models.trace.symbols import Symbol, Symbols
from lemica_trt.models.trace.tape import plain

TOLERANCE = 2e-5
"""Largest deviation of the output with residuals in place of blocks, relative to the largest output. In half precision
one rounding of the output (`torch.finfo(dtype).eps`) is allowed where no other stream is left: modules behind the
blocks may round another way what is off by a rounding in fp32."""

UNCHANGED = 1e-6
"""Blocks change an argument by more than this, relative to the largest element; behind a stream that is corrected, in
half precision, by more than a rounding."""

MAX_STREAMS = 3
"""The most streams that are corrected."""

Place = tuple[str, int, str]
"""Name of a module, number of its call, argument: by name, or by position."""


class NoTrunkError(Exception):
    """The blocks cannot be left out; says why."""


def difference(whole: Tensor, emptied: Tensor) -> Tensor:
    """What blocks add to a stream, fp32."""
    return whole.float() - emptied.float()


def added(stream: Tensor, residual: Tensor) -> Tensor:
    """A stream and an fp32 residual; rounded once, to the stream's dtype."""
    return (stream + residual).to(stream.dtype)


def _rounding(tensor: Tensor | Symbol) -> float:
    """One rounding of a tensor in half precision, relative; 0 of others, which are held to `TOLERANCE`."""
    half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return torch.finfo(tensor.dtype).eps if half else 0.0


class Watched:
    """A transformer whose block lists can be emptied for a call.

    Args:
        transformer: any module.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._module = transformer
        self.lists = {
            name: child
            for name, child in transformer.named_children()
            if isinstance(child, nn.ModuleList) and len(child)
        }
        self._names = {module: name for name, module in transformer.named_modules() if name}
        self._list_of = {block: name for name, blocks in self.lists.items() for block in blocks}
        self._last: tuple[Any, Any] = None, None

    def run(
        self, arguments: Mapping[str, Any], without: Sequence[str] = (), add: Mapping[Place, Any] | None = None
    ) -> tuple[list[Any], dict[Place, tuple[str, Any]]]:
        """One call.

        Args:
            without: lists that are empty in it.
            add: what is added to an argument of a module.

        Returns:
            Output tensors; and all tensors that modules were given, in order: place → (the list that the module is a
            block of, or "", and the tensor). Each as `_seen` keeps it.
        """
        seen: dict[Place, tuple[str, Any]] = {}
        count: dict[str, int] = {}
        inside: list[nn.Module] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            inside.append(module)
            if len(inside) > 1:
                return None
            name = self._names[module]
            number = count[name] = count.get(name, -1) + 1
            given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
            for key, value in given.items():
                if isinstance(value, Tensor):
                    extra = (add or {}).get((name, number, key))
                    given[key] = value if extra is None else self._added(value, extra)
                    seen[name, number, key] = (self._list_of.get(module, ""), self._seen(given[key]))
            args = tuple(value for key, value in given.items() if key.isdecimal())
            return args, {key: value for key, value in given.items() if not key.isdecimal()}

        def leave(*_: Any) -> None:
            inside.pop()

        with contextlib.ExitStack() as undo:
            arguments = undo.enter_context(self._running(arguments))
            for module in self._names:
                undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(leave, always_call=True).remove)
            undo.enter_context(self._emptied(without))
            output = self._module(**arguments)
            leaves = pytree.tree_leaves(plain(output))
            return [self._seen(leaf) for leaf in leaves if isinstance(leaf, Tensor)], seen

    def whole(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[Place, tuple[str, Any]]]:
        """`run` of the whole network; the last one is kept."""
        if self._last[0] is not arguments:
            self._last = arguments, self.run(arguments)
        found: tuple[list[Any], dict[Place, tuple[str, Any]]] = self._last[1]
        return found

    def different(self, calls: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Those of some calls that can tell different things."""
        return calls

    @contextlib.contextmanager
    def _running(self, arguments: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """While it lasts, what runs is watched; the arguments of the call."""
        with torch.no_grad():
            yield arguments

    def _seen(self, tensor: Tensor) -> Any:
        """What is kept of a tensor."""
        return tensor.clone()

    def _added(self, stream: Tensor, residual: Any) -> Tensor:
        """A stream and what `_residual` gives of it."""
        return added(stream, residual)

    def _residual(self, whole: Any, emptied: Any) -> Any:
        """What the blocks add to a stream, both as `_seen` keeps them."""
        return difference(whole, emptied)

    def _distance(self, one: Any, other: Any) -> float:
        """How far two tensors are apart, both as `_seen` keeps them."""
        return relative(one, other)

    @contextlib.contextmanager
    def _emptied(self, lists: Sequence[str]) -> Iterator[None]:
        try:
            for name in lists:
                self._module._modules[name] = nn.ModuleList()
            yield
        finally:
            for name in lists:
                self._module._modules[name] = self.lists[name]

    def residuals(self, arguments: Mapping[str, Any], lists: Sequence[str]) -> tuple[dict[Place, Any], float]:
        """What the blocks of some lists add to each stream, and the error of a run with that in their place.

        Raises:
            NoTrunkError: they cannot be left out.
        """
        reference, whole = self.whole(arguments)
        found: dict[Place, Any] = {}
        while True:
            try:
                output, seen = self.run(arguments, lists, found)
            except Exception as failure:  # a forward without its blocks fails in any way
                raise NoTrunkError(str(failure).partition("\n")[0] or type(failure).__name__) from None
            error = max(map(self._distance, output, reference), default=float("inf"))
            if error <= TOLERANCE and found:
                return found, error
            stream = next(self._streams(whole, seen, lists, found), None)
            if stream is None and found and error <= max((_rounding(tensor) for tensor in reference), default=0.0):
                return found, error
            if stream is None or len(found) == MAX_STREAMS:
                raise NoTrunkError(f"the output differs by {error:.1e} without its blocks")
            found[stream] = self._residual(whole[stream][1], seen[stream][1])

    def _streams(
        self,
        whole: Mapping[Place, tuple[str, Any]],
        seen: Mapping[Place, tuple[str, Any]],
        lists: Sequence[str],
        found: Mapping[Place, Any],
    ) -> Iterator[Place]:
        for place, (_, tensor) in seen.items():
            if place in found or place not in whole or whole[place][0] in lists or not tensor.is_floating_point():
                continue
            other = whole[place][1]
            if other.shape != tensor.shape:
                raise NoTrunkError(f"{place[0]} gets {list(tensor.shape)} without the blocks, {list(other.shape)} with")
            if self._distance(tensor, other) > max(UNCHANGED, _rounding(tensor) if found else 0.0):
                yield place


class OnShapes(Watched):
    """A transformer without weights: what is kept of a tensor is its `Symbol`."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__(transformer)
        self._fake, self._symbols = FakeTensorMode(allow_non_fake_inputs=True), Symbols()
        self._given: dict[int, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def _running(self, arguments: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        with torch.no_grad(), self._fake, self._symbols:
            yield pytree.tree_map(lambda leaf: self._faked(leaf) if isinstance(leaf, Tensor) else leaf, arguments)

    def different(self, calls: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        shapes = [
            str(pytree.tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else leaf, call)) for call in calls
        ]
        return [call for k, call in enumerate(calls) if shapes.index(shapes[k]) == k]

    def _faked(self, tensor: Tensor) -> Tensor:
        """The same of the same in each run."""
        if id(tensor) not in self._given:
            self._given[id(tensor)] = tensor, self._fake.from_tensor(tensor)
        return self._given[id(tensor)][1]

    def _seen(self, tensor: Tensor) -> Any:
        return self._symbols.of(tensor)

    def _added(self, stream: Tensor, residual: Any) -> Tensor:
        whole = torch.empty_like(stream, memory_format=torch.contiguous_format)
        self._symbols.name(whole, residual)
        return whole

    def _residual(self, whole: Any, emptied: Any) -> Any:
        return whole

    def _distance(self, one: Any, other: Any) -> float:
        return 0.0 if one == other else float("inf")


def find_trunk(component: str, transformer: nn.Module, calls: Sequence[Mapping[str, Any]]) -> TraceTrunk:
    """The block lists, as many parameters as possible, that one residual a stream can stand in for.

    Args:
        component: its name.
        calls: arguments of calls. The trunk is found on the first one, and must hold for all.
    """
    watched = (OnShapes if is_stand_in(transformer) else Watched)(transformer)
    calls = watched.different(calls)
    called = {name for name, _ in watched.whole(calls[0])[1].values() if name}
    size = {name: sum(p.numel() for p in watched.lists[name].parameters()) for name in called}
    total = sum(parameter.numel() for parameter in transformer.parameters())
    subsets = [c for r in range(len(size), 0, -1) for c in itertools.combinations(sorted(size), r)]
    reason = f"{type(transformer).__name__} calls no list of blocks"
    for lists in sorted(subsets, key=lambda names: -sum(size[name] for name in names)):
        try:
            results = [watched.residuals(call, lists) for call in calls]
        except NoTrunkError as error:
            reason = reason if subsets[0] != lists else str(error)
            continue
        if len({tuple(residuals) for residuals, _ in results}) == 1:
            return TraceTrunk(
                component=component,
                lists={name: len(watched.lists[name]) for name in lists},
                share=sum(size[name] for name in lists) / max(total, 1),
                streams=tuple((name, key) for name, _, key in results[0][0]),
                error=max(error for _, error in results),
            )
    return TraceTrunk(component=component, lists={}, share=0.0, streams=(), error=0.0, reason=reason)
