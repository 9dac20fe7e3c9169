"""Whether a bundle's engines compute what PyTorch does: graph by graph, and in whole runs.

graphs   each graph on its engine against the torch module that it was exported from
runs     the uncached plan against the diffusers pipeline itself, every other plan against the same plan in PyTorch,
         all from the same noise
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lemica_trt.core.errors import VerificationError
from lemica_trt.core.metrics import psnr
from lemica_trt.evaluate.deployed import Deployed
from lemica_trt.ir.graphs import GraphSpec, StepLayout, TensorSpec
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.report import Agreement, GraphCheck
from lemica_trt.models import Model
from lemica_trt.models.denoise import conditions_of
from lemica_trt.models.family import DTYPES
from lemica_trt.models.steps import step_modules
from lemica_trt.runtime.pipeline import Pipeline

Array = npt.NDArray[Any]
Module = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def modules_by_role(model: Model, layout: StepLayout) -> dict[str, Module]:
    """Role of a graph → the torch module that it is exported from."""
    return {
        **step_modules(model, layout),
        **{role: end.module for role, end in model.ends.items()},
    }


def check_graphs(pipe: Pipeline, model: Model, quantized: Collection[str] = ()) -> list[GraphCheck]:
    """Compare graphs with their torch modules, on random input of batch 1 that is drawn from one seed.

    Args:
        quantized: graphs that are not compared: random input is beyond the ranges that they were quantised for.
    """
    graphs = pipe.bundle.manifest.graphs
    modules = modules_by_role(model, graphs.layout)
    # What a graph does not depend on is pruned from it (Wan's skip graph reads no prompt); its module still takes it.
    known = {spec.name: spec for graph in graphs.graphs for spec in graph.inputs if spec.name != "latents"}
    compared = [graph for graph in graphs.graphs if graph.role not in quantized]
    random = np.random.default_rng(0)
    return [_check_graph(graph, modules[graph.role], known, random, pipe, model) for graph in compared]


def _check_graph(
    graph: GraphSpec,
    module: Module,
    known: Mapping[str, TensorSpec],
    random: np.random.Generator,
    pipe: Pipeline,
    model: Model,
) -> GraphCheck:
    inputs = {spec.name: _random_input(spec, graph.role, random, model) for spec in graph.inputs}
    specs = {**known, **{spec.name: spec for spec in graph.inputs}}
    unread = {name: np.zeros(spec.at(1), np.float32) for name, spec in specs.items() if name not in inputs}
    with torch.inference_mode():
        expected = module(_tensors({**unread, **inputs}, specs, model.device))
    got = pipe.run_graph(graph.role, inputs)
    references = {spec.name: expected[spec.name].float().cpu().numpy() for spec in graph.outputs}
    return GraphCheck(
        role=graph.role,
        difference=_largest(*(np.float32(got[name]) - reference for name, reference in references.items())),
        scale=_largest(*references.values()),
    )


def _random_input(spec: TensorSpec, role: str, random: np.random.Generator, model: Model) -> Array:
    shape = spec.at(1)
    if role in {encoder.graph for encoder in model.encoder_specs()}:
        return np.tile(model.tokens(["a prompt"], role)[spec.name].cpu().numpy(), (shape[0], 1))
    if spec.name == "coefficients":  # timesteps are large numbers, all others about one
        return random.uniform(0.5, 1.0, shape).astype(np.float32)
    if spec.dtype == "int64":  # a mask
        return np.tile(conditions_of(model.embed(["a prompt"]))[spec.name].cpu().numpy()[:1], _tiles(spec, shape))
    return random.standard_normal(shape).astype(np.float32)


def _tiles(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *[1] * (len(shape) - 1))


def _tensors(
    inputs: Mapping[str, Array], specs: Mapping[str, TensorSpec], device: torch.device
) -> dict[str, torch.Tensor]:
    """Arrays as torch tensors of the dtypes that the graph declares for floating-point inputs."""
    floats = {str(name): dtype for name, dtype in DTYPES.items()}
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    return {name: tensor.to(floats.get(specs[name].dtype, tensor.dtype)) for name, tensor in tensors.items()}


def check_runs(
    deployed: Deployed,
    model: Model,
    prompt: str,
    seed: int,
    done: Callable[[float], None],
    known: Sequence[Agreement] = (),
    *,
    plans: Sequence[StepPlan],
) -> list[Agreement]:
    """Compare whole runs of plans on one request, which are kept for the next one who wants them.

    Args:
        plans: of the bundle.
        done: told of full steps in PyTorch.
        known: what need not be compared again.

    Raises:
        VerificationError: a result of the model itself is not finite.
    """
    pipe, found = deployed.pipe, list(known)
    before = {agreement.plan for agreement in known}
    for plan in plans:
        if plan.name in before:
            continue
        got = deployed.latents(plan, prompt, seed, keep=True)
        noise = pipe.generator(seed).randn((1, *model.latent_shape))  # not torch's, which differs in rounding
        against, expected = _torch_run(model, plan, prompt, seed, noise)
        done(plan.budget)
        if not np.isfinite(expected).all():
            raise VerificationError(
                f"the model itself gives numbers that are not finite in {model.profile.dtype}",
                fix="build with another --dtype",
            )
        found.append(
            Agreement(
                plan=plan.name,
                against=against,
                difference=_largest(got - expected),
                psnr=psnr(pipe.decode(got), pipe.decode(expected)),
            )
        )
    return found


def _torch_run(model: Model, plan: StepPlan, prompt: str, seed: int, noise: Array) -> tuple[str, Array]:
    """What a plan is compared with, and its latents: the uncached plan with the pipeline itself."""
    # A stochastic scheduler may draw more than it uses: the pipeline's noise is then not the plan's.
    if plan.budget == plan.num_steps and not plan.stochastic:
        return "diffusers", model.reference([prompt], torch.from_numpy(noise), seed=seed)[0].numpy()
    return "torch", model.run(plan, prompt, seed, start=noise[0])


def _largest(*arrays: Array) -> float:
    """Largest absolute value; NaN if any is."""
    return float(np.max([np.abs(array).max() for array in arrays]))
