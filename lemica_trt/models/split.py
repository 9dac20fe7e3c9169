"""Any diffusers transformer, cut at the ends of its trunk, without rewriting a forward.

A family names the block lists and the first epilogue module. Hooks sit on the *entries* of the first block and of
the epilogue, so every conversion that a model does between its last block and its epilogue stays outside the cut:

    full   h_in is seen entering the first block, h_out entering the epilogue; residual = h_out − h_in
    skip   the block lists are empty, so that what enters the epilogue *is* h_in; the residual is added there

The hidden stream alone is enough for every family: what the trunk makes of the text stream is thrown away anyway.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lemica_trt.core.errors import UnsupportedError

STREAM = "hidden_states"
"""Name of the hidden stream where diffusers passes it to a block by keyword; otherwise it is the first argument."""


@contextlib.contextmanager
def watched(entry: nn.Module, epilogue: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden stream as it enters these modules, in the order in which it does; see `residual_of`."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs[STREAM] if STREAM in kwargs else args[0])

    hooks = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in (entry, epilogue)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def residual_of(seen: Sequence[Tensor]) -> Tensor:
    """h_out − h_in of one call of a transformer under `watched`, in the dtype of the hidden stream."""
    if len(seen) != 2:
        raise UnsupportedError(f"expected one entry of the trunk and one of the epilogue, got {len(seen)} in all")
    entered, left = seen
    return (left - entered).to(entered.dtype)


@contextlib.contextmanager
def added(epilogue: nn.Module, residual: Tensor) -> Iterator[None]:
    """A residual added to the hidden stream that enters the epilogue."""

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if STREAM in kwargs:
            return args, {**kwargs, STREAM: kwargs[STREAM] + residual}
        return (args[0] + residual, *args[1:]), kwargs

    hook = epilogue.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class Full(nn.Module):
    """The whole transformer, which also says what its trunk added. See `split_transformer`."""

    def __init__(self, transformer: nn.Module, entry: nn.Module, epilogue: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self._cut = (entry, epilogue)  # a tuple, so that the modules are not registered twice

    def forward(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run it.

        Args:
            inputs: keyword arguments of the diffusers forward.

        Returns:
            (output, residual): the model output as diffusers gives it, and h_out − h_in [R, tokens, width] in the
            dtype of the hidden stream.
        """
        with watched(*self._cut) as seen:
            output = self.transformer(**inputs, return_dict=False)[0]
        return output, residual_of(seen)


class Skip(nn.Module):
    """The transformer without its trunk; shares the weights of `Full`. See `split_transformer`."""

    def __init__(self, transformer: nn.Module, epilogue: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self._epilogue = (epilogue,)

    def forward(self, residual: Tensor, **inputs: Any) -> Tensor:
        """Run head(embed(inputs) + residual).

        Args:
            residual: [R, tokens, width], from `Full`.
            inputs: keyword arguments of the diffusers forward.

        Returns:
            The model output as diffusers gives it.
        """
        with added(self._epilogue[0], residual):
            output: Tensor = self.transformer(**inputs, return_dict=False)[0]
        return output


class SplitTransformer(NamedTuple):
    """Two views of one set of weights: `full(**inputs) -> (output, residual)`, `skip(residual, **inputs) -> output`."""

    full: Full
    skip: Skip


def trunk_ends(transformer: nn.Module, block_lists: Sequence[str], epilogue: str) -> tuple[nn.Module, nn.Module]:
    """The first block of a trunk, and the first module behind it.

    Args:
        block_lists: attribute names of the trunk's `nn.ModuleList`s, in the order in which they run.
        epilogue: dotted name of the first module behind the trunk.

    Raises:
        UnsupportedError: a list or the epilogue is not there, or the trunk is empty.
    """
    kind = type(transformer).__name__
    lists = [getattr(transformer, name, None) for name in block_lists]
    for name, blocks in zip(block_lists, lists):
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedError(f"expected {kind}.{name} to be the list of blocks, got {type(blocks).__name__}")
    blocks = [block for part in lists if isinstance(part, nn.ModuleList) for block in part]
    if not blocks:
        raise UnsupportedError(f"expected blocks in {kind}.{', '.join(block_lists)}, got none")
    try:
        last = transformer.get_submodule(epilogue)
    except AttributeError:
        raise UnsupportedError(f"expected {kind} to have a module {epilogue!r} behind its blocks, got none") from None
    return blocks[0], last


def split_transformer(transformer: nn.Module, block_lists: Sequence[str], epilogue: str) -> SplitTransformer:
    """Cut a diffusers transformer; nothing is copied and the transformer stays usable as it was.

    Args:
        transformer: a diffusers `ModelMixin` whose forward takes `return_dict`.
        block_lists, epilogue: as in `trunk_ends`.

    Raises:
        UnsupportedError: as `trunk_ends`.
    """
    first, last = trunk_ends(transformer, block_lists, epilogue)
    trunkless = copy.copy(transformer)
    trunkless._modules = {**transformer._modules, **{name: nn.ModuleList() for name in block_lists}}
    return SplitTransformer(Full(transformer, first, last), Skip(trunkless, last))
