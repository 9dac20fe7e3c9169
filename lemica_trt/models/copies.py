"""The networks of a traced pipeline as graphs are made of them: rewritten where `families` says so, and held against
the pipeline's own in calls that were recorded: the network as a whole, and each rewritten module in it on what its
original is given there. What surrounds a module may hide what it does: gates of random weights let a hundred-thousandth
of Mochi's attention through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.text import first_line
from lemica_trt.models.families import rewritten
from lemica_trt.models.trace.replay import relative, tolerance
from lemica_trt.models.trace.slots import Run
from lemica_trt.models.trace.tape import Event, Recorder, plain, refs, replace


class Copies:
    """Networks by name.

    Args:
        components: of a pipeline.
        names: of those that its loop calls.
    """

    def __init__(self, components: Mapping[str, Any], names: Sequence[str]) -> None:
        self._own = {name: components[name] for name in names if isinstance(components.get(name), nn.Module)}
        self._copies = {name: rewritten(network) for name, network in self._own.items()}

    def __getitem__(self, name: str) -> nn.Module:
        return self._copies[name]

    def whole(self, name: str) -> bool:
        """Whether a network is as diffusers has it."""
        return self._copies.get(name) is self._own.get(name)

    def require_same(self, pipeline: str, runs: Sequence[Run]) -> None:
        """What rewritten networks and modules give in the first and the last step of some runs must be what the
        pipeline's own give.

        Raises:
            UnsupportedError: it is not, or they read values in Python; says which.
        """
        for name in (name for name in self._copies if not self.whole(name)):
            for run in runs:
                for program in (run.programs[0], run.programs[-1]):
                    for event in run.tape.items[slice(*program.span)]:
                        if isinstance(event, Event) and event.kind == "call" and event.name == name:
                            try:
                                self._require_call(name, run, event)
                            except _OtherError as error:
                                raise UnsupportedError(f"{pipeline} cannot be built: its rewritten {error}") from None

    def _require_call(self, name: str, run: Run, event: Event) -> None:
        """A network must give what was recorded, and its rewritten modules what theirs give in the same call."""
        own, network, given = self._own[name], self._copies[name], pytree.tree_map(run.tape.value, event.inputs)
        args = [value for key, value in given.items() if key.isdecimal()]
        kwargs = {key: value for key, value in given.items() if not key.isdecimal()}
        recorder = Recorder({name: network})
        with recorder():
            found = _called(name, network, args, kwargs)
        if reads := sorted(how for _, how in recorder.tape.inside):
            raise _OtherError(f"{name} reads values in Python: {reads}")
        _require_near(name, found, [run.tape.value(ref) for ref in refs(event.outs)])
        pairs = [(path, part, network.get_submodule(path)) for path, part in own.named_modules() if path]
        changed = [pair for pair in pairs if type(pair[1]) is not type(pair[2])]
        if changed:
            with contextlib.ExitStack() as undo:
                for path, part, other in changed:
                    replace(part, "forward", _compared(f"{name}.{path}", part.forward, other), undo)
                _called(name, own, args, kwargs)


class _OtherError(Exception):
    """A rewritten module is not what it stands for; says which, and how."""


def _compared(name: str, original: Callable[..., Any], other: nn.Module) -> Callable[..., Any]:
    """A module's `forward`, of which another module, given the same, must give the same."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = _called(name, other, args, kwargs)
        output = original(*args, **kwargs)
        _require_near(name, found, _tensors(output))
        return output

    return forward


def _called(name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What a module gives, of copies of its arguments."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    try:
        with torch.no_grad():
            return _tensors(module(*args, **kwargs))
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        raise _OtherError(f"{name} fails: {first_line(error)}") from None


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(plain(output)) if isinstance(leaf, Tensor)]


def _require_near(name: str, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    if len(found) != len(wanted):
        raise _OtherError(f"{name} gives {len(found)} tensors, and not {len(wanted)}")
    for mine, own in zip(found, wanted):
        if not (off := relative(mine.float(), own.float())) <= tolerance(own.dtype):
            raise _OtherError(f"{name} is {off:.1e} of the largest off")
