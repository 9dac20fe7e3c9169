"""Networks without their weights, as a pipeline's configuration describes them: for what needs no numbers of theirs.

A parameter is a real tensor of its shape and dtype, of which one element lies in memory. On fake tensors a network runs
its own `forward`, or that of its rewritten copy where `families` have one: shapes and operations are the model's. On
real ones its outputs have the shapes and dtypes that this gives, and numbers that stand in for the network's: smooth,
and another for another input. A row of an output follows that row of the inputs alone, and a token that token, where
they have the same rows and tokens. So the loop around the networks, its samplers and its positional tables are computed
as they are with weights.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.models.families import rewritten

RATIO = 0.6180339887
"""Turns between neighbouring numbers of a pattern: no two of a row are equal."""

ALIKE = 2
"""Leading dimensions, rows and tokens, in which an output may follow its inputs one by one."""

NUMBERS = ("layer_idx",)
"""Attributes that number a block."""


class WeightsNeededError(UnsupportedError):
    """Nothing can be said of a network without its weights."""


def is_stand_in(component: object) -> bool:
    """Whether a component of a pipeline is a network without weights."""
    return getattr(component, "_lemica_stand_in", False)


def network_from_config(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A network without weights, rewritten where `families` say so, in evaluation mode.

    Args:
        kind: its class, of diffusers or transformers.
        folder: with its configuration.
        dtype: of its parameters, but for those that the class keeps in fp32.
    """
    with init_empty_weights(include_buffers=False):
        if issubclass(kind, diffusers.ModelMixin):
            network = kind.from_config(kind.load_config(folder))
        else:
            network = kind(kind.config_class.from_pretrained(folder))
    kept = _kept_in_fp32(kind, dtype)
    for name, module in network.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                its = torch.float32 if kept & {*name.split("."), key} else dtype
                value = torch.zeros((), dtype=its).expand(parameter.shape)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and key not in module._non_persistent_buffers_set:
                module._buffers[key] = buffer.to(dtype)
    if isinstance(network, transformers.PreTrainedModel):
        network.tie_weights()
    network = rewritten(network).eval()
    for module in list(network.modules()):
        if any(True for _ in module.parameters()):
            own: Any = type(module)
            module.__class__ = _stand_in_class(own)
    _mark_alike(network)
    return network


def _mark_alike(network: nn.Module) -> None:
    """Give the blocks of a list that are built alike one mark."""
    for name, blocks in network.named_modules():
        if isinstance(blocks, nn.ModuleList):
            built: list[Any] = []
            for block in filter(is_stand_in, blocks):
                how = [_built(*its) for its in block.named_modules()]
                if how not in built:
                    built.append(how)
                block._lemica_alike = f"{name} {built.index(how)}"  # type: ignore[assignment]


def _built(name: str, module: nn.Module) -> Any:
    """What tells two modules apart, but for their numbers."""
    shapes = [(key, value.shape, value.dtype) for key, value in module._parameters.items() if value is not None]
    settings = {
        key: repr(value)
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | tuple | list | torch.dtype) and key not in NUMBERS
    }
    return name, type(module), shapes, settings


def _kept_in_fp32(kind: Any, dtype: torch.dtype) -> set[str]:
    """Names of modules that `from_pretrained` leaves in fp32."""
    names = set(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or issubclass(kind, diffusers.ModelMixin):
        names |= set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    return names if dtype.itemsize < 4 else set()


@functools.cache
def _stand_in_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the same name whose calls on real tensors are stood in for."""
    same: dict[str, Any] = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_lemica_stand_in": True}
    methods = ["forward", *(("encode", "decode") if hasattr(kind, "encode") and hasattr(kind, "decode") else ())]
    for name in methods:
        same[name] = _stood_in(getattr(kind, name))
    return type(kind.__name__, (kind,), same)


class _Shapes(FakeTensorMode):
    """Fake tensors on which blocks that are built alike are run once for each shape of their inputs."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # type: ignore[no-untyped-call,unused-ignore]
        self._known: dict[Any, Any] = {}

    def run(self, block: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a method of a block returns."""
        mark = block.__dict__.get("_lemica_alike")
        if mark is None:
            return own(block, *args, **kwargs)
        key = mark, own.__name__, *_shown((args, kwargs))
        if key not in self._known:
            self._known[key] = own(block, *args, **kwargs)
        return self._known[key]


def _shown(tree: Any) -> tuple[Any, ...]:
    """What a call is known by: shapes and dtypes of tensors, and all else."""
    leaves, structure = pytree.tree_flatten(tree)
    shown = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
    return structure, *shown


def _stood_in(own: Callable[..., Any]) -> Callable[..., Any]:
    theirs = inspect.signature(own)

    @functools.wraps(own)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = detect_fake_mode(pytree.tree_leaves((args, kwargs)))
        if mode is not None:
            return mode.run(self, own, args, kwargs) if isinstance(mode, _Shapes) else own(self, *args, **kwargs)
        named = theirs.bind(self, *args, **kwargs).arguments
        leaves = pytree.tree_leaves([named[name] for name in theirs.parameters if name in named][1:])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = id(self), own.__name__, *_shown((args, kwargs))  # of a copy: another
        known = self.__dict__.setdefault("_lemica_outputs", {})
        if key not in known:
            known[key] = _on_shapes(functools.partial(own, self), args, kwargs, type(self).__name__)
        return pytree.tree_map(lambda leaf: _numbers_for(leaf, tensors), known[key])

    return method


def _on_shapes(own: Callable[..., Any], args: Any, kwargs: Any, name: str) -> Any:
    """What a method returns, on fake tensors.

    Raises:
        WeightsNeededError: it reads values in Python, or its shapes follow them.
    """
    mode = _Shapes()
    given = pytree.tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    try:
        with mode, torch.no_grad():
            return own(*given[0], **given[1])
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise WeightsNeededError(
            f"{name} cannot be looked at without its weights: it reads values, by {error.func}",
            fix="download them, and leave --without-weights out",
        ) from None


def _numbers_for(leaf: Any, inputs: Sequence[Tensor]) -> Any:
    """Numbers in place of a fake tensor; of a VAE's distribution, one of such numbers."""
    if isinstance(leaf, Tensor):
        return stand_in_numbers(tuple(leaf.shape), leaf.dtype, inputs)
    if isinstance(getattr(leaf, "parameters", None), Tensor):
        return type(leaf)(_numbers_for(leaf.parameters, inputs))
    return leaf


def stand_in_numbers(shape: tuple[int, ...], dtype: torch.dtype, inputs: Sequence[Tensor]) -> Tensor:
    """Numbers that follow some inputs: a pattern, and one more for each input, as large as that has it.

    Args:
        shape: of the result. In leading dimensions that an input has, too, each element follows that one alone.
    """
    found = _pattern(math.prod(shape), 0).reshape(shape)
    for k, given in enumerate(inputs):
        shared = 0
        while shared < min(ALIKE, len(shape), given.dim()) and given.shape[shared] == shape[shared]:
            shared += 1
        lead, rest = shape[:shared], shape[shared:]
        size = math.prod(given.shape[shared:])
        if not size:
            continue
        values = given.detach().reshape(-1, size)
        values = values.float() if values.is_floating_point() else torch.sin(values.float() * RATIO)
        part = torch.sin(torch.mv(values, _pattern(size, k + 1)) / math.sqrt(size)).reshape(*lead, *[1] * len(rest))
        found = found.addcmul_(part, _pattern(math.prod(rest), k + 1).reshape(rest))
    return found.to(dtype) if dtype.is_floating_point else (found > 0).to(dtype)


def _pattern(size: int, number: int) -> Tensor:
    """fp32 [size], between −1 and 1, another for each number."""
    turns = torch.arange(size, dtype=torch.float32).mul_(RATIO + 0.1 * number)
    return turns.frac_().mul_(2 * math.pi).cos_()
