"""What a rival is to the benchmark: a method of some library, a few settings of it, and how each is put on a pipeline.

Every other file in this folder, but `run.py`, has one method, or a few that differ in little, as `PEERS`: `run.py`
finds them by listing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemica_trt.bundle.reading import Bundle
from lemica_trt.models import Model

Attach = Callable[[Any], None]
"""Changes a diffusers pipeline so that its next calls run by the method."""


@dataclass(frozen=True)
class Task:
    """What all peers run on.

    Attributes:
        model: the pipeline and its profile; not to be changed.
        bundle: a build of it; its calibration is what our own methods plan from.
        calibration: a prompt and a seed that peers may measure on; none of the clips.
    """

    model: Model
    bundle: Bundle
    calibration: tuple[str, int]

    @property
    def steps(self) -> int:
        """N."""
        return self.model.profile.sampling.steps

    def pipeline(self) -> Any:
        """The pipeline anew: a class and a transformer of its own, all else shared."""
        there = self.model.pipeline
        kind = type(there)
        parts = {**there.components, "transformer": deepcopy(there.transformer)}
        made = type(kind.__name__, (kind,), {"__module__": kind.__module__})(**parts)
        made.set_progress_bar_config(disable=True)
        return made

    @torch.no_grad()
    def sample(self, pipeline: Any, prompt: str, seed: int) -> Tensor:
        """Final latents fp32 [1, *latent_shape] of one request, called as a user calls the pipeline."""
        return self.call(pipeline, self.model.embed([prompt]), self.model.noise(seed)[None])

    @torch.no_grad()
    def call(self, pipeline: Any, embeds: Tensor, noise: Tensor) -> Tensor:
        """The same from prompt embeddings [2, L, W], unconditional first, and noise [1, *latent_shape]."""
        profile = self.model.profile
        found: Tensor = pipeline(
            prompt_embeds=embeds[1:],
            negative_prompt_embeds=embeds[:1],
            num_frames=profile.shape.frames,
            height=profile.shape.height,
            width=profile.shape.width,
            num_inference_steps=profile.sampling.steps,
            guidance_scale=profile.sampling.guidance_scale,
            max_sequence_length=profile.text_length,
            output_type="latent",
            return_dict=False,
            **self.model.family.call_arguments(profile, noise),
        )[0]
        return found.float()


@dataclass(frozen=True)
class Peer:
    """A method.

    Attributes:
        library: as its distribution is called; `lemica-trt` for our own.
        method: as the library calls it.
        settings: what is set, in words → how, weak first; may measure on `Task.calibration`. Raises what the library
            raises where it refuses.
    """

    library: str
    method: str
    settings: Callable[[Task], Mapping[str, Attach]]


def peers() -> list[Peer]:
    """Those of all files in this folder, by file name."""
    names = sorted(found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(name) for name in names if name not in ("peer", "run")]
    return [peer for module in modules for peer in module.PEERS]


class WorkCounter:
    """Counts the work of a pipeline's transformer blocks: their linear layers, and the two products of each attention.

    A block that a cache replaces is still called, so that calls of blocks tell nothing; its linear layers and its
    attention run only where it is computed. Each counts by its multiply-adds, so that a block that runs without its
    attention, or for one branch of the guidance alone, counts for what it is.

    Linear layers are counted by forward hooks; attention, which is a function, only inside `with counter.attention():`,
    in which no other model may run.
    """

    def __init__(self, task: Task, pipeline: Any) -> None:
        self._work = 0
        for name in task.model.family.block_lists:
            for module in getattr(pipeline.transformer, name).modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._work += output.numel() * module.in_features  # type: ignore[operator]

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Count `scaled_dot_product_attention`, too: query·keyᵀ, and the weights times value."""
        original = functional.scaled_dot_product_attention

        def counted(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
            weights = query.shape[:-1].numel() * key.shape[-2]
            self._work += weights * (query.shape[-1] + value.shape[-1])
            return original(query, key, value, *others, **named)

        with patch.object(functional, "scaled_dot_product_attention", counted):
            yield

    def take(self) -> int:
        """Multiply-adds since the last time."""
        found, self._work = self._work, 0
        return found


@contextmanager
def warnings_of(library: str) -> Iterator[list[str]]:
    """The warnings that a library logs meanwhile."""
    found: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, logger = Keeps(logging.WARNING), logging.getLogger(library.replace("-", "_"))
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
