"""Exceptions: networks that are rewritten, and held against diffusers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest

from lemica_trt.models.families import mochi, rewrites, rewritten
from lemica_trt.testing.pipelines import tiny_pipeline

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers and transformers


@pytest.mark.parametrize("rewrite", rewrites(), ids=lambda rewrite: rewrite.module.__name__)
def test_an_exception_is_of_a_class_that_is_there(rewrite: Any) -> None:
    file, _, place = rewrite.upstream.partition(": ")
    source = (Path(diffusers.__file__).parent / file).read_text(encoding="utf-8")
    assert all(f" {name.partition('.')[0]}" in source for name in place.split(", ")) and rewrite.reason
    assert rewrite.original.__module__.startswith("diffusers.")


def test_a_copy_shares_the_weights_and_leaves_the_network_as_it_was() -> None:
    network = tiny_pipeline("mochi").transformer
    kinds = [type(module) for module in network.modules()]
    copied = rewritten(network)
    assert copied is not network and [type(module) for module in network.modules()] == kinds
    assert mochi.MaskedAttention in {type(module) for module in copied.modules()}
    assert dict(copied.named_parameters()).keys() == dict(network.named_parameters()).keys()
    assert all(a is b for a, b in zip(copied.parameters(), network.parameters()))
    plain = tiny_pipeline("flux").transformer
    assert rewritten(plain) is plain
