"""Folded plans through the whole chain: no skip graph, B calls of the full one, the latents of the unfolded plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny
import torch

from lemica_trt import pipeline
from lemica_trt.bundle import Bundle
from lemica_trt.errors import InputError
from lemica_trt.lower import sampler_table, solver_table
from lemica_trt.models import Model, denoise
from lemica_trt.plan import StepPlan, layout_from_plans, plan_from_schedule, plan_from_solver
from lemica_trt.predict import LEMICA, Predictor, predict
from lemica_trt.progress import Quiet
from lemica_trt.runtime.denoise import RowDone
from lemica_trt.sampler import SamplerTable
from lemica_trt.schedule import given, uniform

pytestmark = [
    pytest.mark.cpu,
    # Upstream: diffusers' DPM-Solver++ hands tensors to numpy functions.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

LINEAR = Predictor(of="output", method="linear")
STEPS, BUDGET = 8, 3


class Built:
    """A bundle of the random tiny CogVideoX under one scheduler, with a folded plan and a planned solver."""

    def __init__(self, folder: Path, scheduler: str) -> None:
        profile = tiny.make_variant("sincos", folder / "pipeline")
        sampling = msgspec.structs.replace(profile.sampling, steps=STEPS, scheduler=scheduler)
        self.profile = msgspec.structs.replace(profile, sampling=sampling)
        self.work = pipeline.Work(folder / "work")
        self.model: Model = pipeline.open_model(self.profile, Quiet())
        self.table: SamplerTable = pipeline.lower_sampler(self.model, Quiet())
        g = self.profile.sampling.guidance_scale
        (folded,) = pipeline.make_plans(
            self.table, profile=self.profile, budgets=[BUDGET], method="uniform", predictor=LINEAR
        )
        steps = given([0, 2, 5], STEPS)
        planned = plan_from_solver(
            steps, self.table, solver_table(self.table, steps.full_steps, "dpmsolver++"), name="planned",
            guidance_scale=g, method="given",
        )  # fmt: skip
        self.plans = [folded, planned, pipeline.uncached_plan(self.table, guidance_scale=g)]
        layout = layout_from_plans(self.plans, latent_shape=self.model.latent_shape, guided=True)
        self.exported = pipeline.export(self.model, layout, self.work, Quiet())
        engines = pipeline.engines(self.exported, self.work, ["onnxruntime"], {}, Quiet())
        self.bundle: Bundle = pipeline.assemble(
            self.profile, self.table, None, self.plans, self.exported, engines, self.work, folder / "bundle", Quiet()
        )


@pytest.fixture(scope="module")
def built_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    done: dict[str, Built] = {}

    def get(scheduler: str) -> Built:
        if scheduler not in done:
            done[scheduler] = Built(tmp_path_factory.mktemp(scheduler), scheduler)
        return done[scheduler]

    return get


def unfolded(built: Built) -> StepPlan:
    schedule = uniform(STEPS, BUDGET)
    return plan_from_schedule(
        schedule, built.table, name="unfolded", guidance_scale=3.0, method="uniform",
        prediction=predict(LINEAR, schedule, built.table),
    )  # fmt: skip


def test_no_plan_needs_a_skip_graph_and_none_is_built(built_of: Callable[[str], Built]) -> None:
    built = built_of("CogVideoXDDIMScheduler")
    graphs = built.bundle.manifest.graphs
    assert sorted(graph.role for graph in graphs.graphs) == ["combine", "full", "text_encoder", "vae_decoder"]
    assert graphs.layout.residual_history == 0
    assert [tensor.name for tensor in graphs.graph("full").outputs] == ["latents", "output"]
    assert not list(built.bundle.path.rglob("skip*"))


def test_the_bundle_verifies(built_of: Callable[[str], Built]) -> None:
    """Every plan against PyTorch, the uncached one against diffusers, and the baselines that these graphs can run."""
    built = built_of("CogVideoXDDIMScheduler")
    report = pipeline.verify_bundle(built.bundle, built.model, 1, Quiet())
    ways = {(quality.plan, quality.way) for quality in report.quality}
    assert {(f"b{BUDGET}", way) for way in ("plan", "uniform", "fewer-steps")} <= ways
    assert {(run.plan, run.against) for run in report.agreement} == {
        (f"b{BUDGET}", "torch"), ("planned", "torch"), ("uncached", "torch"), ("uncached", "diffusers"),
    }  # fmt: skip


def test_a_folded_plan_is_its_full_steps_and_nothing_else(built_of: Callable[[str], Built]) -> None:
    built = built_of("CogVideoXDDIMScheduler")
    pipe, rows = built.bundle.pipeline(), list[RowDone]()
    embeds = built.model.embed(["a cat"]).numpy()
    pipe.latents(embeds, built.model.noise(0)[None].numpy(), plan=f"b{BUDGET}", on_step=rows.append)
    assert [(row.graph, row.step) for row in rows] == [("full", 0), ("full", 3), ("full", 5), ("none", STEPS)]


@pytest.mark.parametrize("scheduler", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_runtime_oracle_and_unfolded_plan_agree(built_of: Callable[[str], Built], scheduler: str) -> None:
    """One seed, one video: also where two steps' noise goes into one row, and a sampler of second order."""
    built, seed = built_of(scheduler), 5
    folded = built.bundle.plan(f"b{BUDGET}")
    assert folded.stochastic == (scheduler == "CogVideoXDPMScheduler")
    assert not folded.stochastic or folded.noise_history >= 2
    embeds = built.model.embed(["a cat"])

    def oracle(plan: StepPlan) -> torch.Tensor:
        noises = built.model.noises(seed)
        start = next(noises)[None]
        return denoise(built.model, plan, embeds, start, fresh_noise=lambda _: next(noises)[None])

    expected = oracle(unfolded(built)).numpy()
    scale = np.abs(expected).max()
    assert np.abs(oracle(folded).numpy() - expected).max() <= 1e-5 * scale
    start = built.model.noise(seed)[None].numpy()
    seeds = [seed] if folded.stochastic else None
    found = built.bundle.pipeline().latents(embeds.numpy(), start, plan=folded, seeds=seeds)
    assert np.abs(found - expected).max() <= 1e-5 * scale


def test_plans_of_residuals_are_refused_by_such_a_bundle(built_of: Callable[[str], Built]) -> None:
    built = built_of("CogVideoXDDIMScheduler")
    schedule = uniform(STEPS, BUDGET)
    plan = plan_from_schedule(
        schedule, built.table, name="lemica", guidance_scale=3.0, method="uniform",
        prediction=predict(LEMICA, schedule, built.table),
    )  # fmt: skip
    with pytest.raises(InputError, match="plan lemica needs the graphs combine, full, skip, the bundle has"):
        built.bundle.pipeline().latents(built.model.embed(["a"]).numpy(), built.model.noise(0)[None].numpy(), plan=plan)


def test_tables_of_the_profile_have_levels(built_of: Callable[[str], Built]) -> None:
    for scheduler in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        assert sampler_table(built_of(scheduler).model.scheduler()).levels is not None
