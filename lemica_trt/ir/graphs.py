"""The exported graphs: names, shapes and dtypes of their tensors, and the interface that all step graphs share.

Knows nothing of torch, ONNX or engines."""

from __future__ import annotations

from typing import Literal

from lemica_trt.core.values import Value, require
from lemica_trt.ir.profile import DType

TensorDType = Literal["fp32", "fp16", "bf16", "int64", "int32", "uint8"]


Role = Literal["full", "skip", "combine", "text_encoder", "vae_decoder"]


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
