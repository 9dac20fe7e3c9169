"""The build profile: everything about a model that is not its weights. One TOML file in `engines/`."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Literal, NamedTuple

from msgspec import UNSET, UnsetType

from lemica_trt.core.errors import UnsupportedError, UsageError
from lemica_trt.core.values import Value, require, require_finite

DType = Literal["fp32", "fp16", "bf16"]
"""Precision of a network, by the names that trtexec and Polygraphy use."""


OPSETS = range(18, 24)
"""ONNX opsets that graphs may be of."""

TRACED = "traced"
"""`Profile.family` of a pipeline that is traced."""

CalibrationMethod = Literal["exact", "secant", "retargeted"]
"""How the weights of the error graph are obtained, see `lemica_trt.calibrate`."""


class Shape(Value, frozen=True):
    """The shape bucket that a bundle serves.

    Attributes:
        frames: video frames; 1 for an image.
        height, width: pixels.
        fps: frames a second of the written video.
        max_batch: largest number of requests in one engine call (each is two samples under guidance).
    """

    frames: int
    height: int
    width: int
    fps: int = 8
    max_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "fps", "max_batch"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def is_image(self) -> bool:
        """Whether a clip is one frame."""
        return self.frames == 1

    @property
    def name(self) -> str:
        """Frames, height, width: `49x480x720`; of a bundle's bucket."""
        return f"{self.frames}x{self.height}x{self.width}"


def sizes_from_name(text: str) -> dict[str, int]:
    """Frames, height and width of `49x480x720`; the inverse of `Shape.name`.

    Raises:
        UsageError: it is something else.
    """
    found = re.fullmatch(r"0*([1-9]\d{0,6})x0*([1-9]\d{0,6})x0*([1-9]\d{0,6})", str(text).strip().lower())
    if found is None:
        raise UsageError(
            f"--shape: expected FRAMESxHEIGHTxWIDTH, each at least 1, got {text!r}",
            fix="for example --shape 49x480x720, for an image --shape 1x1024x1024",
        )
    return dict(zip(("frames", "height", "width"), map(int, found.groups())))


class Sampling(Value, frozen=True):
    """How the uncached model is sampled: the reference that a plan is measured against.

    Attributes:
        steps: N, denoising steps.
        guidance_scale: classifier-free guidance g; 1 or less: no unconditional branch at all.
        guidance_scale_2: of the steps for which a pipeline's call has a parameter of this name (those of Wan 2.2's
            second transformer), whatever a request asks for; unset: they follow `guidance_scale` and the request.
        guidance_range: lowest and highest scale of requests, which solvers are fitted across; None: they are fitted at
            `guidance_scale` alone.
        dynamic_guidance: diffusers' `use_dynamic_cfg` of CogVideoX.
        scheduler: diffusers scheduler class to use instead of the pipeline's own; made from its config.
        flow_shift: shift of the sigmas instead of the scheduler's own; of schedulers for flow matching.
        sigmas, timesteps: N of them, falling, instead of the scheduler's own spacing, as the call of a diffusers
            pipeline takes them; one of the two. Other numbers of steps are spaced by the scheduler.
        negative_prompt: default negative prompt.
    """

    steps: int = 50
    guidance_scale: float = 6.0
    guidance_range: tuple[float, float] | None = None
    dynamic_guidance: bool = False
    scheduler: str | None = None
    flow_shift: float | None = None
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    negative_prompt: str = ""
    guidance_scale_2: float | UnsetType = UNSET

    def __post_init__(self) -> None:
        require_finite((self.guidance_scale_2 or 1.0,), "guidance_scale_2")
        if self.flow_shift is not None:
            require_finite((self.flow_shift,), "flow_shift")
            require(self.flow_shift > 0, f"flow_shift must be above 0, got {self.flow_shift}")
        require(self.sigmas is None or self.timesteps is None, "sigmas and timesteps exclude each other")
        for name in ("sigmas", "timesteps"):
            given = getattr(self, name)
            if given is not None:
                require_finite(given, name)
                require(len(given) == self.steps, f"{name} must be {self.steps}, one for each step, got {len(given)}")
                falling = all(a > b for a, b in pairwise(given)) and given[-1] > 0
                require(falling, f"{name} must fall and stay above 0, got {', '.join(map('{:g}'.format, given))}")
        require(self.steps >= 2, f"steps must be at least 2, got {self.steps}")
        require_finite((self.guidance_scale,), "guidance_scale")
        require_finite(self.guidance_range or (), "guidance_range")
        if self.guidance_range is not None:
            low, high = self.guidance_range
            require(
                1 < low <= self.guidance_scale <= high,
                f"guidance_range must begin above 1 and hold {self.guidance_scale:g}, is {low:g}:{high:g}",
            )

    def fit_scales(self, samples: int) -> tuple[float, ...]:
        """The guidance scale at which each of some samples is fitted to.

        Half of them, the even ones, at `guidance_scale`; the others evenly from the highest scale to the lowest,
        because errors grow upwards.
        """
        scales = [self.guidance_scale] * samples
        if self.guidance_range is not None:
            low, high = self.guidance_range
            others = range(1, samples, 2)
            for k, s in enumerate(others):
                scales[s] = high + (low - high) * k / max(len(others) - 1, 1)
        return tuple(scales)

    @property
    def guided(self) -> bool:
        """Whether each request runs two branches."""
        return self.guidance_scale > 1.0


class Effort(NamedTuple):
    """How much is measured for a build, in samples: (prompt, seed) pairs.

    Attributes:
        samples, rollouts, validation_samples: as in `CalibrationSettings`.
        verify_samples: held-out clips of the verification.
        methods: planners that are tried.
    """

    samples: int
    rollouts: int
    validation_samples: int
    verify_samples: int
    methods: tuple[str, ...]


EFFORTS = {
    "quick": Effort(samples=2, rollouts=1, validation_samples=0, verify_samples=1, methods=("auto",)),
    "normal": Effort(samples=9, rollouts=2, validation_samples=1, verify_samples=3, methods=("auto",)),
    "thorough": Effort(samples=16, rollouts=16, validation_samples=32, verify_samples=32, methods=("all",)),
}
"""What `--effort` takes: about 9, 25 and 190 samplings for one budget of 15 of 50 steps."""

NORMAL = EFFORTS["normal"]

FEW_STEPS = 12
"""Samplers of so few steps are measured on more samples, each of which is cheap. There plans lie far from the uncached
run and near to each other, so that one sample tells nothing of which is best."""

FEW = NORMAL._replace(samples=16, validation_samples=16)
"""The effort there, where none is asked for."""


class CalibrationSettings(Value, frozen=True):
    """How the error graph is measured, solvers are fitted, and plans are chosen.

    Attributes:
        prompts: name of a folder below `calibration/` with `calibration.txt` and `held_out.txt`.
        samples: (prompt, seed) pairs.
        rollouts: those of them on which it is measured how errors grow, the first ones, which is what costs most; see
            `calibrate.estimate`.
        max_skip: K, the most steps that one segment skips.
        seed: seed of sample 0.
        method: how edges are weighed.
        validation_samples: (prompt, seed) pairs that the best of several plans is chosen on, and no solver was fitted
            to; 0: the first method is taken, untried.
    """

    prompts: str = "video"
    samples: int = NORMAL.samples
    rollouts: int = NORMAL.rollouts
    max_skip: int = 9
    seed: int = 0
    method: CalibrationMethod = "secant"
    validation_samples: int = NORMAL.validation_samples

    def __post_init__(self) -> None:
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        require(self.rollouts >= 1, f"rollouts must be at least 1, got {self.rollouts}")
        require(self.validation_samples >= 0, f"validation_samples must not be negative, got {self.validation_samples}")
        require(self.max_skip >= 1, f"max_skip must be at least 1, got {self.max_skip}")
        require(0 <= self.seed < 1 << 62, f"seed must be 0 … 2^62 - 1, got {self.seed}")

    @property
    def fit_samples(self) -> int:
        """Samples that solvers are fitted to, the first ones: validation has those behind them.

        Where validation wants no more than a quarter of the calibration's samples it takes them from there, whose
        uncached runs have been made; else it has samples of its own.
        """
        left = self.samples - self.validation_samples
        return left if 4 * left >= 3 * self.samples else self.samples


class Lora(Value, frozen=True):
    """LoRA weights that are fused into a model before anything is measured: W + scale · B A.

    Attributes:
        source: .safetensors file, folder with one, hub id, or `OWNER/NAME/FILE.safetensors`; in a bundle without the
            path of one machine.
        scale: what they are multiplied by.
        sha256: of the file (hex), as built; unset: not looked at.
        expert: component that the file's transformer weights go into, where a pipeline has a second transformer (Wan
            2.2 A14B: the one of the less noisy steps); unset: the first.
    """

    source: str
    scale: float = 1.0
    sha256: str | UnsetType = UNSET
    expert: Literal["transformer_2"] | UnsetType = UNSET

    def __post_init__(self) -> None:
        require(bool(self.source), "a LoRA must have a source")
        require_finite((self.scale,), "scale of a LoRA")
        digest = self.sha256
        require(digest is UNSET or bool(re.fullmatch("[0-9a-f]{64}", digest)), f"sha256: expected 64 hex, got {digest}")

    @property
    def on_hub(self) -> tuple[str, str | None] | None:
        """Repository and file (None: its only one) that the source names if there is no such file here; None: none."""
        owner, _, rest = self.source.partition("/")
        name, _, file = rest.partition("/")
        plain = all(re.fullmatch(r"[\w.-]+", part) and part not in (".", "..") for part in (owner, name))
        if not plain or not (file.endswith(".safetensors") if file else not name.endswith(".safetensors")):
            return None
        return f"{owner}/{name}", file or None

    @property
    def text(self) -> str:
        """For people: source, scale, and the beginning of the digest where it is known."""
        digest = f", sha256 {self.sha256[:16]}" if self.sha256 else ""
        return f"{self.source} × {self.scale:g}{f' in {self.expert}' if self.expert else ''}{digest}"

    @property
    def flag(self) -> str:
        """What gives it on the command line."""
        return f"{'--lora-2' if self.expert else '--lora'} {self.source}:{self.scale:g}"


class Profile(Value, frozen=True):
    """A build profile, one TOML file in `engines/`: everything about a model that is not its weights.

    Attributes:
        name: file name without `.toml`; what `--model` takes.
        family: name of the family in `lemica_trt.models`, or `traced`.
        source: hub id, local folder, or `package:NAME` for the model that ships with this package.
        dtype: precision of the DiT.
        text_length: tokens of a prompt, padded.
        shape, sampling, calibration: see there.
        opset: ONNX opset, 18 … 23 (20 is what the tests run; TensorRT decides what it takes).
        loras: fused into the weights, in this order; unset: none.
    """

    name: str
    family: str
    source: str
    dtype: DType
    text_length: int
    shape: Shape
    sampling: Sampling = Sampling()
    calibration: CalibrationSettings = CalibrationSettings()
    opset: int = 20
    loras: tuple[Lora, ...] | UnsetType = UNSET

    def __post_init__(self) -> None:
        require(self.text_length >= 1, f"text_length must be at least 1, got {self.text_length}")
        require(
            self.family == TRACED or self.sampling.guidance_scale_2 is UNSET,
            f"guidance_scale_2 is of traced pipelines, {self.family} has one guidance scale",
        )
        require(self.opset in OPSETS, f"opset must be 18 … 23, got {self.opset}")

    def require_possible(self) -> None:
        """Refuse, before any download, what no traced pipeline is built for.

        Raises:
            UnsupportedError: says what.
        """
        if self.family == TRACED and self.shape.max_batch != 1:
            raise UnsupportedError(
                f"a traced pipeline is built for one request a call, got max_batch {self.shape.max_batch}",
                fix="--max-batch 1",
            )


class Card(Value, frozen=True):
    """What is known of a named model beside its profile. No build reads it.

    Attributes:
        pipeline: its class, of diffusers or of `lemica_trt.models.open_sora`; "": there is none.
        links: its model card, and where its settings are written.
        refused: why it cannot be built, as tracing says of a tiny pipeline of its class; "": nothing known forbids it.
        note: what a user should know before building it.
        ran: what was done with its own weights, and on what; empty: nothing.
    """

    pipeline: str
    links: tuple[str, ...] = ()
    refused: str = ""
    note: str = ""
    ran: tuple[str, ...] = ()


class NamedModel(Value, frozen=True):
    """What a name stands for."""

    profile: Profile
    card: Card
