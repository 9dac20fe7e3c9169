"""The collective of CFG-parallel denoising: two processes run one branch of the guidance each, on a device each.

A step ends with one all-gather of what the DiT gave, [b, *latent_shape] from each: the branches meet nowhere else.
NCCL on GPUs, gloo on CPUs. The step graphs on both devices have the inputs and outputs of those that run both branches,
and all else is computed on both: the loop, its histories and its random numbers need not know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lemica_trt.core.errors import EngineError
from lemica_trt.core.text import first_line

BRANCHES = 2
"""Of classifier-free guidance, and so processes: 0 runs the unconditional one, 1 the conditional one."""

TIMEOUT = timedelta(minutes=10)
"""After which a process no longer waits for the other one in a step."""


@contextlib.contextmanager
def joined(rank: int, device: torch.device, store: Path) -> Iterator[Callable[[Tensor], Tensor]]:
    """Meet the process of the other branch, and leave it at the end. A process is in one such group at a time.

    Args:
        rank: the branch of this process, 0 or 1.
        device: of this process.
        store: a file that both processes name and that is not there yet.

    Returns:
        The all-gather: [b, …] → [2b, …], the rows of process 0 first; the same on both. Both must call it as often.

    Raises:
        EngineError: the other one is not there, or, in a step, gone.
    """
    on_gpu = device.type == "cuda"
    with _group_errors():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=store.absolute().as_uri(),
            rank=rank,
            world_size=BRANCHES,
            timeout=TIMEOUT,
            device_id=device if on_gpu else None,
        )

    def gather(rows: Tensor) -> Tensor:
        both = rows.new_empty((BRANCHES * len(rows), *rows.shape[1:]))
        with _group_errors():
            dist.all_gather(list(both.chunk(BRANCHES)), rows.contiguous())
        return both

    try:
        yield gather
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _group_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"the process of the other branch does not answer: {first_line(error)}") from None
