"""Sampler lowering against the schedulers themselves: every table must do what `step` does, on any data."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
import textwrap
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.plan import PlanRow
from lemica_trt.ir.sampler import SamplerTable, require_levels
from lemica_trt.models import scheduler as lower
from lemica_trt.models.scheduler import sampler_table, solver_table, support_matrix
from lemica_trt.planning.extrapolation import linear_weights
from lemica_trt.planning.fold import fold
from lemica_trt.planning.step_plan import plan_from_schedule, uncached_plan
from lemica_trt.testing.interpreter import deviation as run_deviation
from lemica_trt.testing.interpreter import interpret, run_plan
from lemica_trt.testing.values import schedule_of

pytestmark = [
    pytest.mark.cpu,
    # Upstream: diffusers hands tensors to numpy functions, and torch's tensors do not speak numpy 2 in full yet.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`algorithm_types dpmsolver and sde-dpmsolver` is deprecated:FutureWarning"),
]

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule of Stable Diffusion and of the CogVideoX family."""

COGVIDEOX = {
    **SD,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}
V = {**SD, "prediction_type": "v_prediction"}
X0 = {**SD, "prediction_type": "sample"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
"""Wan's sampling."""
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
NO_CLIP = {"clip_sample": False}
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}

SUPPORTED: dict[str, tuple[str, dict[str, Any], tuple[int, int, bool]]] = {
    # label: scheduler class, config, (latent history, output history, stochastic) at 10 steps
    "CogVideoXDDIM": ("CogVideoXDDIMScheduler", COGVIDEOX, (1, 1, False)),
    "CogVideoXDPM": ("CogVideoXDPMScheduler", COGVIDEOX, (2, 2, True)),
    "DDIM, epsilon": ("DDIMScheduler", {**SD, **NO_CLIP}, (1, 1, False)),
    "DDIM, v": ("DDIMScheduler", {**V, **NO_CLIP}, (1, 1, False)),
    "DDIM, sample": ("DDIMScheduler", {**X0, **NO_CLIP}, (1, 1, False)),
    "DDIM, zero SNR": ("DDIMScheduler", {**ZERO_SNR, **NO_CLIP}, (1, 1, False)),
    "DDPM": ("DDPMScheduler", NO_CLIP, (1, 1, True)),
    "DDPM, fixed_large": ("DDPMScheduler", {**NO_CLIP, "variance_type": "fixed_large"}, (1, 1, True)),
    "EulerDiscrete": ("EulerDiscreteScheduler", SD, (1, 1, False)),
    "EulerDiscrete, Karras, v": ("EulerDiscreteScheduler", {**V, "use_karras_sigmas": True}, (1, 1, False)),
    "EulerDiscrete, zero SNR": ("EulerDiscreteScheduler", ZERO_SNR, (1, 1, False)),
    "EulerAncestralDiscrete": ("EulerAncestralDiscreteScheduler", SD, (1, 1, True)),
    "HeunDiscrete": ("HeunDiscreteScheduler", SD, (2, 2, False)),
    "HeunDiscrete, Karras, v": ("HeunDiscreteScheduler", {**V, "use_karras_sigmas": True}, (2, 2, False)),
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}, (1, 1, False)),
    "FlowMatchEuler, shift 3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, (1, 1, False)),
    "FlowMatchEuler, shift 12": ("FlowMatchEulerDiscreteScheduler", {"shift": 12.0}, (1, 1, False)),
    "FlowMatchEuler, dynamic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, (1, 1, False)),
    "FlowMatchEuler, stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, (1, 1, True)),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, (2, 2, False)),
    "FlowMatchLCM": ("FlowMatchLCMScheduler", {}, (1, 1, True)),
    "EDMEuler": ("EDMEulerScheduler", {}, (1, 1, False)),
    "EDMDPMSolverMultistep": ("EDMDPMSolverMultistepScheduler", {}, (2, 2, False)),
    "EDMDPMSolverMultistep, order 3": ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, (3, 3, False)),
    "EDMDPMSolverMultistep, SDE": (
        "EDMDPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        (2, 2, True),
    ),
    "DPMSolverMultistep, order 1": ("DPMSolverMultistepScheduler", {**SD, "solver_order": 1}, (1, 1, False)),
    "DPMSolverMultistep, order 2": ("DPMSolverMultistepScheduler", SD, (2, 2, False)),
    "DPMSolverMultistep, order 3": ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}, (3, 3, False)),
    "DPMSolverMultistep, order 3, no lower order at the end": (
        "DPMSolverMultistepScheduler",
        {**SD, **TO_SIGMA_MIN, "solver_order": 3, "lower_order_final": False},
        (3, 3, False),
    ),
    "DPMSolverMultistep, Euler at the end": (
        "DPMSolverMultistepScheduler",
        {**SD, "euler_at_final": True},
        (2, 2, False),
    ),
    "DPMSolverMultistep, zero SNR": ("DPMSolverMultistepScheduler", ZERO_SNR, (2, 2, False)),
    "DPMSolverMultistep, noise form": (
        "DPMSolverMultistepScheduler",
        {**SD, **TO_SIGMA_MIN, "algorithm_type": "dpmsolver"},
        (1, 2, False),
    ),
    "DPMSolverMultistep, SDE": (
        "DPMSolverMultistepScheduler",
        {**SD, "algorithm_type": "sde-dpmsolver++"},
        (2, 2, True),
    ),
    "DPMSolverMultistep, SDE, order 3": (
        "DPMSolverMultistepScheduler",
        {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        (3, 3, True),
    ),
    "DPMSolverMultistep, flow": ("DPMSolverMultistepScheduler", FLOW, (2, 2, False)),
    "DPMSolverSinglestep, order 1": ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 1}, (1, 1, False)),
    "DPMSolverSinglestep, order 2": (
        "DPMSolverSinglestepScheduler",
        {**SD, "lower_order_final": True},
        (2, 2, False),
    ),
    "DPMSolverSinglestep, order 3": (
        "DPMSolverSinglestepScheduler",
        {**SD, "solver_order": 3, "lower_order_final": True},
        (2, 2, False),
    ),
    "UniPC, order 1": ("UniPCMultistepScheduler", {**SD, "solver_order": 1}, (2, 2, False)),
    "UniPC, order 2": ("UniPCMultistepScheduler", SD, (3, 3, False)),
    "UniPC, order 3": ("UniPCMultistepScheduler", {**SD, "solver_order": 3}, (4, 4, False)),
    "UniPC, bh1": ("UniPCMultistepScheduler", {**SD, **TO_SIGMA_MIN, "solver_type": "bh1"}, (3, 3, False)),
    "UniPC, noise form": ("UniPCMultistepScheduler", {**SD, **TO_SIGMA_MIN, "predict_x0": False}, (2, 3, False)),
    "UniPC, flow (Wan)": ("UniPCMultistepScheduler", FLOW, (3, 3, False)),
    "UniPC, flow, order 3": ("UniPCMultistepScheduler", {**FLOW, "solver_order": 3}, (4, 4, False)),
    "DEIS, order 2": ("DEISMultistepScheduler", SD, (1, 2, False)),
    "DEIS, order 3": ("DEISMultistepScheduler", {**SD, "solver_order": 3}, (2, 3, False)),
    "DEIS, v": ("DEISMultistepScheduler", V, (2, 2, False)),
    "LMSDiscrete": ("LMSDiscreteScheduler", SD, (3, 4, False)),
    "PNDM": ("PNDMScheduler", SD, (11, 11, False)),
    "PNDM, no Runge-Kutta steps": ("PNDMScheduler", {**SD, "skip_prk_steps": True}, (3, 4, False)),
    "IPNDM": ("IPNDMScheduler", {}, (4, 4, False)),
    "KDPM2Discrete": ("KDPM2DiscreteScheduler", SD, (2, 1, False)),
    "KDPM2AncestralDiscrete": ("KDPM2AncestralDiscreteScheduler", SD, (2, 1, True)),
    "SASolver": ("SASolverScheduler", SD, (3, 3, True)),
    "SASolver, order 3": ("SASolverScheduler", {**SD, "predictor_order": 3, "corrector_order": 3}, (4, 4, True)),
    "LCM": ("LCMScheduler", SD, (1, 1, True)),
    "TCD": ("TCDScheduler", SD, (1, 1, True)),
}
"""Every sampler that is tested, and what it needs: the README's support matrix."""

AT_50 = (
    "CogVideoXDDIM",
    "CogVideoXDPM",
    "DDIM, zero SNR",
    "DDPM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "FlowMatchEuler, shift 12",
    "FlowMatchHeun",
    "EDMDPMSolverMultistep, order 3",
    "DPMSolverMultistep, order 3",
    "DPMSolverMultistep, SDE",
    "DPMSolverSinglestep, order 3",
    "UniPC, flow (Wan)",
    "DEIS, v",
    "PNDM",
    "SASolver",
    "LCM",
)
"""Tested at 50 steps too."""


@functools.cache
def lowered(label: str, num_steps: int) -> SamplerTable:
    return sampler_table(made(label, num_steps))


def made(label: str, num_steps: int) -> Any:
    """The scheduler of a label, its timesteps set."""
    name, config, _ = SUPPORTED[label]
    scheduler = getattr(diffusers, name)(**config)
    if config.get("use_dynamic_shifting"):
        scheduler.set_timesteps(num_steps, mu=1.15)
    else:
        scheduler.set_timesteps(num_steps)
    return scheduler


class GivenNoise(TorchFunctionMode):
    """Gives the same noise to every draw within a step (one draw at most counts)."""

    noise: torch.Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.noise.clone() if func is torch.randn else func(*args, **(kwargs or {}))


def model(x: torch.Tensor, i: int) -> torch.Tensor:
    """A stand-in for the network: not linear, another one at every step."""
    return torch.sin(1.3 * x + 0.7 * i) * 0.8 + 0.1 * x.roll(1, -1).tanh()


def run_scheduler(
    scheduler: Any, start: torch.Tensor, noise: torch.Tensor, predict: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """The denoising loop of diffusers' pipelines."""
    x = start * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else start
    previous = None
    with GivenNoise() as mode:
        for i, t in enumerate(scheduler.timesteps):
            mode.noise = noise[i]
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            m = predict(scaled, i)
            if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
                back = scheduler.timesteps[i - 1] if i > 0 else None
                x, previous = scheduler.step(m, previous, t, back, x, return_dict=False)
            else:
                x = scheduler.step(m, t, x, return_dict=False)[0]
    return x


def run_table(
    table: SamplerTable, start: torch.Tensor, noise: torch.Tensor, predict: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """A table by the oracle of plans: every step in full."""

    class Predict:
        def full(self, row: PlanRow, sample: Any) -> tuple[Any, None]:
            return predict(sample, row.step), None

        def head(self, row: PlanRow, sample: Any, residual: Any) -> Any:
            raise AssertionError("no step is skipped")

    plan = uncached_plan(table, guidance_scale=1.0)
    return interpret(plan, Predict(), start, lambda row: noise[row.step - 1])[-1][1]


def data(num_calls: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_calls, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    return start.to(dtype), noise.to(dtype)


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.dtype == b.dtype
    return float((a - b).abs().max() / b.abs().max())


CASES = [(label, 10) for label in SUPPORTED] + [(label, 50) for label in AT_50]


@pytest.mark.parametrize(("label", "num_steps"), CASES)
def test_table_runs_as_the_scheduler_does(label: str, num_steps: int) -> None:
    scheduler, table = made(label, num_steps), lowered(label, num_steps)
    assert table.num_steps == len(scheduler.timesteps)
    assert table.timesteps == tuple(scheduler.timesteps.tolist())
    assert table.rows[0].latents == (pytest.approx(float(getattr(scheduler, "init_noise_sigma", 1.0)), rel=1e-6),)

    start, noise = data(table.num_steps, torch.float32)
    assert deviation(run_table(table, start, noise, model), run_scheduler(scheduler, start, noise, model)) <= 1e-4

    start, noise = data(table.num_steps, torch.float64)
    exact = lower._to_float64(made(label, num_steps))
    with lower._Float64(np.zeros((0, 0))):
        expected = run_scheduler(exact, start, noise, model)
    assert deviation(run_table(table, start, noise, model), expected) <= 1e-11


@pytest.mark.parametrize("label", SUPPORTED)
def test_histories_are_as_short_as_the_solver_allows(label: str) -> None:
    table = lowered(label, 10)
    assert (table.latent_history, table.output_history, table.stochastic) == SUPPORTED[label][2]


def test_coefficients_are_the_textbook_ones() -> None:
    """DDIM in closed form: x' = √ᾱ'·x0 + √(1−ᾱ')·ε, x0 = (x − √(1−ᾱ)·ε)/√ᾱ (Song et al. 2021, eq. 12, η = 0)."""
    scheduler = made("DDIM, epsilon", 10)
    table = sampler_table(scheduler)
    alphas = scheduler.alphas_cumprod.double().numpy()
    steps = [int(t) for t in table.timesteps]
    for row, t, s in zip(table.rows[1:], steps, [*steps[1:], None]):
        after = float(scheduler.final_alpha_cumprod) if s is None else alphas[s]
        ratio = math.sqrt(after / alphas[t])
        assert row.latents == pytest.approx((ratio,), rel=1e-13)
        assert row.outputs == pytest.approx((math.sqrt(1 - after) - ratio * math.sqrt(1 - alphas[t]),), rel=1e-11)


def test_flow_matching_is_explicit_euler() -> None:
    scheduler = made("FlowMatchEuler, shift 3", 10)
    sigmas = scheduler.sigmas.double().numpy()
    for i, row in enumerate(sampler_table(scheduler).rows[1:]):
        assert row.latents == (1.0,)
        assert row.outputs == pytest.approx((sigmas[i + 1] - sigmas[i],), rel=1e-14)


def test_in_scale_is_karras_preconditioning() -> None:
    scheduler = made("EulerDiscrete", 10)
    sigmas = scheduler.sigmas.double().numpy()[:-1]
    scales = [row.in_scale for row in sampler_table(scheduler).rows]
    assert scales == pytest.approx([*(1 / np.sqrt(sigmas**2 + 1)), 1.0], rel=1e-14)


def test_repeated_timesteps_of_heun_are_kept() -> None:
    table = sampler_table(made("HeunDiscrete", 10))
    assert table.num_steps == 19
    assert table.timesteps[1] == table.timesteps[2]


SOME = ["CogVideoXDDIM", "CogVideoXDPM", "UniPC, flow (Wan)", "HeunDiscrete", "SASolver"]


@settings(max_examples=15, deadline=None)
@given(label=st.sampled_from(SOME), factor=st.floats(-1e3, 1e3), seed=st.integers(0, 2**31))
def test_scheduler_is_linear_and_the_table_knows_it(label: str, factor: float, seed: int) -> None:
    """scheduler(u + factor·v) = table(u) + factor·table(v), for u, v = (initial noise, all outputs, all noise)."""
    table = lowered(label, 5)
    generator = torch.Generator().manual_seed(seed)
    shape = (table.num_steps, 1, 2, 1, 3)
    u, v = ([torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    both = [a + factor * b for a, b in zip(u, v)]
    scheduler = lower._to_float64(made(label, 5))
    with lower._Float64(np.zeros((0, 0))):
        together = run_scheduler(scheduler, both[0][0], both[1], lambda x, i: both[2][i])
    apart = [run_table(table, part[0][0], part[1], lambda x, i, m=part[2]: m[i]) for part in (u, v)]
    assert deviation(apart[0] + factor * apart[1], together) <= 1e-9


def test_lowering_leaves_no_trace() -> None:
    for label in ("UniPC, order 2", "SASolver", "CogVideoXDPM"):
        scheduler = made(label, 10)
        before = copy.deepcopy(vars(scheduler))
        state, randn, dtype = torch.get_rng_state(), torch.randn, torch.get_default_dtype()
        first = sampler_table(scheduler)
        assert str(vars(scheduler)) == str(before)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.randn is randn and torch.get_default_dtype() is dtype
        assert json_bytes(sampler_table(scheduler)) == json_bytes(first)
    with pytest.raises(UnsupportedError):
        sampler_table(stepped_by(lambda s, m, x: torch.rand_like(x)))
    assert torch.ones(2).float().dtype is torch.float32
    assert not torch.equal(torch.randn(8), torch.randn(8))


def test_table_survives_json() -> None:
    table = sampler_table(made("SASolver", 10))
    assert value_from_json(SamplerTable, json_bytes(table), where="test") == table


# Noise levels

NO_LEVELS = {label for label in SUPPORTED if label.startswith(("EDM", "KDPM2"))} | {"IPNDM", "TCD"}
"""Preconditioned outputs, calls between the levels, no schedule that the attributes tell, no keeping of x0."""


def test_which_samplers_tell_their_noise_levels() -> None:
    assert {label for label in SUPPORTED if lowered(label, 10).levels is None} == NO_LEVELS


@pytest.mark.parametrize(
    "label", [label for label in SUPPORTED if label not in NO_LEVELS and not SUPPORTED[label][2][2]]
)
def test_a_perfect_model_keeps_data_and_noise(label: str) -> None:
    """From signal[0]·x0 + noise[0]·ε, the scheduler itself goes to signal[N]·x0 + noise[N]·ε, at any order."""
    levels, scheduler = require_levels(lowered(label, 10)), lower._to_float64(made(label, 10))
    n = len(scheduler.timesteps)
    x0, eps = (part[0] for part in data(n, torch.float64))
    start = (levels.signal[0] * x0 + levels.noise[0] * eps) / float(getattr(scheduler, "init_noise_sigma", 1.0))

    def perfect(_: torch.Tensor, i: int) -> torch.Tensor:
        p, q = levels.output(i)
        return p * x0 + q * eps

    with lower._Float64(np.zeros((0, 0))):
        end = run_scheduler(scheduler, start, torch.zeros(n, 1), perfect)
    assert deviation(end, levels.signal[-1] * x0 + levels.noise[-1] * eps) <= 1e-6


def test_levels_are_the_textbook_ones() -> None:
    scheduler = made("CogVideoXDDIM", 10)
    levels = require_levels(lowered("CogVideoXDDIM", 10))
    alphas = scheduler.alphas_cumprod.double().numpy()[scheduler.timesteps.numpy()]
    assert levels.signal == pytest.approx([*np.sqrt(alphas), 1.0], rel=1e-7)
    assert levels.noise == pytest.approx([*np.sqrt(1 - alphas), 0.0], rel=1e-7)
    assert levels.target == "v_prediction" and levels.signal[0] == 0
    flow = require_levels(lowered("FlowMatchEuler, shift 3", 10))
    sigmas = made("FlowMatchEuler, shift 3", 10).sigmas.tolist()
    assert (flow.target, flow.noise) == ("flow_prediction", tuple(sigmas))
    assert flow.signal == pytest.approx([1 - s for s in sigmas])
    assert require_levels(lowered("EulerDiscrete", 10)).signal == (1.0,) * 11


def test_levels_that_the_table_does_not_keep_are_not_believed() -> None:
    scheduler = made("DDIM, v", 10)
    rows, _ = lower._rows(scheduler, False)
    assert lower._noise_levels(scheduler, rows) is not None
    scheduler.register_to_config(prediction_type="sample")
    assert lower._noise_levels(scheduler, rows) is None


# Planned solvers

PLANNED = (0, 1, 3, 8, 10, 12, 22, 27, 37, 47, 48)
"""Full steps of 50, a thousandth of the timesteps apart that DDIM can go by."""


def tables_agree(a: SamplerTable, b: SamplerTable, tolerance: float) -> None:
    assert a.num_steps == b.num_steps
    assert a.timesteps == pytest.approx(b.timesteps, abs=1e-3)
    for x, y in zip(a.rows, b.rows):
        for name in ("latents", "outputs"):
            u, v = getattr(x, name), getattr(y, name)
            size = max(len(u), len(v))
            assert (*u, *[0.0] * (size - len(u))) == pytest.approx((*v, *[0.0] * (size - len(v))), abs=tolerance)


@pytest.mark.parametrize("label", ["CogVideoXDDIM", "DDIM, v", "DDIM, epsilon", "DDIM, zero SNR"])
def test_planned_ddim_is_diffusers_ddim_on_those_timesteps(label: str) -> None:
    scheduler, table = lower._to_float64(made(label, 50)), lowered(label, 50)
    planned = solver_table(table, PLANNED, "first-order")
    assert planned.timesteps == tuple(table.timesteps[i] for i in PLANNED)
    start, noise = data(len(PLANNED), torch.float64)
    x = start
    with lower._Float64(np.zeros((0, 0))):
        for k, i in enumerate(PLANNED):
            ahead = ([*PLANNED, 50][k + 1] - i) * 20
            scheduler.num_inference_steps = 1000 // ahead  # by which its step goes back
            x = scheduler.step(model(x, k), scheduler.timesteps[i], x, return_dict=False)[0]
    assert deviation(run_table(planned, start, noise, model), x) <= 1e-10


def test_planned_euler_is_diffusers_euler_at_those_sigmas() -> None:
    """diffusers applies the shift to given sigmas once more: it must be handed them without."""
    table = lowered("FlowMatchEuler, shift 3", 50)
    sigmas = np.array(require_levels(table).noise)[list(PLANNED)]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=(sigmas / (3 - 2 * sigmas)).tolist())
    tables_agree(solver_table(table, PLANNED, "first-order"), sampler_table(scheduler), 1e-6)


@pytest.mark.parametrize(
    ("label", "solver"),
    [
        ("DPMSolverMultistep, order 2", "dpmsolver++"),
        ("DPMSolverMultistep, zero SNR", "dpmsolver++"),
        ("DPMSolverMultistep, flow", "dpmsolver++"),
        ("UniPC, order 2", "unipc"),
        ("UniPC, flow (Wan)", "unipc"),
        ("DDIM, zero SNR", "first-order"),
        ("EulerDiscrete, Karras, v", "first-order"),
        ("FlowMatchEuler, dynamic", "first-order"),
        ("DPMSolverMultistep, order 1", "first-order"),
    ],
)
def test_a_solver_planned_on_its_own_steps_is_itself(label: str, solver: Any) -> None:
    table = lowered(label, 10)
    planned = solver_table(table, range(10), solver)
    tables_agree(planned, table, 1e-12)
    assert planned.timesteps == table.timesteps  # UniPC would cut them to integers


def test_planned_dpmsolver_is_diffusers_on_those_timesteps() -> None:
    table = lowered("DPMSolverMultistep, order 2", 50)
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    scheduler.set_timesteps(timesteps=[int(table.timesteps[i]) for i in PLANNED])
    tables_agree(solver_table(table, PLANNED, "dpmsolver++"), sampler_table(scheduler), 1e-9)


@pytest.mark.parametrize("solver", ["first-order", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("label", ["CogVideoXDDIM", "EulerDiscrete", "UniPC, flow (Wan)"])
def test_planned_solvers_give_a_perfect_model_its_data(label: str, solver: Any) -> None:
    """Also from −∞ log-SNR, and with the model's input as the sampler has it, whatever the parameterisation."""
    table = lowered(label, 50)
    planned = solver_table(table, PLANNED, solver)
    levels, own = require_levels(table), require_levels(planned)
    x0, eps = (part[0] for part in data(50, torch.float64))
    start = (own.signal[0] * x0 + own.noise[0] * eps) / planned.rows[0].latents[0]
    inputs = []

    def perfect(x: torch.Tensor, k: int) -> torch.Tensor:
        inputs.append(x)
        p, q = levels.output(PLANNED[k])
        return p * x0 + q * eps

    end = run_table(planned, start, torch.zeros(50, 1), perfect)
    assert deviation(end, levels.signal[-1] * x0 + levels.noise[-1] * eps) <= 1e-3
    for x, i in zip(inputs, PLANNED):
        expected = table.rows[i].in_scale * (levels.signal[i] * x0 + levels.noise[i] * eps)
        assert deviation(x, expected) <= 1e-3


def test_planned_solvers_keep_the_guidance() -> None:
    table = sampler_table(made("CogVideoXDPM", 10), dynamic_guidance=True)
    for solver in ("first-order", "dpmsolver++"):
        planned = solver_table(table, [0, 2, 5], solver)
        assert [row.guidance for row in planned.rows] == [table.rows[i].guidance for i in (0, 2, 5, 10)]
        assert not planned.stochastic  # the flow without noise


def test_planned_solvers_need_levels_apart() -> None:
    with pytest.raises(UnsupportedError, match="expected the noise level of each step of EDMEuler"):
        solver_table(lowered("EDMEuler", 10), [0, 2], "unipc")
    with pytest.raises(UnsupportedError, match="DPMSolverMultistepScheduler is not finite"):
        solver_table(lowered("HeunDiscrete", 10), range(19), "dpmsolver++")


# Folding


@pytest.mark.parametrize("label", SUPPORTED)
def test_plans_of_every_sampler_fold(label: str) -> None:
    table = lowered(label, 10)
    full = sorted({0, 1, *np.random.default_rng(len(label)).choice(table.num_steps, 4).tolist()})
    schedule = schedule_of(table.num_steps, *full)
    plan = plan_from_schedule(
        schedule, table, name="test", guidance_scale=1.0, method="given",
        output_weights=linear_weights(schedule),
    )  # fmt: skip
    folded = fold(plan)
    assert len(folded.rows) == len(full) + 1
    assert run_deviation(run_plan(folded), run_plan(plan)) <= 1e-12
    assert run_deviation(run_plan(folded, dtype=np.float32), run_plan(plan)) <= 1e-5


# What is refused


class Stepped:
    """A scheduler made of one function of (itself, m, x)."""

    def __init__(self, update: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.update, self.config = update, dict[str, Any]()
        self.timesteps, self.num_inference_steps = torch.arange(20, 0, -1), 20
        self.past: list[torch.Tensor] = []

    def step(self, m: torch.Tensor, t: Any, x: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        self.past.append(m)
        return (self.update(self, m, x),)


def stepped_by(update: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> Stepped:
    return Stepped(update)


def remembering_noise(scheduler: Any, m: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    z = torch.randn(x.shape)
    before = getattr(scheduler, "noise", z)
    scheduler.noise = z
    return x - m + before


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda s, m, x: x - torch.tanh(m), "is not linear"),
        (lambda s, m, x: x - m + 1e-3, "is not linear: it adds a constant at step 0"),
        (lambda s, m, x: x.clamp(-50, 50) - m, "is not linear"),
        (lambda s, m, x: x - s.past[max(0, len(s.past) - 14)], "is no linear recurrence of at most 12 rows at step 14"),
        (lambda s, m, x: x + torch.randn(x.shape) - torch.randn(x.shape), "mixes 2 noise draws into step 0"),
        (remembering_noise, "is no linear recurrence"),
        (lambda s, m, x: sum((torch.randn(x.shape) for _ in range(5)), x), "draws noise more than 4 times"),
        (lambda s, m, x: x + torch.rand_like(x), r"random numbers by torch\.rand_like"),
        (lambda s, m, x: x / 0.0, "Stepped is not finite at step 0"),
        (lambda s, m, x: x.undefined, "AttributeError"),
    ],
)
def test_what_is_not_a_linear_sampler_is_refused(update: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        sampler_table(stepped_by(update))
    assert str(caught.value).startswith("Stepped ") and caught.value.fix


@pytest.mark.parametrize(
    ("name", "config", "remedy"),
    [
        ("DDIMScheduler", SD, "DDIMScheduler with clip_sample=True is not linear.*→ set clip_sample=False"),
        ("DDIMScheduler", {**SD, "clip_sample_range": 100.0}, "set clip_sample=False"),
        ("DDPMScheduler", {}, "DDPMScheduler with clip_sample=True.*→ set clip_sample=False"),
        ("UnCLIPScheduler", {}, "UnCLIPScheduler with clip_sample=True.*→ set clip_sample=False"),
        (
            "DPMSolverMultistepScheduler",
            {**SD, "thresholding": True},
            "DPMSolverMultistepScheduler with thresholding=True is not linear.*→ set thresholding=False",
        ),
        ("CMStochasticIterativeScheduler", {}, "with clip_denoised=True is not linear"),
        ("DDPMScheduler", {**NO_CLIP, "variance_type": "learned_range"}, "variance_type='learned_range'.*fixed_small"),
        (
            "UniPCMultistepScheduler",
            {**SD, "solver_type": "bh1"},
            'not finite at step 9.*final_sigmas_type="sigma_min"',
        ),
        (
            "DPMSolverMultistepScheduler",
            {**SD, **TO_SIGMA_MIN, "algorithm_type": "sde-dpmsolver", "solver_order": 3},
            "DPMSolverMultistepScheduler cannot be stepped.*UnboundLocalError",
        ),
        (
            "DDIMScheduler",
            {**SD, **NO_CLIP, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            'DDIMScheduler is not finite at step 0.*prediction_type="v_prediction"',
        ),
        ("VQDiffusionScheduler", {"num_vec_classes": 8}, "VQDiffusionScheduler cannot be stepped"),
    ],
)
def test_settings_that_are_not_linear_are_refused_by_name(name: str, config: dict[str, Any], remedy: str) -> None:
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(10)
    with pytest.raises(UnsupportedError, match=remedy):
        sampler_table(scheduler)


def test_brownian_noise_is_refused() -> None:
    scheduler: Any = stepped_by(lambda s, m, x: x - m)
    scheduler.noise_sampler = None
    with pytest.raises(UnsupportedError, match=r"Brownian tree.*sde-dpmsolver\+\+"):
        sampler_table(scheduler)


def test_scaling_that_mixes_elements_is_refused() -> None:
    scheduler: Any = stepped_by(lambda s, m, x: x - m)
    scheduler.scale_model_input = lambda x, t: x + x.mean()
    with pytest.raises(UnsupportedError, match="scale_model_input is not a scaling of the sample at step 0"):
        sampler_table(scheduler)


@pytest.mark.parametrize(
    "name", ["CogVideoXDDIMScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_timesteps_must_be_set(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}.*num_inference_steps → call scheduler.set_timesteps\(N\)"):
        sampler_table(getattr(diffusers, name)())


@pytest.mark.parametrize("label", ["UniPC, order 2", "EulerDiscrete", "PNDM"])
def test_a_scheduler_in_the_middle_of_a_run_is_refused(label: str) -> None:
    scheduler = made(label, 10)
    x = torch.zeros(1, 1, 1, 1)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(InputError, match="expected a fresh scheduler, got one that was stepped → call set_timesteps"):
        sampler_table(scheduler)


# Guidance, and the printed matrix


def test_dynamic_guidance_is_what_the_cogvideox_pipeline_computes() -> None:
    """Against the statement in the pipeline's own source."""
    source = inspect.getsource(CogVideoXPipeline.__call__)
    found = re.search(r"self\._guidance_scale = (1 \+ guidance_scale \* \(.*?\n *\))\n", source, re.DOTALL)
    assert found
    expression = compile(textwrap.dedent(found[1]), "pipeline_cogvideox", "eval")
    scheduler = made("CogVideoXDDIM", 50)
    table = sampler_table(scheduler, dynamic_guidance=True)
    for t, row in zip(scheduler.timesteps, table.rows):
        for g in (1.5, 6.0):
            names = {"math": math, "guidance_scale": g, "num_inference_steps": 50, "t": t}
            assert row.guidance[0] + row.guidance[1] * g == pytest.approx(eval(expression, names), rel=1e-15)
    assert len({row.guidance for row in table.rows}) > 2
    assert {row.guidance for row in sampler_table(scheduler).rows} == {(0.0, 1.0)}


def test_support_matrix_prints_every_table() -> None:
    text = support_matrix({"CogVideoX's own": lowered("CogVideoXDPM", 5), "Wan's own": lowered("UniPC, flow (Wan)", 5)})
    assert text.splitlines() == [
        "| sampler | model calls | latents | outputs | noise |",
        "|---|---|---|---|---|",
        "| CogVideoX's own | 5 | 2 | 2 | yes |",
        "| Wan's own | 5 | 3 | 3 | no |",
    ]
    assert "| HeunDiscreteScheduler | 9 | 2 | 2 | no |" in support_matrix([lowered("HeunDiscrete", 5)])
