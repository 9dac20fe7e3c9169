"""LoRA weights put into a finished bundle when it is loaded: W + scale · alpha / rank · B A, in float32, rounded to
the graph's dtype once.

A bundle knows which initializer of which graph is which weight (`ir.graphs.GraphSpec.weights`); everything else about
the files is refused before an engine loads. What LoRA weights were fused when the bundle was built stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from lemica_trt.backends.base import Array, Change
from lemica_trt.backends.options import options_class
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.engine import NONE, EngineEntry
from lemica_trt.ir.graphs import DEFAULT_EXPERT, Role, Weight
from lemica_trt.ir.profile import Lora
from lemica_trt.runtime.lora_file import Factors, LoraFile, factors_of

BUILD = "fuse them when a bundle is built: lemica-trt build --lora"


class Added(NamedTuple):
    """LoRA weights, checked.

    Attributes:
        loras: with the digests of their files.
        changes: graph → initializer → what becomes of it.
    """

    loras: tuple[Lora, ...]
    changes: dict[Role, dict[str, Change]]


def read_loras(bundle: Bundle, entry: EngineEntry, loras: Sequence[Lora]) -> Added:
    """Read files of LoRA weights and hold them against a bundle.

    Args:
        entry: the engines that will run.
        loras: in their order; of files on this machine.

    Raises:
        UnsupportedError: weights of these engines or of this bundle cannot be changed; or as `lora_file`.
        InputError: a file cannot be read or fits nothing.
    """
    weights = _weights(bundle, entry)
    changes: dict[tuple[str, str], list[tuple[Factors, float]]] = {}
    found = []
    for lora in loras:
        part = _part(bundle, lora, weights)
        own = {its.module: its.shape for table in weights.values() for its in table.values() if its.part == part}
        file = LoraFile(Path(lora.source))
        for module, factors in factors_of(file, _prefix(part), dict(sorted(own.items()))).items():
            changes.setdefault((part, module), []).append((factors, lora.scale))
        found.append(msgspec.structs.replace(lora, sha256=file.sha256))
    by_graph = {
        role: {name: _change(its, changes[its.part, its.module]) for name, its in table.items()
               if (its.part, its.module) in changes}
        for role, table in weights.items()
    }  # fmt: skip
    return Added(tuple(found), {role: its for role, its in by_graph.items() if its})


def _weights(bundle: Bundle, entry: EngineEntry) -> dict[Role, dict[str, Weight]]:
    """Graph → its weights.

    Raises:
        UnsupportedError: they cannot be changed.
    """
    if entry.key.quantization != NONE:
        raise UnsupportedError(
            f"LoRA weights are added to engines that are not quantised, these are {entry.key.title}",
            fix=f"name other engines of the bundle, or {BUILD}, and quantise that one",
        )
    if not options_class(entry.key.backend).changes_weights:
        raise UnsupportedError(
            f"LoRA weights are added to engines of onnxruntime, these are of {entry.key.backend}, whose weights are "
            "part of compiled code",
            fix=f"--backend onnxruntime, where the bundle has it, or {BUILD}",
        )
    found = {graph.role: dict(graph.weights) for graph in bundle.manifest.graphs.graphs if graph.weights}
    if not found:
        raise UnsupportedError(
            "the bundle does not say which weights its graphs have: it was built by an older lemica-trt",
            fix="build it again, with the same command; it names them then",
        )
    return found


def _part(bundle: Bundle, lora: Lora, weights: dict[Role, dict[str, Weight]]) -> str:
    """The component that a file changes.

    Raises:
        UnsupportedError: there is none.
    """
    parts = {its.part for table in weights.values() for its in table.values()}
    first = DEFAULT_EXPERT if DEFAULT_EXPERT in parts or len(parts) > 1 else min(parts)
    wanted = str(lora.expert) if lora.expert else first
    if wanted not in parts:
        raise UnsupportedError(
            f"expected a component {wanted} in the bundle, it has {', '.join(sorted(parts))}",
            fix="use --lora" if lora.expert else "use --lora-2",
        )
    return wanted


def _prefix(part: str) -> str:
    """What keys begin with: files name the first transformer whichever they are for."""
    return DEFAULT_EXPERT if part.startswith(DEFAULT_EXPERT) else part


def _change(weight: Weight, parts: Sequence[tuple[Factors, float]]) -> Change:
    def change(values: Array) -> Array:
        own = values.T if weight.transposed else values
        total = np.array(own, np.float32)
        for factors, scale in parts:
            rank = factors.a.shape[0]
            product = factors.b.reshape(-1, rank) @ factors.a.reshape(rank, -1)
            total += (product * np.float32(factors.factor * scale)).reshape(total.shape)
        return total.T if weight.transposed else total

    return change


def unmeasured(bundle: Bundle, loras: Sequence[Lora]) -> str:
    """What a user should know of plans that run with LoRA weights that they were not made with."""
    fused = "".join(f", on top of {lora.text}, which is fused" for lora in bundle.manifest.profile.loras or ())
    named = " and ".join(lora.text for lora in loras)
    return (
        f"LoRA weights added: {named}{fused}; plans and their quality were measured without them → to measure with "
        "them: lemica-trt build --lora"
    )
