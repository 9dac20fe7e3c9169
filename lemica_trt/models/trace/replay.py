"""A trace run again for another request: the check that every trace ends with, and how guidance enters the output.

In fp32 the loop is run whole, each step from what the trace made of the one before. A pipeline in half precision rounds
its latents in every step, so that two whole runs drift apart although each step is right: there every step begins with
the other run's own latents. What the networks and the sampler are given there is computed by the same operators from
the same numbers, and must agree as in fp32. What the sampler makes of it may differ by the rounding of one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.models.scheduler import counted_draws
from lemica_trt.models.trace.program import Program, run_program
from lemica_trt.models.trace.slots import Found, Run, same
from lemica_trt.models.trace.tape import Event, plain, refs

TOLERANCE = 1e-4
"""Largest deviation of the final latents in fp32, relative to the largest of them: the sampler runs in float64 from its
table, the pipeline's own in float32."""

ROUNDINGS = 2
"""Half precision: largest deviation of what a sampler makes of one step, in units of `torch.finfo(dtype).eps` (bf16:
2⁻⁷, fp16: 2⁻¹⁰), relative to the largest number that goes into it; and of guidance that the pipeline rounds: the line
through two rounded values is 1.8 units off where the check has its scale."""

GUIDANCE_TOLERANCE = 1e-6
"""Half precision: largest relative deviation from a straight line of guidance that is a number or fp32."""


class Deviation(NamedTuple):
    """How far a replay is from the run.

    Attributes:
        what: plural, for messages.
        size, allowed: relative.
    """

    what: str
    size: float
    allowed: float


def precision(base: Run) -> torch.dtype:
    """The coarsest of the dtypes of latents and of networks' outputs: float32, float16 or bfloat16."""
    tensors = [*base.programs[0].x]
    for item in base.tape.items[slice(*base.programs[-1].span)]:
        if isinstance(item, Event) and item.kind == "call":
            tensors += [base.tape.values[ref] for ref in refs(item.outs)]
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def tolerance(dtype: torch.dtype) -> float:
    """What numbers of a dtype may deviate by that were rounded to it, relative: `TOLERANCE`, or `ROUNDINGS` of a half
    precision."""
    exact = torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps
    return TOLERANCE if exact else ROUNDINGS * torch.finfo(dtype).eps


class Network:
    """Calls components by name, and keeps what they were given."""

    def __init__(self, components: Mapping[str, Any]) -> None:
        self._components = components
        self.given: list[tuple[str, Any]] = []

    def __call__(self, name: str, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Output tensors of a component (`transformer`), of a module in it, or of a method (`vae.encode`)."""
        self.given.append((name, arguments))
        component, _, path = name.partition(".")
        called = self._components[component]
        if path in ("encode", "decode"):
            called = getattr(called, path)
        elif path:
            called = called.get_submodule(path)
        positional = [value for key, value in arguments.items() if key.isdecimal()]
        output = called(*positional, **{key: value for key, value in arguments.items() if not key.isdecimal()})
        return [leaf for leaf in pytree.tree_leaves(plain(output)) if isinstance(leaf, Tensor)]


class Replay:
    """The loop, run from a trace.

    Args:
        kinds: steps of each kind.
        found: for each kind, what its slots are.
        ends: guidance parameter → the run in which it differs from the base run.
    """

    def __init__(
        self, base: Run, kinds: Sequence[Sequence[int]], found: Sequence[Sequence[Found]], ends: Mapping[str, Run]
    ) -> None:
        self._base, self._kinds, self._found = base, kinds, found
        self._ends = ends

    def _values(self, i: int, new: Run) -> list[Any]:
        """What the slots of step i are for a new request.

        Conditions are read from the new run's first step of this kind. Constants and columns are the base run's;
        guidance is the straight line through the base run's and another's. Nothing else of the new run is used.
        """
        kind = next(k for k, steps in enumerate(self._kinds) if i in steps)
        values = list(self._base.programs[i].values)
        for k, slot in enumerate(self._found[kind]):
            if slot.role == "condition":
                values[k] = new.programs[self._kinds[kind][0]].values[k]
            elif slot.role == "guidance":
                name = slot.of[-1]
                end, start = self._ends[name].scales[name], self._base.scales[name]
                part = (new.scales[name] - start) / (end - start)
                line = values[k] + part * (self._ends[name].programs[i].values[k] - values[k])
                values[k] = line.to(values[k].dtype) if isinstance(values[k], Tensor) else line
        return values

    def _guidance(self, i: int, new: Run, values: Sequence[Any]) -> list[Deviation]:
        """How far the guidance slots of step i are from what they are in the new run."""
        kind = next(k for k, steps in enumerate(self._kinds) if i in steps)
        found = []
        for k, slot in enumerate(self._found[kind]):
            if slot.role == "guidance":
                own = torch.as_tensor(new.programs[i].values[k])
                half = own.is_floating_point() and own.dtype.itemsize < 4
                size = relative(torch.as_tensor(values[k]), own)
                found.append(Deviation("guidance scales", size, tolerance(own.dtype) if half else GUIDANCE_TOLERANCE))
        return found

    def check(self, new: Run, tables: Sequence[SamplerTable], components: Mapping[str, Any]) -> float:
        """The largest deviation from a run's own latents, relative: of the final ones, or in half precision of those
        that any one step makes.

        Raises:
            UnsupportedError: it is more than is allowed, or a network is given something else in step 0, be its effect
                as small as it may; says where it begins. Or the run's latents are not finite.
        """
        dtype = precision(self._base)
        _require_finite(new, dtype)
        forced = dtype.itemsize < 4
        draws = [counted_draws(copied) for copied in new.tape.schedulers.values()]
        latents = [[x.double()] for x in new.programs[0].x]
        outputs: list[list[Tensor]] = [[] for _ in latents]
        first, found = "", list[Deviation]()
        for program in self._base.programs:
            i, network, values = program.index, Network(components), self._values(program.index, new)
            x = [history[-1].to(program.x[k].dtype) for k, history in enumerate(latents)]
            scale = lambda k, sample: (sample.double() * tables[k].rows[i].in_scale).to(sample.dtype)  # noqa: B023,E731
            with torch.no_grad():
                made, samples = run_program(program, x, values, network, scale)
            guidance = self._guidance(i, new, values) if forced else []
            found += guidance
            exact = forced and not any(one.size for one in guidance) and all(t.rows[i].in_scale == 1 for t in tables)
            first = first or _difference(network, new, i, exact=exact)
            for k, table in enumerate(tables):
                _check_sample(samples[k], x[k], program, dtype)
                output = made[k]
                if forced:
                    output = _model_output(new, i, k)
                    allowed = TOLERANCE if exact else tolerance(dtype)
                    found.append(Deviation("model outputs", relative(made[k], output), allowed))
                outputs[k].append(output.double())
                terms = _terms(table, i, latents[k], outputs[k])
                if noise := table.rows[i + 1].noise:
                    terms.append(noise * new.tape.draws[i][draws[k][i]].double())
                after = sum(terms, torch.zeros_like(latents[k][-1]))
                if forced:
                    own = new.programs[i].after[k].double()
                    found.append(Deviation("latents", _of_largest(after - own, [own, *terms]), tolerance(dtype)))
                    after = own
                latents[k].append(after)
        wanted = new.programs[-1].after
        found += [Deviation("latents", relative(its[-1], want), tolerance(dtype)) for its, want in zip(latents, wanted)]
        self._require(found, first)
        return max(one.size for one in found)

    def _require(self, found: Sequence[Deviation], first: str) -> None:
        """Raise UnsupportedError where a deviation is too large or not a number, or a first difference is at step 0."""
        wrong = [one for one in found if not one.size <= one.allowed]
        if wrong or first.endswith(" at step 0"):
            what, size, allowed = wrong[0] if wrong else max(found, key=lambda one: one.size)
            where = f"; {first}" if first else ""
            raise UnsupportedError(
                f"its trace does not hold for another prompt and seed ({what} differ by {size:.1e} of the largest, "
                f"{allowed:.1e} allowed{where}{_host(self._base)})"
            )


def _terms(table: SamplerTable, i: int, latents: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """What a sampler adds up in step i, but for noise."""
    row = table.rows[i + 1]
    return [c * v for c, v in [*zip(row.latents, reversed(latents)), *zip(row.outputs, reversed(outputs))]]


def _require_finite(run: Run, dtype: torch.dtype) -> None:
    """Raise UnsupportedError where a run overflows, as many networks do in fp16."""
    for program in run.programs:
        if not all(bool(after.isfinite().all()) for after in program.after):
            name = str(dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"its latents are not finite behind step {program.index} in {name}", fix="--dtype bf16 or fp32"
            )


def _model_output(run: Run, i: int, state: int) -> Tensor:
    """What a sampler was given in step i."""
    order = list(run.tape.schedulers)
    events = [item for item in run.tape.items[slice(*run.programs[i].span)] if isinstance(item, Event)]
    (event,) = (event for event in events if event.kind == "step" and event.scheduler == order[state])
    found: Tensor = run.tape.value(event.inputs["model_output"])
    return found


def _of_largest(difference: Tensor, others: Sequence[Tensor]) -> float:
    """Largest difference, of the largest element of some tensors."""
    size = max(float(other.abs().max()) for other in others)
    return float(difference.abs().max()) / size if size else 0.0


def relative(one: Tensor, other: Tensor) -> float:
    """Largest difference, of the largest element of `other`."""
    if one.shape != other.shape:
        return float("inf")
    size = float(other.double().abs().max())
    difference = float((one.double() - other.double()).abs().max())
    return difference / size if size else difference


def _check_sample(sample: Tensor, x: Tensor, program: Program, dtype: torch.dtype) -> None:
    """Refuse a loop that does more to its latents between two steps than round them to its dtype."""
    if min(relative(sample, x), relative(sample, x.to(dtype))) > 1e-5:
        last = [node.what for node in program.nodes if node.kind == "op"][-1:]
        raise UnsupportedError(
            "it changes the latents between two steps of the sampler"
            + (f" (its last operator is {last[0]})" if last else "")
        )


def _difference(network: Network, new: Run, i: int, *, exact: bool) -> str:
    """The first argument of a network that differs from what it was in the new run; "" where all agree.

    Args:
        exact: whether nothing that is rounded goes into arguments; else those in half precision may be rounded.
    """
    tape = new.tape
    events = [item for item in tape.items[slice(*new.programs[i].span)] if isinstance(item, Event)]
    for (name, given), event in zip(network.given, [event for event in events if event.kind == "call"]):
        wanted = pytree.tree_map(tape.value, event.inputs)
        its = dict(pytree.tree_flatten_with_path(wanted)[0])
        for path, leaf in pytree.tree_flatten_with_path(dict(given))[0]:
            other = its.get(path)
            close = same(leaf, other)
            if isinstance(leaf, Tensor) and isinstance(other, Tensor):
                allowed = tolerance(leaf.dtype) if leaf.is_floating_point() and not exact else TOLERANCE
                close = close or (leaf.is_floating_point() and relative(leaf, other) < allowed)
            elif not isinstance(leaf, int | float):
                continue
            if not close:
                return f"the first difference is {name}.{getattr(path[0], 'key', '')} at step {i}"
    return ""


def _host(base: Run) -> str:
    """Values of the tape that became Python's."""
    methods = sorted({item.name for item in base.tape.items if isinstance(item, Event) and item.kind == "host"})
    return f"; the pipeline reads values by {', '.join(methods)}" if methods else ""


def nonlinearity(base: Run) -> float:
    """How far the guided output is from linear in what the networks of a step return, relative."""
    program = base.programs[-1]
    events = [item for item in base.tape.items[slice(*program.span)] if isinstance(item, Event)]
    shapes = [[base.tape.values[ref].shape for ref in refs(event.outs)] for event in events if event.kind == "call"]
    generator = torch.Generator("cpu").manual_seed(0)
    one, other, third = ([[torch.randn(shape, generator=generator) for shape in row] for row in shapes] for _ in "abc")
    mixed = [[a + b - c for a, b, c in zip(*rows)] for rows in zip(one, other, third)]

    def guided(outputs: list[list[Tensor]]) -> list[Tensor]:
        left = iter(outputs)
        with torch.no_grad():
            made, _ = run_program(
                program, program.x, program.values, lambda name, tree: next(left), lambda state, sample: sample
            )
        return [made[k].double() for k in sorted(made)]

    # f(a) + f(b) = f(c) + f(a + b − c) holds of what is linear, and of what is linear but for what depends on x alone
    return max(
        relative(c + mix, a + b) for a, b, c, mix in zip(guided(one), guided(other), guided(third), guided(mixed))
    )
