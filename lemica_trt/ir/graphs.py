"""The exported graphs: names, shapes and dtypes of their tensors, and the interface that all step graphs share.

Knows nothing of torch, ONNX or engines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from msgspec import UNSET, UnsetType

from lemica_trt.core.text import Cleaning
from lemica_trt.core.values import Value, require, require_finite
from lemica_trt.ir.profile import DType

TensorDType = Literal["fp32", "fp16", "bf16", "int64", "int32", "uint8"]


Role = str
"""Name of a graph: of a variant, `COMBINE`, of a text encoder, `IMAGE_ENCODER`, or `vae_decoder`."""

IMAGE_ENCODER = "image_encoder"
"""Name of the graph that makes conditions of a picture."""

DRAW = "draw"
"""Its input that is noise of the request's seed."""


NEGATIVE = "negative_"
"""Begins the name of what is of the negative prompt, where its text has another length than the prompt's."""

_TEXT_AXIS = re.compile(rf"(?:{NEGATIVE})?tokens_([1-9]\d*)")


def text_axis(longest: int, *, negative: bool = False) -> str:
    """A dimension that is as long as the text of a prompt, 1 … `longest` tokens."""
    return f"{NEGATIVE if negative else ''}tokens_{longest}"


def longest_text(dim: int | str) -> int | None:
    """Most tokens of a text axis; None: the dimension is none."""
    found = _TEXT_AXIS.fullmatch(dim) if isinstance(dim, str) else None
    return None if found is None else int(found[1])


class TensorSpec(Value, frozen=True):
    """One input or output of a graph.

    Symbolic dimensions are strings: `batch`, a multiple of it (`2*batch`), or a text axis (`tokens_512`: 1 … 512
    tokens of the prompt; `negative_tokens_512`: of the negative prompt).
    """

    name: str
    dtype: TensorDType
    shape: tuple[int | str, ...]

    def at(self, batch: int, *, tokens: int | None = None) -> tuple[int, ...]:
        """The shape at a batch size.

        Args:
            tokens: length of text axes; None: their longest.
        """
        return tuple(dim if isinstance(dim, int) else _size(dim, batch, tokens) for dim in self.shape)

    def at_batch(self, batch: int) -> tuple[int | str, ...]:
        """The same, where text axes stay symbols."""
        free = [longest_text(dim) is not None for dim in self.shape]
        return tuple(dim if is_free else size for dim, size, is_free in zip(self.shape, self.at(batch), free))

    @property
    def text_axes(self) -> dict[str, int]:
        """Text axes → their most tokens."""
        found = {str(dim): longest_text(dim) for dim in self.shape}
        return {dim: longest for dim, longest in found.items() if longest is not None}


def _size(dim: str, batch: int, tokens: int | None) -> int:
    longest = longest_text(dim)
    if longest is None:
        return _factor(dim) * batch
    return longest if tokens is None else min(tokens, longest)


def _factor(dim: str) -> int:
    factor, _, symbol = dim.rpartition("*")
    require(symbol == "batch" and (factor.isdecimal() or not factor), f"expected a multiple of batch, got {dim!r}")
    return int(factor or 1)


class Weight(Value, frozen=True):
    """A parameter of a network, as an initializer of a graph has it: what LoRA weights can be added to.

    Attributes:
        part: component of the pipeline.
        name: of the parameter in it: `transformer_blocks.0.attn1.to_q.weight`.
        shape: as PyTorch has it.
        transposed: true: the initializer is its transpose, [in, out].
    """

    part: str
    name: str
    shape: tuple[int, ...]
    transposed: bool | UnsetType = UNSET

    def __post_init__(self) -> None:
        require(len(self.shape) >= 2, f"{self.name}: expected at least 2 dimensions, got {list(self.shape)}")
        require(not self.transposed or len(self.shape) == 2, f"{self.name}: only matrices are transposed")

    @property
    def module(self) -> str:
        """Name of the module that has it."""
        return self.name.rpartition(".")[0]


class GraphSpec(Value, frozen=True):
    """One exported graph.

    Attributes:
        role: what it is for.
        file: path of the ONNX file, relative to the bundle.
        inputs, outputs: in graph order, after pruning; exactly what the file declares.
        dit: how much of the DiT it computes; None: nothing.
        data_files: external-data files that the ONNX file names, relative to the bundle.
        opset: ONNX opset.
        weights: initializer → the parameter that it is, of the transformers alone; unset: not known, as in graphs of
            older releases and of encoders.
    """

    role: Role
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    dit: Literal["whole", "part"] | None = None
    data_files: tuple[str, ...] = ()
    weights: dict[str, Weight] | UnsetType = UNSET


class CacheSlot(Value, frozen=True):
    """Something that some rows of a plan leave for later rows.

    Attributes:
        name: of the slot; a graph that writes it has an output of that name, one that reads it has inputs `name_k`.
        depth: how many of the last rows that wrote it can be read.
        kind: `blocks` = what a span of the DiT's blocks adds to the hidden stream; `guidance` = the difference of the
            two branches' outputs.
    """

    name: str
    depth: int
    kind: Literal["blocks", "guidance"] = "blocks"

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), f"the name of a cache slot must be an identifier, got {self.name!r}")
        require(self.depth >= 1, f"cache slot {self.name}: depth must be at least 1, got {self.depth}")


DEFAULT_EXPERT = "transformer"
"""Component of a pipeline that has one network."""


class Variant(Value, frozen=True):
    """One way to run a step on the DiT; each is a graph of its own.

    Attributes:
        name: of the graph; what `PlanRow.variant` says.
        expert: component of the pipeline that runs (Wan 2.2 has two, one for each kind of steps).
        branches: `both` branches of the guidance, or the `conditional` one alone.
        reads: cache slots whose contents stand in for what is not computed; empty: everything is computed.
        writes: cache slots that it fills.
    """

    name: str
    expert: str = DEFAULT_EXPERT
    branches: Literal["both", "conditional"] = "both"
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


TRUNK = "trunk"
"""The cache slot of LeMiCa: what all blocks together add to the hidden stream (arXiv 2511.00090, section 3)."""

FULL = Variant(name="full")
"""The whole DiT."""

SKIP = Variant(name="skip", reads=(TRUNK,))
"""Embeddings and head alone; cached trunk residuals stand in for the blocks."""


def full_name(kind: int) -> str:
    """Name of the variant that computes everything in steps of a kind (`SamplerRow.kind`): `full`, `full2`, …"""
    return _of_kind(FULL.name, kind)


def skip_name(kind: int) -> str:
    """Name of the variant that stands in for it: `skip`, `skip2`, …"""
    return _of_kind(SKIP.name, kind)


def trunk_name(kind: int) -> str:
    """The cache slot of a kind of steps: `trunk`, `trunk2`, … One kind's residuals are of no use to another."""
    return _of_kind(TRUNK, kind)


def trunk_of(variant: str | None) -> str:
    """The cache slot that a variant writes or reads; "": of none."""
    return "" if variant is None else trunk_name(kind_of_variant(variant))


def _of_kind(name: str, kind: int) -> str:
    return name if kind == 0 else f"{name}{kind + 1}"


def kind_of_variant(name: str) -> int:
    """The kind of steps that a variant is of.

    Raises:
        ValueError: no variant has such a name.
    """
    found = re.fullmatch(rf"(?:{FULL.name}|{SKIP.name})([2-9]|[1-9]\d+)?", name)
    require(found is not None, f"expected the name of a variant, {FULL.name}, {SKIP.name}2 and so on, got {name!r}")
    return int(found[1] or 1) - 1 if found else 0


COMBINE = "combine"
"""Name of the graph of rows that do not run the DiT."""

TERM = "guidance_term"
"""Output of the step graphs that keep it: what guidance adds to the conditional output, (g − 1)·(c − u)."""

RESERVED = ("latents", "outputs", "guidance_terms", "noise", "in_scale", "timestep", "reuse")
"""Groups of coefficients that are not of a cache slot."""


class StepLayout(Value, frozen=True):
    """The interface that all step graphs of a bundle share; batch b, R = 2b if guided else b.

    A step graph is one for each variant, and `COMBINE`. Inputs, each present only in the graphs that read it:

    | name | dtype, shape | graphs | |
    |---|---|---|---|
    | `latents_j`, j < latent_history | fp32 [b, *latent_shape] | all | x_{i−1−j} |
    | `outputs_k`, k < output_history | fp32 [b, *latent_shape] | all | guided output m_{i−1−k} |
    | `guidance_terms_k`, k < guidance_history | fp32 [b, *latent_shape] | all | (g_i − 1)·(c_i − u_i) of outputs_k |
    | `noise` | fp32 [b, *latent_shape] | all, if stochastic | standard normal: the row's draws, mixed |
    | `coefficients` | fp32 [len(vector)] | all | see `offsets` |
    | `guidance` | fp32 [b] | variants, if guided | g_i of each request |
    | each of `conditions` | as declared, first dimension R, or b | variants | unconditional branches first |
    | `SLOT_k`, k < its depth | dtype, first dimension R | variants that read it | of the k-th last row that wrote it |

    Outputs: `latents` (x_i, fp32), `output` (m_i, fp32), `guidance_term` (e_i, fp32) if guidance_history > 0, and each
    cache slot that the variant writes.

    Attributes:
        latent_shape: without batch.
        latent_history, output_history: depths, at least 1.
        guidance_history: depth to which the guidance terms of outputs can be read back; 0: none are kept.
        conditions: what every variant is given beside the latents: prompt embeddings, masks, image latents. Where their
            shape follows the length of the prompt it has a text axis; where both branches have text axes of their own,
            `negative_NAME` [b, …] is beside NAME [b, …].
        caches: slots, by name.
        variants: how a step can run, the one that computes everything first.
        stochastic: whether `noise` is an input.
        guided: whether both branches run.
    """

    latent_shape: tuple[int, ...]
    latent_history: int
    output_history: int
    conditions: tuple[TensorSpec, ...]
    caches: tuple[CacheSlot, ...] = ()
    variants: tuple[Variant, ...] = (FULL,)
    stochastic: bool = False
    guided: bool = True
    guidance_history: int = 0

    def __post_init__(self) -> None:
        slots = [slot.name for slot in self.caches]
        require(len(set(slots)) == len(slots), f"cache slots must have different names, got {', '.join(slots)}")
        require(not set(slots) & set(RESERVED), f"cache slots must not be named {', '.join(RESERVED)}")
        names = self.step_graphs
        require(len(set(names)) == len(names), f"variants must have different names, got {', '.join(names)}")
        require(bool(self.variants) and not self.variants[0].reads, "the first variant must compute everything")
        for variant in self.variants:
            unknown = sorted({*variant.reads, *variant.writes} - set(slots))
            require(not unknown, f"variant {variant.name} has cache slots that the layout has not: {unknown}")
        require(
            min(self.latent_history, self.output_history) >= 1, "latent_history and output_history must be at least 1"
        )
        require(
            0 <= self.guidance_history <= self.output_history * self.guided,
            f"guidance_history must be 0 … output_history, and 0 without guidance, got {self.guidance_history}",
        )

    @property
    def step_graphs(self) -> tuple[str, ...]:
        """Names of the step graphs: of the variants, and `COMBINE`."""
        return (*(variant.name for variant in self.variants), COMBINE)

    def variant(self, name: str) -> Variant:
        """The variant of a name.

        Raises:
            KeyError: there is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(name)

    @property
    def text_axes(self) -> dict[str, int]:
        """Text axes of the conditions → their most tokens."""
        return {dim: longest for spec in self.conditions for dim, longest in spec.text_axes.items()}

    def depth(self, slot: str) -> int:
        """How far back a cache slot is kept; 0: there is none of that name."""
        return next((found.depth for found in self.caches if found.name == slot), 0)

    @property
    def offsets(self) -> dict[str, slice]:
        """Where each group of coefficients lies in the `coefficients` vector.

        `reuse` (`COMBINE` only) weighs outputs_k into the new output, and their guidance terms into the new one; the
        group of a cache slot, under its name, weighs what is read from it. The vector is the same length for every
        graph; a graph ignores the groups that are not its own.
        """
        sizes = {
            "latents": self.latent_history,
            "outputs": self.output_history,
            "guidance_terms": self.guidance_history,
            "noise": 1,
            "in_scale": 1,
            "timestep": 1,
            **{slot.name: slot.depth for slot in self.caches},
            "reuse": self.output_history,
        }
        offsets, position = {}, 0
        for name, size in sizes.items():
            offsets[name] = slice(position, position + size)
            position += size
        return offsets


def step_layout(
    *,
    latent_shape: tuple[int, ...],
    latent_history: int,
    output_history: int,
    conditions: tuple[TensorSpec, ...] = (),
    trunk_depth: int = 1,
    stochastic: bool = False,
    guided: bool = True,
    guidance_history: int = 0,
    experts: Sequence[str] = (DEFAULT_EXPERT,),
) -> StepLayout:
    """The layout of transformers that run whole, or without their trunk where `trunk_depth` residuals are kept.

    Args:
        trunk_depth: 0: none is kept, there is no such variant.
        experts: for each kind of steps the component that it runs.
        others: as in `StepLayout`.
    """
    variants: list[Variant] = []
    for kind, expert in enumerate(experts):
        trunk = (trunk_name(kind),) if trunk_depth else ()
        variants.append(Variant(name=full_name(kind), expert=expert, writes=trunk))
        if trunk_depth:
            variants.append(Variant(name=skip_name(kind), expert=expert, reads=trunk))
    return StepLayout(
        latent_shape=latent_shape,
        latent_history=latent_history,
        output_history=output_history,
        conditions=conditions,
        caches=tuple(CacheSlot(name=trunk_name(k), depth=trunk_depth) for k in range(len(experts)) if trunk_depth),
        variants=tuple(variants),
        stochastic=stochastic,
        guided=guided,
        guidance_history=guidance_history,
    )


Fit = Literal["stretch", "cover"]
"""How a picture gets another aspect ratio: `stretch` = each side is resized, `cover` = the shorter side is, and what
the longer one has too much is cut off at both ends (`shortest_edge` and centre crop of transformers)."""

Filter = Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"]
"""Pillow's resampling."""


Source = Literal["image", "last_image"]
"""A picture of a request, as diffusers names the argument."""


class PictureSpec(Value, frozen=True):
    """How a picture becomes an input of the image encoder graph: resized as 8-bit pixels, then c·pixel + d a channel.

    Attributes:
        name: of the input, fp32 [1, 3, height, width].
        height, width: pixels.
        fit: what is done to another aspect ratio.
        by: resampling filter.
        scale, offset: c and d of each channel; pixels are 0 … 255.
        of: which picture of the request; unset: `image`.
    """

    name: str
    height: int
    width: int
    fit: Fit
    by: Filter
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]
    of: Source | UnsetType = UNSET

    def __post_init__(self) -> None:
        require_finite((*self.scale, *self.offset), f"{self.name}: scale and offset")

    @property
    def source(self) -> Source:
        """Which picture of the request it is."""
        return "image" if self.of is UNSET else self.of


class ImageSpec(Value, frozen=True):
    """How the pictures of a request become conditions: inputs that are made of them, then the image encoder graph.

    Attributes:
        pictures: those inputs.
        draw: shape of the noise that the graph takes as `draw`, fp32, where the encoder samples its posterior; it is
            drawn of the request's seed, before the initial noise.
    """

    pictures: tuple[PictureSpec, ...]
    draw: tuple[int, ...] | UnsetType = UNSET

    def __post_init__(self) -> None:
        names = [picture.name for picture in self.pictures]
        require(bool(names) and len(set(names)) == len(names), f"pictures must have different names, got {names}")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The pictures that a request must have, in order."""
        return tuple(name for name in get_args(Source) if any(its.source == name for its in self.pictures))


class GraphSet(Value, frozen=True):
    """All graphs of one bundle.

    Attributes:
        dtype: precision of the DiT.
        layout: the step graphs' interface.
        max_batch: largest batch b.
        graphs: by role, sorted.
        image: how a request's pictures become conditions; unset: requests have none.
    """

    dtype: DType
    layout: StepLayout
    max_batch: int
    graphs: tuple[GraphSpec, ...]
    image: ImageSpec | UnsetType = UNSET

    @property
    def sources(self) -> tuple[Source, ...]:
        """The pictures that a request must have, in order; none where it has no image."""
        return () if self.image is UNSET else self.image.sources

    def graph(self, role: Role) -> GraphSpec:
        """The graph of a role.

        Raises:
            KeyError: there is none.
        """
        for graph in self.graphs:
            if graph.role == role:
                return graph
        raise KeyError(role)


PROMPT = "{prompt}"
"""Stands for the prompt in a template."""


class EncoderSpec(Value, frozen=True):
    """How a prompt becomes conditions, without transformers: token ids, then a text encoder graph.

    Attributes:
        graph: name of the text encoder graph; its outputs are conditions of the step layout. It takes the ids of each
            of these that name it.
        tokenizer: path of `tokenizer.json` in the bundle, read by the `tokenizers` library.
        length: number of ids, padded or cut to it (the last id of a cut prompt stays the end token).
        pad_id, end_id: token ids.
        clean: `none`, `basic` = HTML unescaped twice, white space collapsed, `ftfy` = the same after
            `ftfy.fix_text` (Wan), or `lower` = lower case, white space at the ends cut (PixArt).
        mask: whether the text encoder graph takes `attention_mask` beside `input_ids`.
        template: what is tokenised; `{prompt}` stands for the prompt.
        suffix: of the names of the graph's inputs that these ids are for; unset: none.
        negative: true: of negative prompts alone, and those without are of prompts alone.
        multiple: padding stands in front of the ids, up to a multiple of it, and counts as tokens; unset: none does.
        left: true: all padding stands in front of the ids.
    """

    tokenizer: str
    length: int
    pad_id: int
    graph: str = "text_encoder"
    end_id: int | None = None
    clean: Cleaning = "none"
    mask: bool = False
    template: str = PROMPT
    suffix: str | UnsetType = UNSET
    negative: bool | UnsetType = UNSET
    multiple: int | UnsetType = UNSET
    left: bool | UnsetType = UNSET

    def __post_init__(self) -> None:
        whole = self.multiple is UNSET or (self.multiple > 1 and self.length % self.multiple == 0)
        require(whole, f"length must be a multiple of {self.multiple}, of at least 2, got {self.length}")
        require(PROMPT in self.template, f"template must have {PROMPT} in it, got {self.template!r}")
        plain = self.suffix is UNSET or bool(re.fullmatch(r"_\w+", self.suffix))
        require(plain, f"suffix must be a word behind an underscore, got {self.suffix!r}")

    def padded(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """At most `length` ids of a text with the padding around them, and the mask: 0 of padding, unless it counts as
        tokens."""
        counted = 0 if self.multiple is UNSET else -len(ids) % self.multiple
        own, mask = [self.pad_id] * counted + list(ids), [1] * (counted + len(ids))
        rest = self.length - len(own)
        if self.left:
            return [self.pad_id] * rest + own, [0] * rest + mask
        return own + [self.pad_id] * rest, mask + [0] * rest

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs: the ids, and the mask where it is taken."""
        return tuple(f"{name}{self.suffix or ''}" for name in ("input_ids", *["attention_mask"] * self.mask))
