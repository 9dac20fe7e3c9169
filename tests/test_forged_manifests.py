"""Manifests of a real build, changed and digested anew by somebody else: one line when they are read, in any case.

Numbers and names that stay within what a build could have written open, of course: a digest does not say who wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lemica_trt.backends.base import Settings, open_backend
from lemica_trt.bundle.manifest import manifest_from_json
from lemica_trt.core.errors import IntegrityError, LemicaError, UnsupportedError, UsageError

pytestmark = pytest.mark.null

GOLDEN = (Path(__file__).parent / "golden/bundle/manifest.json").read_bytes()

Edit = Callable[[Any], Any]


def _bucket(data: Any) -> Any:
    return data["buckets"]["9x64x64"]


def _graph(data: Any, role: str) -> Any:
    return next(graph for graph in _bucket(data)["graphs"]["graphs"] if graph["role"] == role)


def _layout(**changes: Any) -> Edit:
    return lambda data: _bucket(data)["graphs"]["layout"].update(changes)


def _shape(role: str, side: str, index: int, axis: int, size: Any) -> Edit:
    return lambda data: _graph(data, role)[side][index]["shape"].__setitem__(axis, size)


def _image(others: dict[str, Any] | None = None, role: str = "", **changes: Any) -> Edit:
    """Requests have an image; of a `role`, that graph is said to encode it."""
    picture = {"name": "image", "height": 64, "width": 64, "fit": "stretch", "by": "lanczos"}
    picture |= {"scale": [1.0, 1.0, 1.0], "offset": [0.0, 0.0, 0.0], **changes}

    def edit(data: Any) -> None:
        _bucket(data)["graphs"]["image"] = {"pictures": [picture], **(others or {})}
        if role:
            _graph(data, role)["role"] = "image_encoder"

    return edit


EDITS: dict[str, tuple[Edit, str]] = {
    "depth": (
        lambda data: _bucket(data)["graphs"]["layout"]["caches"][0].update(depth=64),
        r"coefficients: expected fp32 \[86\], got fp32 \[23\]",
    ),
    "history": (_layout(latent_history=9), r"coefficients: expected fp32 \[31\], got fp32 \[23\]"),
    "guided": (
        _layout(guided=False, guidance_history=0, output_history=12),
        "the step layout has no such tensor",
    ),
    "guidance terms": (_layout(guidance_history=7), "guidance_history must be 0 … output_history"),
    "condition": (_layout(conditions=[]), "prompt_embeds: the step layout has no such tensor"),
    "batch": (
        _shape("full", "inputs", 0, 0, 1),
        r"expected fp32 \['batch', 3, 16, 8, 8\], got fp32 \[1, 3, 16, 8, 8\]",
    ),
    "symbol": (_shape("full", "outputs", 3, 0, "rows"), "trunk: expected a multiple of batch, got 'rows'"),
    "endless": (_shape("full", "outputs", 3, 0, "9" * 99 + "*batch"), "trunk: expected a multiple of batch"),
    "frames": (_shape("vae_decoder", "outputs", 0, 1, 5), r"expected uint8 \[rows, 9, 64, 64, 3\], got uint8 \[1, 5"),
    "frames' dtype": (
        lambda data: _graph(data, "vae_decoder")["outputs"][0].update(dtype="fp16"),
        r"frames: expected uint8 \[rows, 9, 64, 64, 3\], got fp16",
    ),
    "length": (
        lambda data: data["encoders"][0].update(length=17),
        r"input_ids: expected int64 \[rows, 17\], got int64 \[1, 16\]",
    ),
    "mask": (
        lambda data: data["encoders"][0].update(mask=True),
        "expected inputs input_ids, attention_mask, got",
    ),
    "encoder": (lambda data: data["encoders"][0].update(graph="vae_decoder"), "expected inputs input_ids, got latents"),
    "embeddings": (
        _shape("text_encoder", "outputs", 0, 2, 65),
        r"prompt_embeds: expected fp32 \[rows, 16, 64\], got fp32 \[1, 16, 65\]",
    ),
    "picture": (_image(height=9000), r"image_encoder, image must be 1 … 8192, got 9000"),
    "picture's fit": (_image(fit="pad"), "Invalid enum value 'pad'"),
    "picture of": (_image(of="middle_image"), "Invalid enum value 'middle_image'"),
    "pictures": (lambda data: _bucket(data)["graphs"].update(image={"pictures": []}), "must have different names, got"),
    "draw": (_image({"draw": [1, 4]}), r"elements of draw must be 16 … 4\.29497e\+09, got 4"),
    "image encoder": (_image(role="vae_decoder"), "expected inputs image, got latents"),
    "dtype": (lambda data: _bucket(data)["engines"][0]["key"].update(dtype="bf16"), "9x64x64 must be of one dtype"),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_what_no_build_writes_is_refused_when_it_is_read(edit: Edit, message: str) -> None:
    data = json.loads(GOLDEN)
    edit(data)
    with pytest.raises(IntegrityError, match=message) as caught:
        manifest_from_json(json.dumps(data).encode(), where="manifest.json")
    assert str(caught.value).isprintable()


@pytest.mark.cpu
@pytest.mark.parametrize(
    "change",
    [
        {"options": {"threads": "x"}},
        {"options": {"threads": 1 << 40}},
        {"options": {"threads": -1}},
        {"options": {"provider": "elsewhere"}},
        {"options": {"colour": 1}},
        {"backend": "../onnxruntime"},
        {"backend": "tensorrt"},
        {"target": "sm_89"},
    ],
    ids=str,
)
def test_engine_keys_that_no_build_writes_open_no_backend(change: dict[str, Any]) -> None:
    data = json.loads(GOLDEN)
    _bucket(data)["engines"][0]["key"].update(change)
    manifest = manifest_from_json(json.dumps(data).encode(), where="manifest.json")
    with pytest.raises(UnsupportedError) as caught:
        open_backend(manifest.engines[0].key)
    assert str(caught.value).isprintable()


@pytest.mark.cpu
def test_options_that_are_left_out_have_their_defaults() -> None:
    data = json.loads(GOLDEN)
    del _bucket(data)["engines"][0]["key"]["options"]["threads"]
    key = manifest_from_json(json.dumps(data).encode(), where="manifest.json").engines[0].key
    open_backend(key)
    for threads in (1 << 40, -1):
        with pytest.raises(UsageError, match=r"--threads must be an integer, 0 … 1024"):
            open_backend(key, Settings(threads=threads))


def test_every_string_and_number_replaced_by_another_kind_is_refused_or_read() -> None:
    """One value after the other: nothing else than a refusal in one line."""
    strange = (None, True, -1, 1 << 70, 1.5, "", "../..", "x" * 10_000, [], {}, [[]])
    refused = 0
    for path in _paths(json.loads(GOLDEN)):
        for value in strange:
            data = json.loads(GOLDEN)
            parent = data
            for step in path[:-1]:
                parent = parent[step]
            parent[path[-1]] = value
            try:
                manifest_from_json(json.dumps(data).encode(), where="manifest.json")
            except LemicaError as error:
                refused += 1
                assert str(error).isprintable()
    assert refused > 1000


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all leaves of a JSON value; of a list, the first two elements stand for all."""
    if isinstance(value, dict):
        return [found for key in value for found in _paths(value[key], (*path, key))]
    if isinstance(value, list) and value:
        return [found for index in range(min(2, len(value))) for found in _paths(value[index], (*path, index))]
    return [path]
