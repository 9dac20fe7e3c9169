"""What the two builders can be told, named as in trtexec and Polygraphy.

Networks are strongly typed, their precision is in the graph; `quantize` has another graph written.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

from lemica_trt.backends.options import Options, Quantize
from lemica_trt.core.values import require

MEMORY_POOLS = {"workspace": "WORKSPACE", "tacticSharedMem": "TACTIC_SHARED_MEMORY"}
"""trtexec's name of a memory pool → `MemoryPoolType` member."""

SIZE_UNITS = {"": 1 << 20, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
"""Suffix of a size → bytes, as in trtexec; none: MiB."""

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT for RTX 1.7 builds for (`ComputeCapability`)."""


class CommonOptions(Options, frozen=True):
    """Options of both builders."""

    builder_optimization_level: Annotated[
        int, Meta(ge=0, le=5, description="how long the builder looks for better kernels")
    ] = 3
    mem_pool_size: Annotated[
        str,
        Meta(
            description="limits of the builder's memory pools as POOL:SIZE[,…], for example "
            "workspace:4G,tacticSharedMem:48K; suffix B, K, M or G, none: MiB; empty: no limit"
        ),
    ] = ""
    weight_streaming: Annotated[bool, Meta(description="weights may stay in host memory when the engine runs")] = False
    profiling_verbosity: Annotated[
        Literal["layer_names_only", "detailed", "none"],
        Meta(description="what the engine tells of its layers; the check of its precisions needs detailed"),
    ] = "detailed"
    quantize: Quantize = "none"

    def __post_init__(self) -> None:
        pool_sizes(self.mem_pool_size)


class TensorRTOptions(CommonOptions, frozen=True, tag="tensorrt"):
    """Options of the backend `tensorrt`."""

    version_compatible: Annotated[
        bool, Meta(description="the engine also runs on the lean runtime (tensorrt_lean) of the same version")
    ] = False
    hardware_compatibility_level: Annotated[
        Literal["none", "ampere_plus", "same_compute_capability"], Meta(description="which other GPUs run the engine")
    ] = "none"


class RtxOptions(CommonOptions, frozen=True, tag="tensorrt-rtx"):
    """Options of the backend `tensorrt-rtx`."""

    compute_capabilities: Annotated[
        str,
        Meta(description=f"GPUs to build for: current, or some of {','.join(RTX_CAPABILITIES)}; empty: 8.0 and later"),
    ] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.compute_capabilities in ("", "current") or set(self.capabilities) <= set(RTX_CAPABILITIES),
            f"--compute-capabilities must be current, or some of {','.join(RTX_CAPABILITIES)}, "
            f"got {self.compute_capabilities!r}",
        )

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities named; (): the builder's default."""
        return tuple(self.compute_capabilities.split(",")) if self.compute_capabilities else ()


def pool_sizes(text: str) -> dict[str, int]:
    """`workspace:4G,tacticSharedMem:48K` → bytes by pool; nothing for an empty text. Sizes as in trtexec.

    Raises:
        ValueError: it is not of this form.
    """
    sizes = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)([BKMG]?)", part)
        if match is None or match[1] not in MEMORY_POOLS:
            raise ValueError(
                f"--mem-pool-size must be POOL:SIZE[B|K|M|G] with POOL one of {', '.join(MEMORY_POOLS)}, got {part!r}"
            )
        sizes[match[1]] = int(float(match[2]) * SIZE_UNITS[match[3]])
    return sizes
