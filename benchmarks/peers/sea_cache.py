"""diffusers' SeaCache: the trunk's residual is extrapolated while the latents change little in a filter of their own.

It needs to be told the step and the noise level, which diffusers' pipelines do in a few families only. Where the
pipeline doesn't, it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import SeaCacheConfig
from peer import Attach, Peer, Task

SETTINGS = ((0.1, 2), (0.25, 2), (0.5, 4), (1.0, 8))
"""Threshold, and the most steps in a row that are skipped."""


def settings(task: Task) -> Mapping[str, Attach]:
    def attach(threshold: float, skip: int) -> Attach:
        return lambda pipe: pipe.transformer.enable_cache(
            SeaCacheConfig(threshold=threshold, max_consecutive_cached=skip)
        )

    return {f"threshold {threshold:g}, at most {skip} skipped": attach(threshold, skip) for threshold, skip in SETTINGS}


PEERS = (Peer("diffusers", "SeaCache", settings),)
