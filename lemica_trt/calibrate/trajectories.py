"""Uncached runs, made once and used by all: errors, Gram matrices, the targets of fits, the references of trials.

A run is found by what decides it (model, sampler, guidance, prompt, seed), whoever made it. For one sample a file holds
x_0 … x_N, fp32 [N + 1, *latent_shape]: 230 MB for CogVideoX-2B. Its name carries a digest of its content: a file that
was damaged or altered is not used, and its run is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from lemica_trt.calibrate.exact import provenance_of
from lemica_trt.calibrate.replay import Stepper, Uncached
from lemica_trt.core.values import write_bytes
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.step_model import Latents, StepModel


class Trajectories(NamedTuple):
    """A folder of uncached runs.

    Attributes:
        folder: absolute; need not exist, its parent must, else nothing is kept; None: runs are not kept.
    """

    folder: Path | None

    def files(self, model: StepModel, table: SamplerTable, prompt: str, seed: int) -> list[Path]:
        """What may hold a run."""
        if self.folder is None:
            return []
        return sorted(self.folder.glob(f"{_key(model, table, prompt, seed)}-*.npy"))

    def find(self, model: StepModel, table: SamplerTable, prompt: str, seed: int) -> Latents | None:
        """x_0 … x_N of a run, fp32 [N + 1, *latent_shape]; None: it was not kept."""
        for path in self.files(model, table, prompt, seed):
            with contextlib.suppress(FileNotFoundError):  # another process has found it damaged, too
                data = path.read_bytes()
                if path.stem.endswith(_digest(data)):
                    found: Latents = np.load(io.BytesIO(data), allow_pickle=False)
                    return found
                path.unlink()
        return None

    def keep(self, model: StepModel, table: SamplerTable, prompt: str, seed: int, run: Uncached) -> Latents:
        """Put a run into the folder; returns x_0 … x_N."""
        latents = np.stack([part.latents[0] for part in run.runs[1:]] + [run.final])
        if self.folder is not None and self.folder.parent.is_dir():  # else this is a worker that does not see it
            file = io.BytesIO()
            np.save(file, latents)
            data = file.getvalue()
            write_bytes(data, self.folder / f"{_key(model, table, prompt, seed)}-{_digest(data)}.npy")
        return latents

    def run(self, stepper: Stepper, prompt: str, seed: int, name: str) -> Latents:
        """Make a run and keep it; returns x_0 … x_N.

        Args:
            name: of the run, for messages.

        Raises:
            VerificationError: latents are not finite; names the run and the step.
        """
        uncached = stepper.sample(name, prompt, seed).uncached()
        return self.keep(stepper.model, stepper.table, prompt, seed, uncached)


def _key(model: StepModel, table: SamplerTable, prompt: str, seed: int) -> str:
    origin = msgspec.json.encode(provenance_of(model, table, [prompt], seed), order="sorted")
    return hashlib.sha256(origin).hexdigest()[:32]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
