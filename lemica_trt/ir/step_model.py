"""What calibration asks of a model, wherever that runs: in PyTorch (`models.Model`), or on the engines of a bundle
(`evaluate.engine_model.EngineModel`).

Latents, outputs and guidance terms are arrays on the host. Prompt conditions and trunk residuals, which are large, stay
where the model is: nobody else looks into them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from lemica_trt.ir.graphs import StepLayout
from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.profile import Profile

Latents = npt.NDArray[np.float32]


class Beginning(NamedTuple):
    """What a request begins with.

    Attributes:
        conditions: of its prompt and the negative prompt; the model's own.
        noises: all noise of its seed, without end: the initial noise, then z of each draw; fp32 latent_shape.
    """

    conditions: Any
    noises: Iterator[Latents]


class StepInput(NamedTuple):
    """What a row finds of one run.

    Attributes:
        conditions: see `Beginning`.
        latents, outputs, guidance_terms: histories, newest first, fp32 latent_shape each; what is missing is zero.
        noise: the row's draws, mixed to one, fp32 latent_shape; None: zero.
        residual: that a cached row reads; of an earlier `StepOutput` of the same model.
    """

    conditions: Any
    latents: Sequence[Latents]
    outputs: Sequence[Latents]
    guidance_terms: Sequence[Latents] = ()
    noise: Latents | None = None
    residual: Any = None


class StepOutput(NamedTuple):
    """What a row gives to one run: fp32 latent_shape; the guidance term where the layout keeps it, the trunk residual
    where the row writes it."""

    latents: Latents
    output: Latents
    guidance_term: Latents | None = None
    residual: Any = None


class Steps(Protocol):
    """Takes rows of plans."""

    def __call__(self, row: PlanRow, runs: Sequence[StepInput], guidance_scale: float) -> list[StepOutput]:
        """One row of several runs, side by side where the model can.

        Args:
            guidance_scale: g of the requests; the row's own follows from it.

        Raises:
            ValueError: the row reads further back than the model's steps can.
        """


class StepModel(Protocol):
    """A model at one shape, dtype and sampling.

    Attributes:
        profile: what it was loaded for.
        revision: of its weights.
        latent_shape: of one sample, without batch.
        guided: whether each request runs two branches.
        branches: whether the steps give guidance terms.
        libraries: library → version: what computes.
    """

    @property
    def profile(self) -> Profile: ...

    @property
    def revision(self) -> str: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def guided(self) -> bool: ...

    @property
    def branches(self) -> bool: ...

    @property
    def libraries(self) -> dict[str, str]: ...

    def begin(self, prompt: str, seed: int) -> Beginning:
        """What a request of a prompt and a seed begins with."""

    def steps(self, layout: StepLayout) -> Steps:
        """Takes rows of plans that fit a layout."""

    def run(self, plan: StepPlan, prompt: str, seed: int) -> Latents:
        """A request by a plan: x_N, fp32 latent_shape; not checked for NaN."""

    def frames(self, latents: Latents) -> npt.NDArray[np.uint8]:
        """Latents fp32 latent_shape → frames uint8 [F, H, W, 3]."""


class AtGuidance:
    """A model whose requests have another guidance scale by default, also above 1; in everything else the same.

    Args:
        model: guided.
        scale: g.

    Attributes:
        profile: the model's, with this scale.
    """

    def __init__(self, model: StepModel, scale: float) -> None:
        self._model = model
        sampling = msgspec.structs.replace(model.profile.sampling, guidance_scale=scale, guidance_range=None)
        self.profile = msgspec.structs.replace(model.profile, sampling=sampling)
        self.revision, self.latent_shape, self.libraries = model.revision, model.latent_shape, model.libraries
        self.guided, self.branches = model.guided, model.branches
        self.begin, self.steps, self.run, self.frames = model.begin, model.steps, model.run, model.frames
