"""Exceptions: networks of diffusers that no graph can follow as they are written, said in another way.

    hidream            experts of a token: all of them, weighted; a picture's size
    hunyuanimage       text tokens stay where they are, and are masked
    hunyuanvideo_15    text tokens stay where they are, and are masked
    lumina2            text tokens stay where they are, and are masked
    mochi              the same in its attention
    z_image            a prompt padded to a multiple of 32, of any length; the head sees the picture alone

Each file has `REWRITES`, and is found by listing this folder. A pipeline is traced, and a request compared, with the
network as diffusers has it; graphs are made of a copy that shares its weights, in which some modules are of another
class. Before a build the copy must give what the network gave in calls that were recorded, with prompts of several
lengths (`models.traced`).
"""

from __future__ import annotations

import copy
import functools
import importlib
import pkgutil
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Rewrite:
    """One exception.

    Attributes:
        module: a subclass, without parameters of its own, of the class that it stands for. Where it has a method
            `adapt()`, that is called once for each such module of the copy.
        upstream: file and class, in diffusers.
        reason: what no graph can follow there.
    """

    module: type[nn.Module]
    upstream: str
    reason: str

    @property
    def original(self) -> type[nn.Module]:
        """The class that it stands for."""
        return self.module.__mro__[1]


@functools.cache
def rewrites() -> tuple[Rewrite, ...]:
    """All of them, in the order of their files."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return tuple(its for name in names for its in importlib.import_module(f"{__name__}.{name}").REWRITES)


def rewritten(network: nn.Module) -> nn.Module:
    """A copy of a network that shares its weights, with the modules of other classes that `rewrites` have for its own;
    the network itself where they have none. Subclasses of those classes are not rewritten."""
    by_class = {rewrite.original: rewrite.module for rewrite in rewrites()}
    if not any(type(module) in by_class for module in network.modules()):
        return network
    shared = [*network.parameters(), *network.buffers()]
    found = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    for module in found.modules():
        if type(module) in by_class:
            module.__class__ = by_class[type(module)]
            getattr(module, "adapt", lambda: None)()
    return found
