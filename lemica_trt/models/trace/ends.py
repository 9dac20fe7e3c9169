"""What stands before and behind the loop, as torch modules: token ids → conditions, and final latents → frames.

Both are slices of a recording: the operators and calls between two tensors, run again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.models.trace.body import split_states
from lemica_trt.models.trace.program import Extraction, Node, Slot, Step, X
from lemica_trt.models.trace.replay import Network
from lemica_trt.models.trace.tape import Ref, Tape


class TapeSlice(nn.Module):
    """A part of a recording as a module; all that does not depend on its inputs is a constant.

    Args:
        tape: the recording.
        span: of its items.
        inputs: name → tensor.
        outputs: name → tensor.
        components: of the pipeline.
        held: names of inputs that only calls are given; for operators they are as they were recorded.
        counted: whether values that became Python's are as they were recorded, too.

    Raises:
        UnsupportedError: an output does not depend on any input, or a value of one became Python's.
    """

    def __init__(
        self,
        tape: Tape,
        span: tuple[int, int],
        inputs: Mapping[str, Ref],
        outputs: Mapping[str, Ref],
        components: Mapping[str, Any],
        held: Collection[str] = (),
        *,
        counted: bool = False,
    ) -> None:
        super().__init__()
        self._names = list(inputs)
        numbers = {name: {ref.id: k} for k, (name, ref) in enumerate(inputs.items())}
        free, of_calls = (
            {number: k for name, its in numbers.items() if (name in held) is is_held for number, k in its.items()}
            for is_held in (False, True)
        )
        cut = Extraction(tape, span, free, [], of_inputs=True, of_calls=of_calls)
        nodes = [_with_places(node, cut) for node in cut.nodes()]
        if cut.host and not counted:
            raise UnsupportedError(f"a value that follows {' and '.join(inputs)} is read by .{cut.host[0][0]}()")
        self._outputs = {name: cut.place(ref) for name, ref in outputs.items()}
        for name, place in self._outputs.items():
            if isinstance(place, Slot):
                raise UnsupportedError(f"{name} does not follow {' and '.join(inputs)}")
        self._nodes = _needed(nodes, self._outputs.values())
        self.read = [
            name
            for k, name in enumerate(inputs)
            if any(X(k) in pytree.tree_leaves(n.tree) for n in self._nodes.values())
        ]
        used = {
            leaf.index
            for node in self._nodes.values()
            for leaf in pytree.tree_leaves(node.tree)
            if isinstance(leaf, Slot)
        }
        self._numbers = {k: v for k, v in enumerate(cut.values) if k in used and not isinstance(v, Tensor)}
        for k, value in enumerate(cut.values):
            if k in used and isinstance(value, Tensor):
                self.register_buffer(f"constant_{k}", value, persistent=False)
        called = {str(node.what).partition(".")[0] for node in self._nodes.values() if node.kind == "call"}
        self._components = {name: components[name] for name in called}
        for name, component in self._components.items():
            self.add_module(f"component_{name}", component)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run it."""
        made: dict[int, list[Tensor]] = {}
        network = Network(self._components)
        given = [inputs.get(name) for name in self._names]

        def take(leaf: Any) -> Any:
            if isinstance(leaf, Node):
                return made[leaf.node][leaf.output]
            if isinstance(leaf, Slot):
                if leaf.index in self._numbers:
                    return self._numbers[leaf.index]
                return self.get_buffer(f"constant_{leaf.index}").clone()
            return given[leaf.state] if isinstance(leaf, X) else leaf

        for k, node in self._nodes.items():
            tree = pytree.tree_map(take, node.tree)
            if node.kind == "call":
                made[k] = network(node.what, tree)
            else:
                result = node.what(*tree[0], **tree[1])
                made[k] = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        return {name: take(place) for name, place in self._outputs.items()}


def _with_places(node: Step, cut: Extraction) -> Step:
    """A node that reads elements at a constant mask, with their places in its stead: no graph can follow a mask."""
    if node.what is not torch.ops.aten.index.Tensor:
        return node
    (source, indices), kwargs = node.tree
    found: list[Any] = []
    for index in indices:
        value = cut.values[index.index] if isinstance(index, Slot) else None
        masks = isinstance(value, Tensor) and value.dtype == torch.bool
        found += map(cut.constant, value.nonzero(as_tuple=True)) if masks else [index]  # type: ignore[union-attr]
    return Step(node.kind, node.what, ((source, found), kwargs))


def _needed(nodes: Sequence[Step], targets: Any) -> dict[int, Step]:
    """The nodes that outputs depend on, and those that write in place to what they depend on."""
    wanted = {leaf.node for leaf in targets if isinstance(leaf, Node)}
    while True:
        size = len(wanted)
        for k in sorted(wanted, reverse=True):
            wanted |= {leaf.node for leaf in pytree.tree_leaves(nodes[k].tree) if isinstance(leaf, Node)}
        for k, node in enumerate(nodes):
            if node.kind == "op" and node.what._schema.is_mutable:
                first = pytree.tree_leaves(node.tree[0])[:1]
                if any(isinstance(leaf, Node) and leaf.node in wanted for leaf in first):
                    wanted.add(k)
        if len(wanted) == size:
            return {k: nodes[k] for k in sorted(wanted)}


STATES = ("latents", "latents_2", "latents_3")
"""Inputs of a decoding, one of each state."""


class FramesDecoder(nn.Module):
    """Final latents → 8-bit frames; the VAE decoder graph.

    Args:
        decode: `STATES` → `pixels`, 0 … 1, [1, 3, height, width] or [1, frames, 3, height, width].
        states: final latents of each state in a recording.
    """

    def __init__(self, decode: TapeSlice, states: Sequence[Tensor]) -> None:
        super().__init__()
        self._decode = decode
        self._like = [torch.empty_like(state, device="meta") for state in states]

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`latents` fp32 [1, *latent_shape] → `frames` uint8 [1, frames, height, width, 3]."""
        states = split_states(inputs["latents"], self._like)
        pixels = self._decode(dict(zip(STATES, states)))["pixels"].float()
        pixels = pixels[:, None] if pixels.dim() == 4 else pixels
        return {"frames": (pixels * 255).round().clamp(0, 255).permute(0, 1, 3, 4, 2).to(torch.uint8)}
