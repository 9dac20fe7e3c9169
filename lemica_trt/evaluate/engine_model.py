"""A bundle's engines as a model that calibration, fits and trials run on: no PyTorch, the precision that is deployed.

Steps run one request at a time. Latents, outputs and guidance terms go to the host and back at each of them; residuals
stay on the device, as many as calibration holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.core.metrics import Frames
from lemica_trt.ir.graphs import COMBINE, TERM, GraphSpec, StepLayout, trunk_of
from lemica_trt.ir.plan import PlanRow, StepPlan, coefficient_vector
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.step_model import Beginning, Latents, StepInput, StepOutput, Steps
from lemica_trt.runtime.pipeline import Pipeline

Watch = Callable[[GraphSpec, Mapping[str, Any]], None]
"""Given a graph, and its inputs by name."""


class EngineModel:
    """An open pipeline as an `ir.step_model.StepModel`.

    Args:
        pipe: of a bundle with text encoders; of the VAE decoder there is need for frames only.
        backend: whose engines the pipeline has; None: the preferred ones.
        watch: given each graph's inputs before it runs, by name, with batch.

    Attributes:
        pipe: as given.
    """

    def __init__(self, pipe: Pipeline, backend: str | None = None, *, watch: Watch | None = None) -> None:
        self.pipe, self._key, self._watch = pipe, pipe.bundle.engine(backend).key, watch
        self._layout = pipe.bundle.manifest.graphs.layout
        if not pipe.bundle.manifest.encoders:
            raise UnsupportedError(
                "calibration on engines needs a text encoder, and the bundle has none",
                fix="calibrate in PyTorch: --calibrate-on torch",
            )

    @property
    def profile(self) -> Profile:
        return self.pipe.bundle.manifest.profile

    @property
    def revision(self) -> str:
        return str(self.pipe.bundle.manifest.revision)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._layout.latent_shape

    @property
    def guided(self) -> bool:
        return self._layout.guided

    @property
    def branches(self) -> bool:
        return self._layout.guidance_history > 0

    @property
    def libraries(self) -> dict[str, str]:
        """The vendor's package, and which engines they are: other options round otherwise."""
        return {self._key.backend: self._key.version, "engines": self._key.digest}

    def begin(self, prompt: str, seed: int) -> Beginning:
        """What a request begins with."""
        return Beginning(self.pipe.conditions_at(prompt, seed), self._noises(seed))

    def _noises(self, seed: int) -> Iterator[Latents]:
        generator = self.pipe.generator(seed)
        while True:
            yield generator.randn((1, *self.latent_shape))[0]

    def steps(self, layout: StepLayout) -> Steps:
        """Takes rows; whatever the layout, they are those of the bundle's graphs.

        Raises:
            UsageError: the bundle has no graph for one of the layout's variants.
        """
        missing = set(layout.step_graphs) - set(self._layout.step_graphs)
        if missing:
            raise UsageError(
                f"calibration on engines needs the {', '.join(sorted(missing))} graph, and the bundle has none",
                fix="build it with --method all, or calibrate in PyTorch: --calibrate-on torch",
            )
        return self._take

    def run(self, plan: StepPlan, prompt: str, seed: int) -> Latents:
        """A request by a plan, as it is deployed."""
        first = next(self._noises(seed))[None]
        seeds = [seed] if plan.stochastic else None
        found: Latents = self.pipe.latents(
            self.pipe.conditions_at(prompt, seed), first, plan=plan, seeds=seeds, finite=False
        )[0]
        return found

    def frames(self, latents: Latents) -> Frames:
        """Latents fp32 latent_shape → frames uint8 [F, H, W, 3]."""
        return self.pipe.decode(latents)

    def _take(self, row: PlanRow, runs: Sequence[StepInput], guidance_scale: float) -> list[StepOutput]:
        """`ir.step_model.Steps`."""
        return [self._step(row, run, guidance_scale) for run in runs]

    def _step(self, row: PlanRow, run: StepInput, guidance_scale: float) -> StepOutput:
        layout, role = self._layout, row.variant or COMBINE
        offset, factor = row.guidance
        blank = np.zeros(layout.latent_shape, np.float32)
        inputs: dict[str, Any] = {
            "coefficients": coefficient_vector(row, layout),
            "guidance": np.array([offset + factor * guidance_scale]),
            "noise": (blank if run.noise is None else run.noise)[None],
            **run.conditions,
        }
        for name, depth, history in (
            ("latents", layout.latent_history, run.latents),
            ("outputs", layout.output_history, run.outputs),
            ("guidance_terms", layout.guidance_history, run.guidance_terms),
        ):
            filled = [*history, *[blank] * depth]
            inputs |= {f"{name}_{k}": filled[k][None] for k in range(depth)}
        graph, trunk = self.pipe.bundle.manifest.graphs.graph(role), trunk_of(row.variant)
        if row.cached:
            # Residuals further back are there for plans that no calibration runs.
            inputs |= {spec.name: np.zeros(spec.at(1)) for spec in graph.inputs if spec.name.startswith(f"{trunk}_")}
            inputs[f"{trunk}_0"] = run.residual
        given = {spec.name: inputs[spec.name] for spec in graph.inputs}
        if self._watch is not None:
            self._watch(graph, given)
        found = self.pipe.run_graph(role, given, keep=(trunk,))
        term = found.get(TERM)
        return StepOutput(found["latents"][0], found["output"][0], None if term is None else term[0], found.get(trunk))
