"""What a model is built as: the build profile, and the description of every graph that is exported.

Knows names, shapes and dtypes; nothing of torch, ONNX or engines.
"""

from __future__ import annotations

from typing import Literal

from lemica_trt.values import Value, require, require_finite

DType = Literal["fp32", "fp16", "bf16"]
"""Precision of a network, by the names that trtexec and Polygraphy use."""

CalibrationMethod = Literal["exact", "secant", "adjoint", "retargeted"]
"""How the weights of the error graph are obtained, see `lemica_trt.calibrate`."""

TensorDType = Literal["fp32", "fp16", "bf16", "int64", "int32", "uint8"]

Role = Literal["full", "skip", "combine", "text_encoder", "vae_decoder"]


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


class Sampling(Value, frozen=True):
    """How the uncached model is sampled: the reference that a plan is measured against.

    Attributes:
        steps: N, denoising steps.
        guidance_scale: classifier-free guidance g; 1 or less: no unconditional branch at all.
        dynamic_guidance: diffusers' `use_dynamic_cfg` of CogVideoX.
        scheduler: diffusers scheduler class to use instead of the pipeline's own; made from its config.
        flow_shift: shift of the sigmas instead of the scheduler's own; of schedulers for flow matching.
        negative_prompt: default negative prompt.
    """

    steps: int = 50
    guidance_scale: float = 6.0
    dynamic_guidance: bool = False
    scheduler: str | None = None
    flow_shift: float | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.flow_shift is not None:
            require_finite((self.flow_shift,), "flow_shift")
            require(self.flow_shift > 0, f"flow_shift must be above 0, got {self.flow_shift}")
        require(self.steps >= 2, f"steps must be at least 2, got {self.steps}")
        require_finite((self.guidance_scale,), "guidance_scale")

    @property
    def guided(self) -> bool:
        """Whether each request runs two branches."""
        return self.guidance_scale > 1.0


class Calibration(Value, frozen=True):
    """How the error graph is measured.

    Attributes:
        prompts: name of a folder below `calibration/` with `calibration.txt` and `held_out.txt`.
        samples: (prompt, seed) pairs.
        max_skip: K, the most steps that one segment skips.
        seed: seed of sample 0.
        method: how edges are weighed.
        validation_samples: (prompt, seed) pairs, others than those, that the best of several ways is chosen on.
    """

    prompts: str = "video"
    samples: int = 8
    max_skip: int = 9
    seed: int = 0
    method: CalibrationMethod = "secant"
    validation_samples: int = 32

    def __post_init__(self) -> None:
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        require(self.validation_samples >= 1, f"validation_samples must be at least 1, got {self.validation_samples}")
        require(self.max_skip >= 1, f"max_skip must be at least 1, got {self.max_skip}")
        require(0 <= self.seed < 1 << 62, f"seed must be 0 … 2^62 - 1, got {self.seed}")


class Profile(Value, frozen=True):
    """A build profile, one TOML file in `engines/`: everything about a model that is not its weights.

    Attributes:
        name: file name without `.toml`; what `--model` takes.
        family: name of the family in `lemica_trt.models`.
        source: hub id, local folder, or `package:NAME` for the model that ships with this package.
        dtype: precision of the DiT.
        text_length: tokens of a prompt, padded.
        shape, sampling, calibration: see there.
        opset: ONNX opset, 18 … 23 (20 is what the tests run; TensorRT decides what it takes).
    """

    name: str
    family: str
    source: str
    dtype: DType
    text_length: int
    shape: Shape
    sampling: Sampling = Sampling()
    calibration: Calibration = Calibration()
    opset: int = 20

    def __post_init__(self) -> None:
        require(self.text_length >= 1, f"text_length must be at least 1, got {self.text_length}")
        require(18 <= self.opset <= 23, f"opset must be 18 … 23, got {self.opset}")


class TensorSpec(Value, frozen=True):
    """One input or output of a graph. Symbolic dimensions are strings (`batch`)."""

    name: str
    dtype: TensorDType
    shape: tuple[int | str, ...]

    def at(self, batch: int) -> tuple[int, ...]:
        """The shape at a batch size; a symbolic dimension is `batch` or a multiple of it (`2*batch`)."""
        return tuple(dim if isinstance(dim, int) else _factor(dim) * batch for dim in self.shape)


def _factor(dim: str) -> int:
    factor, _, symbol = dim.rpartition("*")
    require(symbol == "batch" and (factor.isdecimal() or not factor), f"expected a multiple of batch, got {dim!r}")
    return int(factor or 1)


class GraphSpec(Value, frozen=True):
    """One exported graph.

    Attributes:
        role: what it is for.
        file: path of the ONNX file, relative to the bundle.
        inputs, outputs: in graph order, after pruning; exactly what the file declares.
        data_files: external-data files that the ONNX file names, relative to the bundle.
        opset: ONNX opset.
    """

    role: Role
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    data_files: tuple[str, ...] = ()


class StepLayout(Value, frozen=True):
    """The interface that all step graphs (full, skip, combine) of a bundle share; batch b, R = 2b if guided else b.

    Inputs, each present only in the graphs that read it:

    | name | dtype, shape | graphs | |
    |---|---|---|---|
    | `latents_j`, j < latent_history | fp32 [b, *latent_shape] | all | x_{i−1−j} |
    | `outputs_k`, k < output_history | fp32 [b, *latent_shape] | all | guided output m_{i−1−k} |
    | `noise` | fp32 [b, *latent_shape] | all, if stochastic | standard normal: the row's draws, mixed |
    | `coefficients` | fp32 [len(vector)] | all | see `offsets` |
    | `guidance` | fp32 [b] | full, skip, if guided | g_i of each request |
    | `prompt_embeds` | dtype [R, text_length, width] | full, skip | unconditional branches first, as diffusers has it |
    | `residual_k`, k < residual_history | dtype [R, tokens, width] | skip | k-th last full row's trunk residual |

    Outputs: `latents` (x_i, fp32), `output` (m_i, fp32), and from full also `residual` (dtype), where any is read.

    Attributes:
        latent_shape: without batch.
        latent_history, output_history: depths, at least 1.
        residual_history: depth; 0: no plan reads residuals, there is no skip graph.
        stochastic: whether `noise` is an input.
        guided: whether both branches run.
    """

    latent_shape: tuple[int, ...]
    latent_history: int
    output_history: int
    residual_history: int = 1
    stochastic: bool = False
    guided: bool = True

    @property
    def offsets(self) -> dict[str, slice]:
        """Where each group of coefficients lies in the `coefficients` vector.

        `reuse` (combine only) weighs outputs_k into the new output; `residuals` (skip only) weighs residual_k.
        The vector is the same length for every graph; a graph ignores the groups that are not its own.
        """
        sizes = {
            "latents": self.latent_history,
            "outputs": self.output_history,
            "noise": 1,
            "in_scale": 1,
            "timestep": 1,
            "residuals": self.residual_history,
            "reuse": self.output_history,
        }
        offsets, position = {}, 0
        for name, size in sizes.items():
            offsets[name] = slice(position, position + size)
            position += size
        return offsets


class GraphSet(Value, frozen=True):
    """All graphs of one bundle.

    Attributes:
        dtype: precision of the DiT.
        layout: the step graphs' interface.
        max_batch: largest batch b.
        graphs: by role, sorted.
    """

    dtype: DType
    layout: StepLayout
    max_batch: int
    graphs: tuple[GraphSpec, ...]

    def graph(self, role: Role) -> GraphSpec:
        """The graph of a role.

        Raises:
            KeyError: there is none.
        """
        for graph in self.graphs:
            if graph.role == role:
                return graph
        raise KeyError(role)


class TextSpec(Value, frozen=True):
    """How a prompt becomes token ids, without transformers.

    Attributes:
        tokenizer: path of `tokenizer.json` in the bundle, read by the `tokenizers` library.
        length: number of ids, padded or cut to it (the last id of a cut prompt stays the end token).
        pad_id, end_id: token ids.
        clean: `none`, or `basic` = HTML unescaped twice, white space collapsed (Wan).
        mask: whether the text encoder graph takes `attention_mask` beside `input_ids`.
    """

    tokenizer: str
    length: int
    pad_id: int
    end_id: int | None = None
    clean: Literal["none", "basic"] = "none"
    mask: bool = False
