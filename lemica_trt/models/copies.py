"""The networks of a traced pipeline as graphs are made of them: rewritten where `families` says so, and held against
what the pipeline's own gave in calls that were recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.text import first_line
from lemica_trt.models.families import rewritten
from lemica_trt.models.trace.replay import Network, relative, tolerance
from lemica_trt.models.trace.slots import Run
from lemica_trt.models.trace.tape import Event, Recorder, refs


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
        """What rewritten networks give in the first and the last step of some runs must be what the pipeline's own
        gave.

        Raises:
            UnsupportedError: it is not, or they read values in Python; says which.
        """
        for name, network in self._copies.items():
            if self.whole(name):
                continue
            for run in runs:
                for program in (run.programs[0], run.programs[-1]):
                    for event in run.tape.items[slice(*program.span)]:
                        if isinstance(event, Event) and event.kind == "call" and event.name == name:
                            _require_call(pipeline, name, network, run, event)


def _require_call(pipeline: str, name: str, network: nn.Module, run: Run, event: Event) -> None:
    recorder = Recorder({name: network})
    given = pytree.tree_map(lambda leaf: _fresh(run.tape.value(leaf)), event.inputs)
    try:
        with torch.no_grad(), recorder():
            found = Network({name: network})(name, given)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        raise UnsupportedError(f"{pipeline} cannot be built: its rewritten {name} fails: {first_line(error)}") from None
    if reads := sorted(how for _, how in recorder.tape.inside):
        raise UnsupportedError(f"{pipeline} cannot be built: its rewritten {name} reads values in Python: {reads}")
    wanted = [run.tape.value(ref) for ref in refs(event.outs)]
    sizes = [relative(mine.float(), own.float()) for mine, own in zip(found, wanted)]
    if len(found) != len(wanted) or not all(size <= tolerance(own.dtype) for size, own in zip(sizes, wanted)):
        raise UnsupportedError(
            f"{pipeline} cannot be built: its rewritten {name} is {max(sizes):.1e} of the largest off"
        )


def _fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
