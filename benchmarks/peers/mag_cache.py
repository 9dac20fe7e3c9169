"""diffusers' MagCache: the trunk's residual is reused while the measured ratios of its magnitude stay near 1.

The ratios are those that its own calibration prints for one prompt; the first fifth of the steps is full, as is its
default.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping

from diffusers import MagCacheConfig
from peer import Attach, Peer, Task

SETTINGS = ((0.06, 3), (0.12, 3), (0.24, 5), (0.5, 8), (1.0, 10))
"""Threshold, and the most steps in a row that are skipped."""


def ratios(task: Task) -> list[float]:
    """What the library's calibration prints."""
    pipe = task.pipeline()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=task.steps))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        task.sample(pipe, *task.calibration)
    found = re.search(r"^\[[-\d].*\]$", printed.getvalue(), re.MULTILINE)
    if found is None:
        raise RuntimeError("its calibration printed no ratios")
    return [float(ratio) for ratio in json.loads(found[0])]


def settings(task: Task) -> Mapping[str, Attach]:
    measured = ratios(task)

    def attach(threshold: float, skip: int) -> Attach:
        return lambda pipe: pipe.transformer.enable_cache(
            MagCacheConfig(
                threshold=threshold, max_skip_steps=skip, num_inference_steps=task.steps, mag_ratios=list(measured)
            )
        )

    return {f"threshold {threshold:g}, at most {skip} skipped": attach(threshold, skip) for threshold, skip in SETTINGS}


PEERS = (Peer("diffusers", "MagCache", settings),)
