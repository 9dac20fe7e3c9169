"""A plan run with the step modules is the pipeline, and the step modules are their formulas."""

from __future__ import annotations

import msgspec
import pytest
import torch

from lemica_trt.ir.graphs import step_layout
from lemica_trt.ir.plan import PlanRow, StepPlan, coefficient_vector, layout_from_plans, trunk_reads
from lemica_trt.ir.sampler import SamplerRow, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.models import Model, denoise, load_model
from lemica_trt.models.steps import CombineStep, FullStep, SkipStep
from lemica_trt.planning.step_plan import plan_from_schedule

pytestmark = pytest.mark.cpu


def first_order_table(model: Model) -> SamplerTable:
    """Of a scheduler whose step is a·x + b·m: both read off it in float64."""
    scheduler, zero, one = model.scheduler(), torch.zeros(1).double(), torch.ones(1).double()
    rows = [
        SamplerRow(
            latents=(float(getattr(scheduler, "init_noise_sigma", 1.0)),), timestep=float(scheduler.timesteps[0])
        )
    ]
    pairs = []
    for m, x in ((zero, one), (one, zero)):
        scheduler = model.scheduler()
        pairs.append([float(scheduler.step(m, t, x, return_dict=False)[0]) for t in scheduler.timesteps])
    for i, (a, b) in enumerate(zip(*pairs)):
        t = float(scheduler.timesteps[i + 1]) if i + 1 < len(scheduler.timesteps) else None
        rows.append(SamplerRow(latents=(a,), outputs=(b,), timestep=t))
    return SamplerTable(scheduler=type(scheduler).__name__, rows=tuple(rows))


def plan_of(model: Model, full_steps: tuple[int, ...]) -> StepPlan:
    table = first_order_table(model)
    return plan_from_schedule(
        Schedule(num_steps=table.num_steps, full_steps=full_steps), table, name="test",
        guidance_scale=model.profile.sampling.guidance_scale, method="given",
    )  # fmt: skip


@pytest.fixture
def first_order(model: Model) -> Model:
    """Wan with a first-order scheduler in place of UniPC; the others have one."""
    if model.family.name != "wan":
        return model
    sampling = msgspec.structs.replace(model.profile.sampling, scheduler="FlowMatchEulerDiscreteScheduler")
    return load_model(msgspec.structs.replace(model.profile, sampling=sampling))


def test_all_steps_in_full_is_the_pipeline(first_order: Model) -> None:
    model, prompts = first_order, ["a cat", "x"]
    noise = torch.stack([model.noise(0), model.noise(1)])
    seen = []
    mine = denoise(
        model, plan_of(model, (0, 1, 2, 3)), model.embed(prompts, "no"), noise,
        on_row=lambda row, result: seen.append((row.step, sorted(result))),
    )  # fmt: skip
    assert (mine - model.reference(prompts, noise, negative="no")).abs().max() < 2e-5
    assert seen == [(i, ["latents", "output"]) for i in range(5)]  # nothing reads a residual: none is given away


def test_skipped_steps_reuse_the_residual_of_the_last_full_one(first_order: Model) -> None:
    model, steps = first_order, {}
    noise, embeds = model.noise(0)[None], model.embed(["a cat"])
    denoise(model, plan_of(model, (0, 2)), embeds, noise, on_row=lambda row, result: steps.update({row.step: result}))
    assert "trunk" in steps[2] and "trunk" not in steps[3]
    with torch.no_grad():
        inputs = model.transformer_inputs(
            torch.cat([steps[3]["latents"]] * 2), torch.full((2,), first_order_table(model).timesteps[3]), embeds
        )
        u, c = model.split.skip(steps[2]["trunk"], **inputs).chunk(2)
    assert (u + 3.0 * (c - u) - steps[3]["output"]).abs().max() < 1e-6


def test_requests_of_a_batch_do_not_meet(model_of) -> None:
    model, plan = model_of("rotary"), plan_of(model_of("rotary"), (0, 2))
    noise = torch.stack([model.noise(0), model.noise(1)])
    scales = torch.tensor([2.0, 5.0])
    both = denoise(model, plan, model.embed(["a", "b"]), noise, guidance_scale=scales)
    for i, prompt in enumerate("ab"):
        alone = denoise(model, plan, model.embed([prompt]), noise[i : i + 1], guidance_scale=float(scales[i]))
        assert (both[i] - alone[0]).abs().max() < 1e-5
    assert (denoise(model, plan, model.embed(["a", "b"]), noise) - both).abs().max() > 1e-3


def test_steps_are_their_formulas(model_of) -> None:
    model = model_of("sincos")
    layout = step_layout(
        latent_shape=model.latent_shape, latent_history=2, output_history=3, trunk_depth=2, stochastic=True
    )
    generator = torch.Generator().manual_seed(3)
    x0, x1, m0, m1, m2, z = (torch.randn(1, *model.latent_shape, generator=generator) for _ in range(6))
    r0, r1 = (torch.randn(2, 12, 32, generator=generator) for _ in range(2))
    row = PlanRow(
        variant="skip", step=3, latents=(0.9, -0.2), outputs=(0.3, 0.1, -0.4), draws=1, noise=(0.5,), timestep=321.25,
        in_scale=0.7, caches=trunk_reads(1.5, -0.5),
    )  # fmt: skip
    embeds = model.embed(["a cat"])
    inputs = {
        "latents_0": x0, "latents_1": x1, "outputs_0": m0, "outputs_1": m1, "outputs_2": m2, "noise": z,
        "guidance": torch.tensor([4.0]), "prompt_embeds": embeds, "trunk_0": r0, "trunk_1": r1,
        "coefficients": torch.from_numpy(coefficient_vector(row, layout)),
    }  # fmt: skip
    x = 0.9 * x0 - 0.2 * x1 + 0.3 * m0 + 0.1 * m1 - 0.4 * m2 + 0.5 * z
    with torch.no_grad():
        dit = model.transformer_inputs(torch.cat([0.7 * x] * 2), torch.tensor([321.25, 321.25]), embeds)
        u, c = model.split.skip(1.5 * r0 - 0.5 * r1, **dit).chunk(2)
        skip = SkipStep(model, layout)(inputs)
        full = FullStep(model, layout)(inputs)
        output, residual = model.split.full(**dit)
    assert sorted(skip) == ["latents", "output"]
    assert (skip["latents"] - x).abs().max() < 1e-6
    assert (skip["output"] - (u + 4 * (c - u))).abs().max() < 2e-5
    assert (full["output"] - (output[:1] + 4 * (output[1:] - output[:1]))).abs().max() < 2e-5
    assert (full["trunk"] - residual).abs().max() < 1e-5
    reuse = PlanRow(variant=None, step=3, latents=(0.0, 1.0), reuse=(2.0, 0.0, -1.0))
    inputs["coefficients"] = torch.from_numpy(coefficient_vector(reuse, layout))
    combined = CombineStep(layout)(inputs)
    assert torch.equal(combined["latents"], x1)
    assert torch.equal(combined["output"], 2 * m0 - m2)


def test_half_precision_keeps_the_sampler_in_fp32(model_of) -> None:
    single = model_of("sincos")
    half = load_model(single.profile, dtype="fp16")
    plan = plan_of(half, (0, 2))
    noise, results = half.noise(0)[None], {}
    timesteps = []
    hook = half.pipeline.transformer.time_proj.register_forward_pre_hook(lambda _, args: timesteps.append(args[0]))
    rough = denoise(half, plan, half.embed(["a cat"]), noise, on_row=lambda row, r: results.update({row.step: r}))
    hook.remove()
    assert {t.dtype for t in timesteps} == {torch.float32}
    assert results[0]["trunk"].dtype == torch.float16
    assert results[1]["output"].dtype == results[1]["latents"].dtype == torch.float32
    fine = denoise(single, plan, single.embed(["a cat"]), noise)
    assert 0 < (rough - fine).abs().max() < 2e-2


def test_fresh_noise_is_asked_for_where_it_is_drawn(model_of) -> None:
    model = model_of("sincos")
    plan = plan_of(model, (0, 1, 2, 3))
    noises = {1: (1, (0.1,)), 3: (2, ()), 4: (1, (0.1, 0.0, -0.2))}  # what is not used is drawn all the same
    rows = [
        msgspec.structs.replace(row, draws=noises.get(row.step, (0, ()))[0], noise=noises.get(row.step, (0, ()))[1])
        for row in plan.rows
    ]
    stochastic = msgspec.structs.replace(plan, rows=tuple(rows))
    assert layout_from_plans([plan, stochastic], latent_shape=model.latent_shape, guided=model.guided).stochastic
    embeds, noise = model.embed(["a"]), model.noise(0)[None]
    with pytest.raises(ValueError, match="pass fresh_noise"):
        denoise(model, stochastic, embeds, noise)
    drawn, given = [], model.noises(0)
    next(given)

    def draw(row: int) -> torch.Tensor:
        drawn.append(row)
        return next(given)[None]

    result = denoise(model, stochastic, embeds, noise, fresh_noise=draw)
    assert drawn == [1, 3, 3, 4]
    assert not torch.equal(result, denoise(model, plan, embeds, noise))
