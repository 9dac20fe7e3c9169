"""What was measured on: every result of a calibration carries the same account of it.

Knows values only.
"""

from __future__ import annotations

import hashlib

import msgspec

from lemica_trt.sampler import SamplerTable, probes_agree
from lemica_trt.spec import DType
from lemica_trt.values import Value, json_bytes, require, require_finite


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
        require(self.num_steps >= 2, f"num_steps must be at least 2, got {self.num_steps}")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON without `sampler_probe`, whose last bits are those of a processor."""
        return hashlib.sha256(json_bytes(msgspec.structs.replace(self, sampler_probe=()))).hexdigest()

    def is_of(self, table: SamplerTable) -> bool:
        """Whether it was measured on this sampler: the same identity, and numbers that agree."""
        return self.sampler_digest == table.digest and probes_agree(self.sampler_probe, table.probe)
