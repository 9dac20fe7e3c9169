"""diffusers' FasterCache: attention is reused, and the unconditional branch is made of the conditional one."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import FasterCacheConfig
from peer import Attach, Peer, Task

SETTINGS = (
    (2, 641, 2, 641, 0.5),
    (2, 641, 5, 641, 0.5),
    (2, 681, 5, 781, 0.3),
    (3, 801, 5, 801, 0.5),
    (3, 801, 5, 801, 0.3),
    (5, 951, 5, 951, 0.5),
    (5, 951, 5, 951, 0.3),
)
"""Attention is computed every so many steps below a timestep, the unconditional branch every so many below another, and
attention is extrapolated by a weight: 0.5 is the library's default, 0.3 that of its example for CogVideoX, which is the
third of these."""


def settings(task: Task) -> Mapping[str, Attach]:
    def attach(attention: int, attention_below: int, branch: int, branch_below: int, weight: float) -> Attach:
        return lambda pipe: pipe.transformer.enable_cache(
            FasterCacheConfig(
                spatial_attention_block_skip_range=attention,
                spatial_attention_timestep_skip_range=(-1, attention_below),
                unconditional_batch_skip_range=branch,
                unconditional_batch_timestep_skip_range=(-1, branch_below),
                attention_weight_callback=lambda _: weight,
                tensor_format="BFCHW" if task.model.family.name == "cogvideox" else "BCFHW",
                current_timestep_callback=lambda: pipe.current_timestep,
            )
        )

    names = "attention every {} below {}, branch every {} below {}, weight {:g}"
    return {names.format(*each): attach(*each) for each in SETTINGS}


PEERS = (Peer("diffusers", "FasterCache", settings),)
