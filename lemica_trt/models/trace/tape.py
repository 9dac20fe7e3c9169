"""Record what a diffusers pipeline does around its networks: a tape of aten operators between *events*.

Events are calls of a component (transformer, text encoder, VAE), of a tokenizer, and of a scheduler's
`scale_model_input` and `step`. What happens inside one is not recorded; its outputs are fresh tensors. Module hooks
and, while the recording lasts, wrapped methods of the tokenizers' and schedulers' classes see them (classes, because a
pipeline may copy its scheduler). No pipeline is known by name.

`.tolist()` and `.numpy()` do not reach the dispatcher; a `TorchFunctionMode` sees them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = ("tolist", "numpy", "item", "__array__", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor by which its values become Python's."""

EventKind = Literal["call", "tokenize", "scale", "step", "host"]


@dataclass(frozen=True)
class Ref:
    """A tensor at one version: in-place operators raise it."""

    id: int
    version: int


@dataclass(frozen=True)
class Op:
    """An aten operator; tensors in `args` and `kwargs` are `Ref`s. `mutates`: storages it writes to."""

    func: Any
    args: Any
    kwargs: Any
    outs: tuple[Ref, ...]
    mutates: frozenset[int]


@dataclass(frozen=True)
class Event:
    """Something whose inside is not recorded.

    Attributes:
        name: of the component (`transformer`, `transformer.proj_in`); of a host read: the method.
        inputs, outs: trees of `Ref`s and constants.
        scheduler: id of the scheduler object, of `scale` and `step`.
    """

    kind: EventKind
    name: str
    inputs: Any
    outs: Any
    scheduler: int | None = None


class Stop(Exception):
    """Ends a recording."""


def refs(tree: Any) -> list[Ref]:
    """All `Ref`s of a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Ref)]


def plain(output: Any) -> Any:
    """diffusers' and transformers' output classes as dicts and tuples; of a VAE's distribution its parameters."""
    if isinstance(output, Tensor) or output is None:
        return output
    if isinstance(output, dict) or hasattr(output, "to_tuple"):
        return {key: plain(value) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return tuple(plain(value) for value in output)
    if isinstance(getattr(output, "parameters", None), Tensor):
        return {key: value for key, value in vars(output).items() if isinstance(value, Tensor)}
    return output


@dataclass
class Tape:
    """One recording.

    Attributes:
        items: operators and events in order.
        values: a copy of each tensor at each version that was read or made.
        schedulers: id of a scheduler object → a copy of it before its first use, in order of first use.
        draws: number of steps done → what the scheduler drew in the next one.
        inside: (component, method) of values that became Python's inside a component.
        steps: number of steps done.
        copying: whether a value is being copied, which is not recorded.
    """

    items: list[Op | Event] = field(default_factory=list)
    values: dict[Ref, Tensor] = field(default_factory=dict)
    schedulers: dict[int, Any] = field(default_factory=dict)
    draws: dict[int, list[Tensor]] = field(default_factory=dict)
    inside: set[tuple[str, str]] = field(default_factory=set)
    steps: int = 0
    copying: bool = False
    _ids: dict[int, int] = field(default_factory=dict)
    _alive: list[Tensor] = field(default_factory=list)
    _kept: list[Any] = field(default_factory=list)
    _storages: list[int] = field(default_factory=list)

    def ref(self, tensor: Tensor, *, raised: bool = False) -> Ref:
        """The tensor as it is; `raised`: as it is after the in-place operator that just ran."""
        number = self._ids.get(id(tensor))
        if number is None:
            number = self._ids[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
            try:
                storage = tensor.untyped_storage()
                self._kept.append(storage)  # its address must not be that of another, even if the tensor lets it go
                self._storages.append(storage._cdata)
            except (NotImplementedError, RuntimeError):
                self._storages.append(-1 - number)
        found = Ref(number, 0 if tensor.is_inference() else tensor._version + raised)
        if found not in self.values:
            self.copying = True
            self.values[found] = tensor.detach().clone()
            self.copying = False
        return found

    def storage(self, ref: Ref) -> int:
        """Where a tensor's numbers lie: views share it."""
        return self._storages[ref.id]

    def refs_from(self, tree: Any) -> Any:
        """The tree with `Ref`s for tensors."""
        return pytree.tree_map(lambda leaf: self.ref(leaf) if isinstance(leaf, Tensor) else leaf, tree)

    def forget(self, made: Collection[int], *, compared: bool) -> None:
        """End the recording, and keep shapes and dtypes alone of what is not looked at again: outputs of components
        that nothing reads, and what operators made that no event gave.

        Args:
            made: ids of what operators and events made of the latents.
            compared: nothing of all that is looked at.
        """
        events = [item for item in self.items if isinstance(item, Event)]
        inputs = {ref.id for event in events for ref in refs(event.inputs)}
        operators = [item for item in self.items if isinstance(item, Op)]
        read = inputs | {ref.id for item in operators for ref in refs((item.args, item.kwargs))}
        given = {ref.id for event in events for ref in refs(event.outs)}
        called = {ref.id for event in events if event.kind == "call" for ref in refs(event.outs)}
        forgotten = (set(made) if compared else set(made) - given - inputs) | (called - read)
        for ref, value in self.values.items():
            if ref.id in forgotten:
                self.values[ref] = value.to("meta")
        self._ids.clear()
        self._alive.clear()
        self._kept.clear()

    def value(self, leaf: Any) -> Any:
        """What a leaf of a tree stood for."""
        return self.values[leaf] if isinstance(leaf, Ref) else leaf

    def copied(self, scheduler: Any) -> int:
        """The id of a scheduler, which is copied before its first use."""
        if id(scheduler) not in self.schedulers:
            self.schedulers[id(scheduler)] = copy.deepcopy(scheduler)
            self._kept.append(scheduler)
        return id(scheduler)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Writes operators to the tape unless an event is running."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._recorder.inside or self._recorder.tape.copying:
            return func(*args, **kwargs)
        tape = self._recorder.tape
        given, named = tape.refs_from(args), tape.refs_from(kwargs)
        mutates = set()
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = given[i] if i < len(given) else named.get(argument.name)
                mutates |= {tape.storage(ref) for ref in refs(written)}
        output = func(*args, **kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        passed = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))} if mutates else set()
        outs = tuple(tape.ref(leaf, raised=id(leaf) in passed) for leaf in leaves)
        if func is torch.ops.aten._local_scalar_dense.default:
            tape.items.append(Event("host", "item", given, ()))
        else:
            tape.items.append(Op(func, given, named, outs, frozenset(mutates)))
        return output


class _Python(TorchFunctionMode):
    """Sees values that become Python's, and what a scheduler draws."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, name = self._recorder, getattr(func, "__name__", "")
        if name in HOST_READS and args and isinstance(args[0], Tensor):
            if recorder.inside:
                recorder.tape.inside.add((recorder.inside[0], name))
            elif name in ("tolist", "numpy", "__array__"):  # the others reach the dispatcher
                recorder.tape.items.append(Event("host", name, (recorder.tape.ref(args[0]),), ()))
        output = func(*args, **(kwargs or {}))
        if name == "randn" and recorder.inside[:1] == [SCHEDULER]:
            recorder.tape.draws.setdefault(recorder.tape.steps, []).append(output.detach().clone())
        return output


class HeldNetworks:
    """Networks that compute once for each shape of their inputs, and then give what they gave: for recordings that want
    to know what a loop calls, not what becomes of its latents.

    Args:
        names: of components.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self._outputs: dict[Any, Any] = {}

    def forward(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for a component's `forward`."""

        @functools.wraps(original)
        def held(*args: Any, **kwargs: Any) -> Any:
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            key = name, *((leaf.shape, leaf.dtype) for leaf in given)
            if key not in self._outputs:
                self._outputs[key] = original(*args, **kwargs)
            return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._outputs[key])

        return held


SCHEDULER = "scheduler"
"""What runs while a scheduler steps, in `Recorder.inside`."""


class Recorder:
    """Records calls of one pipeline.

    Args:
        components: name → component, of `pipeline.components`.
        last_step: the recording ends before this step; None: with the call.
        held: networks that need not compute.

    Attributes:
        tape: what was recorded.
        inside: names of the components that are running, the outermost first.
    """

    def __init__(
        self, components: Mapping[str, Any], *, last_step: int | None = None, held: HeldNetworks | None = None
    ) -> None:
        self.tape = Tape()
        self._held = held
        self.inside: list[str] = []
        self._components = components
        self._last_step = last_step
        self._names: dict[int, str] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Tape]:
        """While it lasts, everything is recorded; `Stop` ends it silently."""
        with contextlib.ExitStack() as undo:
            for name, component in self._components.items():
                if isinstance(component, nn.Module):
                    self._hook(name, component, undo)
            self._wrap_classes(undo)
            try:
                with _Python(self), _Operators(self):
                    yield self.tape
            except Stop:
                pass
            finally:
                self.inside.clear()

    def _hook(self, name: str, component: nn.Module, undo: contextlib.ExitStack) -> None:
        pending: list[Any] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.inside:
                pending.append(self.tape.refs_from(_bound(module.forward, args, kwargs)))
            self.inside.append(self._names[id(module)])

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if len(self.inside) == 1:
                outs = self.tape.refs_from(plain(output))
                self.tape.items.append(Event("call", self.inside[0], pending.pop(), outs))
            self.inside.pop()

        for path, module in component.named_modules():
            if id(module) in self._names:
                continue
            self._names[id(module)] = f"{name}.{path}" if path else name
            for handle in (
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, with_kwargs=True),
            ):
                undo.callback(handle.remove)
        if self._held is not None and name in self._held.names:
            replace(component, "forward", self._held.forward(name, component.forward), undo)
        for method in ("encode", "decode"):
            if hasattr(component, method) and hasattr(component, "decode"):
                replace(component, method, self._coder(f"{name}.{method}", getattr(component, method)), undo)

    def _coder(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """A VAE's `encode` or `decode`: a call, of which a distribution's parameters are the output."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return original(*args, **kwargs)
            given = self.tape.refs_from(_bound(original, args, kwargs))
            with self._in(name):
                output = original(*args, **kwargs)
            outs = [leaf for leaf in pytree.tree_leaves(plain(output)) if isinstance(leaf, Tensor)]
            self.tape.items.append(Event("call", name, given, self.tape.refs_from(tuple(outs))))
            return output

        return wrapped

    def _wrap_classes(self, undo: contextlib.ExitStack) -> None:
        for kind in {type(component) for component in self._components.values()}:
            if hasattr(kind, "step") and hasattr(kind, "set_timesteps"):
                replace(kind, "step", self._step(kind.step), undo)
                if hasattr(kind, "scale_model_input"):
                    replace(kind, "scale_model_input", self._scale(kind.scale_model_input), undo)
            elif callable(getattr(kind, "__call__", None)) and (  # noqa: B004  # the class's own is replaced
                hasattr(kind, "batch_decode") and not issubclass(kind, nn.Module)
            ):
                replace(kind, "__call__", self._tokenize(kind.__call__), undo)

    def _tokenize(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return original(tokenizer, *args, **kwargs)
            name = next((key for key, value in self._components.items() if value is tokenizer), "tokenizer")
            given = self.tape.refs_from(_bound(functools.partial(original, tokenizer), args, kwargs))
            with self._in(name):
                output = original(tokenizer, *args, **kwargs)
            tensors = {key: value for key, value in output.items() if isinstance(value, Tensor)}
            self.tape.items.append(Event("tokenize", name, given, self.tape.refs_from(tensors)))
            return output

        return wrapped

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return original(scheduler, *args, **kwargs)
            if self.tape.steps == self._last_step:
                self.tape.copied(scheduler)
                raise Stop
            given = self.tape.refs_from(_bound(functools.partial(original, scheduler), args, kwargs))
            with self._in(SCHEDULER):
                key = self.tape.copied(scheduler)
                output = original(scheduler, *args, **kwargs)
            name = type(scheduler).__name__
            self.tape.items.append(Event("step", name, given, self.tape.refs_from(plain(output)), key))
            self.tape.steps += 1
            return output

        return wrapped

    def _scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(scheduler: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return original(scheduler, sample, *args, **kwargs)
            given = {"sample": self.tape.ref(sample)}
            with self._in(SCHEDULER):
                key = self.tape.copied(scheduler)
                output = original(scheduler, sample, *args, **kwargs)
            if output is not sample:
                name = type(scheduler).__name__
                self.tape.items.append(Event("scale", name, given, self.tape.ref(output), key))
            return output

        return wrapped

    @contextlib.contextmanager
    def _in(self, name: str) -> Iterator[None]:
        self.inside.append(name)
        try:
            yield
        finally:
            if self.inside:
                self.inside.pop()


def _bound(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name; those of `**kwargs` among them."""
    try:
        signature = inspect.signature(function)
        bound = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def replace(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set an attribute for a while; one that was inherited is deleted again."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)
