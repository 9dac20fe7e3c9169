"""Does a bundle do what it must, and how good are its plans?

    graphs      each graph on its engine against the torch module that it was exported from
    agreement   whole runs: the uncached plan against the diffusers pipeline itself, each plan against the same plan
                in PyTorch, from the same noise
    quality     each plan on held-out prompts against the uncached run, or the M steps that it is held against: PSNR,
                SSIM, LPIPS where its weights are – beside other ways of spending the same budget: LeMiCa as the paper
                has it, full steps at equal distances, simply fewer sampling steps
    timing      a full step, a skipped step, each whole plan, and what a plan costs beyond its steps

The bundle's plans go through the deployed runtime, what they are compared with through PyTorch, whose graphs take any
plan. Knows nothing of how the bundle was made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lemica_trt.backends.machine import describe_machine
from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE, VERIFY_REPORT
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InfeasibleError, InputError, UnsupportedError, VerificationError
from lemica_trt.core.metrics import lpips, psnr, ssim
from lemica_trt.core.progress import Reporter
from lemica_trt.core.values import read_value
from lemica_trt.evaluate.timing import backend_name, measure_steps, measure_timing
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.graphs import TensorSpec
from lemica_trt.ir.plan import StepPlan
from lemica_trt.models import denoise
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.models.steps import CombineStep, FullStep, SkipStep
from lemica_trt.planning.minimax import solve
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.step_plan import plan_from_schedule
from lemica_trt.runtime.pipeline import Pipeline
from lemica_trt.runtime.random import Generator

if TYPE_CHECKING:
    from lemica_trt.models import Model
from lemica_trt.ir.report import PLAN, Agreement, Clip, GraphCheck, Quality, VerifyReport

Array = npt.NDArray[Any]


CLIPS = 4
"""Clips that are kept to be looked at."""


HELD_OUT_SEED = 1_000_000
"""Seed of the first held-out sample; calibration seeds start at 0."""


def held_out(prompts: Sequence[str], samples: int) -> list[tuple[str, int]]:
    """(prompt, seed) of the held-out clips: sample s takes prompt s, repeating, and seed `HELD_OUT_SEED` + s."""
    return [(prompts[s % len(prompts)], HELD_OUT_SEED + s) for s in range(samples)]


def stored_report(bundle: Bundle) -> VerifyReport | None:
    """The report in a bundle's `reports/`, if there is one that this version can read."""
    try:
        return read_value(VerifyReport, bundle.path / VERIFY_REPORT)
    except InputError:
        return None


def verify(
    bundle: Bundle,
    model: Model,
    requests: Sequence[tuple[str, int]],
    *,
    reporter: Reporter,
    backend: str | None = None,
) -> tuple[VerifyReport, list[Clip]]:
    """Verify a bundle against the model that it was built from.

    Args:
        bundle: what to verify; every file is checked first.
        model: the same model in PyTorch.
        requests: (prompt, seed) of the held-out clips, see `held_out`.
        backend: which engines; None: the preferred ones.

    Returns:
        The report, and the first `CLIPS` clips to look at.

    Raises:
        IntegrityError: a file is altered or missing.
        VerificationError: a result of the model itself is not finite.
    """
    bundle.check()
    pipe = Pipeline(bundle, backend=backend)
    key = bundle.engine(backend).key
    reporter.stage("verify", f"{len(requests)} held-out clips, {key.backend} {key.version} on {key.target}")
    with torch.inference_mode():
        graphs = _check_graphs(bundle, pipe, model)
        agreement = _check_runs(bundle, pipe, model, requests[0])
    quality, clips = _measure_quality(bundle, pipe, model, requests, reporter)
    report = VerifyReport(
        manifest_digest=bundle.manifest.digest,
        samples=len(requests),
        machine=describe_machine(),
        backend=backend_name(key),
        dtype=bundle.manifest.profile.dtype,
        graphs=tuple(graphs),
        agreement=tuple(agreement),
        quality=tuple(quality),
        timing=tuple(measure_timing(pipe, [bundle.plan(name) for name in bundle.plans])),
        steps=measure_steps(pipe),
    )
    return report, clips


def require_verified(report: VerifyReport, bundle: Path) -> None:
    """Raise VerificationError, naming everything that failed and where the bundle is, unless all is well."""
    failures = report.failures()
    if failures:
        raise VerificationError("; ".join(failures), fix=f"do not deploy {bundle}; report it with its {VERIFY_REPORT}")


def _check_graphs(bundle: Bundle, pipe: Pipeline, model: Model) -> list[GraphCheck]:
    """Every graph on random input of batch 1, drawn from one seed."""
    layout = bundle.manifest.graphs.layout
    modules = {
        "full": FullStep(model, layout),
        "skip": SkipStep(model, layout),
        "combine": CombineStep(layout),
        "text_encoder": model.text_encoder,
        "vae_decoder": model.vae_decoder,
    }
    random = np.random.default_rng(0)
    # What a graph does not depend on is pruned from it (Wan's skip graph reads no prompt); its module still takes it.
    specs = {
        spec.name: spec for graph in bundle.manifest.graphs.graphs for spec in graph.inputs if spec.name != "latents"
    }
    checks = []
    for graph in bundle.manifest.graphs.graphs:
        inputs = {spec.name: _random_input(spec.name, spec.at(1), random, model) for spec in graph.inputs}
        taken = {**specs, **{spec.name: spec for spec in graph.inputs}}
        unread = {name: np.zeros(spec.at(1), np.float32) for name, spec in taken.items() if name not in inputs}
        expected = modules[graph.role](_tensors({**unread, **inputs}, taken, model.device))
        got = pipe.run_graph(graph.role, inputs)
        difference = scale = 0.0
        for spec in graph.outputs:
            reference = expected[spec.name].float().cpu().numpy()
            difference = max(difference, _largest(np.float32(got[spec.name]) - reference))
            scale = max(scale, _largest(reference))
        checks.append(GraphCheck(role=graph.role, difference=difference, scale=scale))
    return checks


def _random_input(name: str, shape: tuple[int, ...], random: np.random.Generator, model: Model) -> Array:
    if name == "input_ids":
        return np.tile(model.tokens(["a prompt"])["input_ids"].cpu().numpy(), (shape[0], 1))
    if name == "attention_mask":
        return np.tile(model.tokens(["a prompt"])["attention_mask"].cpu().numpy(), (shape[0], 1))
    if name == "coefficients":  # timesteps are large numbers, all others about one
        return random.uniform(0.5, 1.0, shape).astype(np.float32)
    return random.standard_normal(shape).astype(np.float32)


def _tensors(inputs: dict[str, Array], specs: dict[str, TensorSpec], device: torch.device) -> dict[str, torch.Tensor]:
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    return {name: tensor.to(half.get(specs[name].dtype, tensor.dtype)) for name, tensor in tensors.items()}


def _check_runs(bundle: Bundle, pipe: Pipeline, model: Model, request: tuple[str, int]) -> list[Agreement]:
    """The uncached plan against diffusers, and every plan against PyTorch, on one request."""
    prompt, seed = request
    noise = Generator(seed).randn((1, *model.latent_shape))
    embeds = model.embed([prompt])
    checks = []
    for name in bundle.plans:
        plan = bundle.plan(name)
        got = pipe.latents(_embeds(pipe, prompt), noise, plan=plan, seeds=[seed] if plan.stochastic else None)
        fresh = model.noises(seed)
        next(fresh)  # the initial noise
        start = torch.from_numpy(noise)

        def draw(_: int, fresh: Iterator[torch.Tensor] = fresh) -> torch.Tensor:
            return next(fresh)[None]

        references = {"torch": denoise(model, plan, embeds, start, fresh_noise=draw).cpu()}
        # A stochastic scheduler may draw more than it uses: the pipeline's noise is then not the plan's.
        if plan.budget == plan.num_steps and not plan.stochastic:
            references["diffusers"] = model.reference([prompt], start)
        for against, reference in references.items():
            expected = reference.numpy()
            if not np.isfinite(expected).all():
                raise VerificationError(
                    f"the model itself gives numbers that are not finite in {model.profile.dtype}",
                    fix="build with another --dtype",
                )
            checks.append(
                Agreement(
                    plan=name,
                    against=against,
                    difference=_largest(got - expected),
                    psnr=psnr(pipe.decode(got[0]), pipe.decode(expected[0])),
                )
            )
    return checks


def _largest(array: Array) -> float:
    """Largest absolute value; NaN if any is."""
    return float(np.abs(array).max())


def _embeds(pipe: Pipeline, prompt: str) -> Array:
    """[R, text_length, width] of one prompt, the unconditional branch first."""
    manifest = pipe.bundle.manifest
    branches = [manifest.profile.sampling.negative_prompt, prompt] if manifest.graphs.layout.guided else [prompt]
    return np.stack([pipe.encode(text) for text in branches])


def _measure_quality(
    bundle: Bundle, pipe: Pipeline, model: Model, requests: Sequence[tuple[str, int]], reporter: Reporter
) -> tuple[list[Quality], list[Clip]]:
    plans = [bundle.plan(name) for name in bundle.plans]
    uncached = next((plan for plan in plans if plan.budget == plan.num_steps), None)
    cached = [plan for plan in plans if plan.budget < plan.num_steps]
    if uncached is None or not cached:
        return [], []
    graph = None
    if ERROR_GRAPH_FILE in bundle.manifest.files:
        graph = read_value(ErrorGraph, bundle.file(ERROR_GRAPH_FILE))
    ways = [way for plan in cached for way in [(plan.name, PLAN, plan), *baselines(plan, model, graph)]]
    default = bundle.plan()
    against = {plan.name: plan.reference_steps for plan in cached}
    fine = {steps: _every_step(model, steps, uncached.guidance_scale) for steps in against.values() if steps}
    clips: list[Clip] = []
    scores: list[list[tuple[float, float, float | None]]] = [[] for _ in ways]
    for done, (prompt, seed) in enumerate(requests):
        noise = Generator(seed).randn((1, *bundle.manifest.graphs.layout.latent_shape))
        embeds = _embeds(pipe, prompt)
        torch_embeds = model.embed([prompt])

        def deployed(plan: StepPlan, embeds: Array = embeds, noise: Array = noise, seed: int = seed) -> Array:
            return pipe.decode(pipe.latents(embeds, noise, plan=plan, seeds=[seed] if plan.stochastic else None)[0])

        def baseline(plan: StepPlan, embeds: torch.Tensor = torch_embeds, seed: int = seed) -> Array:
            return pipe.decode(_run(model, plan, embeds, seed))

        references = {steps: baseline(other) for steps, other in fine.items()} | {None: deployed(uncached)}
        for (name, way, plan), found in zip(ways, scores):
            clip, reference = deployed(plan) if way == PLAN else baseline(plan), references[against[name]]
            if way == PLAN and plan.name == default.name and len(clips) < CLIPS:
                clips.append(Clip(prompt, reference, clip))
            found.append((psnr(clip, reference), ssim(clip, reference), lpips(clip, reference)))
        reporter.advance(done + 1, len(requests))
    found_of = zip(ways, scores)
    return [_quality(name, way, plan.budget, found, against[name]) for (name, way, plan), found in found_of], clips


def _every_step(model: Model, steps: int, guidance_scale: float) -> StepPlan:
    """The sampler with so many steps, all of them in full."""
    table = sampler_table(model.scheduler(steps), dynamic_guidance=model.profile.sampling.dynamic_guidance)
    return plan_from_schedule(
        uniform(table.num_steps, table.num_steps),
        table,
        name="reference",
        guidance_scale=guidance_scale,
        method="none",
    )


def _run(model: Model, plan: StepPlan, embeds: torch.Tensor, seed: int) -> Array:
    """Final latents of one request in PyTorch, fp32 latent_shape; noise as diffusers draws it from the seed."""
    fresh = (noise[None] for noise in model.noises(seed))
    result: Array = denoise(model, plan, embeds, next(fresh), fresh_noise=lambda _: next(fresh))[0].cpu().numpy()
    return result


def _quality(
    name: str, way: str, budget: int, scores: list[tuple[float, float, float | None]], reference_steps: int | None
) -> Quality:
    psnrs, ssims, perceptual = zip(*scores)
    measured = [value for value in perceptual if value is not None]
    return Quality(
        plan=name,
        way=way,
        budget=budget,
        psnr=float(np.mean(psnrs)),
        psnr_p5=float(np.percentile(psnrs, 5)),
        ssim=float(np.mean(ssims)),
        ssim_p5=float(np.percentile(ssims, 5)),
        lpips=float(np.mean(measured)) if measured else None,
        each_psnr=psnrs,
        reference_steps=reference_steps,
    )


def baselines(plan: StepPlan, model: Model, graph: ErrorGraph | None) -> list[tuple[str, str, StepPlan]]:
    """(plan name, way, plan) of what is compared with a plan at the same budget.

    lemica         the paper: minimax steps of the same error graph, residual reuse; left out where the plan is that
    uniform        full steps at equal distances, residual reuse
    fewer-steps    the sampler itself with B steps
    """
    dynamic = model.profile.sampling.dynamic_guidance
    table = sampler_table(model.scheduler(), dynamic_guidance=dynamic)
    schedules = {"uniform": (table, uniform(table.num_steps, plan.budget))}
    with contextlib.suppress(InfeasibleError):
        if graph is not None and graph.num_steps == table.num_steps:
            schedules = {"lemica": (table, solve(graph, [plan.budget])[plan.budget]), **schedules}
    try:
        few = sampler_table(model.scheduler(plan.budget), dynamic_guidance=dynamic)
    except UnsupportedError:  # few steps are beyond some samplers
        few = None
    # Heun and PNDM call the model more than once a step: their B steps are no baseline of B calls.
    if few is not None and few.num_steps == plan.budget:
        schedules["fewer-steps"] = (few, uniform(few.num_steps, plan.budget))
    found = []
    for way, (sampler, schedule) in schedules.items():
        other = plan_from_schedule(
            schedule, sampler, name=f"{plan.name}-{way}", guidance_scale=plan.guidance_scale, method=way
        )
        if other.rows != plan.rows:
            found.append((plan.name, way, other))
    return found
