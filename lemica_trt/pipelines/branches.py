"""The two branches of a pipeline's guidance, seen from outside: what its transformer returns, what its scheduler gets.

A scheduler is given the guided output m = u + g·(c − u) alone. Plans that weigh the branches apart (`ir.plan`) need the
guidance term m − c too. Hooks keep what the transformer returns in a step, be it one call for both branches or a call
each; of two tensors on a line with m the nearer one is c, whatever their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError

NETWORKS = ("transformer", "transformer_2", "unet")
"""Components of a pipeline that its loop may call."""

LINE = 1e-3
"""How far the guided output may lie off the line through the branches, in units of their distance; beside rounding."""


class BranchOutputs:
    """Hooks on the networks of a pipeline.

    Args:
        pipe: a diffusers pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        found = [getattr(pipe, name, None) for name in NETWORKS]
        self._kind = type(pipe).__name__
        self._seen: list[Tensor] = []
        self._hooks = [m.register_forward_hook(self._after) for m in found if isinstance(m, nn.Module)]

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def clear(self) -> None:
        """Forget what an earlier request, or one that failed, has left."""
        self._seen = []

    def guidance_term(self, output: Tensor) -> Tensor:
        """(g − 1)·(c − u) of the step whose guided output this is; 0 where one branch ran. fp32, in its shape.

        Raises:
            UnsupportedError: the branches are not to be seen: the output is something else than a line through them.
        """
        seen, self._seen = self._seen, []
        guided = output.detach().float()
        if [tensor.shape for tensor in seen] == [guided.shape]:
            return torch.zeros_like(guided)
        parts = [part.float() for tensor in seen for part in torch.split(tensor, len(guided))]
        if [part.shape for part in parts] == [guided.shape] * 2:
            far, near = sorted(parts, key=lambda part: -float((guided - part).square().sum()))
            difference, term = near - far, guided - near
            square = float(difference.square().sum())
            scale = float((term * difference).sum()) / square if square else 0.0
            off = float((term - scale * difference).norm())
            rounding = 4 * torch.finfo(output.dtype).eps * float(guided.norm())
            if off <= LINE * square**0.5 + rounding:
                return difference * scale
        raise UnsupportedError(
            f"the branches of the guidance of {self._kind} cannot be told from what its transformer returns",
            fix="fit a plan on this pipeline: lemica_trt.fit",
        )

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
        self._seen += [leaves[0].detach()] if leaves else []


def _plain(output: Any) -> Any:
    """diffusers' outputs are dictionaries that pytree may not know."""
    return list(output.values()) if hasattr(output, "values") else output
