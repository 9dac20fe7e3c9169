"""The thin interface to a GPU: memory, one stream, events, graphs. Everything that the TensorRT executor asks of CUDA.

    Device      one GPU and one stream on it
    Memory      bytes on the device, freed when nobody refers to them
    Host        bytes on the host that the device copies from and to by itself (page-locked)
    Event       a point in the stream
    Graph       what was captured from the stream, to be launched as one piece

`cuda` implements it on cuda-core. `null` implements it without a GPU: it computes on the CPU, and is as late as a
stream may be, as strict as a driver is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import EngineError

ALIGNMENT = 256
"""Bytes; every allocation begins at a multiple."""


class OutOfMemory(EngineError):
    """There is no such piece of memory left."""


class MemoryInfo(NamedTuple):
    """Bytes of device memory: free for this process, and in all."""

    free: int
    total: int


class Memory(Protocol):
    """Bytes on the device."""

    @property
    def address(self) -> int: ...

    @property
    def size(self) -> int: ...


class Host(Protocol):
    """Page-locked bytes on the host."""

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All of them, uint8 [size]."""
        ...


class Event(Protocol):
    """A point in the stream."""

    def wait(self) -> None:
        """Wait until the stream has got there.

        Raises:
            EngineError: something before it failed.
        """
        ...


class Graph(Protocol):
    """Captured work."""

    def launch(self) -> None:
        """Enqueue all of it.

        Raises:
            EngineError: it cannot be launched.
        """
        ...


class Device(Protocol):
    """One GPU and one stream on it, which is not the default stream. Everything is enqueued there, in order.

    Attributes:
        name: of the product.
        compute_capability: major, minor.
        driver: highest CUDA version that the driver supports: major, minor.
        stream: the stream's handle, for vendors.
    """

    @property
    def name(self) -> str: ...

    @property
    def compute_capability(self) -> tuple[int, int]: ...

    @property
    def driver(self) -> tuple[int, int]: ...

    @property
    def stream(self) -> int: ...

    def use(self) -> None:
        """Make it the calling thread's device; before anything else, in each thread."""
        ...

    def allocate(self, size: int) -> Memory:
        """Memory with undefined content, usable at once.

        Raises:
            OutOfMemory: there is not so much.
        """
        ...

    def host(self, size: int) -> Host:
        """Page-locked host memory with undefined content.

        Raises:
            OutOfMemory: there is not so much.
        """
        ...

    def copy_in(self, host: Host, memory: Memory, size: int) -> None:
        """Enqueue a copy of the first bytes; the host memory must stay as it is until then."""
        ...

    def copy_out(self, memory: Memory, host: Host, size: int) -> None:
        """Enqueue a copy of the first bytes; they are there when the stream has got so far."""
        ...

    def record(self) -> Event:
        """The end of what has been enqueued."""
        ...

    def capture(self, enqueue: Callable[[], Any]) -> Graph:
        """What `enqueue` enqueues, as a graph; nothing of it runs. Addresses and sizes are those of now.

        Raises:
            EngineError: something in it cannot be captured.
            Whatever `enqueue` raises; the stream is usable then.
        """
        ...

    def memory_info(self) -> MemoryInfo:
        """Free and total memory."""
        ...

    def synchronize(self) -> None:
        """Wait for everything enqueued.

        Raises:
            EngineError: something of it failed.
        """
        ...


def capability_text(capability: tuple[int, int]) -> str:
    """(8, 9) → `sm_89`."""
    return f"sm_{capability[0]}{capability[1]}"
