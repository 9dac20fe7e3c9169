"""Folded plans through the whole chain: no skip graph, B calls of the full one, the latents of the unfolded plan."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from rich.console import Console

from lemica_trt.backends.build import build as build_engine
from lemica_trt.bundle.manifest import REFERENCE_FILE, SAMPLER_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import write_bundle
from lemica_trt.calibrate.calibration import fit_by_model
from lemica_trt.compiler.bundle_plans import plan_bundle
from lemica_trt.compiler.bundle_stages import verify_bundle
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import json_bytes
from lemica_trt.export import export_graphs
from lemica_trt.ir.plan import StepPlan, layout_from_plans
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.models import Model, denoise, load_model
from lemica_trt.models.scheduler import sampler_table, solver_table
from lemica_trt.planning.extrapolation import linear_weights
from lemica_trt.planning.fold import fold
from lemica_trt.planning.schedules import given, uniform
from lemica_trt.planning.step_plan import plan_from_schedule, plan_from_solver, uncached_plan
from lemica_trt.report.summary import agreement_text
from lemica_trt.runtime.denoise import RowDone
from lemica_trt.runtime.pipeline import Pipeline

pytestmark = [
    pytest.mark.cpu,
    # Upstream: diffusers' DPM-Solver++ hands tensors to numpy functions.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

Array = npt.NDArray[Any]

STEPS, BUDGET = 8, 3


class Built(NamedTuple):
    """A bundle of the random tiny CogVideoX, with a folded plan, a planned and a fitted solver, and the uncached plan;
    the fitted one is held against twice the steps."""

    model: Model
    table: SamplerTable
    bundle: Bundle


def open_tiny(folder: Path, scheduler: str) -> tuple[Model, SamplerTable]:
    profile = tiny.make_variant("sincos", folder / "pipeline", layers=1)
    sampling = msgspec.structs.replace(profile.sampling, steps=STEPS, scheduler=scheduler)
    shape = msgspec.structs.replace(profile.shape, max_batch=1)
    model = load_model(msgspec.structs.replace(profile, sampling=sampling, shape=shape))
    return model, sampler_table(model.scheduler())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("folded")
    model, table = open_tiny(folder, "CogVideoXDDIMScheduler")
    g, schedule = model.profile.sampling.guidance_scale, given([0, 2, 5], STEPS)
    finer = sampler_table(model.scheduler(2 * STEPS))
    settings, prompts = model.profile.calibration, ["a cat", "a dog"]
    fit = fit_by_model(
        lambda: model, settings, table, prompts, reference=finer, journals=folder / "journals",
        trajectories=folder / "trajectories", reporter=Quiet(),
    )  # fmt: skip
    assert fit is not None
    solver = solver_table(table, schedule.full_steps, "dpmsolver++")
    plans = [
        fold(uniform_plan(table, name=f"b{BUDGET}")),
        plan_from_solver(schedule, table, solver, name="planned", guidance_scale=g, method="given"),
        msgspec.structs.replace(fit(schedule), name="fitted"),
        uncached_plan(table, guidance_scale=g),
    ]
    layout = layout_from_plans(plans, latent_shape=model.latent_shape, guided=True, conditions=model.conditions)
    graphs = export_graphs(model, layout, folder)
    files: dict[str, Path | bytes] = {
        "tokenizer.json": model.tokenizer_json(),
        SAMPLER_FILE: json_bytes(table),
        REFERENCE_FILE: json_bytes(finer),
        **{graph.file: folder / graph.file for graph in graphs.graphs},
    }
    engines = [build_engine("onnxruntime", graphs, folder, folder)]
    files |= {name: folder / name for entry in engines for name in entry.files.values()}
    bundle = write_bundle(
        folder / "bundle",
        profile=model.profile,
        graphs=graphs,
        plans=plans,
        default_plan=plans[0].name,
        encoders=(model.text_spec("tokenizer.json"),),
        engines=engines,
        files=files,
        revision=model.revision,
    )
    return Built(model, table, bundle)


def uniform_plan(table: SamplerTable, name: str = "unfolded", *, residuals: bool = False) -> StepPlan:
    """Not folded."""
    schedule = uniform(STEPS, BUDGET)
    return plan_from_schedule(
        schedule, table, name=name, guidance_scale=3.0, method="uniform",
        output_weights=None if residuals else linear_weights(schedule),
    )  # fmt: skip


def conditions(built: Built) -> dict[str, Array]:
    (condition,) = built.model.conditions
    return {condition.name: built.model.embed(["a cat"]).numpy()}


def oracle(model: Model, plan: StepPlan, seed: int) -> Array:
    noises = model.noises(seed)
    start = next(noises)[None]
    return denoise(model, plan, model.embed(["a cat"]), start, fresh_noise=lambda _: next(noises)[None]).numpy()


def test_no_plan_needs_a_skip_graph_and_none_is_built(built: Built) -> None:
    graphs = built.bundle.manifest.graphs
    assert sorted(graph.role for graph in graphs.graphs) == ["combine", "full", "text_encoder", "vae_decoder"]
    assert graphs.layout.caches == ()
    assert [tensor.name for tensor in graphs.graph("full").outputs] == ["latents", "output", "guidance_term"]
    assert not list(built.bundle.path.rglob("skip*"))


def test_the_bundle_verifies(built: Built) -> None:
    """Every plan against PyTorch, the uncached one against diffusers, and the baselines that these graphs can run."""
    report = verify_bundle(built.bundle, built.model, ["a cat"], 1, Quiet(), backend="onnxruntime")
    ways = {(quality.plan, quality.method) for quality in report.quality}
    assert {(f"b{BUDGET}", way) for way in ("plan", "fewer-steps")} <= ways
    assert {(quality.plan, quality.reference_steps) for quality in report.quality} == {
        (f"b{BUDGET}", None), ("planned", None), ("fitted", 2 * STEPS),
    }  # fmt: skip
    said = io.StringIO()
    Console(file=said, width=300).print(agreement_text(report))
    assert "against the uncached run, fitted against 16 steps" in said.getvalue()
    assert {(run.plan, run.against) for run in report.agreement} == {
        (f"b{BUDGET}", "torch"), ("planned", "torch"), ("fitted", "torch"),
        ("uncached", "diffusers"),
    }  # fmt: skip


def test_a_folded_plan_is_its_full_steps_and_nothing_else(built: Built) -> None:
    pipe, rows = Pipeline(built.bundle), list[RowDone]()
    pipe.latents(conditions(built), built.model.noise(0)[None].numpy(), plan=f"b{BUDGET}", on_step=rows.append)
    assert [(row.variant, row.step) for row in rows] == [("full", 0), ("full", 3), ("full", 5), (None, STEPS)]


def test_runtime_oracle_and_unfolded_plan_agree(built: Built) -> None:
    model, folded = built.model, built.bundle.plan(f"b{BUDGET}")
    expected = oracle(model, uniform_plan(built.table), 5)
    start = model.noise(5)[None].numpy()
    found = Pipeline(built.bundle).latents(conditions(built), start, plan=folded)
    for latents in (found, oracle(model, folded, 5)):
        assert np.abs(latents - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("method", ["lemica", "linear", "fitted", "auto"])
def test_a_bundle_without_a_calibration_plans_nothing_that_needs_one(built: Built, method: str) -> None:
    with pytest.raises(UsageError, match=r"needs an error graph|no method is possible"):
        plan_bundle(built.bundle, BuildRequest(budgets=(BUDGET,), methods=(method,)), Quiet())


def test_a_bundle_knows_the_reference_that_it_was_made_against(built: Built, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built.bundle.path, copy)

    def replanned(reference_steps: int | None) -> StepPlan:
        request = BuildRequest(budgets=(BUDGET,), methods=("stock:first-order",), reference_steps=reference_steps)
        plan_bundle(Bundle.open(copy), request, Quiet())
        return Bundle.open(copy).plan(f"b{BUDGET}")

    assert (replanned(None).reference_steps, replanned(STEPS).reference_steps) == (2 * STEPS, None)
    with pytest.raises(UsageError, match="expected 8 or 16, which the bundle knows, got 32"):
        replanned(32)


def test_one_seed_is_one_video_under_a_sampler_that_draws(tmp_path: Path) -> None:
    """CogVideoXDPM: of second order, and the noise of two or three steps goes into one row."""
    model, table = open_tiny(tmp_path, "CogVideoXDPMScheduler")
    folded = fold(uniform_plan(table))
    assert max(row.draws for row in folded.rows) == 3 and folded.latent_history > 1
    expected = oracle(model, uniform_plan(table), 5)
    assert np.abs(oracle(model, folded, 5) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(oracle(model, folded, 6) - expected).max() > 0.1 * np.abs(expected).max()


def test_plans_of_residuals_are_refused_by_such_a_bundle(built: Built) -> None:
    plan, noise = uniform_plan(built.table, residuals=True), built.model.noise(0)[None].numpy()
    with pytest.raises(InputError, match="plan unfolded needs the graphs combine, full, skip, the bundle has"):
        Pipeline(built.bundle).latents(conditions(built), noise, plan=plan)
