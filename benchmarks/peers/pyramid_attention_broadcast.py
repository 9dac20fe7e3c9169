"""diffusers' Pyramid Attention Broadcast: attention is reused over a range of steps, all else is computed."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import PyramidAttentionBroadcastConfig
from peer import Attach, Peer, Task

SETTINGS = ((2, 100, 800), (4, 100, 800), (8, 0, 950))
"""Attention is computed every so many steps, between these timesteps."""


def settings(task: Task) -> Mapping[str, Attach]:
    def attach(every: int, above: int, below: int) -> Attach:
        return lambda pipe: pipe.transformer.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=every,
                spatial_attention_timestep_skip_range=(above, below),
                current_timestep_callback=lambda: pipe.current_timestep,
            )
        )

    return {f"every {every}, {above} … {below}": attach(every, above, below) for every, above, below in SETTINGS}


PEERS = (Peer("diffusers", "PyramidAttentionBroadcast", settings),)
