"""What a traced pipeline's conditions are in its graphs: which slots of its programs they fill, their names, the rows
and text axes that they have."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.graphs import NEGATIVE as NEGATIVE_NAME
from lemica_trt.ir.trace import TraceSlot
from lemica_trt.models.trace.arguments import BASE
from lemica_trt.models.trace.body import Prefix
from lemica_trt.models.trace.program import Program
from lemica_trt.models.trace.slots import IMAGE, NEGATIVE, PROMPT, Run
from lemica_trt.models.trace.tracing import Traced

TAKEN = ("input_ids", "attention_mask", "latents", "output", "noise", "coefficients", "guidance", "frames")
"""Names of other inputs and outputs of graphs."""


class Place(NamedTuple):
    """A slot of the programs of a kind of steps."""

    kind: int
    number: int
    slot: TraceSlot


class Conditions:
    """See the module docstring. What costs a run of the pipeline is made when it is asked for.

    Attributes:
        values: name → one row of each condition, of `longest`; conditions that differ only in the branch are one.
    """

    def __init__(self, traced: Traced) -> None:
        self.traced, self.trace = traced, traced.trace
        self._axes = self._row_axes()

    @cached_property
    def longest(self) -> tuple[Run, str]:
        """The run that text encoders and conditions are made from, and its prompt: the longest prompt that the pipeline
        takes, where shapes follow the prompt.

        Raises:
            UnsupportedError: its steps run other operators.
        """
        runs = self.traced.runs
        found = runs.longest() if self.trace.text == "free" else (runs.base, BASE)
        if any(a.digest != b.digest for a, b in zip(found[0].programs, runs.base.programs)):
            raise UnsupportedError(f"{self.trace.pipeline} cannot be built yet: long prompts take other operators")
        return found

    @property
    def guided(self) -> bool:
        """Whether a negative prompt is a condition: then the guidance scale is an input too."""
        return any(NEGATIVE in slot.of for slot in self.trace.role("condition"))

    def axis(self, name: str) -> int | None:
        """Along which axis rows of a slot stand; None: it is one row, without that axis."""
        return self._axes.get(name, 0)

    def places(self, kind: int | None = None) -> list[Place]:
        """Each slot of the programs of a kind of steps, or of all, that is not a constant number."""
        traced = self.traced
        by_name = {slot.name: slot for slot in self.trace.slots}
        kinds = range(len(self.trace.kinds)) if kind is None else (kind,)
        numbers = [(k, number) for k in kinds for number in range(len(traced.found[k]))]
        return [Place(*at, by_name[name]) for at in numbers for name in [traced.named.name(*at)] if name]

    def value(self, run: Run, place: Place) -> Any:
        """What a slot is in the first step of its kind; rows of a condition come first."""
        value = self.program(run, place.kind).values[place.number]
        axis = self.axis(place.slot.name)
        return value if axis == 0 else value[None] if axis is None else value.movedim(axis, 0)

    def program(self, run: Run, kind: int) -> Program:
        """Of the first step of a kind."""
        return run.programs[self.trace.kinds[kind].steps[0]]

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Name → the base run's value of one row of each: conditions that differ only in the branch are one."""
        found: dict[str, Tensor] = {}
        for place in self.places():
            slot = place.slot
            if slot.role == "condition":
                value = self.value(self.longest[0], place)
                if not isinstance(value, Tensor) or not value.dim():
                    raise UnsupportedError(f"{slot.name} is a number that follows the prompt: it cannot be built yet")
                name = self.name(slot)
                row = value[self.prompt_row(place) if PROMPT in slot.of else 0][None]
                if name in found and found[name].shape != row.shape:
                    raise UnsupportedError(f"{slot.name} has another shape in another call: it cannot be built yet")
                if PROMPT in slot.of or name not in found:
                    found[name] = row
        return found

    def _argument(self, slot: TraceSlot) -> str:
        """The network's argument that a condition is, or is an element of where each text is one."""
        bare = self.axis(slot.name) is None
        argument = slot.argument.rpartition(".")[0] or slot.argument if bare else slot.argument
        return argument.replace(".", "_")

    def name(self, slot: TraceSlot) -> str:
        """A condition's name in graphs: that of the network's argument, unless it is the only one, or graphs use that
        for something else."""
        arguments = {self._argument(its) for its in self.trace.role("condition")}
        name = "prompt_embeds" if len(arguments) == 1 else self._argument(slot)
        own = slot.name in self.trace.text_slots and PROMPT not in slot.of
        return (NEGATIVE_NAME if own else "") + (f"dit_{name}" if name in TAKEN else name)

    def _row_axes(self) -> dict[str, int | None]:
        """By slot, the axis of a condition along which texts stand: the first one where another prompt changes one row
        of at most two (HiDream's is behind the layers of a language model). None: it is one text, [tokens, …], as an
        element of a list (Z-Image); or it is of several pictures, in a row each (Wan's of a first and a last one)."""
        runs, found = self.traced.runs, dict[str, int | None]()
        for place in self.places():
            slot = place.slot
            what = next((what for what in (PROMPT, NEGATIVE) if what in slot.of), None)
            if slot.role == "condition" and IMAGE in slot.of:
                value = self.program(runs.base, place.kind).values[place.number]
                if isinstance(value, Tensor) and value.dim() and not all(torch.equal(value[0], row) for row in value):
                    found[slot.name] = None
            if slot.role != "condition" or what is None:
                continue
            base, other, *longer = (
                self.program(run, place.kind).values[place.number]
                for run in (runs.base, runs.others[what], *runs.longer.values())
            )
            if slot.name in self.trace.text_slots and any(len(value) != len(base) for value in longer):
                found[slot.name] = None
            elif isinstance(base, Tensor):
                one = (a for a in range(base.dim()) if base.shape[a] <= 2 and len(_changed_rows(base, other, a)) == 1)
                found[slot.name] = next(one, 0)
        return found

    def require_text_axes(self) -> None:
        """Conditions whose shape follows the prompt must be [rows, tokens, …], or [tokens, …].

        Raises:
            UnsupportedError: one is not.
        """
        for place in self.places():
            slot = place.slot
            if slot.role != "condition" or slot.name not in self.trace.text_slots:
                continue
            own = self.value(self.traced.runs.base, place).shape
            others = [self.value(run, place).shape for run in self.traced.runs.longer.values()]
            if len(own) < 3 or any(its[:1] + its[2:] != own[:1] + own[2:] for its in others):
                raise UnsupportedError(
                    f"{self.trace.pipeline} cannot be built yet: {slot.component}.{slot.argument} follows the length "
                    f"of the prompt, and is not [rows, tokens, width] but {list(own)}"
                )

    def is_negative(self, name: str) -> bool:
        """Whether a condition is of the negative prompt alone, with a text axis of its own."""
        return name.startswith(NEGATIVE_NAME) and name.removeprefix(NEGATIVE_NAME) in self.values

    def is_image(self, name: str) -> bool:
        """Whether a condition follows the image."""
        return any(self.name(slot) == name and IMAGE in slot.of for slot in self.trace.role("condition"))

    def is_free(self, name: str) -> bool:
        """Whether the shape of a condition follows the prompt."""
        return any(
            self.name(slot) == name for slot in self.trace.role("condition") if slot.name in self.trace.text_slots
        )

    def prefix(self, place: Place) -> Prefix:
        """A slot that the length of a text decides alone."""
        runs, slot, longest = self.traced.runs, place.slot, self.value(self.longest[0], place)
        longer = {what: self.value(run, place) for what, run in runs.longer.items()}
        base = self.value(runs.base, place)
        followed = [what for what, value in longer.items() if value.shape != base.shape]
        names = {self.is_negative(name): name for name in self.values if self.is_free(name)}
        name = names.get(followed == [NEGATIVE])
        cut = all(torch.equal(longest[: len(value)], value) for value in (base, *longer.values()))
        if slot.role != "constant" or len(followed) != 1 or name is None or not cut:
            raise UnsupportedError(
                f"{self.trace.pipeline} cannot be built yet: {slot.name} follows the length of the prompt, and is not "
                "the beginning of what it is for a longer one"
            )
        return Prefix(name, longest)

    def prompt_row(self, place: Place, what: str = PROMPT) -> int:
        """The row of a condition that follows the prompt, or the negative prompt."""
        runs = self.traced.runs
        base, other = self.value(runs.base, place), self.value(runs.others[what], place)
        rows = _changed_rows(base, other, 0)
        if len(rows) != 1 or base.shape[0] > 2:
            raise UnsupportedError(f"expected one row of a condition to follow the prompt, got rows {rows}")
        return rows[0]

    def rows(self, place: Place) -> tuple[int, ...]:
        """Rows of a condition that a slot has: 0 is the negative prompt's, where there is guidance; or the image's."""
        slot = place.slot
        if IMAGE in slot.of:
            return (0,) * int(self.value(self.traced.runs.base, place).shape[0])
        if not self.guided or (slot.name in self.trace.text_slots and len(slot.of) == 1):
            return (0,)
        if slot.of == (PROMPT, NEGATIVE):
            return (0, 1) if self.prompt_row(place) == 1 else (1, 0)
        return (1,) if PROMPT in slot.of else (0,)

    @cached_property
    def short(self) -> Run:
        """A run with shorter prompts, where their length matters."""
        return self.traced.runs.shorter()


def _changed_rows(one: Tensor, other: Tensor, axis: int) -> list[int]:
    """Which rows along an axis differ."""
    pairs = zip(one.unbind(axis), other.unbind(axis))
    return [i for i, (mine, its) in enumerate(pairs) if not torch.equal(mine, its)]
