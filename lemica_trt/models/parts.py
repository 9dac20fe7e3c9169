"""The parts of a pipeline folder: loaded so that nothing is missing or left unread, and compared with each other.

diffusers and transformers warn where a checkpoint does not match its config, and go on with random or absent weights.
Here every tensor that is missing, left over or of another shape is a refusal. Whether parts fit each other and the
shape is found by running them once on shapes alone (`FakeTensorMode`): nothing is computed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from lemica_trt.core.errors import InputError, MissingDependencyError, UnsupportedError
from lemica_trt.core.text import first_line
from lemica_trt.models.index import index_file, read_index
from lemica_trt.models.model import Model
from lemica_trt.models.open_sora import transformer, vae
from lemica_trt.models.stand_ins import network_from_config

BROKEN = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    AssertionError,
    safetensors.SafetensorError,
)
"""What diffusers, transformers and the hub's client raise for files that are missing, cut off or of another model."""

LIBRARIES = {
    "diffusers": diffusers,
    "transformers": transformers,
    **{module.__name__: module for module in (transformer, vae)},
}
"""Where the class of a part may come from; diffusers would import any module that `model_index.json` names."""


@contextlib.contextmanager
def reading(source: object) -> Iterator[None]:
    """Turn what the libraries raise into one line.

    Args:
        source: what is loaded, as the message names it.

    Raises:
        InputError: the folder is incomplete or broken.
        MissingDependencyError: a library is missing, or does not go with another one.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"{source}: {first_line(error)}") from None
    except BROKEN as error:
        raise InputError(f"{source}: expected a complete pipeline, got: {first_line(error)}") from None


def load_networks(
    folder: Path, dtypes: Mapping[str, torch.dtype], *, weights: bool = True
) -> dict[str, torch.nn.Module]:
    """The networks that `model_index.json` names, on the CPU.

    Args:
        folder: of the pipeline.
        dtypes: by name, `default` for the others.
        weights: else networks are as `stand_ins` has them, by their configuration.

    Raises:
        InputError: a weight file does not match its config; names a tensor.
        UnsupportedError: a part is of a class from elsewhere.
        MissingDependencyError: the tokenizer cannot be read with the libraries that are installed.
    """
    _require_sentencepiece(folder / "tokenizer")
    index = read_index(index_file(folder), where=str(folder))
    load, found = _load_network if weights else network_from_config, {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry == [None, None]:
            continue
        kind = class_of(name, entry)
        if issubclass(kind, torch.nn.Module):
            found[name] = load(kind, folder / name, dtypes.get(name, dtypes["default"]))
    return found


def class_of(name: str, entry: list[Any]) -> Any:
    """The class of a part, as `model_index.json` names it.

    Raises:
        UnsupportedError: it is from elsewhere.
    """
    library, kind = map(str, entry if len(entry) == 2 else (None, None))
    found = getattr(LIBRARIES.get(library) or _pipelines_folder(library), kind, None)
    if not isinstance(found, type):
        raise UnsupportedError(
            f"model_index.json: {name} must be a class of diffusers or transformers, got {library}.{kind}"
        )
    return found


def _pipelines_folder(name: str) -> Any:
    """The folder of diffusers' own pipelines with that name, which may have networks (LTX-2); None: there is none."""
    names = {found.name for found in pkgutil.iter_modules(diffusers.pipelines.__path__)}
    return importlib.import_module(f"diffusers.pipelines.{name}") if name in names else None


def _load_network(kind: Any, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    _require_no_variant(folder)
    key = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
    network, info = kind.from_pretrained(
        folder, **{key: dtype}, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
    )
    kinds = {"missing_keys": "has no", "unexpected_keys": "has an unknown", "mismatched_keys": "has another shape of"}
    for name, what in kinds.items():
        tensors = sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(name, ()))
        if tensors:
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            raise InputError(
                f"{folder.name}: expected weights that match config.json, got a file that {what} {tensors[0]}{more}",
                fix="save the model again with save_pretrained, adapters merged, uncompiled and without quantization",
            )
    if info.get("error_msgs"):
        raise InputError(f"{folder.name}: expected weights that match config.json: {info['error_msgs'][0]}")
    return network  # type: ignore[no-any-return]


def _require_no_variant(folder: Path) -> None:
    """Raise InputError where there are weights of a variant only (`model.fp16.safetensors`); no variant is loaded."""
    names = [path.name for path in folder.glob("*.safetensors")] + [path.name for path in folder.glob("*.bin")]
    variants = {match[1] for name in names if (match := _VARIANT.search(name))}
    if variants and all(_VARIANT.search(name) for name in names):
        raise InputError(
            f"{folder.name}: expected weights, got some of the variant {', '.join(sorted(variants))} only",
            fix="download the others, or save the pipeline again with save_pretrained without a variant",
        )


_VARIANT = re.compile(r"\.([A-Za-z]\w*)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")


def require_vocabulary(folder: Path, pipeline: Any) -> None:
    """Raise InputError unless the tokenizer's folder has a vocabulary; without one, transformers makes one up."""
    names = {name for name in type(pipeline.tokenizer).vocab_files_names.values() if name} | {"tokenizer.json"}
    if not any((folder / "tokenizer" / name).is_file() for name in names):
        raise InputError(f"{folder}: expected a vocabulary in tokenizer/, got none of {', '.join(sorted(names))}")


def require_fitting(model: Model) -> None:
    """Run each part once on shapes alone: tokenizer, text encoder, transformer, VAE.

    Raises:
        InputError: they do not fit each other or the shape.
    """
    largest = max(model.pipeline.tokenizer.get_vocab().values(), default=0)
    rows = model.pipeline.text_encoder.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise InputError(
            f"{model.profile.source}: expected a text encoder for all {largest + 1} tokens of the tokenizer, got one "
            f"for {rows}"
        )
    batch = 2 if model.guided else 1
    with _fitting(model, "the text encoder"):
        (condition,) = model.conditions
    with _fitting(model, "the transformer"):
        constants = model.constants
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            latents = torch.zeros((batch, *model.latent_shape), dtype=model.dtype, device=model.device)
            embeds = torch.zeros([batch, *map(int, condition.shape[1:])], dtype=model.dtype, device=model.device)
            timestep = torch.zeros(batch, device=model.device)
            inputs = model.family.transformer_inputs(latents, timestep, embeds, constants)
            output = model.pipeline.transformer(**inputs, return_dict=False)[0]
        _require_shape(output, latents.shape)
    shape = model.profile.shape
    with _fitting(model, "the VAE"):
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            frames = model.decode(torch.zeros((1, *model.latent_shape)))
        _require_shape(frames, (1, shape.frames, shape.height, shape.width, 3))


@contextlib.contextmanager
def _fitting(model: Model, part: str) -> Iterator[None]:
    shape = model.profile.shape
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it logs the traceback of what it raises
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except BROKEN as error:
        raise InputError(
            f"{model.profile.source}: {part} does not fit the other parts at {shape.frames} frames of "
            f"{shape.width}x{shape.height}: {first_line(error)}",
            fix="check that all folders are of one text-to-video model, and the shape",
        ) from None
    finally:
        log.setLevel(level)


def _require_shape(tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"expected an output of {list(expected)}, got {list(tensor.shape)}")


def _require_sentencepiece(folder: Path) -> None:
    """Raise MissingDependencyError where a tokenizer has `spiece.model` only, and nothing here can read that.

    sentencepiece from 0.2.3 on brings code for protobuf 7, which tritonclient excludes; transformers then reports that
    `tiktoken` is missing.
    """
    if (folder / "tokenizer.json").is_file() or not any(folder.glob("*.model")):
        return
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        pass  # transformers says so itself
    except Exception as error:  # protobuf's VersionError is no ImportError
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("sentencepiece", "protobuf"))
        raise MissingDependencyError(
            f"{folder}: {versions} do not go together: {first_line(error)}", fix="pip install 'sentencepiece<0.2.3'"
        ) from None
