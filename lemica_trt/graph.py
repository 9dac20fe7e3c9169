"""The error graph: what caching each segment of the sampling trajectory costs, measured end to end.

An edge (i, j) is the segment with full steps at i and j (j = N: to the end) and reuse at every t, i < t < j. Its
error is LeMiCa's *global outcome-aware error* (NeurIPS 2025, arXiv 2511.00090, eq. 4): the mean absolute
difference of the final latents between the run in which only this segment is cached and the uncached run,
L1_glob(i→j) = (1/n)·‖x0^{cache(i→j)} − x0^{original}‖₁, averaged over samples (a sample: a prompt and a seed).
Edges of length 1 cache nothing: they have no entry and weigh 0.

Knows values only; `calibrate` measures, `schedule` searches.
"""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from lemica_trt.provenance import Provenance
from lemica_trt.spec import CalibrationMethod
from lemica_trt.values import Value, require, require_finite

FORMAT_VERSION = 1


class Edge(Value, frozen=True):
    """Errors of one cached segment.

    Attributes:
        start: i, the full step whose residual is reused.
        stop: j, the next full step, or N; j ≥ i + 2.
        errors: one per sample, in latent units (unit variance at the data end), same order for every edge.
        cost: what choosing this edge costs, in full steps.
    """

    start: int
    stop: int
    errors: tuple[float, ...]
    cost: int = 1

    def __post_init__(self) -> None:
        require(
            self.stop >= self.start + 2 >= 2,
            f"edge ({self.start}, {self.stop}) must span at least 2 steps",
        )
        require(len(self.errors) > 0, f"edge ({self.start}, {self.stop}) has no errors")
        require_finite(self.errors, f"edge ({self.start}, {self.stop}).errors")
        require(min(self.errors) >= 0, f"edge ({self.start}, {self.stop}) has a negative error")
        require(self.cost >= 1, f"edge ({self.start}, {self.stop}).cost must be at least 1, got {self.cost}")

    @property
    def error(self) -> float:
        """Mean over samples: the weight that the planner minimises."""
        return sum(self.errors) / len(self.errors)


class ErrorGraph(Provenance, frozen=True, kw_only=True):
    """All measured edges, and exactly what they were measured on.

    Attributes:
        max_skip: K, the most steps that one segment skips (j − i − 1 ≤ K).
        samples: number of (prompt, seed) pairs; model, sampler and prompts as in `Provenance`.
        metric: `l1` (eq. 4).
        method: how the edges were obtained: `exact` = replayed one by one; `secant`, `adjoint` = estimated;
            `retargeted` = estimated with the sensitivities of another calibration.
        samplings: evaluations of the DiT that one sample took, counted, in uncached samplings; absent where exact
            (there it follows from N and K, see `calibrate.cost`).
        edges: sorted by (start, stop).
    """

    max_skip: int
    samples: int
    edges: tuple[Edge, ...]
    metric: str = "l1"
    method: CalibrationMethod = "exact"
    samplings: float | UnsetType = UNSET
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        Provenance.__post_init__(self)
        require(
            self.format_version == FORMAT_VERSION, f"format_version must be {FORMAT_VERSION}, got {self.format_version}"
        )
        require(self.samplings is UNSET or self.samplings > 0, f"samplings must be above 0, got {self.samplings}")
        require(1 <= self.max_skip < self.num_steps, f"max_skip must be 1 … {self.num_steps - 1}, got {self.max_skip}")
        keys = [(edge.start, edge.stop) for edge in self.edges]
        require(keys == sorted(set(keys)), "edges must be sorted by (start, stop) and unique")
        for edge in self.edges:
            where = f"edge ({edge.start}, {edge.stop})"
            require(edge.stop <= self.num_steps, f"{where} ends after step {self.num_steps}")
            require(edge.stop - edge.start - 1 <= self.max_skip, f"{where} skips more than max_skip = {self.max_skip}")
            require(
                len(edge.errors) == self.samples, f"{where} has {len(edge.errors)} errors for {self.samples} samples"
            )
