"""A file of LoRA weights, read without PyTorch: safetensors → pairs of factors.

Layouts that are read, for a module M of the transformer by its name in diffusers:

    transformer.M.lora_A.weight, .lora_B.weight     diffusers with peft; alpha in the metadata or as transformer.M.alpha
    transformer.M.lora.down.weight, .lora.up.weight, and .lora_down.weight, .lora_up.weight     older ones
    lora_transformer_M_.lora_down.weight, .alpha    kohya's, dots of M as underscores; lora_unet_, too

Other trainers name modules as the model's own repository does, and join or split them: diffusers converts those.

The file is nobody's: sizes are bounded, offsets checked, and nothing of it is run (safetensors, `format.md`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from lemica_trt.backends.base import Array, decode
from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.core.text import shortened

MAX_FILE = 8 << 30
MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

METADATA = "lora_adapter_metadata"
"""Where diffusers puts peft's configuration (`LORA_ADAPTER_METADATA_KEY`), each key with its part before it."""

CONVERT = (
    "convert it with diffusers (CLASS.lora_state_dict, CLASS.save_lora_weights), or fuse it: lemica-trt build --lora"
)
"""What to do with a file of another layout."""

FACTORS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_down.weight": "a",
    ".lora_up.weight": "b",
    ".lora.down.weight": "a",
    ".lora.up.weight": "b",
    ".alpha": "alpha",
}
"""How keys end → what the tensor is."""

KOHYA = ("lora_transformer_", "lora_unet_")


class Factors(NamedTuple):
    """The change of one weight, B A · factor.

    Attributes:
        key: of the file, for messages.
        a: float32 [rank, …], b: float32 [out, rank, …].
        factor: alpha / rank, or alpha / √rank; 1 where no alpha is given.
    """

    key: str
    a: Array
    b: Array
    factor: float


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class LoraFile:
    """Tensors of a .safetensors file, float32 when they are asked for.

    Args:
        path: the file.

    Attributes:
        sha256: of the file, hex.
        metadata: its own text.

    Raises:
        InputError: it cannot be read, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".safetensors" or not path.is_file():
            raise InputError(
                f"{path}: expected LoRA weights in a .safetensors file on this machine",
                fix="give the file; one of the hub: hf download OWNER/NAME FILE.safetensors",
            )
        self.path = path
        try:
            if path.stat().st_size > MAX_FILE:
                raise self._broken(f"a file of at most {MAX_FILE >> 30} GiB")
            self._data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from None
        self.sha256 = hashlib.sha256(self._data).hexdigest()
        length = int.from_bytes(self._data[:8], "little")
        if not 2 <= length <= min(MAX_HEADER, len(self._data) - 8):
            raise self._broken(f"a header of at most {MAX_HEADER >> 20} MiB")
        try:
            raw = msgspec.json.decode(self._data[8 : 8 + length], type=dict[str, msgspec.Raw])
            self.metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
            self._entries = {name: msgspec.json.decode(its, type=_Entry) for name, its in raw.items()}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._broken(f"a header of its format ({shortened(str(error), 80)})") from None
        self._start = 8 + length
        self._check()

    def _check(self) -> None:
        if len(self._entries) > MAX_TENSORS:
            raise self._broken(f"at most {MAX_TENSORS} tensors")
        for name, its in self._entries.items():
            first, last = its.data_offsets
            width = np.dtype(DTYPES[its.dtype]).itemsize if its.dtype in DTYPES else None
            size = last - first if width is None else math.prod(its.shape) * width
            inside = 0 <= first <= last <= len(self._data) - self._start
            if not inside or min(its.shape, default=1) < 0 or len(its.shape) > 8 or last - first != size:
                raise self._broken(f"tensors inside the file, not {shortened(name, 80)}")

    def _broken(self, expected: str) -> InputError:
        return InputError(f"{self.path.name}: expected a safetensors file with {expected}", fix="get the file again")

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors, sorted."""
        return tuple(sorted(self._entries))

    def tensor(self, key: str) -> Array:
        """A tensor as float32.

        Raises:
            UnsupportedError: it is of whole numbers or eight bits.
            InputError: it is not finite.
        """
        its = self._entries[key]
        if its.dtype not in DTYPES:
            raise UnsupportedError(f"{self.path.name}: expected floats in {key}, got {its.dtype}", fix=CONVERT)
        first, last = (self._start + offset for offset in its.data_offsets)
        values = np.frombuffer(self._data[first:last], DTYPES[its.dtype]).reshape(its.shape)
        found = decode(values, "bf16") if its.dtype == "BF16" else values.astype(np.float32)
        if not np.isfinite(found).all():
            raise InputError(f"{self.path.name}: expected finite numbers in {key}", fix="get the file again")
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._entries[key].shape)


def factors_of(file: LoraFile, part: str, modules: Mapping[str, tuple[int, ...]]) -> dict[str, Factors]:
    """The factors of a file by module; each of its tensors must be of one.

    Args:
        part: what keys of the transformer begin with.
        modules: those of the transformer that can be changed → shape of their weight.

    Raises:
        InputError: a tensor is of no such module, has another shape, or stands alone.
        UnsupportedError: a tensor is of a text encoder, or no factor of a product.
    """
    found = _by_module(file, part, modules)
    settings = _peft_settings(file, part)
    result = {}
    for module, its in sorted(found.items()):
        if "a" not in its or "b" not in its:
            raise _misfit(file, [next(iter(its.values()))], f"lora_A and lora_B of each module of the {part}")
        a, b, whole = file.shape(its["a"]), file.shape(its["b"]), modules[module]
        if len(a) < 2 or len(b) < 2 or (b[0], *a[1:]) != whole or b[1] != a[0] or math.prod(b) != b[0] * b[1]:
            raise InputError(
                f"{file.path.name}: expected B A of {list(whole)} for {part}.{module}, got {list(b)} and {list(a)}",
                fix="give LoRA weights of this model",
            )
        factor = _factor(file, its, settings, module, max(a[0], 1))
        result[module] = Factors(its["a"], file.tensor(its["a"]), file.tensor(its["b"]), factor)
    return result


def _by_module(file: LoraFile, part: str, modules: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    """Module → what (`FACTORS`) → key."""
    flat = {name.replace(".", "_"): name for name in modules}
    found: dict[str, dict[str, str]] = {}
    strange, others = list[str](), list[str]()
    for key in file.keys:
        if key.startswith(("text_encoder", "lora_te")):
            raise UnsupportedError(
                f"{file.path.name}: expected LoRA weights of the {part} alone, got {key}: text encoders are not "
                "changed in a finished bundle",
                fix="fuse it when the bundle is built: lemica-trt build --lora",
            )
        ending = next((end for end in FACTORS if key.endswith(end)), None)
        if ending is None:
            others.append(key)
            continue
        name = key.removesuffix(ending)
        prefix = next((start for start in KOHYA if name.startswith(start)), None)
        module = name.removeprefix(f"{part}.") if prefix is None else flat.get(name.removeprefix(prefix), "")
        if module not in modules or (prefix is None and not name.startswith(f"{part}.")):
            strange.append(key)
        elif found.setdefault(module, {}).setdefault(FACTORS[ending], key) != key:
            raise _misfit(file, [key], "each factor once")
    if strange or not (found or others):
        examples = [f"{part}.{name}" for name in (*list(modules)[:1], *list(modules)[-1:])]
        raise _misfit(file, strange, f"modules that can be changed, such as {', '.join(dict.fromkeys(examples))}")
    if others:
        raise UnsupportedError(
            f"{file.path.name}: expected products B A alone, got {shortened(others[0], 120)}{_more(others)}",
            fix="fuse it when the bundle is built: lemica-trt build --lora; or give LoRA weights without them",
        )
    return found


def _peft_settings(file: LoraFile, part: str) -> dict[str, Any]:
    """peft's configuration of a part, where diffusers wrote it.

    Raises:
        InputError: it is damaged.
        UnsupportedError: DoRA, or other alphas by pattern that are no plain names.
    """
    if METADATA not in file.metadata:
        return {}
    try:
        whole = json.loads(file.metadata[METADATA])
        found = {key.removeprefix(f"{part}."): its for key, its in whole.items() if key.startswith(f"{part}.")}
        patterns = found.get("alpha_pattern") or {}
        numbers = [found.get("lora_alpha", 1), *patterns.values()]
        valid = all(isinstance(its, (int, float)) and math.isfinite(its) for its in numbers)
    except (ValueError, AttributeError, RecursionError, OverflowError):
        valid = False
    if not valid:
        raise InputError(f"{file.path.name}: expected {METADATA} as diffusers writes it", fix=CONVERT)
    if found.get("use_dora") or not all(re.fullmatch(r"[\w.]+", name) for name in patterns):
        what = "DoRA" if found.get("use_dora") else "alphas by a pattern"
        raise UnsupportedError(f"{file.path.name}: expected products B A alone, got {what}", fix=CONVERT)
    return found


def _factor(file: LoraFile, its: Mapping[str, str], settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A is multiplied by."""
    if "alpha" in its:
        number = file.tensor(its["alpha"])
        if number.size != 1:
            raise _misfit(file, [its["alpha"]], "one number as alpha")
        return float(number.reshape(-1)[0]) / rank
    patterns = settings.get("alpha_pattern") or {}
    own = next((its for name, its in patterns.items() if module == name or module.endswith(f".{name}")), None)
    alpha = own if own is not None else settings.get("lora_alpha")
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _misfit(file: LoraFile, keys: Sequence[str], expected: str) -> InputError:
    got = f"{shortened(keys[0], 120)}{_more(keys)}" if keys else "none"
    return InputError(
        f"{file.path.name}: expected {expected}, got {got}", fix=f"give LoRA weights of this model, or {CONVERT}"
    )


def _more(keys: Sequence[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""
