"""diffusers' FirstBlockCache: all blocks but the first are skipped while the first one's residual changes little."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import FirstBlockCacheConfig
from peer import Attach, Peer, Task

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)


def settings(task: Task) -> Mapping[str, Attach]:
    def attach(threshold: float) -> Attach:
        return lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))

    return {f"threshold {threshold:g}": attach(threshold) for threshold in THRESHOLDS}


PEERS = (Peer("diffusers", "FirstBlockCache", settings),)
