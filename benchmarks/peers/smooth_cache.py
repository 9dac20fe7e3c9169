"""SmoothCache (Liu et al. 2024, arXiv 2411.10510), if diffusers has it."""

from __future__ import annotations

from collections.abc import Mapping

import diffusers
from peer import Attach, Peer, Task


def settings(task: Task) -> Mapping[str, Attach]:
    """Raises NotImplementedError: this diffusers does not have it, or it is new and no settings are known here."""
    there = hasattr(diffusers, "SmoothCacheConfig")
    raise NotImplementedError(
        f"diffusers {diffusers.__version__} has {'a' if there else 'no'} SmoothCacheConfig"
        + (", whose settings this benchmark does not know yet" if there else "")
    )


PEERS = (Peer("diffusers", "SmoothCache", settings),)
