"""Value numbering: what a tensor is, said without its numbers.

Two tensors have one symbol where the same operators made them of the same tensors. So a transformer without weights is
compared with itself: what differs between two runs differs because it is computed in another way.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lemica_trt.models.trace.program import VALUE_FREE


class Symbol(NamedTuple):
    """What stands for a tensor.

    Attributes:
        name: digest of how it was computed.
        shape, dtype: of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def is_floating_point(self) -> bool:
        """As a tensor's."""
        return self.dtype.is_floating_point


class Symbols(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Gives symbols to all tensors that are computed while it lasts; parameters and arguments have their own.

    Who writes into a tensor changes the symbols of all that share its storage.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self._names: dict[int, tuple[Tensor, str, str]] = {}  # with the tensor: its id must not become another's
        self._writes: dict[int, str] = {}

    def of(self, tensor: Tensor) -> Symbol:
        """The symbol of a tensor as it is."""
        if id(tensor) not in self._names:
            fixed = isinstance(tensor, FakeTensor | nn.Parameter)
            self._set(tensor, f"given {id(tensor)}" if fixed else _digest(_bytes(tensor)))
        _, name, written = self._names[id(tensor)]
        now = self._written(tensor)
        return Symbol(name if written == now else _digest((name, now)), tuple(tensor.shape), tensor.dtype)

    def name(self, tensor: Tensor, symbol: Symbol) -> None:
        """Give a tensor the symbol of another one."""
        self._set(tensor, symbol.name)

    def _set(self, tensor: Tensor, name: str) -> None:
        self._names[id(tensor)] = tensor, name, self._written(tensor)

    def _written(self, tensor: Tensor) -> str:
        """What was written into a tensor's storage so far."""
        return self._writes.get(tensor.untyped_storage()._cdata, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        free = func._schema.name in VALUE_FREE

        def shown(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return (tuple(leaf.shape), leaf.dtype) if free else self.of(leaf)

        made = _digest((str(func), pytree.tree_map(shown, (args, kwargs))))
        output = func(*args, **kwargs)
        for tensor in self._targets(func, args, kwargs):
            self._writes[tensor.untyped_storage()._cdata] = _digest((self._written(tensor), made))
        for k, leaf in enumerate(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)):
            self._set(leaf, f"{made} {k}")
        return output

    @staticmethod
    def _targets(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        found = []
        for k, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                its = args[k] if k < len(args) else kwargs.get(argument.name)
                found += [leaf for leaf in pytree.tree_leaves(its) if isinstance(leaf, Tensor)]
        return found


def _bytes(tensor: Tensor) -> bytes:
    """The numbers of a real tensor."""
    with _disable_current_modes():
        return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
