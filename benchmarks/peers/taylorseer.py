"""diffusers' TaylorSeer: outputs between full steps are predicted by finite differences.

Of every attention, which is its default; of attention and feed-forward, all that a block computes; or of the whole
transformer's output alone (`use_lite_mode`). The default's patterns must match the whole name of an attention, and find
none that is called `attn1`; `attn1` names it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import TaylorSeerCacheConfig
from peer import Attach, Peer, Task

INTERVALS = (2, 3, 4, 5, 7)


def settings(order: int, names: list[str] | None = None, *, lite: bool = False) -> Mapping[str, Attach]:
    """One for each interval.

    Args:
        names: patterns of the modules that are predicted; None: the library's.
    """

    def attach(interval: int) -> Attach:
        return lambda pipe: pipe.transformer.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=interval,
                max_order=order,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=names,
                use_lite_mode=lite,
            )
        )

    return {f"interval {every}, order {order}": attach(every) for every in INTERVALS}


def of_parts(task: Task, parts: str) -> Mapping[str, Attach]:
    """Of all blocks.

    Args:
        parts: pattern of their modules' names.
    """
    return settings(1, [rf"{name}\.\d+\.({parts})" for name in task.model.family.block_lists])


PEERS = (
    Peer("diffusers", "TaylorSeer", lambda _: settings(1)),
    Peer("diffusers", "TaylorSeer of attn1", lambda task: of_parts(task, "attn1")),
    Peer("diffusers", "TaylorSeer of attn1, ff", lambda task: of_parts(task, "attn1|ff")),
    Peer("diffusers", "TaylorSeer, lite", lambda _: {**settings(1, lite=True), **settings(2, lite=True)}),
)
