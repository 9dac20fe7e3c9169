"""CFG-parallel: two processes with a branch of the guidance each, joined by gloo, make the latents of one process."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch

from lemica_trt.backends.torch.branches import BRANCHES, joined
from lemica_trt.core.errors import EngineError, UsageError
from lemica_trt.evaluate.torch_runtime import torch_denoiser
from lemica_trt.ir.graphs import StepLayout
from lemica_trt.ir.plan import StepPlan, layout_from_plans
from lemica_trt.ir.schedule import Schedule
from lemica_trt.models import Model, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.models.steps import Branch, step_modules
from lemica_trt.planning.step_plan import plan_from_schedule

Array = npt.NDArray[Any]


def plans_of(model: Model) -> tuple[list[StepPlan], StepLayout]:
    """A plan with steps that read a cache slot, and one of full steps."""
    table, plans = sampler_table(model.scheduler()), []
    for steps in ((0, 2), (0, 1, 2, 3)):
        schedule = Schedule(num_steps=table.num_steps, full_steps=steps)
        plans.append(plan_from_schedule(schedule, table, name=f"b{len(steps)}", guidance_scale=3.0, method="given"))
    return plans, layout_from_plans(
        plans, latent_shape=model.latent_shape, guided=model.guided, conditions=model.conditions
    )


def latents(model: Model, branch: Branch | None) -> list[Array]:
    """Of both plans, batches of 1 and of 2."""
    plans, layout = plans_of(model)
    denoiser, found = torch_denoiser(model, layout, branch=branch), []
    for batch in (1, 2):
        embeds = model.embed(["a cat", "x"][:batch])
        noise = torch.stack([model.noise(i) for i in range(batch)]).numpy()
        scales = np.array([3.0, 4.5])[:batch]
        found += [denoiser.run(plan, {"prompt_embeds": embeds.float().numpy()}, noise, scales) for plan in plans]
    return found


def run_branch(rank: int, folders: dict[str, Path], store: Path, output: Path) -> None:
    """One process: its branch of every model. Then process 1 goes, and process 0 writes what it is told."""
    with joined(rank, torch.device("cpu"), store) as gather:
        for name, folder in folders.items():
            for k, found in enumerate(latents(load_model(folder), Branch(rank, gather))):
                np.save(output / f"{name}-{k}-{rank}.npy", found)
        if rank == 0:
            try:
                gather(torch.zeros(1, 2))
            except EngineError as error:
                (output / "told").write_text(str(error))


@pytest.mark.cpu
def test_two_processes_make_the_latents_of_one(tmp_path: Path) -> None:
    """Both processes the same bits; those of one process up to rounding: a batch of half the rows may add in another
    order. When one goes, the other is told so in one line."""
    folders = {name: tiny.make_variant(name, tmp_path / name) for name in ("sincos", "wan")}
    other = multiprocessing.get_context("spawn").Process(
        target=run_branch, args=(1, folders, tmp_path / "store", tmp_path)
    )
    other.start()
    run_branch(0, folders, tmp_path / "store", tmp_path)
    other.join()
    assert other.exitcode == 0
    for name, folder in folders.items():
        for k, expected in enumerate(latents(load_model(folder), None)):
            found, same = (np.load(tmp_path / f"{name}-{k}-{rank}.npy") for rank in range(BRANCHES))
            assert np.array_equal(found, same)
            assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    assert (tmp_path / "told").read_text().startswith("the process of the other branch does not answer: ")


@pytest.mark.cpu
def test_a_branch_runs_its_own_rows_and_keeps_those_alone(tmp_path: Path) -> None:
    """Half the rows enter the transformer of each process, and half are in its cache slot."""
    model = load_model(tiny.make_variant("sincos", tmp_path))
    _, layout = plans_of(model)
    seen: list[int] = []
    model.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    module = step_modules(model, layout, Branch(1, lambda rows: torch.cat([rows, rows])))["full"]
    inputs = {f"{name}_0": torch.ones(3, *model.latent_shape) for name in ("latents", "outputs")}
    inputs |= {f"latents_{j}": inputs["latents_0"] for j in range(layout.latent_history)}
    inputs |= {f"outputs_{k}": inputs["outputs_0"] for k in range(layout.output_history)}
    inputs["coefficients"] = torch.ones(max(part.stop for part in layout.offsets.values()))
    inputs["guidance"] = torch.ones(3)
    inputs["prompt_embeds"] = model.embed(["a", "b", "c"])
    with torch.no_grad():
        found = module(inputs)
    assert seen == [3] and len(found["trunk"]) == 3 and len(found["output"]) == 3


@pytest.mark.cpu
def test_a_model_without_guidance_has_nothing_to_split(tmp_path: Path) -> None:
    model = load_model(tiny.make_variant("sincos", tmp_path))
    _, layout = plans_of(model)
    with pytest.raises(UsageError, match="expected two branches of guidance to split"):
        step_modules(model, msgspec.structs.replace(layout, guided=False), Branch(0, lambda rows: rows))
