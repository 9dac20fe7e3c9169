"""Exceptions: networks that are rewritten, and held against diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.models.copies import Copies
from lemica_trt.models.families import hidream, hunyuanvideo_15, mochi, rewrites, rewritten
from lemica_trt.models.trace.arguments import Arguments
from lemica_trt.models.trace.program import programs
from lemica_trt.models.trace.runs import record
from lemica_trt.models.trace.slots import Run
from lemica_trt.testing.pipelines import CASES, tiny_pipeline

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


def require_same(name: str) -> None:
    """As a build does, of one recorded call."""
    pipeline = tiny_pipeline(name)
    tape, _ = record(pipeline, Arguments(pipeline, CASES[name].request))
    run = Run(tape, programs(tape, {"transformer"}), {})
    Copies(pipeline.components, ["transformer"]).require_same(type(pipeline).__name__, [run])


def changed(kind: Any, how: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewritten class of which every output is something else."""
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: how(own(self, *args, **kwargs)))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("mochi", mochi.MaskedAttention, r"transformer\.transformer_blocks\.0\.attn1 is 5\.0e-01"),
        ("hidream", hidream.DenseExperts, r"transformer.* is "),
        ("hunyuanvideo-1.5", hunyuanvideo_15.MaskedHunyuanVideo15, r"transformer is 5\.0e-01"),
    ],
)
def test_a_wrong_rewrite_is_refused(name: str, kind: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that the network's own output does not show: the gates of Mochi's tiny pipeline are nearly closed."""
    require_same(name)
    changed(kind, lambda given: pytree.tree_map(lambda value: value * 1.5, given), monkeypatch)
    with pytest.raises(UnsupportedError, match=f"cannot be built: its rewritten {message}.* of the largest off"):
        require_same(name)


def test_a_rewrite_that_reads_values_or_gives_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for how, message in (
        (
            lambda given: given if given[0].max().item() > -1e9 else (),
            r"transformer reads values in Python: \['item'\]",
        ),
        (lambda given: given[0] @ given[0], "transformer fails: "),
    ):
        with monkeypatch.context() as patch:
            changed(mochi.MaskedAttention, how, patch)
            with pytest.raises(UnsupportedError, match=f"its rewritten {message}"):
                require_same("mochi")
