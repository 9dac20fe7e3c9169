"""The size that a pipeline decodes, found on shapes alone: pipelines round what they are asked for, and say little."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lemica_trt.models.trace.tape import Stop, plain

AUTOENCODER = "vae"
"""The component that decodes pictures."""


def has_autoencoder(pipeline: Any) -> bool:
    """Whether a pipeline has a component of that name that decodes."""
    return hasattr(pipeline.components.get(AUTOENCODER), "decode")


@contextlib.contextmanager
def decoding_on_shapes(pipeline: Any) -> Iterator[list[tuple[int, int]]]:
    """While it lasts, a recorded call of a pipeline ends where its autoencoder decodes, which is done on fake tensors.

    Yields:
        Where height and width of the pixels are put.
    """
    found: list[tuple[int, int]] = []
    autoencoder = pipeline.components[AUTOENCODER]
    autoencoder.decode = _on_shapes(autoencoder.decode, found)
    try:
        yield found
    finally:
        del autoencoder.decode


def _on_shapes(decode: Callable[..., Any], found: list[tuple[int, int]]) -> Callable[..., Any]:
    def ended(*args: Any, **kwargs: Any) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        given = pytree.tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, args)
        with mode:
            pixels, *_ = pytree.tree_leaves(plain(decode(*given, **kwargs)))
        height, width = pixels.shape[-2:]
        found.append((int(height), int(width)))
        raise Stop

    return ended
