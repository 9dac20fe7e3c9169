"""What calibration measures: the error graph, trajectory Grams and sensitivities, and what they were measured on.

An edge (i, j) of the error graph is the segment with full steps at i and j (j = N: to the end) and reuse at every t,
i < t < j. Its error is LeMiCa's *global outcome-aware error* (NeurIPS 2025, arXiv 2511.00090, eq. 4): the mean absolute
difference of the final latents between the run in which only this segment is cached and the uncached run,
L1_glob(i→j) = (1/n)·‖x0^{cache(i→j)} − x0^{original}‖₁, averaged over samples (a sample: a prompt and a seed). Edges
of length 1 cache nothing: they have no entry and weigh 0.

With m_t the guided output of step t, the trajectory Gram matrix is

    G[k, l] = mean over samples of ⟨m_k, m_l⟩ / ((1/N)·Σ_t ⟨m_t, m_t⟩)

Each sample is divided by its own mean square first, so that none counts for more because it is louder. Every least
squares fit of an output by any others – coefficients, and the error that is left – needs only this matrix:

    mean ‖m_t − Σ_k c_k·m_k‖² = G[t, t] − 2·Σ_k c_k·G[k, t] + Σ_kl c_k·c_l·G[k, l]

so that one pass over some uncached runs serves every schedule. What is left of a good fit is 1e-4 … 1e-6 of G[t, t]:
inner products must be summed in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, UnsetType

from lemica_trt.core.values import Value, json_bytes, require, require_finite
from lemica_trt.ir.profile import CalibrationMethod, DType
from lemica_trt.ir.sampler import SamplerTable, probes_agree

MAX_STEPS = 10_000
"""N of a calibration; the searches take memory that grows with N²."""


class Provenance(Value, frozen=True, kw_only=True):
    """Model, sampler, prompts and seeds of a measurement.

    Attributes:
        model: family name or source of the model, e.g. `cogvideox-tiny`.
        revision: digest of the weights, or the hub commit.
        scheduler: diffusers scheduler class.
        sampler_digest: digest of the `SamplerTable`: which sampler it is; a plan on another one is refused.
        sampler_probe: the table's numbers in short (`SamplerTable.probe`); no part of any digest.
        num_steps: N.
        dtype: precision of the DiT.
        guidance_scale: g of the runs.
        negative_prompt, text_length: of the runs, see `spec`.
        latent_shape: frames, channels, height, width (or the family's order), without batch.
        seed: seed of sample 0; sample s has seed + s.
        prompts_digest: SHA-256 of the prompts used, one a line.
        versions: library versions that the numbers depend on.
    """

    model: str
    revision: str
    dtype: DType
    scheduler: str
    sampler_digest: str
    sampler_probe: tuple[float, ...]
    num_steps: int
    guidance_scale: float
    negative_prompt: str
    text_length: int
    latent_shape: tuple[int, ...]
    seed: int
    prompts_digest: str
    versions: dict[str, str] = {}

    def __post_init__(self) -> None:
        require_finite((self.guidance_scale,), "guidance_scale")
        require_finite(self.sampler_probe, "sampler_probe")
        require(2 <= self.num_steps <= MAX_STEPS, f"num_steps must be 2 … {MAX_STEPS}, got {self.num_steps}")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON without `sampler_probe`, whose last bits are those of a processor."""
        return hashlib.sha256(json_bytes(msgspec.structs.replace(self, sampler_probe=()))).hexdigest()

    def is_of(self, table: SamplerTable) -> bool:
        """Whether it was measured on this sampler: the same identity, and numbers that agree."""
        return self.sampler_digest == table.digest and probes_agree(self.sampler_probe, table.probe)


ERROR_GRAPH_FORMAT = 1


class Edge(Value, frozen=True):
    """Errors of one cached segment.

    Attributes:
        start: i, the full step whose residual is reused.
        stop: j, the next full step, or N; j ≥ i + 2.
        errors: one per sample, in latent units (unit variance at the data end), same order for every edge.
        cost: what choosing this edge costs, in full steps; at most the j − i that it spans.
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
        span = self.stop - self.start
        require(1 <= self.cost <= span, f"edge ({self.start}, {self.stop}).cost must be 1 … {span}, got {self.cost}")

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
        method: how the edges were obtained: `exact` = replayed one by one; `secant` = estimated;
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
    format_version: int = ERROR_GRAPH_FORMAT

    def __post_init__(self) -> None:
        Provenance.__post_init__(self)
        require(
            self.format_version == ERROR_GRAPH_FORMAT,
            f"format_version must be {ERROR_GRAPH_FORMAT}, got {self.format_version}",
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


GRAMS_FORMAT = 1


SYMMETRY = 1e-9
"""How far G[k, l] and G[l, k] may differ, relative to the largest entry."""


Matrix = tuple[tuple[float, ...], ...]


Array = npt.NDArray[np.float64]


class TrajectoryGrams(Provenance, frozen=True, kw_only=True):
    """Gram matrix of the outputs of uncached runs, and what it was measured on.

    Attributes:
        samples: number of (prompt, seed) pairs; all else as in `Provenance`.
        outputs: N rows of N numbers: G of the guided outputs m_0 … m_{N−1}.
        format_version: 1.
    """

    samples: int
    outputs: Matrix
    format_version: int = GRAMS_FORMAT

    def __post_init__(self) -> None:
        Provenance.__post_init__(self)
        require(
            self.format_version == GRAMS_FORMAT, f"format_version must be {GRAMS_FORMAT}, got {self.format_version}"
        )
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        _require_gram(self.outputs, self.num_steps, "outputs")


def gram_from_samples(grams: Sequence[Array] | Array) -> Matrix:
    """G of one kind from each sample's raw inner products: normalise each sample, then average.

    Args:
        grams: float64 [N, N] for each sample, ⟨a_k, a_l⟩ summed in float64 over any fixed set of elements.

    Returns:
        N rows of N numbers, symmetric to the bit.

    Raises:
        ValueError: no sample, another shape, or a sample whose vectors are all zero or not finite.
    """
    stack = np.asarray(grams, np.float64)
    require(stack.ndim == 3 and len(stack) > 0 and stack.shape[1] == stack.shape[2], f"grams has shape {stack.shape}")
    require_finite(stack.ravel(), "grams")
    power = np.trace(stack, axis1=1, axis2=2) / stack.shape[1]
    require(bool((power > 0).all()), "a sample's vectors are all zero")
    mean = (stack / power[:, None, None]).mean(0)
    return tuple(tuple(row) for row in ((mean + mean.T) / 2).tolist())


def _require_gram(matrix: Matrix, num_steps: int, name: str) -> None:
    """Raise ValueError unless `matrix` is [N, N], finite, symmetric and positive on its diagonal."""
    require(
        len(matrix) == num_steps and all(len(row) == num_steps for row in matrix),
        f"{name} must have {num_steps} rows of {num_steps} numbers",
    )
    for k, row in enumerate(matrix):
        require_finite(row, f"{name}[{k}]")
        require(row[k] > 0, f"{name}[{k}][{k}] must be above 0, got {row[k]}")
    array = np.array(matrix)
    asymmetry = float(np.abs(array - array.T).max())
    require(asymmetry <= SYMMETRY * float(np.abs(array).max()), f"{name} must be symmetric, is off by {asymmetry:.1e}")


SENSITIVITY_FORMAT = 1


RESULT = -1.0
"""Stands for the timestep of the result, where there is none: behind all others."""


Knots = tuple[tuple[float, float], ...]


class Sensitivity(Provenance, frozen=True, kw_only=True):
    """Sensitivities at a few levels for each sample, and what they were measured on.

    Attributes:
        samples: number of (prompt, seed) pairs that were rolled out; all else as in `Provenance`.
        knots: for each of them (t, c), t rising: the mean absolute change of the result for each unit of mean absolute
            change of the latents at timestep t (`RESULT`: of the result itself).
        format_version: 1.
    """

    samples: int
    knots: tuple[Knots, ...]
    format_version: int = SENSITIVITY_FORMAT

    def __post_init__(self) -> None:
        Provenance.__post_init__(self)
        require(
            self.format_version == SENSITIVITY_FORMAT,
            f"format_version must be {SENSITIVITY_FORMAT}, got {self.format_version}",
        )
        require(len(self.knots) == self.samples >= 1, f"knots are of {len(self.knots)} samples, not {self.samples}")
        for s, knots in enumerate(self.knots):
            require(len(knots) > 0, f"knots[{s}] is empty")
            times = [time for time, _ in knots]
            require_finite(times, f"knots[{s}]")
            require(
                times == sorted(set(times)) and times[0] >= RESULT, f"knots[{s}]: timesteps must rise from {RESULT:g}"
            )
            require_finite((value for _, value in knots), f"knots[{s}]")
            require(min(value for _, value in knots) > 0, f"knots[{s}]: sensitivities must be above 0")

    def at(self, table: SamplerTable) -> Array:
        """c_0 … c_N for the rows of a sampler, float64: log c is linear in the timestep, its mean is over samples."""
        curves = []
        for knots in self.knots:
            known, values = np.array(knots).T
            curves.append(np.interp([*table.timesteps, RESULT], known, np.log(values)))
        found: Array = np.exp(np.mean(curves, 0))
        return found


class Calibration(Value, frozen=True):
    """What is known of a model under a sampler, as one value: all parts belong together.

    Attributes:
        graph: what reuse over each segment costs.
        grams: of the uncached runs, where they were kept.
        sensitivity: from which calibrations at other steps, shifts and guidance scales can be made. Of a retargeted
            graph, that of the calibration which it was made from: of the same model, but another sampler or guidance.

    Raises:
        ValueError: parts of different models, samplers or guidance scales.
    """

    graph: ErrorGraph
    grams: TrajectoryGrams | None = None
    sensitivity: Sensitivity | None = None

    def __post_init__(self) -> None:
        moved = self.graph.method == "retargeted"
        for name, part, fields in (
            ("grams", self.grams, ("revision", "sampler_digest", "guidance_scale")),
            ("sensitivity", self.sensitivity, ("revision", *(() if moved else ("sampler_digest", "guidance_scale")))),
        ):
            for field in fields if part is not None else ():
                expected, got = getattr(self.graph, field), getattr(part, field)
                require(expected == got, f"{name}: expected {field} {expected}, which the graph has, got {got}")

    def is_of(self, table: SamplerTable) -> bool:
        """Whether it was measured on this sampler; see `Provenance.is_of`."""
        return self.graph.is_of(table) and (self.grams is None or self.grams.is_of(table))
