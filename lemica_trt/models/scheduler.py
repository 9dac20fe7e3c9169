"""Sampler lowering: a diffusers scheduler becomes a `SamplerTable`, exact to float64, without a line of solver code.

Nearly every scheduler is linear in the latents and in the model outputs, and acts on each element alike. So its own
`step` is run once on *basis vectors*: the elements of one float64 tensor are the coordinates

    (x_0 … x_{N−1}, m_0 … m_{N−1}, noise draws),

step i gets e(x_i) and e(m_i), and what it returns are the coefficients of x_{i+1}. Each visible latent is fed as a
*fresh* basis vector rather than as the combination that it is: coefficients come out directly, with no division by
numbers that shrink along the trajectory. A solver that keeps a latent of its own (UniPC and SA-Solver correct the
sample and hide the corrected one) then reads arbitrarily far back; its hidden state is eliminated by adding
multiples of the earlier rows "x_k = its combination" until everything older than the shortest window cancels.

The result is never believed: table and scheduler are run side by side on random data under a non-linear model, and a
scheduler that the table does not follow to 1e-9 is refused. That one check finds clipping, thresholding and hidden
state alike.

Nothing is patched and no global is set: a `TorchFunctionMode`, local to the thread and to the `with` block, turns
float32 into float64 and hands out basis vectors where the scheduler draws noise. It knows nothing of plans or models.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch.overrides import TorchFunctionMode

from lemica_trt.core.errors import InputError, MissingDependencyError, UnsupportedError
from lemica_trt.core.text import first_line
from lemica_trt.ir.sampler import NoiseLevels, SamplerRow, SamplerTable, Setting, require_levels
from lemica_trt.planning.elimination import newest_first, shortest_combination
from lemica_trt.planning.solvers import first_order_table

MAX_DEPTH = 12
"""The most rows that a recurrence may look back."""

MAX_DRAWS = 4
"""The most noise draws a step may make (CogVideoXDPM makes two and throws one away)."""

ZERO = 1e-12
"""Coefficients below this part of a row's largest one are round-off of terms that cancel."""

MAX_MULTIPLIER = 1e3
"""The largest multiple of an earlier row that elimination may add: beyond, round-off in fp32 would be visible."""

TOLERANCE = 1e-9
"""Largest deviation of the table from the scheduler, relative to the largest latent of the step."""

LEVEL_TOLERANCE = 1e-6
"""Largest deviation of the noise levels that a scheduler names from those that its table keeps."""

MAGNITUDE = 1e6
"""Size of the data that the comparison runs on: beyond every clipping range, and bends below 1e-3 of it still show."""

Solver = Literal["first-order", "dpmsolver++", "unipc"]

SOLVERS: dict[Solver, Any] = {"dpmsolver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
"""diffusers' classes of the multistep solvers."""

MAX_SIGMA = 4096.0
MAX_FLOW_SIGMA = 1e6
"""Largest noise over signal that a multistep solver is given where a schedule begins without signal, at a log-SNR of
−∞: diffusers' own limits (an alpha of 2^-24; in flow matching a signal of 1e-6)."""

NON_LINEAR = {
    "thresholding": "thresholding=False",
    "clip_sample": "clip_sample=False",
    "clip_denoised": "clip_denoised=False",
}
"""Config keys that make a scheduler non-linear → what to set."""

STEP_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a scheduler raises when it is asked for something that it cannot do."""

FACTORIES = (torch.tensor, torch.ones, torch.zeros, torch.full, torch.linspace, torch.arange, torch.eye, torch.empty)
OTHER_DRAWS = (torch.rand, torch.randint, torch.normal, torch.randn_like, torch.rand_like, torch.bernoulli)

Array = npt.NDArray[np.float64]


def sampler_table(scheduler: Any, *, dynamic_guidance: bool = False) -> SamplerTable:
    """Lower a scheduler on which `set_timesteps` has been called; N is the number of its model calls.

    Args:
        scheduler: any diffusers scheduler; it is copied, never stepped or changed.
        dynamic_guidance: guidance of diffusers' CogVideoX `use_dynamic_cfg`:
            g_i = 1 + g·(1 − cos(π·((N − t_i)/N)⁵))/2 (pipeline_cogvideox.py, where t_i is the timestep itself).

    Returns:
        The table; coefficients exact to float64. Timesteps are what the scheduler hands the model.

    Raises:
        InputError: `set_timesteps` has not been called, or the scheduler has been stepped since.
        UnsupportedError: the scheduler is not linear, mixes several noise draws into one step, takes its noise from
            a Brownian tree, needs more than `MAX_DEPTH` rows of history, or cannot step at all.
    """
    _check_fresh(scheduler)
    _check_supported(scheduler)
    rows, draws = _rows(scheduler, dynamic_guidance)
    table = SamplerTable(
        scheduler=type(scheduler).__name__,
        rows=rows,
        settings=_settings(scheduler) | ({"use_dynamic_cfg": True} if dynamic_guidance else {}),
        levels=_noise_levels(scheduler, rows),
    )
    _check_against(scheduler, table, draws)
    return table


def counted_draws(scheduler: Any) -> list[int]:
    """For each step of a scheduler that `sampler_table` lowers: which of its noise draws counts; 0 where none does."""
    return _rows(scheduler, False)[1]


def solver_table(table: SamplerTable, steps: Sequence[int], solver: Solver) -> SamplerTable:
    """A solver set to some steps of a sampler: one model call at each, none skipped.

    It is given the noise levels themselves rather than asked for them by number: no shift is applied a second time,
    and the model gets the very timesteps that it gets from the sampler (UniPC would cut them to integers).

    Args:
        table: N steps, with noise levels; any sampler of the model.
        steps: rising, the first is 0.
        solver: `first-order` is DDIM, which for flow matching is Euler; `dpmsolver++` is the multistep solver of
            second order (2M; Lu et al. 2022, arXiv 2211.01095), `unipc` UniPC of order 2 with its corrector (Zhao et
            al. 2023, arXiv 2302.04867), both diffusers'.

    Returns:
        len(steps) model calls, guidance and kinds of steps as in the table.

    Raises:
        UnsupportedError: the table has no noise levels, or two of the steps have the same one.
    """
    if solver == "first-order":
        return first_order_table(table, steps)
    levels, kept = require_levels(table), [*steps, table.num_steps]
    signal, noise = (np.array(numbers)[kept] for numbers in (levels.signal, levels.noise))
    flow = levels.target == "flow_prediction"
    with np.errstate(divide="ignore"):
        sigmas = np.minimum(noise / signal, MAX_FLOW_SIGMA if flow else MAX_SIGMA)
    scheduler = SOLVERS[solver](
        prediction_type=levels.target,
        use_flow_sigmas=flow,
        final_sigmas_type="zero" if noise[-1] == 0 else "sigma_min",
    )
    scheduler.set_timesteps(len(steps))
    scheduler.sigmas = torch.from_numpy(sigmas / (1 + sigmas) if flow else sigmas)
    scheduler.timesteps = torch.tensor([table.timesteps[i] for i in steps], dtype=torch.float64)
    scheduler.set_begin_index(0)
    lowered = sampler_table(scheduler)
    own = [table.rows[i] for i in kept]
    rows = [msgspec.structs.replace(row, guidance=its.guidance, kind=its.kind) for row, its in zip(lowered.rows, own)]
    return msgspec.structs.replace(lowered, rows=tuple(rows))


def made_scheduler(kind: Any, config: Mapping[str, Any], **changes: Setting) -> Any:
    """`from_config` of a diffusers scheduler class.

    Args:
        kind: the class.
        config: of a scheduler, maybe of another class.
        changes: settings in place of those.

    Raises:
        UnsupportedError: the class does not take these settings.
        MissingDependencyError: it needs a library that is not installed.
    """
    with refusing(f"{kind.__name__} cannot be made with the model's settings"):
        return kind.from_config(config, **changes)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn what a scheduler raises while it is made or set into one line that begins with `what`.

    Raises:
        UnsupportedError, MissingDependencyError: see there.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"{what}: {first_line(error)}") from None
    except STEP_FAILURES as error:
        raise UnsupportedError(
            f"{what}: {first_line(error)}", fix="choose another --scheduler or number of steps"
        ) from None


def support_matrix(tables: Mapping[str, SamplerTable] | Iterable[SamplerTable]) -> str:
    """A markdown table of lowered samplers: name, steps, history depths, noise.

    Args:
        tables: by label, or plain (then the label is the scheduler's class name).
    """
    named = tables.items() if isinstance(tables, Mapping) else [(table.scheduler, table) for table in tables]
    lines = ["| sampler | model calls | latents | outputs | noise |", "|---|---|---|---|---|"]
    for label, table in named:
        noise = "yes" if table.stochastic else "no"
        lines.append(f"| {label} | {table.num_steps} | {table.latent_history} | {table.output_history} | {noise} |")
    return "\n".join(lines)


def _rows(scheduler: Any, dynamic_guidance: bool) -> tuple[tuple[SamplerRow, ...], list[int]]:
    """All rows, and for each step the index of the noise draw that counts (0 where none does)."""
    stepper = _Stepper(scheduler)
    n = stepper.num_steps
    dimension = 2 * n + MAX_DRAWS * n + 1  # the last coordinate is never fed: what comes back there is a constant
    basis = np.eye(dimension)
    updates = np.zeros((n + 1, dimension))
    in_scales = []
    for i in range(n):
        x, m = basis[i], basis[n + i]
        scaled = stepper.scale(i, x)
        if not np.array_equal(scaled, scaled[i] * x):
            raise _refusal(scheduler, f"scale_model_input is not a scaling of the sample at step {i}")
        in_scales.append(float(scaled[i]))
        noise = basis[2 * n + MAX_DRAWS * i : 2 * n + MAX_DRAWS * (i + 1)]
        updates[i + 1] = stepper.step(i, m, x, noise)
        if not np.isfinite(updates[i + 1]).all():
            raise _not_finite(scheduler, i, stepper.timesteps[i])
        if updates[i + 1, -1]:
            raise _refusal(scheduler, f"is not linear: it adds a constant at step {i}")

    latents: list[tuple[float, ...]] = [(stepper.init_scale,)]
    outputs: list[tuple[float, ...]] = [()]
    noises, draws = [0.0], []
    for row in range(1, n + 1):
        combination = _shortest(updates, row, n)
        if combination is None:
            raise _refusal(scheduler, f"is no linear recurrence of at most {MAX_DEPTH} rows at step {row - 1}")
        combination[np.abs(combination) <= ZERO * np.abs(combination).max()] = 0.0
        fresh = combination[2 * n + MAX_DRAWS * (row - 1) : 2 * n + MAX_DRAWS * row]
        used = np.flatnonzero(fresh)
        if len(used) > 1:
            raise _refusal(scheduler, f"mixes {len(used)} noise draws into step {row - 1}, only one is supported")
        draws.append(int(used[0]) if len(used) else 0)
        latents.append(newest_first(combination[:row]))
        outputs.append(newest_first(combination[n : n + row]))
        noises.append(float(fresh[draws[-1]]))

    guidance = [(0.0, 1.0)] * (n + 1)
    if dynamic_guidance:
        guidance[:n] = [_dynamic_guidance(t, stepper.num_inference_steps) for t in stepper.timesteps]
    rows = tuple(
        SamplerRow(
            latents=latents[i],
            outputs=outputs[i],
            noise=noises[i],
            timestep=stepper.timesteps[i] if i < n else None,
            in_scale=in_scales[i] if i < n else 1.0,
            guidance=guidance[i],
        )
        for i in range(n + 1)
    )
    return rows, draws


def _shortest(updates: Array, row: int, n: int) -> Array | None:
    """x_row as a combination over the smallest window of rows, or None.

    Args:
        updates: float64 [N + 1, D]; row k is x_k over fresh basis vectors, older than k.

    Returns:
        float64 [D].
    """

    def older_than(depth: int) -> npt.NDArray[np.bool_]:
        old = np.zeros(updates.shape[1], bool)
        old[: row - depth] = True
        old[n : n + row - depth] = True
        old[2 * n : 2 * n + MAX_DRAWS * (row - 1)] = True  # noise is drawn afresh: none may outlive its step
        return old

    relations = -updates[1:row][::-1]
    relations[np.arange(row - 1), np.arange(1, row)[::-1]] += 1.0
    return shortest_combination(
        updates[row], relations, older_than, max_depth=min(MAX_DEPTH, row), max_multiplier=MAX_MULTIPLIER, zero=ZERO
    )


def _dynamic_guidance(timestep: float, num_inference_steps: int) -> tuple[float, float]:
    """(offset, factor) of the guidance scale under `use_dynamic_cfg` (diffusers, pipeline_cogvideox.py)."""
    fraction = (num_inference_steps - timestep) / num_inference_steps
    return 1.0, (1 - math.cos(math.pi * fraction**5.0)) / 2


def _check_against(scheduler: Any, table: SamplerTable, draws: list[int]) -> None:
    """Run table and scheduler, each on its own latents, on random data under a model that is not linear.

    Closed loops: a recurrence that is exact but unstable would drift away too.

    Raises:
        UnsupportedError: they differ by more than `TOLERANCE`.
    """
    rng = np.random.default_rng(0)
    stepper = _Stepper(scheduler)
    n, size = stepper.num_steps, 16
    noise = MAGNITUDE * rng.standard_normal((n, MAX_DRAWS, size))
    latents, outputs = [MAGNITUDE * rng.standard_normal(size)], list[Array]()  # of the table
    x, m = stepper.init_scale * latents[0], np.zeros(size)  # of the scheduler
    for i, row in enumerate(table.rows):
        terms = [c * v for c, v in zip(row.latents, reversed(latents))]
        terms += [c * v for c, v in zip(row.outputs, reversed(outputs))]
        if i > 0:
            x = stepper.step(i - 1, m, x, noise[i - 1])
            terms.append(row.noise * noise[i - 1, draws[i - 1]])
        latents.append(np.sum(terms, axis=0))
        error = np.abs(latents[-1] - x).max() / np.abs(x).max()
        if not error <= TOLERANCE:
            raise _refusal(scheduler, f"is not linear: at step {i} a linear table is {error:.1e} away from it")
        if i < n:
            m = MAGNITUDE * np.sin(1.5 * stepper.scale(i, x) / MAGNITUDE + i)
            outputs.append(MAGNITUDE * np.sin(1.5 * row.in_scale * latents[-1] / MAGNITUDE + i))


def _noise_levels(scheduler: Any, rows: tuple[SamplerRow, ...]) -> NoiseLevels | None:
    """The level of each row as the scheduler's own attributes tell it; None where they do not.

    Believed only if the table agrees: under a perfect model, latents signal·x0 + noise·ε stay so (with fresh noise,
    their x0 does) from row to row, whatever the solver and its order.
    """
    config, n = _config(scheduler), len(rows) - 1
    exact = _to_float64(copy.deepcopy(scheduler))
    flow = type(scheduler).__name__.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    target = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
    if hasattr(exact, "sigmas_interpol"):  # KDPM2 calls the model between its sigmas
        return None
    sigmas = torch.as_tensor(getattr(exact, "sigmas", ()), dtype=torch.float64)
    if sigmas.ndim == 1 and len(sigmas) > n:
        noise = sigmas[: n + 1]
        if flow:
            signal = 1 - noise
        elif hasattr(exact, "_sigma_to_alpha_sigma_t"):
            signal, noise = exact._sigma_to_alpha_sigma_t(noise)
            signal = signal.expand_as(noise)
        else:
            signal = torch.ones_like(noise)
    elif hasattr(exact, "alphas_cumprod"):
        final = torch.as_tensor(getattr(exact, "final_alpha_cumprod", 1.0)).double().reshape(1)
        timesteps = exact.timesteps.long().clamp(max=len(exact.alphas_cumprod) - 1)
        alphas = torch.cat([exact.alphas_cumprod[timesteps], final])
        signal, noise = alphas**0.5, (1 - alphas) ** 0.5
    else:
        return None
    try:
        levels = msgspec.convert(
            {"target": target, "signal": signal.tolist(), "noise": noise.tolist()}, NoiseLevels, strict=True
        )
    except msgspec.ValidationError:  # levels that are not finite, a target with another name
        return None
    latents = np.stack([levels.signal, levels.noise], 1)
    outputs = np.array([levels.output(i) for i in range(n)])
    parts = slice(0, 1 if any(row.noise for row in rows) else 2)
    for i, row in enumerate(rows[1:], 1):
        expected = np.dot(row.latents, latents[i - 1 :: -1][: len(row.latents)])
        expected = expected + np.dot(row.outputs, outputs[i - 1 :: -1][: len(row.outputs)])
        if not np.abs(expected - latents[i])[parts].max() <= LEVEL_TOLERANCE * np.abs(latents[i - 1 : i + 1]).max():
            return None
    return levels


class _Stepper:
    """A float64 copy of a scheduler, stepped with numpy vectors, noise given."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = _to_float64(copy.deepcopy(scheduler))
        parameters = inspect.signature(scheduler.step).parameters
        self._cogvideox_dpm = "timestep_back" in parameters
        self._previous: Any = None  # CogVideoXDPM hands its state to the caller
        self.timesteps = tuple(float(t) for t in scheduler.timesteps)
        self.num_steps = len(self.timesteps)
        self.num_inference_steps = int(scheduler.num_inference_steps)
        with self._float64(np.zeros((0, 0))):
            self.init_scale = float(getattr(self._scheduler, "init_noise_sigma", 1.0))

    def scale(self, i: int, x: Array) -> Array:
        """What the model gets for x at step i."""
        if not hasattr(self._scheduler, "scale_model_input"):  # flow matching: the model gets x itself
            return x
        with self._float64(np.zeros((0, len(x)))):
            return _vector(self._scheduler.scale_model_input(_sample(x), self._scheduler.timesteps[i]))

    def step(self, i: int, m: Array, x: Array, noise: Array) -> Array:
        """x_{i+1} from x_i, m_i and up to `MAX_DRAWS` noise vectors."""
        timesteps = self._scheduler.timesteps
        with self._float64(noise):
            if self._cogvideox_dpm:
                back = timesteps[i - 1] if i > 0 else None
                result, self._previous = self._scheduler.step(
                    _sample(m), self._previous, timesteps[i], back, _sample(x), return_dict=False
                )
            else:
                result = self._scheduler.step(_sample(m), timesteps[i], _sample(x), return_dict=False)[0]
            return _vector(result)

    @contextmanager
    def _float64(self, noise: Array) -> Iterator[None]:
        """`_Float64`, with what the scheduler raises turned into a refusal."""
        try:
            with _Float64(noise):
                yield
        except STEP_FAILURES as error:
            raise UnsupportedError(
                f"{type(self._scheduler).__name__} cannot be stepped as an image or video sampler with its present "
                f"config: {type(error).__name__}: {error}",
                fix="choose another config or sampler; if its first timestep repeats, call set_begin_index(0)",
            ) from error


class _Float64(TorchFunctionMode):
    """Keeps float64 where schedulers cast to float32, and gives out `noise` (float64 [draws, D]) in turn."""

    def __init__(self, noise: Array) -> None:
        super().__init__()
        self._noise = iter(noise)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.randn:
            noise = next(self._noise, None)
            if noise is None:
                raise RuntimeError(f"it draws noise more than {MAX_DRAWS} times")
            return _sample(noise)
        if func in OTHER_DRAWS:
            raise RuntimeError(f"it draws random numbers by torch.{func.__name__}, only torch.randn is supported")
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        if any(arg is torch.float32 for arg in args):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.dtype is torch.float32:
            result = func(*args, **kwargs, dtype=torch.float64) if func in FACTORIES else result.double()
        return result


def _to_float64(scheduler: Any) -> Any:
    """Turn a scheduler's float32 tables into float64, in place; schedulers inside it (UniPC's solver_p) too."""
    for key, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.dtype is torch.float32:
            setattr(scheduler, key, value.double())
        elif isinstance(value, list):
            is_table = [isinstance(item, torch.Tensor) and item.dtype is torch.float32 for item in value]
            setattr(scheduler, key, [item.double() if table else item for item, table in zip(value, is_table)])
        elif hasattr(value, "set_timesteps"):
            _to_float64(value)
    return scheduler


def _sample(vector: Array) -> torch.Tensor:
    """Float64 [D] → a sample [1, 1, 1, D]: solvers want batch and channels."""
    return torch.from_numpy(vector.reshape(1, 1, 1, -1).copy())


def _vector(sample: torch.Tensor) -> Array:
    """A sample [1, 1, 1, D] → float64 [D]."""
    if sample.dtype is not torch.float64:
        raise TypeError(f"expected a float64 sample, got {sample.dtype}")
    vector: Array = sample.reshape(-1).numpy().copy()
    return vector


def _check_fresh(scheduler: Any) -> None:
    """Raise InputError unless `set_timesteps` is the last thing that happened to the scheduler."""
    name = type(scheduler).__name__
    if getattr(scheduler, "num_inference_steps", None) is None or getattr(scheduler, "timesteps", None) is None:
        raise InputError(
            f"{name}: expected a scheduler with its timesteps set, got one without num_inference_steps",
            fix="call scheduler.set_timesteps(N) before lowering it",
        )
    if getattr(scheduler, "_step_index", None) is not None or getattr(scheduler, "counter", None):
        raise InputError(
            f"{name}: expected a fresh scheduler, got one that was stepped", fix="call set_timesteps again"
        )


def _check_supported(scheduler: Any) -> None:
    """Refuse what is known beforehand and could not be seen in the numbers."""
    config = _config(scheduler)
    if str(config.get("variance_type", "")).startswith("learned"):
        raise UnsupportedError(
            f"{type(scheduler).__name__} expects a model that outputs its variance too (variance_type="
            f"{config['variance_type']!r}); only one model output is supported",
            fix='set variance_type="fixed_small" if the model has no variance output, else use another scheduler',
        )
    if hasattr(scheduler, "noise_sampler"):
        raise UnsupportedError(
            f"{type(scheduler).__name__} takes its noise from a Brownian tree, correlated between steps",
            fix='use DPMSolverMultistepScheduler with algorithm_type="sde-dpmsolver++"',
        )


def _settings(scheduler: Any) -> dict[str, Setting]:
    """The scheduler's configuration as far as it differs from the defaults of its class.

    A release of diffusers that adds a setting with a default does not change what older schedulers are; one that
    changes a default shows in the table's numbers.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(scheduler)).parameters.items()}
    found: dict[str, Setting] = {}
    for name, value in sorted(_config(scheduler).items()):
        if name.startswith("_") or name not in defaults or value is defaults[name]:
            continue
        plain = json.dumps(value.tolist() if hasattr(value, "tolist") else value, default=str)
        if plain != json.dumps(defaults[name], default=str):
            found[name] = value if isinstance(value, (bool, int, float, str)) or value is None else plain
    return found


def _not_finite(scheduler: Any, step: int, timestep: float) -> UnsupportedError:
    """An UnsupportedError that says which settings help a scheduler whose coefficients are not finite."""
    fixes = ["choose another solver type"]
    if _config(scheduler).get("final_sigmas_type") == "zero":
        fixes.insert(0, 'set final_sigmas_type="sigma_min"')
    if _config(scheduler).get("rescale_betas_zero_snr"):
        fixes.insert(0, 'set prediction_type="v_prediction" (if that is what the model predicts)')
    return UnsupportedError(
        f"{type(scheduler).__name__} is not finite at step {step} (timestep {timestep:g})", fix=", or ".join(fixes)
    )


def _config(scheduler: Any) -> Mapping[str, Any]:
    config: Mapping[str, Any] = getattr(scheduler, "config", {})
    return config


def _refusal(scheduler: Any, what: str) -> UnsupportedError:
    """An UnsupportedError that names the scheduler, and the config key that is to blame where one is known."""
    config = _config(scheduler)
    for key, remedy in NON_LINEAR.items():
        if config.get(key):
            return UnsupportedError(f"{type(scheduler).__name__} with {key}=True {what}", fix=f"set {remedy}")
    return UnsupportedError(f"{type(scheduler).__name__} {what}", fix="choose a linear sampler (see support_matrix)")
