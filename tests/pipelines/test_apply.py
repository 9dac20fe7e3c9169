"""A plan in a pipeline computes what this package's own runtimes compute, and leaves nothing behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from pipes import CASES, Case, flux, is_euler
from typing import Any

import diffusers
import msgspec
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

import lemica_trt
from lemica_trt.core.errors import InputError, UnsupportedError, UsageError
from lemica_trt.ir.plan import StepPlan
from lemica_trt.models.denoise import denoise
from lemica_trt.models.model import Model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.pipelines.branches import BranchOutputs
from lemica_trt.pipelines.scheduler import PlanScheduler
from lemica_trt.planning.extrapolation import linear_plan
from lemica_trt.planning.planner import Problem, planners
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.step_plan import plan_from_schedule, uncached_plan

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers under NumPy 2
]

PROMPT, SEED, N = "a big red circle moves left", 7, 10

Models = Callable[[str], Model]


def table_of(model: Model) -> Any:
    return sampler_table(model.scheduler(N))


def with_terms(plan: StepPlan) -> StepPlan:
    """The plan with some weights on guidance terms."""
    terms = (0.05, -0.02, 0.01)
    rows = [msgspec.structs.replace(row, guidance_terms=terms[: min(i, 3)]) for i, row in enumerate(plan.rows)]
    return msgspec.structs.replace(plan, rows=tuple(rows))


def plans(table: Any, guidance: float) -> dict[str, StepPlan]:
    schedule = uniform(table.num_steps, 4)
    return {
        "uncached": uncached_plan(table, guidance_scale=guidance),
        "linear": linear_plan(schedule, table, guidance_scale=guidance),
        "branches": with_terms(linear_plan(schedule, table, guidance_scale=guidance)),
        "lemica": plan_from_schedule(schedule, table, name="lemica", guidance_scale=guidance, method="lemica"),
    }


def latents(model: Model, **more: Any) -> torch.Tensor:
    """What the pipeline itself makes, called as a user calls it."""
    shape, sampling = model.profile.shape, model.profile.sampling
    call = {
        "num_frames": shape.frames, "height": shape.height, "width": shape.width, "output_type": "latent",
        "max_sequence_length": model.profile.text_length, "guidance_scale": sampling.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(SEED),
    }  # fmt: skip
    found: torch.Tensor = model.pipeline(PROMPT, **{**call, **more}).frames
    return found


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert float((a - b).abs().max() / b.abs().max()) < tolerance


# --- the bundled models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uncached", "linear", "branches", "lemica"])
@pytest.mark.parametrize("name", ["cogvideox-tiny", "wan-tiny"])
def test_latents_are_those_of_the_step_modules(models: Models, name: str, kind: str) -> None:
    """Wan runs the branches of its guidance one after the other, the conditional one first: a residual for each."""
    model = models(name)
    plan = plans(table_of(model), model.profile.sampling.guidance_scale)[kind]
    expected = denoise(model, plan, model.embed([PROMPT]), model.noise(SEED)[None])
    with lemica_trt.apply(model.pipeline, plan):
        assert_close(latents(model), expected)
        assert_close(latents(model), expected)  # a second request begins anew
    if kind == "uncached":
        assert_close(latents(model, num_inference_steps=N), expected)


def test_a_bundle_runs_in_its_pipeline(
    models: Models, built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Clips of the ONNX Runtime bundle, by folder, by opened bundle, and by a plan's file."""
    model, runtime = models("cogvideox-tiny"), lemica_trt.load(built[0])
    bundle = lemica_trt.Bundle.open(built[0])
    bundle.plan("b4").save(tmp_path / "b4.json")
    expected = torch.from_numpy(runtime(PROMPT, seed=SEED, plan="b4").latents)[None]
    layout = bundle.manifest.profile.shape
    shape = {"num_frames": layout.frames, "height": layout.height, "width": layout.width}
    assert bundle._repr_html_().count("<svg") == len(bundle.plans) == 3
    guidance = bundle.manifest.profile.sampling.guidance_scale
    for source, name in ((built[0], "b4"), (bundle, "b4"), (tmp_path / "b4.json", None), (str(built[0]), "b4")):
        with lemica_trt.apply(model.pipeline, source, name=name) as applied:
            assert applied.scheduler.plan.name == "b4"
            assert_close(latents(model, **shape, guidance_scale=guidance), expected)
    with pytest.raises(UsageError, match="no plan"):
        lemica_trt.apply(model.pipeline, built[0], name="b7")
    with pytest.raises(UsageError, match="expected a bundle"):
        lemica_trt.apply(model.pipeline, tmp_path / "b4.json", name="b5")
    with pytest.raises(InputError):
        lemica_trt.apply(model.pipeline, tmp_path / "nothing.json")


def test_branches_that_are_not_seen_are_said(models: Models) -> None:
    model = models("cogvideox-tiny")
    plan = plans(table_of(model), 4.0)["branches"]
    scheduler = PlanScheduler(plan)
    scheduler.set_timesteps(N)
    with pytest.raises(UsageError, match=r"weighs the branches of the guidance apart.*lemica_trt\.apply"):
        scheduler.step(torch.zeros(1, 3), scheduler.timesteps[0], torch.zeros(1, 3))

    hooks = BranchOutputs(model.pipeline)
    try:
        unconditional, conditional = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0)).unbind()
        guided = unconditional + 4 * (conditional - unconditional)
        for order in ((unconditional, conditional), (conditional, unconditional)):
            for outputs in (order, (torch.cat(order),)):  # a call each, or one for both
                hooks._seen = list(outputs)
                assert_close(hooks.guidance_term(guided), 3 * (conditional - unconditional))
        hooks._seen = [guided]  # one branch: nothing is added
        assert not hooks.guidance_term(guided).any()
        for outputs in ((unconditional, conditional), (unconditional,) * 3, ()):
            hooks._seen = list(outputs)
            with pytest.raises(UnsupportedError, match="cannot be told"):
                hooks.guidance_term(guided.flip(1))
    finally:
        hooks.remove()


def test_half_precision_keeps_its_dtype(models: Models) -> None:
    model = models("cogvideox-tiny")
    plan = plans(table_of(model), 4.0)["linear"]
    scheduler = PlanScheduler(plan)
    scheduler.set_timesteps(N)
    exact, x, half = PlanScheduler(plan), torch.randn(1, 3, dtype=torch.float64).float(), torch.bfloat16
    exact.set_timesteps(N)
    sample, sample16 = x, x.to(half)
    for t in scheduler.timesteps:
        output = torch.sin(x + t).to(half)
        sample = exact.step(output, t, sample, return_dict=False)[0]
        sample16 = scheduler.step(output, t, sample16).prev_sample
        assert sample16.dtype is half and sample.dtype is torch.float32
    assert_close(sample16.float(), sample, 0.02)  # one rounding of x and one of the result, none in between


# --- other families ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_all_steps_are_the_pipeline_itself(name: str) -> None:
    case = CASES[name]()
    own = case(num_inference_steps=8)
    with lemica_trt.apply(case.pipe, uncached_plan(case.table(8), guidance_scale=3.0)):
        assert_close(case(), own)
        assert_close(case(num_inference_steps=8), own)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("solver", ["first-order", "unipc"])
def test_fewer_steps_are_those_of_the_solver(name: str, solver: Any) -> None:
    """Euler at four steps of eight is diffusers' own Euler, given the sigmas of these steps."""
    from lemica_trt.models.scheduler import solver_table

    case, schedule = CASES[name](), uniform(8, 4)
    table = case.table(8)
    problem = Problem(table, 3.0, solver=lambda s, kind: solver_table(table, s.full_steps, kind))
    plan = planners()[f"stock:{solver}"](problem, 4)
    with lemica_trt.apply(case.pipe, plan) as applied:
        found = case()
        assert [float(t) for t in applied.scheduler.timesteps] == [table.timesteps[i] for i in schedule.full_steps]
    if solver == "first-order" and is_euler(case):
        own = case.pipe.scheduler
        case.pipe.scheduler = Given(own, schedule.full_steps)
        assert_close(found, case(num_inference_steps=8))


class Given(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """The pipeline's Euler scheduler, which leaves out all but some of its steps."""

    def __init__(self, own: Any, steps: tuple[int, ...]) -> None:
        super().__init__(**{k: v for k, v in own.config.items() if not k.startswith("_")})
        self.steps = steps

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, **more: Any
    ) -> None:  # type: ignore[override]
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, **more)
        self.timesteps = self.timesteps[list(self.steps)]
        self.sigmas = self.sigmas[[*self.steps, -1]]


def test_a_plan_for_another_size_is_refused() -> None:
    """FLUX shifts its sigmas by the size of the image."""
    case = flux()
    plan = linear_plan(uniform(8, 4), case.table(8), guidance_scale=3.5)
    with lemica_trt.apply(case.pipe, plan), pytest.raises(InputError, match="another shift, or another size"):
        case(height=256, width=256)


def test_residuals_need_a_known_trunk() -> None:
    case = flux()
    plan = plans(case.table(8), 3.5)["lemica"]
    before = case.pipe.scheduler
    with pytest.raises(UnsupportedError, match="reuses residuals, which works in CogVideoXPipeline, WanPipeline"):
        lemica_trt.apply(case.pipe, plan)
    assert case.pipe.scheduler is before and type(case.pipe) is diffusers.FluxPipeline


def test_latents_that_a_callback_changes_are_what_goes_on() -> None:
    """Replaced by equal ones nothing changes; replaced by others the pipeline's own sampler does the same with them."""
    case = flux()
    own = case(num_inference_steps=8)

    def scaled(factor: float) -> Callable[..., dict[str, Any]]:
        return lambda pipe, i, t, kwargs: {"latents": factor * kwargs["latents"]}

    changed = case(num_inference_steps=8, callback_on_step_end=scaled(0.9))
    with lemica_trt.apply(case.pipe, uncached_plan(case.table(8), guidance_scale=3.5)):
        assert_close(case(callback_on_step_end=scaled(1.0)), own)
        assert_close(case(callback_on_step_end=scaled(0.9)), changed)


def test_dynamic_guidance_is_the_pipelines_own_affair(models: Models) -> None:
    model = models("cogvideox-tiny")
    plan = uncached_plan(sampler_table(model.scheduler(N), dynamic_guidance=True), guidance_scale=4.0)
    own = latents(model, num_inference_steps=N, use_dynamic_cfg=True)
    with lemica_trt.apply(model.pipeline, plan):
        assert_close(latents(model, use_dynamic_cfg=True), own)
        with pytest.raises(UsageError, match=r"was made with use_dynamic_cfg → use_dynamic_cfg=True"):
            latents(model)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def case() -> Case:
    return flux()


@pytest.fixture
def plan(case: Case) -> StepPlan:
    made = linear_plan(uniform(8, 4), case.table(8), guidance_scale=3.5)
    return msgspec.structs.replace(made, guidance_range=(2.0, 5.0))


def test_other_steps_guidance_and_samplers_are_refused(case: Case, plan: StepPlan) -> None:
    with lemica_trt.apply(case.pipe, plan):
        with pytest.raises(UsageError, match=r"stands in for 8 steps, got 4 → num_inference_steps=8"):
            case(num_inference_steps=4)
        with pytest.raises(InputError, match="holds for guidance_scale 2 … 5, got 6"):
            case(guidance_scale=6.0)
    case.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    with lemica_trt.apply(case.pipe, plan), pytest.raises(InputError, match="settings of its own"):
        case()


def test_one_plan_at_a_time(case: Case, plan: StepPlan) -> None:
    with lemica_trt.apply(case.pipe, plan), pytest.raises(UsageError, match="is on this pipeline already"):
        lemica_trt.apply(case.pipe, plan)
    with pytest.raises(UsageError, match="expected a diffusers pipeline"):
        lemica_trt.apply(torch.nn.Identity(), plan)


def test_loops_that_begin_elsewhere_are_refused(plan: StepPlan) -> None:
    scheduler = PlanScheduler(plan)
    x = torch.zeros(1, 4)
    with pytest.raises(UsageError, match="expected set_timesteps"):
        scheduler.step(x, 0.0, x)
    scheduler.set_timesteps(8)
    with pytest.raises(UnsupportedError, match="a plan begins at step 0, got 2"):
        scheduler.set_begin_index(2)
    with pytest.raises(UnsupportedError, match=r"the plan is at timestep 1000, the loop at"):
        scheduler.step(x, scheduler.timesteps[1], x)
    with pytest.raises(UnsupportedError, match="pure noise"):
        scheduler.add_noise(x, x, 0)
    with pytest.raises(UsageError, match="eta 0"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=1.0)


def test_a_request_belongs_to_its_thread(plan: StepPlan) -> None:
    import threading

    scheduler, x, found = PlanScheduler(plan), torch.zeros(1, 4), []
    scheduler.set_timesteps(8)

    def other() -> None:
        try:
            scheduler.step(x, scheduler.timesteps[0], x)
        except UsageError as error:
            found.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "another thread" in found[0]


# --- what is left behind -------------------------------------------------------------------------------------------


def test_everything_is_undone(case: Case, plan: StepPlan) -> None:
    pipe, before, config = case.pipe, case.pipe.scheduler, dict(case.pipe.config)
    own = case(num_inference_steps=8)
    with pytest.raises(KeyboardInterrupt), lemica_trt.apply(pipe, plan):
        assert isinstance(pipe, diffusers.FluxPipeline) and type(pipe).__name__ == "FluxPipeline"
        raise KeyboardInterrupt
    applied = lemica_trt.apply(pipe, plan)
    assert "4 of 8 steps) on FluxPipeline" in repr(applied)
    case()
    applied.remove()
    applied.remove()
    assert (pipe.scheduler, type(pipe), dict(pipe.config)) == (before, diffusers.FluxPipeline, config)
    assert torch.equal(case(num_inference_steps=8), own)


def test_residual_hooks_are_undone(models: Models) -> None:
    """Also where a call ends in the middle of a step that has no blocks."""
    model = models("wan-tiny")
    pipe, blocks = model.pipeline, model.pipeline.transformer.blocks
    head = pipe.transformer.proj_out
    plan = plans(table_of(model), model.profile.sampling.guidance_scale)["lemica"]
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(len(pipe.transformer.blocks))
        if not calls[-1]:
            raise RuntimeError("in a step without blocks")

    hook = head.register_forward_pre_hook(fail)
    with lemica_trt.apply(pipe, plan), pytest.raises(RuntimeError, match="without blocks"):
        latents(model)
    hook.remove()
    assert pipe.transformer.blocks is blocks and len(blocks) > 0 and calls[-1] == 0
    for module in pipe.transformer.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_the_transformer_is_not_touched(case: Case, plan: StepPlan) -> None:
    """Compiled modules and offload hooks stay as they are."""
    pipe = case.pipe
    with lemica_trt.apply(pipe, plan):
        expected = case()
    hook = ModelHook()
    add_hook_to_module(pipe.transformer, hook)
    pipe.transformer = compiled = torch.compile(pipe.transformer, backend="eager")
    with lemica_trt.apply(pipe, plan):
        assert_close(case(), expected)
        assert pipe.transformer is compiled
    assert compiled._orig_mod._hf_hook is hook


def test_the_progress_bar_counts_the_steps_that_run(case: Case, plan: StepPlan) -> None:
    seen: list[int] = []
    with lemica_trt.apply(case.pipe, plan):
        case(callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(i) or {})
        bar = case.pipe.progress_bar(total=8)
        assert (seen, bar.total) == ([0, 1, 2, 3], 4)
        bar.close()


# --- the scheduler as an object of diffusers -----------------------------------------------------------------------


def test_it_is_saved_and_loaded_as_diffusers_does(case: Case, plan: StepPlan, tmp_path: Path) -> None:
    own = case.pipe.scheduler
    with lemica_trt.apply(case.pipe, plan):
        expected = case()
    scheduler = PlanScheduler.from_plan(plan, scheduler=own)
    assert scheduler.config.base_shift == own.config.base_shift, "pipelines ask the config for it"
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = PlanScheduler.from_pretrained(tmp_path / "scheduler")
    assert repr(loaded).startswith("<PlanScheduler linear: 4 of 8 steps in full")
    assert loaded.plan == plan and len(loaded) == 1000
    case.pipe.scheduler = loaded
    assert_close(case(num_inference_steps=8), expected, 1e-6)
    with pytest.raises(UsageError, match="stands in for 8 steps"):
        case(num_inference_steps=4)
    again = type(own).from_config({k: v for k, v in loaded.config.items() if not k.startswith("lemica")})
    assert {**own.config, **again.config} == dict(own.config)
    with pytest.raises(InputError, match="expected the config of a PlanScheduler"):
        PlanScheduler.from_config(dict(own.config))


def test_a_pipeline_folder_keeps_it(models: Models, tmp_path: Path) -> None:
    model = models("cogvideox-tiny")
    plan = plans(table_of(model), 4.0)["linear"]
    pipe = type(model.pipeline)(**model.pipeline.components)
    pipe.scheduler = PlanScheduler.from_plan(plan, scheduler=pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, PlanScheduler) and loaded.scheduler.plan == plan


def test_without_the_own_scheduler_the_plan_is_believed(case: Case, plan: StepPlan) -> None:
    with lemica_trt.apply(case.pipe, plan) as applied:
        expected, sigmas = case(), applied.scheduler.sigmas
    case.pipe.scheduler = PlanScheduler.from_plan(plan)
    assert_close(case(num_inference_steps=8), expected, 1e-6)
    assert_close(case.pipe.scheduler.sigmas, sigmas, 1e-5)  # flow matching


def test_noise_is_drawn_from_the_generator() -> None:
    """A stochastic sampler: DDPM with all its steps is diffusers' own, draw by draw."""
    own = diffusers.DDPMScheduler(clip_sample=False)
    own.set_timesteps(6)
    scheduler = PlanScheduler(uncached_plan(sampler_table(own), guidance_scale=1.0), own)
    scheduler.set_timesteps(6)
    results = []
    for stepped in (own, scheduler):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(1, 4, 2, 2, generator=generator)
        for t in stepped.timesteps:
            x = stepped.step(torch.tanh(x), t, x, generator=generator).prev_sample
        results.append(x)
    assert_close(results[1], results[0])


def test_plans_of_several_experts_run_from_bundles_alone(models: Models) -> None:
    model = models("cogvideox-tiny")
    plan = uncached_plan(table_of(model), guidance_scale=4.0)
    rows = tuple(msgspec.structs.replace(row, variant="full2") if row.step == 5 else row for row in plan.rows)
    with pytest.raises(
        UnsupportedError, match=r"of several experts, which runs from a bundle alone → lemica_trt\.load"
    ):
        lemica_trt.apply(model.pipeline, msgspec.structs.replace(plan, rows=rows))
