"""diffusers' FasterCache: attention is reused, and the unconditional branch is made of the conditional one."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import FasterCacheConfig
from peer import Attach, Peer, Task

SETTINGS = ((2, 2, 641), (2, 5, 641), (3, 5, 801), (5, 5, 951))
"""Attention is computed every so many steps, the unconditional branch every so many, both below this timestep."""


def settings(task: Task) -> Mapping[str, Attach]:
    def attach(attention: int, branch: int, below: int) -> Attach:
        return lambda pipe: pipe.transformer.enable_cache(
            FasterCacheConfig(
                spatial_attention_block_skip_range=attention,
                spatial_attention_timestep_skip_range=(-1, below),
                unconditional_batch_skip_range=branch,
                unconditional_batch_timestep_skip_range=(-1, below),
                tensor_format="BFCHW" if task.model.family.name == "cogvideox" else "BCFHW",
                current_timestep_callback=lambda: pipe.current_timestep,
            )
        )

    return {
        f"attention every {attention}, branch every {branch}, below {below}": attach(attention, branch, below)
        for attention, branch, below in SETTINGS
    }


PEERS = (Peer("diffusers", "FasterCache", settings),)
