"""cache-dit: DBCache, its calibrators, DBPrune, and its static masks of steps.

DBCache computes the first block, and skips the rest while its residual changes little; its default, the first eight
blocks, is more than small models have. A calibrator predicts the residual of the skipped blocks where DBCache reuses
the last: TaylorSeer, or dynamic mode decomposition (DMD). A mask of steps stands in for the threshold: the library's
own policies, and LeMiCa's steps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peer import Attach, Peer, Task

from lemica_trt.evaluate.quality import error_graph_of
from lemica_trt.planning.minimax import solve

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "WARNING")  # else it prints each configuration

SETTINGS = ((8, 0.08), (8, 0.15), (8, 0.3), (8, 0.6), (4, 0.15), (4, 0.3), (4, 0.6))
"""Steps of warm-up, which are full, and the threshold. 8 and 0.08 are the library's defaults."""

POLICIES = ("slow", "medium", "fast", "ultra")
BUDGETS = (10, 15, 20)

Calibrator = tuple[str, dict[str, Any]]
"""Its class in cache-dit, and its arguments."""

TAYLOR: Calibrator = ("TaylorSeerCalibratorConfig", {"taylorseer_order": 1})
DMD: Calibrator = ("DMDCalibratorConfig", {})


def enable(task: Task, calibrator: Calibrator | None, config: str = "DBCacheConfig", **changes: Any) -> Attach:
    """F1B0, unless something else is said."""
    import cache_dit

    given = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0} | changes

    def attach(pipe: Any) -> None:
        # The library keeps the configuration that it is given, and writes to it.
        cache_dit.enable_cache(
            pipe,
            cache_config=getattr(cache_dit, config)(num_inference_steps=task.steps, **given),
            calibrator_config=None if calibrator is None else getattr(cache_dit, calibrator[0])(**calibrator[1]),
        )

    return attach


def by_threshold(task: Task, calibrator: Calibrator | None = None, config: str = "DBCacheConfig") -> dict[str, Attach]:
    return {
        f"{warm} steps of warm-up, threshold {threshold:g}": enable(
            task, calibrator, config, max_warmup_steps=warm, residual_diff_threshold=threshold
        )
        for warm, threshold in SETTINGS
    }


def by_mask(task: Task, calibrator: Calibrator | None = None) -> Mapping[str, Attach]:
    """The library's policies, then LeMiCa's steps."""
    import cache_dit

    masks = {policy: cache_dit.steps_mask(total_steps=task.steps, mask_policy=policy) for policy in POLICIES}
    graph = error_graph_of(task.bundle)
    assert graph is not None
    for budget, schedule in solve(graph, BUDGETS).items():
        masks[f"LeMiCa's {budget}"] = [int(step in schedule.full_steps) for step in range(task.steps)]
    return {
        name: enable(task, calibrator, steps_computation_mask=mask, steps_computation_policy="static")
        for name, mask in masks.items()
    }


PEERS = (
    Peer("cache-dit", "DBCache", by_threshold),
    Peer("cache-dit", "DBCache, TaylorSeer", lambda task: by_threshold(task, TAYLOR)),
    Peer("cache-dit", "DBCache, DMD", lambda task: by_threshold(task, DMD)),
    Peer("cache-dit", "DBPrune", lambda task: by_threshold(task, None, "DBPruneConfig")),
    Peer("cache-dit", "static mask", by_mask),
    Peer("cache-dit", "static mask, TaylorSeer", lambda task: by_mask(task, TAYLOR)),
)
