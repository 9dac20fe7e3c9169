"""LoRA weights, fused into a pipeline by diffusers' own loader before anything is measured: W + scale · B A.

diffusers warns of keys that fit nothing, and drops them; here each tensor of a file must be of a module that the
pipeline has, or the file is refused. What can be told from its keys and the configuration is told before weights load.

Where a pipeline has two transformers, diffusers puts a file into the first, or with `load_into_transformer_2` into the
second (`WanLoraLoaderMixin.load_lora_weights`): `Lora.expert` says which.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import msgspec
from diffusers.utils import (
    USE_PEFT_BACKEND,
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from torch import Tensor, nn

from lemica_trt.core.errors import InputError, MissingDependencyError, UnsupportedError, install_command
from lemica_trt.core.files import sha256_of
from lemica_trt.core.text import MAX_LINE, first_line, shortened
from lemica_trt.ir.profile import Lora
from lemica_trt.models.parts import BROKEN

NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls a file of LoRA weights; taken where there are several."""

TENSORS = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
"""What a module's keys end with, once diffusers has converted them."""


def lora_file(lora: Lora, *, download: bool = True) -> Path:
    """The file of LoRA weights, on this machine.

    Args:
        download: from the hub, where it is neither here nor in the hub's cache.

    Raises:
        InputError: there is none, or several; or it is no .safetensors file.
    """
    path = Path(lora.source)
    if path.is_dir():
        return path / _only([file.name for file in path.iterdir()], lora)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: expected LoRA weights in a .safetensors file", fix="save them as safetensors")
        return path
    if (place := lora.on_hub) is None:
        raise InputError(
            f"{lora.source}: expected a file of LoRA weights or a hub id, got none that exists",
            fix="check the path, or give the id as the hub has it: OWNER/NAME or OWNER/NAME/FILE.safetensors",
        )
    try:
        return _hub_file(place[0], place[1], lora, download=download)
    except BROKEN as error:
        raise InputError(
            f"{lora.source}: expected a file of LoRA weights, or one on the hub, got: {first_line(error)}",
            fix="check the name and the network, or give the downloaded file",
        ) from None


def _hub_file(repository: str, name: str | None, lora: Lora, *, download: bool) -> Path:
    if name is None and download:
        with contextlib.suppress(*BROKEN):  # without a network, what the cache has
            name = _only(huggingface_hub.HfApi().list_repo_files(repository), lora)
    if name is None:
        folder = Path(
            huggingface_hub.snapshot_download(repository, allow_patterns=["*.safetensors"], local_files_only=True)
        )
        name = _only([str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")], lora)
    return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=not download))


def _only(names: Sequence[str], lora: Lora) -> str:
    """The one among some files that LoRA weights are in."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if NAME in found:
        return NAME
    if len(found) != 1:
        raise InputError(
            f"{lora.source}: expected one .safetensors file of LoRA weights, got {', '.join(found) or 'none'}",
            fix="name the file",
        )
    return found[0]


def identified(loras: Sequence[Lora]) -> tuple[Lora, ...]:
    """The same with the digests of their files.

    Raises:
        InputError: as `lora_file`.
    """
    return tuple(msgspec.structs.replace(lora, sha256=sha256_of(lora_file(lora))) for lora in loras)


def fuse_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Fuse LoRA weights into a loaded pipeline, in place and in this order.

    Args:
        pipeline: of diffusers, on one device.

    Raises:
        InputError: a file cannot be read, or does not fit, or gives NaN.
        UnsupportedError: the pipeline's class takes none, or they are of a kind that is not fused here.
        MissingDependencyError: peft is not installed.
    """
    for lora in loras:
        path = lora_file(lora)
        wanted = require_fitting_lora(type(pipeline), pipeline.components, lora)
        with _told(lora):
            into = {f"load_into_{lora.expert}": True} if lora.expert else {}
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, **into)
        with _told(lora):
            tuned = _tuned(pipeline, wanted)  # diffusers adds factors of zero for image layers of a text-to-video file
            if any(names - tuned[part] for part, names in wanted.items()):
                raise ValueError("diffusers left some of its modules out")
            pipeline.fuse_lora(components=list(wanted), lora_scale=lora.scale, safe_fusing=True)
            pipeline.unload_lora_weights()


def _tuned(pipeline: Any, parts: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The modules of some parts that have LoRA weights beside their own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        part: {name for name, its in pipeline.components[part].named_modules() if isinstance(its, BaseTunerLayer)}
        for part in parts
    }


def require_fitting_lora(kind: Any, networks: Mapping[str, Any], lora: Lora) -> dict[str, set[str]]:
    """Refuse LoRA weights that do not fit a pipeline, tensor by tensor.

    Args:
        kind: class of the pipeline.
        networks: its parts by name, with weights or on the meta device; None: it has none; those that are missing are
            not looked at.

    Returns:
        Part → names of its modules that they change.

    Raises:
        InputError, UnsupportedError, MissingDependencyError: as `fuse_loras`.
    """
    if importlib.util.find_spec("peft") is None or not USE_PEFT_BACKEND:
        raise MissingDependencyError(
            "--lora: diffusers fuses LoRA weights with peft, which is not installed", fix=install_command("build")
        )
    if not hasattr(kind, "lora_state_dict"):
        raise UnsupportedError(
            f"--lora: diffusers {diffusers.__version__} takes no LoRA weights for {kind.__name__}",
            fix="leave --lora out",
        )
    if lora.expert and networks.get(lora.expert) is None:
        raise UnsupportedError(
            f"--lora-2: expected a pipeline with a second transformer, {kind.__name__} has none here", fix="use --lora"
        )
    path = lora_file(lora)
    _require_factors(lora, path)
    with _told(lora):
        weights = kind.lora_state_dict(str(path.parent), weight_name=path.name, use_safetensors=True)
    found: dict[str, set[str]] = {}
    for part in kind._lora_loadable_modules:
        own = {key.removeprefix(f"{part}."): its for key, its in weights.items() if key.startswith(f"{part}.")}
        weights = {key: its for key, its in weights.items() if not key.startswith(f"{part}.")}
        changed = str(lora.expert) if lora.expert and part == "transformer" else part
        network = networks.get(changed)
        if own and network is None and changed in networks:
            raise _misfit(lora, f"no weights of a {part}, which this pipeline does not have", own)
        if own and part == "transformer_2":
            raise _misfit(lora, "keys that begin with transformer., which --lora and --lora-2 put into one of two", own)
        if own and isinstance(network, nn.Module):
            found[changed] = _require_modules(lora, changed, network, _in_peft_form(own, network))
    if weights or not found:
        parts = " or ".join(f"{part}." for part in kind._lora_loadable_modules)
        raise _misfit(lora, f"keys that begin with {parts}, as {kind.__name__} has them", weights)
    return found


def _require_factors(lora: Lora, path: Path) -> None:
    """Refuse what diffusers leaves out without a warning: changes of whole weights, and what belongs to products that
    are not there.

    Raises:
        InputError: the file cannot be read, or has such remains.
        UnsupportedError: it has such tensors.
    """
    with _told(lora), safe_open(path, "numpy") as file:
        keys = list(file.keys())
    whole = [key for key in keys if key.endswith((".diff", ".diff_b"))]
    projection = [key for key in keys if "time_projection" in key]
    if projection and not any(key.endswith(".weight") for key in projection):  # diffusers drops them: Wan
        raise _misfit(lora, "the products of time_projection", dict.fromkeys(projection))
    if whole:
        raise UnsupportedError(
            f"{lora.source}: expected products B A alone, got changes of whole weights: {whole[0]}{_more(whole)}",
            fix="give LoRA weights without them, or a model that they were fused into: --weights",
        )


def _in_peft_form(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Keys as diffusers' loader converts them for a network: `MODULE.lora_A.weight`."""
    if isinstance(network, diffusers.ModelMixin):
        if any("lora_A" in key for key in weights):
            return dict(weights)
        return convert_unet_state_dict_to_peft(dict(weights))  # type: ignore[no-any-return]
    found = convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(weights)))
    prefix = "" if hasattr(network, "text_model") else "text_model."
    return {key.removeprefix(prefix): its for key, its in found.items()}


def _require_modules(lora: Lora, part: str, network: nn.Module, weights: Mapping[str, Tensor]) -> set[str]:
    """Names of the modules that have these keys.

    Raises:
        InputError: a key is of none, or a tensor of another shape.
        UnsupportedError: a tensor is no factor of a product.
    """
    modules = dict(network.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if other := [key for key in weights if not key.endswith(TENSORS)]:
        raise UnsupportedError(
            f"{lora.source}: expected tensors that end with {', '.join(TENSORS)}, got {other[0]}"
            f"{_more(other)}: only products B A are fused",
            fix="give LoRA weights of that kind, or a model that they were fused into: --weights",
        )
    names = {key: next(key.removesuffix(f".{end}") for end in TENSORS if key.endswith(end)) for key in weights}
    example = f"modules that the {part} has, such as {', '.join((*linear[:1], *linear[-1:]))}"
    if strange := {key: weights[key] for key, name in names.items() if name not in modules}:
        raise _misfit(lora, example, strange)
    any_bias = any(key.endswith(TENSORS[2]) for key in weights)
    for name in dict.fromkeys(names.values()):
        own = getattr(modules[name], "weight", None)
        a, b = (weights.get(f"{name}.{end}") for end in TENSORS[:2])
        if own is None or a is None or b is None:
            raise _misfit(lora, f"lora_A and lora_B of {part} modules with a weight", {name: a if b is None else b})
        bias = weights.get(f"{name}.{TENSORS[2]}")
        if (bias is None) == any_bias or (bias is not None and bias.shape != b.shape[:1]):
            raise _misfit(lora, f"{TENSORS[2]} of all {part} modules or none, as long as lora_B", {name: bias})
        if (b.shape[0], *a.shape[1:]) != tuple(own.shape) or b.shape[1] != a.shape[0]:
            raise InputError(
                f"{lora.source}: expected B A of {list(own.shape)} for {part}.{name}, got {list(b.shape)} and "
                f"{list(a.shape)}",
                fix="give LoRA weights of this model",
            )
    return set(names.values())


def _misfit(lora: Lora, expected: str, keys: Mapping[str, Any]) -> InputError:
    got = f"{next(iter(keys))}{_more(list(keys))}" if keys else "none"
    return InputError(f"{lora.source}: expected {expected}, got {got}", fix="give LoRA weights of this model")


def _more(keys: Sequence[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


@contextlib.contextmanager
def _told(lora: Lora) -> Iterator[None]:
    """Turn what diffusers raises or warns of while it reads LoRA weights into one line: it warns of what it drops."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("diffusers.loaders")
    level, propagate = log.level, log.propagate
    log.setLevel(logging.WARNING)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"{lora.source}: {first_line(error)}", fix=install_command("build")) from None
    except BROKEN as error:
        raise InputError(
            f"{lora.source}: expected LoRA weights of this model, got: {first_line(error)}",
            fix="give LoRA weights of this model",
        ) from None
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
        log.setLevel(level)
    dropped = [message for message in messages if not message.startswith("No LoRA keys associated")]
    if dropped:
        raise InputError(
            f"{lora.source}: expected LoRA weights that diffusers takes whole: {shortened(dropped[0], MAX_LINE)}",
            fix="give LoRA weights of this model, without DoRA or other parts",
        )
