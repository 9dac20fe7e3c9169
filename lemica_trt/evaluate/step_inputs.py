"""What full steps are given on the uncached runs of some samples: what quantisation measures ranges and errors on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lemica_trt.backends.base import encode
from lemica_trt.backends.build import Observed
from lemica_trt.bundle.reading import Bundle
from lemica_trt.calibrate.replay import Stepper
from lemica_trt.calibrate.trajectories import Trajectories
from lemica_trt.evaluate.engine_model import EngineModel
from lemica_trt.evaluate.samples import Samples
from lemica_trt.ir.graphs import GraphSpec, Role
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.runtime.pipeline import Pipeline

RANGE_SAMPLES = 4
"""Samples that ranges are measured on: together every step once."""

ERROR_STEPS = 6
"""Steps of each kind, of one more sample, that errors are measured on."""

SAMPLES = RANGE_SAMPLES + 1
"""Uncached runs that all this takes."""

OUTPUT = "output"
"""The step graphs' output that is compared: the model's own, with guidance."""


def observed_steps(
    bundle: Bundle,
    backend: str,
    table: SamplerTable,
    samples: Samples,
    *,
    trajectories: Path,
    done: Callable[[float], None],
) -> dict[Role, Observed]:
    """Step inputs of the graphs that run the whole DiT, from uncached runs on a bundle's engines.

    Args:
        bundle: with engines that run here.
        backend: which.
        table: the bundle's sampler.
        samples: the first `SAMPLES` of them run.
        trajectories: folder where these runs are kept, for fits.
        done: told of full steps that were run.

    Raises:
        UnsupportedError: the bundle has no text encoder.
        VerificationError: a run is not finite.
    """
    found: dict[Role, dict[int, list[dict[str, Any]]]] = {}
    every = {s: {*range(s, table.num_steps, RANGE_SAMPLES)} for s in range(RANGE_SAMPLES)}
    every[RANGE_SAMPLES] = set()
    for kind in set(table.kinds):
        steps = [step for step, its in enumerate(table.kinds) if its == kind]
        every[RANGE_SAMPLES] |= {steps[int(k)] for k in np.linspace(0, len(steps) - 1, ERROR_STEPS).round()}
    sample = step = 0

    def watch(graph: GraphSpec, given: Mapping[str, Any]) -> None:
        nonlocal step
        if graph.dit != "whole":
            return
        if step in every[sample]:
            arrays = {spec.name: encode(np.array(given[spec.name]), spec.dtype) for spec in graph.inputs}
            found.setdefault(graph.role, {}).setdefault(sample, []).append(arrays)
        step += 1

    with Pipeline(bundle, backend=backend) as pipe:
        stepper, kept = Stepper(EngineModel(pipe, backend, watch=watch), table, batch=1), Trajectories(trajectories)
        for sample in range(SAMPLES):
            step = 0
            kept.run(stepper, *samples[sample], f"sample {sample}")
            done(table.num_steps)
    return {
        role: Observed(
            ranges=[each for s in range(RANGE_SAMPLES) for each in by_sample.get(s, ())],
            errors=by_sample[RANGE_SAMPLES],
            output=OUTPUT,
        )
        for role, by_sample in found.items()
    }
