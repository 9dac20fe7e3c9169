"""Finding, naming and loading models, and the one line that a user gets when that fails."""

from __future__ import annotations

import inspect
import json
import math
import shutil

import diffusers
import msgspec
import pytest
import tiny
import torch

from lemica_trt.core.errors import InputError, UnsupportedError, UsageError
from lemica_trt.ir.profile import Sampling
from lemica_trt.models import FAMILIES, denoise, family_from_name, family_from_pipeline, load_model, scheduler_like
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.step_plan import uncached_plan

pytestmark = pytest.mark.cpu


@pytest.fixture
def folder(model_of, tmp_path):
    """A copy of the sincos pipeline that a test may break."""
    return shutil.copytree(model_of("sincos").folder, tmp_path / "pipeline")


def _profile(folder, **changes):
    return tiny.tiny_profile(folder, "cogvideox", frames=9, **changes)


def test_families_are_named_once() -> None:
    assert all(name == family.name for name, family in FAMILIES.items())
    assert len({family.pipeline_class for family in FAMILIES.values()}) == len(FAMILIES)
    with pytest.raises(UnsupportedError, match="one of cogvideox, wan, got 'flux'"):
        family_from_name("flux")


def test_family_from_pipeline(model_of, tmp_path) -> None:
    assert family_from_pipeline(model_of("sincos").folder).name == "cogvideox"
    assert family_from_pipeline(model_of("wan").folder).name == "wan"
    with pytest.raises(InputError, match="no readable model_index"):
        family_from_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UnsupportedError, match="got FluxPipeline"):
        family_from_pipeline(tmp_path)


@pytest.mark.parametrize("source", ["/no/such/folder", "package:nothing", "nothing"])
def test_no_such_source(source) -> None:
    with pytest.raises(InputError, match="none that exists"):
        load_model(_profile(source))


@pytest.mark.parametrize(
    "part", ["transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "vae/config.json"]
)
@pytest.mark.parametrize("harm", ["remove", "cut"])
def test_incomplete_folders_give_one_line(folder, part, harm) -> None:
    path = folder / part
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="expected a complete pipeline") as caught:
        load_model(_profile(folder))
    assert "\n" not in str(caught.value)


def test_another_family_is_refused(model_of) -> None:
    with pytest.raises(InputError, match="expected a WanPipeline, got a CogVideoXPipeline"):
        load_model(msgspec.structs.replace(model_of("sincos").profile, family="wan"))


def test_source_and_dtype_override_the_profile(folder) -> None:
    model = load_model(_profile("nowhere"), source=str(folder), dtype="fp16")
    assert model.profile.source == str(folder)
    assert model.profile.dtype == "fp16"
    assert model.pipeline.transformer.dtype == torch.float16
    assert model.pipeline.vae.dtype == torch.float16
    kept = {name.split(".")[-2] for name, p in model.pipeline.text_encoder.named_parameters() if p.dtype.itemsize == 4}
    assert kept == {"wo"}


def test_wan_keeps_its_vae_and_its_modules_in_fp32(model_of) -> None:
    model = load_model(model_of("wan").profile, dtype="bf16")
    assert model.pipeline.vae.dtype == torch.float32
    assert model.pipeline.transformer.scale_shift_table.dtype == torch.float32
    assert model.pipeline.transformer.proj_out.weight.dtype == torch.bfloat16


def test_revision_follows_content_not_place(folder, model_of) -> None:
    original = model_of("sincos")
    profile = _profile(folder)
    assert load_model(profile).revision == original.revision
    (folder / "README.md").write_text("notes do not count")
    assert load_model(profile).revision == original.revision
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**config, "beta_end": 0.013}))
    assert load_model(profile).revision != original.revision


def test_scheduler_by_name(folder) -> None:
    model = load_model(_profile(folder, scheduler="CogVideoXDPMScheduler"))
    assert isinstance(model.scheduler(), diffusers.CogVideoXDPMScheduler)
    assert model.scheduler() is not model.scheduler()
    assert model.scheduler().config.prediction_type == "v_prediction"
    for name in ("NoSuchScheduler", "CogVideoXPipeline"):
        with pytest.raises(UsageError, match="expected a class of diffusers, got"):
            load_model(_profile(folder, scheduler=name))


def test_a_flow_model_keeps_its_shift_and_its_velocity_under_another_scheduler() -> None:
    """diffusers' own `from_config` loses both."""
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    euler = scheduler_like(diffusers.FlowMatchEulerDiscreteScheduler, unipc)
    assert euler.config.shift == 3.0
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    unipc = scheduler_like(diffusers.UniPCMultistepScheduler, euler)
    unipc.set_timesteps(4)
    sigmas = torch.linspace(1, 0, 5)
    torch.testing.assert_close(unipc.sigmas, 5 * sigmas / (1 + 4 * sigmas), atol=2e-3, rtol=0)
    assert unipc.config.prediction_type == "flow_prediction"


def test_flow_matching_and_diffusion_do_not_mix(model_of) -> None:
    for variant, name in (("wan", "DDIMScheduler"), ("sincos", "FlowMatchEulerDiscreteScheduler")):
        profile = model_of(variant).profile
        sampling = msgspec.structs.replace(profile.sampling, scheduler=name)
        with pytest.raises(UnsupportedError, match=f"for flow matching, unlike {name}"):
            load_model(msgspec.structs.replace(profile, sampling=sampling))


def test_another_shift_of_a_flow_scheduler(folder, model_of) -> None:
    wan = model_of("wan").profile
    shifted = msgspec.structs.replace(wan.sampling, flow_shift=5.0)
    scheduler = load_model(msgspec.structs.replace(wan, sampling=shifted)).scheduler(10)
    own = model_of("wan").scheduler(10)
    assert (own.config.flow_shift, scheduler.config.flow_shift) == (3.0, 5.0)
    flat = own.sigmas[1:-1] / (3 - 2 * own.sigmas[1:-1])  # σ = s·u/(1 + (s − 1)·u)
    torch.testing.assert_close(scheduler.sigmas[1:-1], 5 * flat / (1 + 4 * flat), rtol=0.01, atol=0.0)
    with pytest.raises(UnsupportedError, match="a scheduler for flow matching to shift, got CogVideoXDDIMScheduler"):
        load_model(_profile(folder, flow_shift=5.0))


SIGMAS = (0.99, 0.8, 0.45, 0.1)


@pytest.mark.parametrize("scheduler", [None, "FlowMatchEulerDiscreteScheduler"])
def test_given_sigmas_are_those_of_the_pipeline_and_of_its_table(model_of, scheduler) -> None:
    """Of the pipeline itself, whose call takes none, and of the plan that is lowered; other numbers of steps are not
    touched."""
    wan = model_of("wan").profile
    if (
        scheduler is None
        and "sigmas" not in inspect.signature(diffusers.UniPCMultistepScheduler.set_timesteps).parameters
    ):
        pytest.skip("this diffusers has a UniPC that takes no sigmas")
    sampling = msgspec.structs.replace(wan.sampling, steps=4, sigmas=SIGMAS, scheduler=scheduler)
    model = load_model(msgspec.structs.replace(wan, sampling=sampling))
    table = sampler_table(model.scheduler())
    shifted = [3 * s / (1 + 2 * s) for s in SIGMAS]
    assert [t / 1000 for t in table.timesteps] == pytest.approx(shifted, abs=2e-3)
    own = load_model(msgspec.structs.replace(wan, sampling=msgspec.structs.replace(sampling, sigmas=None)))
    assert torch.equal(model.scheduler(7).sigmas, own.scheduler(7).sigmas)
    assert not torch.allclose(model.scheduler().sigmas, own.scheduler().sigmas, atol=0.01)
    noise = model.noise(0)[None]
    plan = uncached_plan(table, guidance_scale=sampling.guidance_scale)
    theirs = model.reference(["a cat"], noise, negative="no")
    assert (denoise(model, plan, model.embed(["a cat"], "no"), noise) - theirs).abs().max() < 1e-4
    assert (own.reference(["a cat"], noise, negative="no") - theirs).abs().max() > 1e-3


# Upstream: diffusers hands tensors to numpy functions, and torch's tensors do not speak numpy 2 in full yet.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "given", "message"),
    [
        (None, {"timesteps": (999.0, 600.0, 300.0, 20.0)}, "expected a scheduler that takes timesteps, CogVideoXDDIM"),
        ("DDIMScheduler", {"sigmas": SIGMAS}, "expected a scheduler that takes sigmas, DDIMScheduler does not"),
        ("UniPCMultistepScheduler", {"sigmas": SIGMAS}, "Passing `sigmas` is only supported|takes sigmas"),
        ("EulerDiscreteScheduler", {"sigmas": SIGMAS}, "of 4 sigmas it makes 3 steps"),
        ("DPMSolverMultistepScheduler", {"timesteps": (999.5, 600.0, 300.0, 20.0)}, "makes 4 steps, at .999, 600"),
    ],
)
def test_sigmas_that_a_scheduler_does_not_take_are_refused(folder, scheduler, given, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load_model(_profile(folder, scheduler=scheduler, steps=4, **given)).scheduler()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_given_timesteps(folder) -> None:
    timesteps = (999.0, 600.0, 300.0, 20.0)
    model = load_model(_profile(folder, scheduler="DPMSolverMultistepScheduler", steps=4, timesteps=timesteps))
    assert sampler_table(model.scheduler()).timesteps == timesteps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigmas": (1.0, 0.5)}, "sigmas must be 3, one for each step, got 2"),
        ({"sigmas": (1.0, 0.5, 0.5)}, "sigmas must fall and stay above 0, got 1, 0.5, 0.5"),
        ({"timesteps": (1.0, 0.5, 0.0)}, "timesteps must fall and stay above 0"),
        ({"sigmas": (math.inf, 0.5, 0.1)}, "must be finite"),
        ({"sigmas": (1.0, 0.5, 0.1), "timesteps": (3.0, 2.0, 1.0)}, "exclude each other"),
    ],
)
def test_lists_that_are_no_schedule(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(steps=3, **given)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("sincos", {"frames": 13}, "multiple of 8 plus 1 for this model, got 13 → use 9 or 17"),
        ("sincos", {"height": 40}, "height must be a multiple of 16 for this model, got 40 → use 32"),
        ("wan", {"frames": 8}, "multiple of 4 plus 1 for this model, got 8 → use 5 or 9"),
        ("wan", {"width": 8}, "width must be a multiple of 16 for this model, got 8 → use 16"),
    ],
)
def test_shapes_that_a_model_cannot_make(model_of, variant, changes, message) -> None:
    profile = model_of(variant).profile
    with pytest.raises(InputError, match=message):
        load_model(msgspec.structs.replace(profile, shape=msgspec.structs.replace(profile.shape, **changes)))


def test_wan_has_no_dynamic_guidance(model_of) -> None:
    profile = model_of("wan").profile
    sampling = msgspec.structs.replace(profile.sampling, dynamic_guidance=True)
    with pytest.raises(UnsupportedError, match="no dynamic guidance"):
        load_model(msgspec.structs.replace(profile, sampling=sampling))
