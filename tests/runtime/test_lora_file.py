"""Files of LoRA weights: every layout that is read, and what is refused, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import content, written

from lemica_trt.backends.base import encode
from lemica_trt.core.errors import InputError, LemicaError, UnsupportedError
from lemica_trt.runtime.lora_file import METADATA, LoraFile, factors_of

pytestmark = pytest.mark.null

MODULES = {"blocks.0.to_q": (4, 6), "proj": (5, 3, 2, 2)}
_draw = np.random.default_rng(1)
A, B = (_draw.standard_normal(shape).astype(np.float32) for shape in ((2, 6), (4, 2)))
CONV_A, CONV_B = (_draw.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 2, 2), (5, 2, 1, 1)))
NAME = "transformer.blocks.0.to_q"
PEFT = {f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B}
KOHYA = {"lora_unet_blocks_0_to_q.lora_down.weight": A, "lora_unet_blocks_0_to_q.lora_up.weight": B}


def settings(**values: Any) -> dict[str, str]:
    return {METADATA: json.dumps({f"transformer.{name}": its for name, its in values.items()})}


READ: dict[str, tuple[dict[str, Any], dict[str, str] | None, float]] = {
    "peft": (PEFT, None, 1.0),
    "alpha": ({**PEFT, f"{NAME}.alpha": np.float32(3)}, None, 1.5),
    "lora_down": ({f"{NAME}.lora_down.weight": A, f"{NAME}.lora_up.weight": B}, None, 1.0),
    "lora.down": ({f"{NAME}.lora.down.weight": A, f"{NAME}.lora.up.weight": B}, None, 1.0),
    "kohya": ({**KOHYA, "lora_unet_blocks_0_to_q.alpha": np.float32(1)}, None, 0.5),
    "metadata": (PEFT, settings(r=2, lora_alpha=8), 4.0),
    "rslora": (PEFT, settings(r=2, lora_alpha=8, use_rslora=True), 8 / 2**0.5),
    "pattern": (PEFT, settings(r=2, lora_alpha=8, alpha_pattern={"to_q": 6}), 3.0),
    "another pattern": (PEFT, settings(r=2, lora_alpha=8, alpha_pattern={"q": 6}), 4.0),
}


@pytest.mark.parametrize("case", READ)
def test_layouts(case: str, tmp_path: Path) -> None:
    tensors, metadata, factor = READ[case]
    found = factors_of(LoraFile(written(tmp_path / "x.safetensors", tensors, metadata)), "transformer", MODULES)
    assert list(found) == ["blocks.0.to_q"]
    its = found["blocks.0.to_q"]
    assert np.array_equal(its.a, A) and np.array_equal(its.b, B) and its.factor == pytest.approx(factor)


def test_convolutions_and_precisions(tmp_path: Path) -> None:
    half = {
        f"{NAME}.lora_A.weight": A.astype(np.float16),
        f"{NAME}.lora_B.weight": encode(B, "bf16"),
        "transformer.proj.lora_A.weight": CONV_A.astype(np.float64),
        "transformer.proj.lora_B.weight": CONV_B,
    }
    found = factors_of(LoraFile(written(tmp_path / "x.safetensors", half)), "transformer", MODULES)
    assert found["blocks.0.to_q"].a == pytest.approx(A, rel=1e-3, abs=1e-4)
    assert found["blocks.0.to_q"].b == pytest.approx(B, rel=1e-2)
    assert np.array_equal(found["proj"].a, CONV_A) and np.array_equal(found["proj"].b, CONV_B)
    assert all(array.dtype == np.float32 for its in found.values() for array in (its.a, its.b))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str] | None, type[LemicaError], str]] = {
    "others": (
        {key.replace("transformer.", "diffusion_model."): its for key, its in PEFT.items()}, None, InputError,
        r"modules that can be changed, such as transformer\.blocks\.0\.to_q, transformer\.proj, got "
        r"diffusion_model\.\S+ and 1 more → .*convert it with diffusers",
    ),
    "no such module": (
        {key.replace("to_q", "to_k"): its for key, its in PEFT.items()}, None, InputError, r"got transformer\.\S+to_k",
    ),
    "another trainer's": (
        {key.replace("blocks_0_to_q", "double_blocks_0_qkv"): its for key, its in KOHYA.items()}, None, InputError,
        r"got lora_unet_double_blocks_0_qkv\.\S+ and 1 more → .*convert it with diffusers",
    ),
    "text encoder": (
        {**PEFT, "text_encoder.q.lora_A.weight": A}, None, UnsupportedError,
        r"text_encoder\.q\.lora_A\.weight: text encoders are not changed in a finished bundle → fuse it",
    ),
    "shape": ({**PEFT, f"{NAME}.lora_A.weight": A[:, :-1]}, None, InputError, r"B A of \[4, 6\] for transformer\.b"),
    "rank": ({**PEFT, f"{NAME}.lora_A.weight": A[:1]}, None, InputError, r"got \[4, 2\] and \[1, 6\]"),
    "half": ({f"{NAME}.lora_A.weight": A}, None, InputError, "lora_A and lora_B of each module"),
    "twice": ({**PEFT, f"{NAME}.lora_down.weight": A}, None, InputError, "each factor once"),
    "nothing": ({}, None, InputError, "got none"),
    "bias": ({**PEFT, f"{NAME}.lora_B.bias": B[:, 0]}, None, UnsupportedError, r"products B A alone, got \S+bias"),
    "dora": ({**PEFT, f"{NAME}.dora_scale": B}, None, UnsupportedError, r"products B A alone, got \S+dora_scale"),
    "dora by metadata": (PEFT, settings(use_dora=True), UnsupportedError, "got DoRA"),
    "pattern": (PEFT, settings(alpha_pattern={"(a+)+b": 2}), UnsupportedError, "alphas by a pattern"),
    "metadata": (PEFT, {METADATA: "[1]"}, InputError, f"expected {METADATA} as diffusers writes it"),
    "alpha": ({**PEFT, f"{NAME}.alpha": B}, None, InputError, "one number as alpha"),
    "nan": ({**PEFT, f"{NAME}.lora_B.weight": B * np.nan}, None, InputError, "finite numbers"),
    "whole numbers": (
        {**PEFT, f"{NAME}.lora_B.weight": B.astype(int)}, None, UnsupportedError, "floats in .*, got I64"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_fits_nothing(case: str, tmp_path: Path) -> None:
    tensors, metadata, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as raised:
        factors_of(LoraFile(written(tmp_path / "x.safetensors", tensors, metadata)), "transformer", MODULES)
    assert "\n" not in str(raised.value) and "→" in str(raised.value)


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "header cut": lambda data: data[:30],
    "no JSON": lambda data: _header(b"{nothing"),
    "deep": lambda data: _header(b'{"a":' + b"[" * 100_000),
    "a huge header": lambda data: b"\xff" * 8 + data[8:],
    "outside": lambda data: _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "negative": lambda data: _header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}'),
    "huge": lambda data: _header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "more": lambda data: _header(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":1}}') + data[:-1],
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(DAMAGED[case](content(PEFT)))
    if case == "more":  # what newer writers may add to an entry is no harm
        assert LoraFile(path).keys == ("a",)
        return
    with pytest.raises(InputError, match="expected a safetensors file with") as raised:
        LoraFile(path)
    assert "\n" not in str(raised.value)


def test_what_is_no_file_of_that_kind(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path, written(tmp_path / "x.bin", PEFT)):
        with pytest.raises(InputError, match=r"in a \.safetensors file on this machine"):
            LoraFile(path)
