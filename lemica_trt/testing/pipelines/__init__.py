"""Tiny random pipelines of diffusers' own classes, made without a download.

    parts     tokenizers, text encoders, autoencoders, schedulers
    images    text to image
    videos    text and images to video
    modular   diffusers' modular pipelines

A new one is a function, and its name in `CASES` of its file; the conformance tests find it there.
"""

from __future__ import annotations

from typing import Any

import torch

from lemica_trt.testing.pipelines import images, modular, videos
from lemica_trt.testing.pipelines.parts import Case

CASES: dict[str, Case] = dict(sorted({**images.CASES, **videos.CASES, **modular.CASES}.items()))
"""All of them, by name."""


def tiny_pipeline(name: str) -> Any:
    """A pipeline of `CASES`, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = CASES[name].make()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
