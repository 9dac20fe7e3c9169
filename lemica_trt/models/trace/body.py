"""The loop's body as a torch module: what is exported for each step.

The network has the pipeline's precision. What is done with its outputs is computed in fp32, guidance and what the
trunk adds to its stream, except behind a cast of the pipeline's own to half precision: that is in the program too.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.trace import TraceTrunk
from lemica_trt.models.trace.program import Program, run_program
from lemica_trt.models.trace.tape import plain
from lemica_trt.models.trace.trunk import added, difference


@dataclass(frozen=True)
class Line:
    """A slot that is factor·v + offset: of the timestep (`timestep`) or of the guidance scale (`guidance`).

    `through`: v is rounded to it first, as FLUX in bf16 does with its timesteps before it divides them. `rounded`: the
    slot is rounded to it, whatever its own dtype.
    """

    of: str
    factor: float
    offset: float
    through: torch.dtype | None = None
    rounded: torch.dtype | None = None


@dataclass(frozen=True)
class Rows:
    """A slot that is a condition.

    Attributes:
        condition: name.
        rows: the rows of it, in order; row 0 is the negative prompt's where there is guidance.
        axis: of the rows in the slot; None: it is one row, without that dimension.
    """

    condition: str
    rows: tuple[int, ...]
    axis: int | None = 0


@dataclass(frozen=True)
class Prefix:
    """A slot that is the same for all prompts, cut to the length of the text.

    Attributes:
        condition: name of a condition [rows, tokens, …] that has this length.
        values: at the longest text, [tokens, …].
    """

    condition: str
    values: Tensor


class Network(nn.Module):
    """A transformer whose trunk can be seen, and left out.

    Args:
        transformer: of the pipeline.
        trunk: with one stream or several.
    """

    def __init__(self, transformer: nn.Module, trunk: TraceTrunk) -> None:
        super().__init__()
        self.transformer = transformer
        emptied = copy.copy(transformer)
        emptied._modules = {**transformer._modules, **{name: nn.ModuleList() for name in trunk.lists}}
        self._emptied = (emptied,)  # a tuple, so that modules are not registered twice
        self._streams = [(transformer.get_submodule(name), key) for name, key in trunk.streams]

    def whole(self, arguments: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and what the trunk added to each of its streams, fp32."""
        seen: list[list[Tensor]] = [[] for _ in self._streams]

        def watch(number: int, stream: Tensor) -> Tensor:
            seen[number].append(stream)
            return stream

        with self._hooked(watch):
            outputs = _tensors(self.transformer(**arguments))
            self._emptied[0](**arguments)  # only what comes before the streams is kept of it in a graph
        for its in seen:
            if len(its) != 2:
                raise UnsupportedError(f"expected one call of the module behind the blocks, got {len(its) / 2:g}")
        return outputs, [difference(*its) for its in seen]

    def without(self, arguments: Mapping[str, Any], residual: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Outputs where fp32 residuals stand in for the trunk.

        Args:
            residual: a stream → its residual; called in the order of the streams.
        """
        with self._hooked(lambda _, stream: added(stream, residual(stream))):
            return _tensors(self._emptied[0](**arguments))

    @contextlib.contextmanager
    def _hooked(self, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """While it lasts, streams are what `change` makes of their number and of them."""
        with contextlib.ExitStack() as undo:
            for number, (module, key) in enumerate(self._streams):

                def enter(_: nn.Module, args: Any, kwargs: Any, number: int = number, key: str = key) -> Any:
                    if not key.isdecimal():
                        return args, {**kwargs, key: change(number, kwargs[key])}
                    at = int(key)
                    return (*args[:at], change(number, args[at]), *args[at + 1 :]), kwargs

                undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            yield


def _tensors(output: Any) -> list[Tensor]:
    """The tensors that a network returns, in order; numbers in fp32."""
    found = [leaf for leaf in pytree.tree_leaves(plain(output)) if isinstance(leaf, Tensor)]
    return [leaf.float() if leaf.is_floating_point() else leaf for leaf in found]


def joined_states(states: Sequence[Tensor]) -> Tensor:
    """Latents of several states as one, [b, n]; those of one state as they are. A sampler's step is the same for each
    element."""
    return states[0] if len(states) == 1 else torch.cat([state.flatten(1) for state in states], 1)


def split_states(x: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Latents of each state.

    Args:
        x: as `joined_states` gives them.
        like: a tensor of the shape and dtype of each state.
    """
    if len(like) == 1:
        return [x.to(like[0].dtype)]
    parts = torch.split(x, [its.shape[1:].numel() for its in like], 1)
    return [part.reshape(x.shape[0], *its.shape[1:]).to(its.dtype) for part, its in zip(parts, like)]


def joined_residuals(own: Sequence[Tensor], rows: int) -> Tensor:
    """Residuals of all streams and calls as one, [rows, …]; see `Step.residual`."""
    if len({residue.shape[1:] for residue in own}) == 1:
        whole = torch.cat(list(own))
        if whole.shape[0] % rows == 0:
            return whole.reshape(rows, whole.shape[0] // rows, *whole.shape[1:])
    return torch.cat([residue.flatten() for residue in own]).reshape(rows, -1)


class Residuals:
    """`joined_residuals`, taken apart in the order in which they were joined: a stream → its residual.

    Args:
        joined: of one request.
    """

    def __init__(self, joined: Tensor) -> None:
        self._left = joined.flatten()

    def __call__(self, stream: Tensor) -> Tensor:
        own, self._left = self._left[: stream.numel()], self._left[stream.numel() :]
        return own.reshape(stream.shape)


class Step(NamedTuple):
    """What a body makes of one request.

    Attributes:
        output: guided, fp32 [1, *latent_shape]; of all states (`joined_states`).
        guidance_term: what a guidance scale above 1 adds to it, fp32 [1, *latent_shape]; zeros if not asked for.
        residual: of the trunk, fp32 [R, …]: of all calls, whose own first dimension may be a multiple (Latte's has
            frames); [R, n] where streams have several shapes (LTX-2).
    """

    output: Tensor
    guidance_term: Tensor
    residual: Tensor


class Body(nn.Module):
    """A program with its slots filled in.

    Args:
        program: of every step.
        slots: number of a slot → what it is; others are constants, with the program's own values.
        network: called by it.
        branches: whether to give guidance terms; no network may follow the guidance scale then.

    Attributes:
        calls: of the network.
    """

    def __init__(
        self, program: Program, slots: Mapping[int, Line | Rows | Prefix], network: Network, *, branches: bool
    ) -> None:
        super().__init__()
        self.network = network
        self._branches = branches
        self.calls = len(program.calls)
        self._program, self._lines = program, dict(slots)
        for k, value in enumerate(program.values):
            slot = slots.get(k)
            if isinstance(value, Tensor) and (slot is None or isinstance(slot, Prefix)):
                constant = slot.values if isinstance(slot, Prefix) else value
                self.register_buffer(f"constant_{k}", constant, persistent=False)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        in_scale: Tensor,
        guidance: Tensor | None,
        conditions: Mapping[str, Tensor],
        residual: Tensor | None = None,
    ) -> Step:
        """One request.

        Args:
            x: fp32 [1, *latent_shape].
            timestep, in_scale, guidance: fp32 [1]; guidance: None where it is baked.
            conditions: by name, [R, …].
            residual: as in `Step`, in place of the trunk; None: the trunk runs.
        """
        own: list[Tensor] = []
        returned: list[list[Tensor]] = []
        given = None if residual is None else Residuals(residual)

        def call(name: str, arguments: Any) -> list[Tensor]:
            if given is not None:
                outputs = self.network.without(arguments, given)
            else:
                outputs, residues = self.network.whole(arguments)
                own.extend(residues)
            if self._branches:
                returned.append([output.clone() for output in outputs])  # what follows may write into them
            return outputs

        def output(guidance: Tensor | None, call: Callable[[str, Any], list[Tensor]]) -> Tensor:
            sources = {"timestep": timestep, "guidance": guidance}
            values = [self._value(k, value, sources, conditions) for k, value in enumerate(self._program.values)]
            made, _ = run_program(
                self._program,
                split_states(x, self._program.x),
                values,
                call,
                lambda state, it: (in_scale * it.float()).to(it.dtype),
            )
            return joined_states([made[state].float() for state in sorted(made)])

        guided = output(guidance, call)
        term = torch.zeros_like(guided)
        if self._branches and guidance is not None:  # at scale 1 the output is the conditional one
            again = iter(returned)
            term = guided - output(torch.ones_like(guidance), lambda name, arguments: next(again))
        rows = 1 if guidance is None else 2
        if not own:
            return Step(guided, term, x)
        return Step(guided, term, joined_residuals(own, rows))

    def _value(self, k: int, value: Any, sources: Mapping[str, Tensor | None], conditions: Mapping[str, Tensor]) -> Any:
        slot = self._lines.get(k)
        if slot is None:
            return self.get_buffer(f"constant_{k}") if isinstance(value, Tensor) else value
        if isinstance(slot, Prefix):
            return self.get_buffer(f"constant_{k}")[: conditions[slot.condition].shape[1]]
        if isinstance(slot, Rows):
            whole = conditions[slot.condition]
            rows = (
                whole if slot.rows == tuple(range(whole.shape[0])) else torch.cat([whole[i : i + 1] for i in slot.rows])
            )
            return (rows[0] if slot.axis is None else rows.movedim(0, slot.axis)).to(value.dtype)
        source = sources[slot.of]
        assert source is not None
        return on_line(slot, source, value)


def on_line(line: Line, source: Tensor, value: Any) -> Any:
    """What a slot is at a timestep or guidance scale.

    Args:
        source: fp32 [1].
        value: of the slot in a recording: a tensor, whose shape and dtype the result has, or a number.
    """
    source = source if line.through is None else source.to(line.through).float()
    found = line.factor * source + line.offset
    if line.rounded is not None and line.rounded != getattr(value, "dtype", None):
        found = found.to(line.rounded).float()
    if not isinstance(value, Tensor):
        return found[0]
    found = found if value.dtype.is_floating_point else found.round()
    return found.to(value.dtype).expand(value.shape) if value.dim() else found.to(value.dtype)[0]


def fitted_line(
    of: str, sources: Sequence[float], values: Sequence[float], name: str, *, dtypes: Sequence[torch.dtype] = ()
) -> Line:
    """The straight line through points.

    Args:
        dtypes: half precisions that the values, or sources and values, may be rounded to: then to the bit.

    Raises:
        UnsupportedError: they are on none, rounded or not.
    """
    x, y = np.asarray(sources, np.float64), np.asarray(values, np.float64)
    factor, offset = _least_squares(x, y)
    size = max(float(np.abs(y).max()), 1e-9)
    if np.allclose(factor * x + offset, y, rtol=1e-5, atol=1e-5 * size):
        return Line(of, factor, offset)
    for digits, dtype, through in itertools.product(range(1, 7), dtypes, (None, *dtypes)):
        its = x if through is None else _rounded(x, through)
        for line in _short_lines(its, y, digits):
            if np.array_equal(_rounded(line[0] * its + line[1], dtype), y):
                return Line(of, *line, through, dtype)
    raise UnsupportedError(f"{name} is no straight line in the {of}")


def _least_squares(x: Any, y: Any) -> tuple[float, float]:
    """Factor and offset."""
    if not np.ptp(x):
        return 0.0, 0.0
    factor, offset = np.polyfit(x, y, 1)
    return float(factor), float(offset)


def _short_lines(x: Any, y: Any, digits: int) -> list[tuple[float, float]]:
    """Lines near points whose factor has so many digits: what a line may have been before its values were rounded."""
    factor = float(f"{_least_squares(x, y)[0]:.{digits}g}")
    offset = float(np.mean(y - factor * x))
    return [(factor, near) for near in dict.fromkeys([0.0, *(round(offset, places) for places in range(5))])]


def _rounded(values: Any, dtype: torch.dtype) -> Any:
    """Numbers as a dtype has them, float64; to float32 first, as the runtime's coefficients are."""
    return torch.from_numpy(np.asarray(values)).float().to(dtype).double().numpy()
