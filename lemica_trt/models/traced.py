"""A model made from a trace: any pipeline that tracing understands, with the interface of `model.Model`.

What is not understood well enough to be built is refused when the model is loaded, before long work: several samplers,
several networks in a step, a trunk with several streams, a text encoder that reads values in Python.

Steps may be of several kinds (Wan 2.2 has a transformer for early steps and one for late ones): each kind is a body of
its own, with a trunk of its own. Which step of how many is of which kind, the pipeline's own loop says, run with
networks that do not compute (`trace.tape.HeldNetworks`).

Where shapes follow the prompt, text encoders run at the length of the longest prompt that the pipeline takes, and their
outputs are cut to the prompt's own tokens: conditions have a text axis, of each branch's own where each has a call of
its own. What the pipeline computes from the length alone is kept at the longest and cut too.

Last, the conditions that its own encoders make of two requests are compared with the pipeline's. Whole runs
are compared by `lemica-trt verify`, as for every model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import UNSET, UnsetType
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.core.pictures import Pixels
from lemica_trt.core.text import CLEANINGS
from lemica_trt.ir.graphs import IMAGE_ENCODER, EncoderSpec, ImageSpec, TensorDType, TensorSpec, text_axis
from lemica_trt.ir.graphs import NEGATIVE as NEGATIVE_NAME
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.prompts import Prompt, prompt_from_line
from lemica_trt.ir.sampler import SamplerTable, Setting
from lemica_trt.ir.trace import Trace, TraceRequest, TraceSlot
from lemica_trt.models.copies import Copies
from lemica_trt.models.image_encoder import ImageEncoder, given_draw, image_encoder, picture_of
from lemica_trt.models.model import End, Model, require_no_picture
from lemica_trt.models.padding import fed_ids, multiples
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.models.trace.arguments import BASE, LONGER, LONGER_NEGATIVE, SHORTER, SHORTER_NEGATIVE
from lemica_trt.models.trace.arguments import NEGATIVE as BASE_NEGATIVE
from lemica_trt.models.trace.body import Body, Line, Network, Prefix, Rows, fitted_line, joined_states, on_line
from lemica_trt.models.trace.ends import STATES, FramesDecoder, TapeSlice
from lemica_trt.models.trace.noise import NoiseArguments
from lemica_trt.models.trace.program import Program, effects
from lemica_trt.models.trace.replay import precision, relative, tolerance
from lemica_trt.models.trace.runs import record
from lemica_trt.models.trace.slots import IMAGE, NEGATIVE, PROMPT, SEED, Run
from lemica_trt.models.trace.tape import Event, Ref, Tape, plain, refs
from lemica_trt.models.trace.tracing import trace_runs

ODD = "The RED Cat &amp; a  blue <b>bird</b>, 2 ｔｒｅｅｓ schÃ¶n\n"
"""A prompt that shows how a pipeline cleans its prompts."""

CUT = " ".join([LONGER] * 80)
"""A prompt of more tokens than text encoders take: whether its last id is the end token, where it is cut."""

TAKEN = ("input_ids", "attention_mask", "latents", "output", "noise", "coefficients", "guidance", "frames")
"""Names of other inputs and outputs of graphs."""

NAMES: dict[torch.dtype, TensorDType] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "int64",
}
"""dtype of a condition → of the graphs' tensors."""


class _Place(NamedTuple):
    """A slot of the programs of a kind of steps."""

    kind: int
    number: int
    slot: TraceSlot


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """A text encoder graph: how text becomes ids, by the tokenizer's component, and the graph."""

    graph: str
    specs: dict[str, EncoderSpec]
    module: _FirstRows
    outputs: tuple[str, ...]

    @property
    def is_negative(self) -> bool:
        """Whether it is of negative prompts alone."""
        return any(spec.negative for spec in self.specs.values())


@dataclasses.dataclass(frozen=True)
class _Source:
    """What conditions are followed back in.

    Attributes:
        run, text: a run, and its prompt, or its negative prompt.
        counted: whether Python reads lengths there: the prompt fills all positions, and what is behind a shorter one is
            zero.
        negative: whether the text is a negative prompt.
    """

    run: Run
    text: str
    counted: bool = False
    negative: bool = False

    @property
    def follows(self) -> str:
        """What its conditions follow."""
        return NEGATIVE if self.negative else PROMPT


class TracedModel(Model):
    """See the module docstring; attributes and methods are those of `model.Model`.

    Raises:
        UnsupportedError: the pipeline cannot be traced, or not built; says why.
    """

    def __init__(self, profile: Profile, pipeline: Any, folder: Path) -> None:
        self.profile, self.pipeline, self.folder = profile, pipeline, folder  # a family is what it has not
        profile.require_possible()
        self._traced = trace_runs(pipeline, request_from_profile(profile, pipeline))
        self.trace = self._traced.trace
        self._precision = precision(self._traced.runs.base)
        self._tables: dict[int, SamplerTable] = {}
        self._axes = self._row_axes()
        self._networks = Copies(pipeline.components, self.experts)
        self._require_buildable()
        self._require_text_axes()
        free = self.trace.text == "free"
        self._whole, self._text = self._traced.runs.longest() if free else (self._traced.runs.base, BASE)
        if any(a.digest != b.digest for a, b in zip(self._whole.programs, self._traced.runs.base.programs)):
            raise UnsupportedError(f"{self.trace.pipeline} cannot be built yet: long prompts take other operators")
        self.latent_shape = tuple(joined_states(self._traced.runs.base.programs[0].x).shape[1:])
        self._conditions = self._named_conditions()
        self._encoders = self._make_encoders()
        self._image = self._make_image_encoder()
        self.check_own_parts()

    # ------------------------------------------------------------ what it is

    @property
    def guided(self) -> bool:
        """Whether a negative prompt is a condition: then the guidance scale is an input too."""
        return any(NEGATIVE in slot.of for slot in self.trace.role("condition"))

    @property
    def image(self) -> ImageSpec | UnsetType:
        """How the picture of a request becomes conditions."""
        return UNSET if self._image is None else self._image.spec

    @cached_property
    def branches(self) -> bool:
        """Whether the guidance scale is known to be used behind the networks only."""
        if not self.guided:
            return False
        base = self._traced.runs.base
        for number, kind in enumerate(self.trace.kinds):
            program = base.programs[kind.steps[-1]]
            others = list(program.values)
            for place in self._places(number):
                if place.slot.role == "guidance":
                    others[place.number] = 2 * others[place.number]
            *given, _ = zip(effects(base.tape, program, program.values), effects(base.tape, program, others))
            if not all(torch.equal(one, other) for one, other in given):
                return False
        return True

    @property
    def experts(self) -> tuple[str, ...]:
        """As `Model.experts`."""
        return tuple(kind.calls[0] for kind in self.trace.kinds)

    @property
    def conditions(self) -> tuple[TensorSpec, ...]:
        """As the loop reads them, without duplicates; R = 2 under guidance, the negative prompt's row first; 1 of an
        image."""
        rows, specs = "2*batch" if self.guided else "batch", []
        for name, value in self._conditions.items():
            shape: tuple[int | str, ...] = ("batch" if self._is_image(name) else rows, *value.shape[1:])
            if self._is_free(name):
                negative = self._is_negative(name)
                first = "batch" if negative or NEGATIVE_NAME + name in self._conditions else rows
                shape = (first, text_axis(value.shape[1], negative=negative), *value.shape[2:])
            specs.append(TensorSpec(name=name, dtype=NAMES[value.dtype], shape=shape))
        return tuple(specs)

    def _require_buildable(self) -> None:
        trace, kind = self.trace, self.trace.pipeline
        trunks = {trunk.component: trunk for trunk in trace.trunks}
        called = {name for its in trace.kinds for name in its.calls}
        python = [how for how in trace.python if self._networks.whole(how.partition(":")[0])]
        reasons = {
            "it steps several latents, by samplers that differ": any(
                state.table.rows != trace.states[0].table.rows for state in trace.states
            ),
            "it calls several networks in a step": any(len(set(its.calls)) != 1 for its in trace.kinds),
            "its network is a part of a component": any("." in name or name not in trunks for name in called),
            "some of its steps call their network more often than others": len({len(k.calls) for k in trace.kinds})
            != 1,
            "it takes no prompt": trace.text == "none",
            "its blocks add to no stream": any(not trunk.streams for trunk in trunks.values()),
            **_beyond_prompts(trace),
            f"its network reads values in Python ({', '.join(python)})": bool(python),
            "it follows several guidance scales, none of them the first": any(
                len(self._followed_scales(kind)) > 1 and self._own_scale(kind) is None
                for kind, _ in enumerate(trace.kinds)
            ),
            "its latents are not of one request": any(state.shape[0] != 1 for state in trace.states),
        }
        for reason, holds in reasons.items():
            if holds:
                raise UnsupportedError(f"{kind} cannot be built yet: {reason}")

    # ------------------------------------------------------------ conditions

    def _places(self, kind: int | None = None) -> list[_Place]:
        """Each slot of the programs of a kind of steps, or of all, that is not a constant number."""
        traced = self._traced
        by_name = {slot.name: slot for slot in self.trace.slots}
        kinds = range(len(self.trace.kinds)) if kind is None else (kind,)
        numbers = [(k, number) for k in kinds for number in range(len(traced.found[k]))]
        return [_Place(*at, by_name[name]) for at in numbers for name in [traced.named.name(*at)] if name]

    def _value(self, run: Run, place: _Place) -> Any:
        """What a slot is in the first step of its kind; rows of a condition come first."""
        value = self._program(run, place.kind).values[place.number]
        axis = self._axes.get(place.slot.name, 0)
        return value if axis == 0 else value[None] if axis is None else value.movedim(axis, 0)

    def _program(self, run: Run, kind: int) -> Program:
        """Of the first step of a kind."""
        return run.programs[self.trace.kinds[kind].steps[0]]

    def _named_conditions(self) -> dict[str, Tensor]:
        """Name → the base run's value of one row of each: conditions that differ only in the branch are one."""
        found: dict[str, Tensor] = {}
        for place in self._places():
            slot = place.slot
            if slot.role == "condition":
                value = self._value(self._whole, place)
                if not isinstance(value, Tensor) or not value.dim():
                    raise UnsupportedError(f"{slot.name} is a number that follows the prompt: it cannot be built yet")
                name = self._name(slot)
                if IMAGE in slot.of and not all(torch.equal(value[0], row) for row in value):
                    raise UnsupportedError(f"{slot.name} has another image in another branch: it cannot be built yet")
                row = value[self._prompt_row(place) if PROMPT in slot.of else 0][None]
                if name in found and found[name].shape != row.shape:
                    raise UnsupportedError(f"{slot.name} has another shape in another call: it cannot be built yet")
                if PROMPT in slot.of or name not in found:
                    found[name] = row
        return found

    def _argument(self, slot: TraceSlot) -> str:
        """The network's argument that a condition is, or is an element of where each text is one."""
        bare = self._axes.get(slot.name, 0) is None
        argument = slot.argument.rpartition(".")[0] if bare else slot.argument
        return argument.replace(".", "_")

    def _name(self, slot: TraceSlot) -> str:
        """A condition's name in graphs: that of the network's argument, unless it is the only one, or graphs use that
        for something else."""
        arguments = {self._argument(its) for its in self.trace.role("condition")}
        name = "prompt_embeds" if len(arguments) == 1 else self._argument(slot)
        own = slot.name in self.trace.text_slots and PROMPT not in slot.of
        return (NEGATIVE_NAME if own else "") + (f"dit_{name}" if name in TAKEN else name)

    def _row_axes(self) -> dict[str, int | None]:
        """By slot, the axis of a condition along which texts stand: the first one where another prompt changes one row
        of at most two (HiDream's is behind the layers of a language model). None: it is one text, [tokens, …], as an
        element of a list (Z-Image)."""
        runs, found = self._traced.runs, dict[str, int | None]()
        for place in self._places():
            slot = place.slot
            what = next((what for what in (PROMPT, NEGATIVE) if what in slot.of), None)
            if slot.role != "condition" or what is None:
                continue
            base, other, *longer = (
                self._program(run, place.kind).values[place.number]
                for run in (runs.base, runs.others[what], *runs.longer.values())
            )
            if slot.name in self.trace.text_slots and any(len(value) != len(base) for value in longer):
                found[slot.name] = None
            elif isinstance(base, Tensor):
                one = (a for a in range(base.dim()) if base.shape[a] <= 2 and len(_changed_rows(base, other, a)) == 1)
                found[slot.name] = next(one, 0)
        return found

    def _require_text_axes(self) -> None:
        """Conditions whose shape follows the prompt must be [rows, tokens, …], or [tokens, …].

        Raises:
            UnsupportedError: one is not.
        """
        for place in self._places():
            slot = place.slot
            if slot.role != "condition" or slot.name not in self.trace.text_slots:
                continue
            own = self._value(self._traced.runs.base, place).shape
            others = [self._value(run, place).shape for run in self._traced.runs.longer.values()]
            if len(own) < 3 or any(its[:1] + its[2:] != own[:1] + own[2:] for its in others):
                raise UnsupportedError(
                    f"{self.trace.pipeline} cannot be built yet: {slot.component}.{slot.argument} follows the length "
                    f"of the prompt, and is not [rows, tokens, width] but {list(own)}"
                )

    def _is_negative(self, name: str) -> bool:
        """Whether a condition is of the negative prompt alone, with a text axis of its own."""
        return name.startswith(NEGATIVE_NAME) and name.removeprefix(NEGATIVE_NAME) in self._conditions

    def _is_image(self, name: str) -> bool:
        """Whether a condition follows the image."""
        return any(self._name(slot) == name and IMAGE in slot.of for slot in self.trace.role("condition"))

    def _is_free(self, name: str) -> bool:
        """Whether the shape of a condition follows the prompt."""
        return any(
            self._name(slot) == name for slot in self.trace.role("condition") if slot.name in self.trace.text_slots
        )

    def _prefix(self, place: _Place) -> Prefix:
        """A slot that the length of a text decides alone."""
        runs, slot, longest = self._traced.runs, place.slot, self._value(self._whole, place)
        longer = {what: self._value(run, place) for what, run in runs.longer.items()}
        base = self._value(runs.base, place)
        followed = [what for what, value in longer.items() if value.shape != base.shape]
        names = {self._is_negative(name): name for name in self._conditions if self._is_free(name)}
        name = names.get(followed == [NEGATIVE])
        cut = all(torch.equal(longest[: len(value)], value) for value in (base, *longer.values()))
        if slot.role != "constant" or len(followed) != 1 or name is None or not cut:
            raise UnsupportedError(
                f"{self.trace.pipeline} cannot be built yet: {slot.name} follows the length of the prompt, and is not "
                "the beginning of what it is for a longer one"
            )
        return Prefix(name, longest)

    def _prompt_row(self, place: _Place, what: str = PROMPT) -> int:
        """The row of a condition that follows the prompt, or the negative prompt."""
        runs = self._traced.runs
        base, other = self._value(runs.base, place), self._value(runs.others[what], place)
        rows = _changed_rows(base, other, 0)
        if len(rows) != 1 or base.shape[0] > 2:
            raise UnsupportedError(f"expected one row of a condition to follow the prompt, got rows {rows}")
        return rows[0]

    def body(self, kind: int) -> Body:
        """The program of a step of a kind, as a module."""
        program = self._traced.runs.base.programs[self.trace.kinds[kind].steps[-1]]
        slots: dict[int, Line | Rows | Prefix] = {}
        for place in self._places(kind):
            k, slot = place.number, place.slot
            if slot.name in self.trace.text_slots and slot.role != "condition":
                slots[k] = self._prefix(place)
            elif slot.role == "column":
                slots[k] = self._line(place)
            elif (
                slot.role == "guidance"
                and len(self._followed_scales(kind)) > 1
                and slot.of[-1] != self._own_scale(kind)
            ):
                continue  # the build's own: a constant
            elif slot.role == "guidance" and self.guided:
                spread = [max(numbers) - min(numbers) for numbers in (slot.factor, slot.column) if numbers]
                if not spread or max(spread) > 1e-5 * abs(slot.factor[0]):
                    raise UnsupportedError(f"{slot.name} has another guidance scale each step: it cannot be built yet")
                slots[k] = Line("guidance", slot.factor[0], slot.column[0])
            elif slot.role == "guidance" and "step" in slot.of:
                raise UnsupportedError(f"{slot.name} has another guidance scale each step: it cannot be built yet")
            elif slot.role == "condition":
                slots[k] = Rows(self._name(slot), self._rows(place), self._axes.get(slot.name, 0))
        trunk = next(trunk for trunk in self.trace.trunks if trunk.component == self.experts[kind])
        network = Network(self._networks[trunk.component], trunk)
        return Body(program, slots, network, branches=self.branches)

    def _line(self, place: _Place) -> Line:
        """A column, as a line in the timestep."""
        slot, steps = place.slot, self.trace.kinds[place.kind].steps
        if not slot.column:
            raise UnsupportedError(f"{slot.name} has another value in each element: it cannot be built yet")
        timesteps = [self.trace.states[0].table.timesteps[step] for step in steps]
        halves = self._halves(self._value(self._traced.runs.base, place))
        return fitted_line("timestep", timesteps, slot.column, slot.name, dtypes=halves)

    def _halves(self, value: Any) -> list[torch.dtype]:
        """The half precisions that a value of the loop may have been rounded to, its own first."""
        found = [self._precision] if self._precision.itemsize < 4 else []
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
            found.insert(0, value.dtype)
        return list(dict.fromkeys(found))

    def _rows(self, place: _Place) -> tuple[int, ...]:
        """Rows of a condition that a slot has: 0 is the negative prompt's, where there is guidance; or the image's."""
        slot = place.slot
        if IMAGE in slot.of:
            return (0,) * int(self._value(self._traced.runs.base, place).shape[0])
        if not self.guided or (slot.name in self.trace.text_slots and len(slot.of) == 1):
            return (0,)
        if slot.of == (PROMPT, NEGATIVE):
            return (0, 1) if self._prompt_row(place) == 1 else (1, 0)
        return (1,) if PROMPT in slot.of else (0,)

    # ------------------------------------------------------------ text

    def _make_encoders(self) -> list[_Encoder]:
        """A graph for each group of conditions that follow the ids of the same tokenizers.

        Where Python reads how long a prompt is, they are followed in a run whose prompt fills all positions.
        """
        names = [name for name in self._conditions if not (self._is_negative(name) or self._is_image(name))]
        source = _Source(self._whole, self._text)
        followed = self._followed(names, source)
        if not all(followed.values()) and self.trace.text == "fixed":
            source = _Source(*self._traced.runs.filled(), counted=True)
            followed = self._followed(names, source)
        if left := [name for name, events in followed.items() if not events]:
            raise UnsupportedError(
                f"{', '.join(left)}: expected a condition that follows tokenizers' ids by operators alone; it cannot "
                "be built yet"
            )
        groups: list[tuple[dict[int, Event], list[str]]] = []
        for name, events in followed.items():
            shared = [group for group in groups if group[0].keys() & events.keys()]
            groups = [group for group in groups if group not in shared]
            events = {at: event for group in shared for at, event in group[0].items()} | events
            groups.append((dict(sorted(events.items())), [*(its for group in shared for its in group[1]), name]))
        groups.sort(key=lambda group: min(group[0]))
        found = [self._encoder(events, its, source) for events, its in groups]
        return [*found, *(self._negative_encoders(found) if self._whole is source.run else ())]

    def _make_image_encoder(self) -> ImageEncoder | None:
        """The graph of all conditions that follow the image; None: there are none."""
        base, found = self._traced.runs.base, {}
        for place in reversed(self._places()):
            if IMAGE in place.slot.of:
                found[self._name(place.slot)] = self._program(base, place.kind).births[place.number]
        return image_encoder(self._traced, self.pipeline, found) if found else None  # type: ignore[arg-type]

    def _negative_encoders(self, found: Sequence[_Encoder]) -> list[_Encoder]:
        """Text encoder graphs of their own for negative prompts, where those become other ids than prompts do."""
        source = _Source(self._traced.runs.base, BASE_NEGATIVE, negative=True)
        if self.trace.text == "free" or not self.guided:
            return []
        followed = self._followed([name for encoder in found for name in encoder.outputs], source)
        events = [
            dict(sorted((at, event) for name in encoder.outputs for at, event in followed[name].items()))
            for encoder in found
        ]
        forms = [[(event.name, *self._form(event, source)) for event in its.values()] for its in events]
        same = [[(name, spec.length, spec.template) for name, spec in encoder.specs.items()] for encoder in found]
        if forms == same or not all(events):  # not all: a negative prompt is in none of what a condition follows
            return []
        return [self._encoder(its, encoder.outputs, source) for its, encoder in zip(events, found)]

    def _form(self, event: Event, source: _Source) -> tuple[int, str]:
        """Number of ids that a tokenizer gave, and the template of its text."""
        ids = source.run.tape.value(fed_ids(source.run.tape, event))
        return ids.shape[1], _texts(event, source.text)[0].replace(source.text, "{prompt}")

    def _texts_at(self, source: _Source) -> dict[str, _Place]:
        """Where each condition is that follows the prompt, or the negative prompt; of several kinds of steps, the last
        of the first that has it."""
        found: dict[str, _Place] = {}
        for place in self._places():
            name, slot = self._name(place.slot), place.slot
            own = slot.role == "condition" and source.follows in slot.of
            if own and (name not in found or found[name].kind == place.kind):
                found[name] = place
        return found

    def _births(self, source: _Source) -> dict[str, Ref]:
        """The tensors that conditions are, by name."""
        births = {
            name: self._program(source.run, place.kind).births[place.number]
            for name, place in self._texts_at(source).items()
        }
        return {name: born for name, born in births.items() if born is not None}

    def _end(self, source: _Source) -> int:
        """The item of the recording behind which no condition is made."""
        return max(self._program(source.run, place.kind).span[1] for place in self._texts_at(source).values())

    def _followed(self, names: Sequence[str], source: _Source) -> dict[str, dict[int, Event]]:
        """The tokenizers' calls of the prompt whose ids or mask each condition follows, by place in the recording."""
        births, found = self._births(source), {name: dict[int, Event]() for name in names}
        for at, event in enumerate(source.run.tape.items[: self._end(source)]):
            if isinstance(event, Event) and event.kind == "tokenize" and _texts(event, source.text):
                for name in names:
                    if name not in births or any(its.name == event.name for its in found[name].values()):
                        continue  # the text may be the negative prompt's too, which comes later
                    with contextlib.suppress(UnsupportedError):
                        self._slice({at: event}, {name: births[name]}, source)
                        found[name][at] = event
        return found

    def _slice(self, events: dict[int, Event], outputs: dict[str, Ref], source: _Source) -> TapeSlice:
        """What becomes of the ids and masks of some tokenizers."""
        names = ("input_ids", "attention_mask")
        inputs = {
            f"{name}{_suffix(k)}": event.outs[name] if name != names[0] else fed_ids(source.run.tape, event)
            for k, event in enumerate(events.values())
            for name in names
            if name in event.outs
        }
        held = tuple(name for name in inputs if name.startswith(names[1])) if self.trace.text == "free" else ()
        span = (min(events) + 1, self._end(source))
        return TapeSlice(source.run.tape, span, inputs, outputs, self.pipeline.components, held, counted=source.counted)

    def _encoder(self, events: dict[int, Event], outputs: Sequence[str], source: _Source) -> _Encoder:
        components = [event.name for event in events.values()]
        if len(set(components)) < len(components) or (len(components) > 1 and self.trace.text == "free"):
            raise UnsupportedError(
                f"{', '.join(outputs)}: expected a condition that follows each tokenizer once, got "
                f"{', '.join(components)}; it cannot be built yet"
            )
        births = self._births(source)
        module = self._slice(events, {name: births[name] for name in outputs}, source)
        places = self._texts_at(source)
        rows = {
            name: (self._axes[places[name].slot.name], self._prompt_row(places[name], source.follows))
            for name in outputs
        }
        whole = _FirstRows(module, rows, self._filled(events, outputs) if source.counted else ())
        first = components[0] if "tokenizer" in components[0] else "tokenizer"  # a processor of text and images
        graph = first.replace("tokenizer", "text_encoder") + "_negative" * source.negative
        specs = {
            event.name: self._spec(event, graph, _suffix(k), whole.read, source)
            for k, event in enumerate(events.values())
        }
        return _Encoder(graph, specs, whole, tuple(outputs))

    def _filled(self, events: dict[int, Event], outputs: Sequence[str]) -> tuple[str, ...]:
        """Conditions with a row for each id, which are zero behind the prompt."""
        first = next(iter(events.values()))
        if len(events) > 1 or "attention_mask" not in first.outs:
            raise UnsupportedError(f"{', '.join(outputs)}: Python reads the length of a prompt; it cannot be built yet")
        length = self._traced.runs.base.tape.value(first.outs["input_ids"]).shape[1]
        return tuple(name for name in outputs if self._conditions[name].shape[1:2] == (length,))

    def _spec(self, event: Event, graph: str, suffix: str, read: Sequence[str], source: _Source) -> EncoderSpec:
        """How a text becomes the ids that a tokenizer gave."""
        tokens = self._tokenizer(event.name)
        length, template = self._form(event, source)
        spec = EncoderSpec(
            tokenizer=f"{event.name}/tokenizer.json",
            length=length,
            pad_id=tokens.pad_token_id,
            end_id=tokens.eos_token_id,
            graph=graph,
            mask=f"attention_mask{suffix}" in read,
            template=template,
            suffix=suffix or UNSET,
            negative=source.negative or UNSET,
        )
        return self._checked_ids(event.name, spec)

    def _tokenizer(self, component: str) -> Any:
        """A tokenizer, or that of a processor of text and images (FLUX.2)."""
        found = self.pipeline.components[component]
        return getattr(found, "tokenizer", found)

    def _checked_ids(self, component: str, spec: EncoderSpec) -> EncoderSpec:
        """The spec with the cleaning, and the end of cut prompts, that give the pipeline's own ids, for prompts of
        several lengths and kinds."""
        runs = self._traced.runs
        tapes = {BASE: runs.base.tape, LONGER: runs.others[PROMPT].tape, SHORTER: runs.check.tape, ODD: self._odd}
        if not runs.longer:
            tapes[CUT] = self._cut
        if spec.negative:
            odd, _ = record(self.pipeline, self._traced.arguments, last_step=0, negative=ODD)
            tapes = {BASE_NEGATIVE: runs.base.tape, LONGER_NEGATIVE: runs.others[NEGATIVE].tape, ODD: odd}
            tapes |= {SHORTER_NEGATIVE: runs.check.tape, CUT: self._cut}
        if PROMPT in runs.longer:
            tapes = {**tapes, LONGER: runs.longer[PROMPT].tape, SHORTER: self._short.tape, self._text: self._whole.tape}
        tries = itertools.product(CLEANINGS, (spec.end_id, None), multiples(tapes, component), (UNSET, True))
        for clean, end, multiple, left in tries:
            tried = msgspec.structs.replace(spec, clean=clean, end_id=end, multiple=multiple or UNSET, left=left)
            if all(self._has_ids(tape, component, *self._ids(component, tried, text)) for text, tape in tapes.items()):
                return tried
        raise UnsupportedError(f"{component}: the runtime would give other token ids; it cannot be built yet")

    @cached_property
    def _short(self) -> Run:
        """A run with shorter prompts, where their length matters."""
        return self._traced.runs.shorter()

    @cached_property
    def _odd(self) -> Tape:
        """A prompt with capitals, white space, markup and damaged Unicode, up to the loop."""
        return record(self.pipeline, self._traced.arguments, last_step=0, prompt=ODD)[0]

    @cached_property
    def _cut(self) -> Tape:
        """A prompt and a negative prompt that are cut, up to the loop."""
        return record(self.pipeline, self._traced.arguments, last_step=0, prompt=CUT, negative=CUT)[0]

    @staticmethod
    def _has_ids(tape: Tape, component: str, ids: Tensor, mask: Tensor) -> bool:
        """Whether a tokenizer gave these ids in a recording, with padding or without."""
        events = [e for e in tape.items if isinstance(e, Event) and e.kind == "tokenize" and e.name == component]
        found = [tape.value(fed_ids(tape, event)) for event in events if "input_ids" in event.outs]
        own = ids[mask > 0][None]
        return any(torch.equal(its.cpu(), ids) or torch.equal(its.cpu(), own) for its in found)

    def _ids(self, component: str, spec: EncoderSpec, text: str) -> tuple[Tensor, Tensor]:
        """As `runtime.text.PromptTokenizer.ids`; int64 [1, length] each."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._tokenizer(component).backend_tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.enable_truncation(spec.length)
        found = tokenizer.encode(spec.template.replace("{prompt}", CLEANINGS[spec.clean](text))).ids
        if spec.end_id is not None and len(found) == spec.length:
            found[-1] = spec.end_id
        ids, mask = spec.padded(found)
        return torch.tensor([ids]), torch.tensor([mask])

    def tokens(self, prompts: Sequence[str], role: str = "text_encoder") -> dict[str, Tensor]:
        """Inputs of a text encoder graph, for one prompt."""
        encoder = next(each for each in self._encoders if each.graph == role)
        found: dict[str, Tensor] = {}
        for component, spec in encoder.specs.items():
            found |= dict(zip(spec.inputs, (its.to(self.device) for its in self._ids(component, spec, prompts[0]))))
        return found

    @torch.no_grad()
    def embed(  # type: ignore[override]  # `denoise.Conditions`
        self,
        prompts: Sequence[str],
        negative: str | Sequence[str] | None = None,
        *,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """Conditions by name, [R, …] or [b, …]; under guidance the negative prompts' rows first.

        Args:
            prompts: lines of a prompt file (`ir.prompts.Prompt.line`); a picture is drawn where one has none.
            seeds: of what an image encoder draws, [b].

        Raises:
            InputError: a line brings a picture that the model does not take, or it cannot be read.
        """
        images = self._image_conditions([*map(prompt_from_line, prompts)], seeds)
        prompts = [prompt_from_line(prompt).text for prompt in prompts]
        negatives = self._negatives(negative, len(prompts)) if self.guided else []
        rows = {(text, False): self._embed(text) for text in dict.fromkeys(prompts)}
        rows |= {(text, True): self._embed(text, negative=True) for text in dict.fromkeys(negatives)}
        first, second = (
            [(text, is_negative) for text in texts] for texts, is_negative in ((negatives, True), (prompts, False))
        )
        found = {}
        for spec in self.conditions:
            if spec.name in images:
                found[spec.name] = images[spec.name]
                continue
            name, followed = spec.name, second
            if self._is_negative(name):
                name, followed = name.removeprefix(NEGATIVE_NAME), first
            texts = followed if spec.text_axes and spec.shape[0] == "batch" else [*first, *second]
            parts = [rows[text][name] for text in texts]
            if spec.text_axes:
                length, *others = {self._length(name, text) for text, _ in followed}
                if others or length < 1:
                    raise InputError(f"prompts of a batch must have one length, at least 1 token, got {length}")
                parts = [part[:, :length] for part in parts]
            found[spec.name] = torch.cat(parts)
        return found

    def conditions_at(self, prompt: str, seed: int) -> Any:
        """As `Model.conditions_at`."""
        return self.embed([prompt], seeds=[seed])

    def _image_conditions(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> dict[str, Tensor]:
        """What the image encoder makes of the pictures of some prompts, by name, [b, …]."""
        if self._image is None:
            for prompt in prompts:
                require_no_picture(prompt, type(self.pipeline).__name__)
            return {}
        rows = []
        for prompt, seed in zip(prompts, [*seeds, *[0] * len(prompts)]):
            draw = self._image.draw(torch.Generator("cpu").manual_seed(seed))
            rows.append(self._image.conditions(self._picture(prompt), draw, self.device))
        return {name: torch.cat([row[name] for row in rows]) for name in self._image.outputs}

    def _encoded_image(self, run: Run) -> dict[str, Tensor]:
        """What the image encoder makes of the image and the seed of a recorded run."""
        if self._image is None:
            return {}
        draw = self._image.draw(torch.Generator("cpu").manual_seed(run.seed))
        return self._image.conditions(np.array(self._traced.arguments.picture(run.image)), draw, self.device)

    def _picture(self, prompt: Prompt) -> Pixels:
        return picture_of(prompt, self.profile.shape.height, self.profile.shape.width)

    def _length(self, name: str, text: str) -> int:
        """Tokens that a condition has for a prompt."""
        encoder = next(encoder for encoder in self._encoders if name in encoder.outputs)
        ((component, spec),) = encoder.specs.items()
        _, mask = self._ids(component, spec, text)
        return self._conditions[name].shape[1] - int((mask == 0).sum())

    def _embed(self, text: str, *, negative: bool = False) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        own = [encoder for encoder in self._encoders if encoder.is_negative]
        for encoder in own if negative and own else [encoder for encoder in self._encoders if encoder not in own]:
            found |= encoder.module(self.tokens([text], encoder.graph))
        return found

    def encoder_specs(self) -> tuple[EncoderSpec, ...]:
        """How the runtime makes conditions of a prompt, a text encoder each."""
        return tuple(spec for encoder in self._encoders for spec in encoder.specs.values())

    def tokenizer_files(self) -> dict[str, bytes]:
        """Path in a bundle → `tokenizer.json`, without padding and truncation."""
        files = {}
        for component, spec in (pair for encoder in self._encoders for pair in encoder.specs.items()):
            backend = self._tokenizer(component).backend_tokenizer
            copied = type(backend).from_str(backend.to_str())
            copied.no_padding()
            copied.no_truncation()
            files[spec.tokenizer] = copied.to_str(pretty=False).encode()
        return files

    # ------------------------------------------------------------ ends

    @cached_property
    def ends(self) -> dict[str, End]:
        """The graphs before and behind the steps, by role. Without weights there is no decoder: its pixels would be
        gigabytes."""
        found = {}
        for encoder in self._encoders:
            specs = [
                TensorSpec(name=name, dtype="int64", shape=(1, spec.length))
                for spec in encoder.specs.values()
                for name in spec.inputs
            ]
            found[encoder.graph] = End(encoder.module, tuple(specs), encoder.outputs)
        if self._image is not None:
            found[IMAGE_ENCODER] = End(self._image, self._image.inputs, self._image.outputs)
        if not self.trace.without_weights:
            latents = TensorSpec(name="latents", dtype="fp32", shape=(1, *self.latent_shape))
            found["vae_decoder"] = End(self.vae_decoder, (latents,), ("frames",))
        return found

    @cached_property
    def vae_decoder(self) -> nn.Module:
        """The VAE decoder graph as a module, as the pipeline decodes for `output_type="pt"`."""
        tape, output = self._decoded()
        last = max(k for k, item in enumerate(tape.items) if isinstance(item, Event) and item.kind == "step")
        final = next(iter(plain(output).values()))
        if not isinstance(final, Tensor) or final.dim() not in (4, 5):
            raise UnsupportedError(f"{self.trace.pipeline} cannot be built yet: its output is no tensor of pixels")
        shape = self.profile.shape
        frames, asked = final.shape[1] if final.dim() == 5 else 1, (shape.frames, shape.height, shape.width)
        if (frames, *final.shape[-2:]) != asked:
            raise UnsupportedError(
                f"{self.trace.pipeline} makes {frames} frames of {final.shape[-1]}x{final.shape[-2]}, "
                f"{asked[0]} of {asked[2]}x{asked[1]} are asked for",
                fix="--frames, --width and --height of what it makes",
            )
        slice_ = TapeSlice(
            tape, (last + 1, len(tape.items)), dict(zip(STATES, _final_refs(tape))),
            {"pixels": tape.ref(final)}, self.pipeline.components,
        )  # fmt: skip
        decoder = FramesDecoder(slice_, [tape.value(ref) for ref in _final_refs(tape)])
        runs = [(tape, final)]
        if self._image is not None:
            other, output = self._decoded(image=2)
            runs.append((other, next(iter(plain(output).values()))))
        for run, wanted in runs:
            with torch.no_grad():
                pixels = slice_(dict(zip(STATES, map(run.value, _final_refs(run)))))["pixels"]
            if relative(pixels, wanted) > tolerance(self._precision):
                how = "is not reproduced" if run is tape else "reads the image, too"
                raise UnsupportedError(f"{self.trace.pipeline} cannot be built yet: its decoding {how}")
        return decoder

    def _decoded(self, **changes: Any) -> tuple[Tape, Any]:
        """A call of the pipeline that decodes its latents; in tiles where its autoencoder must (Allegro)."""
        for tiled in (False, True):
            try:
                return record(self.pipeline, self._traced.arguments, others={"output_type": "pt"}, **changes)
            except InputError:
                vae = self.pipeline.components.get("vae")
                if tiled or not hasattr(vae, "enable_tiling"):
                    raise
                vae.enable_tiling()
        raise AssertionError("the second call returns or raises")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents fp32 [1, *latent_shape] → frames uint8 [1, frames, height, width, 3]."""
        frames: Tensor = self.vae_decoder({"latents": latents.to(self.device)})["frames"]
        return frames

    # ------------------------------------------------------------ sampling

    def scheduler(self, steps: int | None = None) -> Any:
        """The diffusers scheduler as the pipeline sets it up for so many steps."""
        count = self.profile.sampling.steps if steps is None else steps
        tape, _ = record(self.pipeline, self._traced.arguments, last_step=0, others={"num_inference_steps": count})
        return next(iter(tape.schedulers.values()))

    def table(self, steps: int | None = None) -> SamplerTable:
        """As `Model.table`. Where steps are of several kinds, the pipeline's own loop says which are which.

        Raises:
            UnsupportedError: some of so many steps are of no kind that was traced, or have other constants.
        """
        count = self.profile.sampling.steps if steps is None else steps
        if len(self.trace.kinds) == 1:
            return super().table(count)
        if count not in self._tables:
            self._tables[count] = self._table_of_kinds(count)
        return self._tables[count]

    def _table_of_kinds(self, count: int) -> SamplerTable:
        run, sampling = self._traced.runs.at_steps(count), self.profile.sampling
        table = sampler_table(next(iter(run.tape.schedulers.values())), dynamic_guidance=sampling.dynamic_guidance)
        by_digest = {kind.digest: number for number, kind in enumerate(self.trace.kinds)}
        kinds = [by_digest.get(program.digest, -1) for program in run.programs]
        if -1 in kinds or len(kinds) != table.num_steps:
            raise UnsupportedError(
                f"{self.trace.pipeline} cannot be built with {count} steps: step {(*kinds, -1).index(-1)} is of a kind "
                "that it was not traced with"
            )
        with torch.no_grad():
            for program, kind, row in zip(run.programs, kinds, table.rows):
                self._require_same(run, program, kind, row.timestep or 0.0, count)
        guidance = [self._guidance_of(kind) for kind in range(len(self.trace.kinds))]
        rows = [
            msgspec.structs.replace(row, kind=kind or UNSET, guidance=guidance[kind])
            for row, kind in zip(table.rows, kinds)
        ]
        runs = [[kind, len(list(steps))] for kind, steps in itertools.groupby(kinds)]
        own: dict[str, Setting] = {"kinds_of_steps": json.dumps(runs)}
        if sampling.guidance_scale_2 is not UNSET:
            own["guidance_scale_2"] = sampling.guidance_scale_2
        return msgspec.structs.replace(table, rows=(*rows, table.rows[-1]), settings=table.settings | own)

    def _require_same(self, run: Run, program: Program, kind: int, timestep: float, count: int) -> None:
        """Raise UnsupportedError unless a step of a run of another number of steps is what a body would do: with the
        constants of its kind, and columns that lie on their lines."""
        found, base = self._traced.found[kind], self._traced.runs.base.programs[self.trace.kinds[kind].steps[0]]
        values = [b if slot.role == "constant" else v for slot, b, v in zip(found, base.values, program.values)]
        for place in self._places(kind):
            if place.slot.role == "column":
                values[place.number] = on_line(self._line(place), torch.tensor([timestep]), values[place.number])
        pairs = zip(effects(run.tape, program, program.values), effects(run.tape, program, values))
        if any(relative(mine.float(), own.float()) > tolerance(torch.float32) for own, mine in pairs):
            raise UnsupportedError(
                f"{self.trace.pipeline} cannot be built with {count} steps: step {program.index} reads what changes "
                "with the number of steps"
            )

    def _followed_scales(self, kind: int) -> list[str]:
        """Guidance parameters that steps of a kind follow."""
        return list(dict.fromkeys(place.slot.of[-1] for place in self._places(kind) if place.slot.role == "guidance"))

    def _own_scale(self, kind: int) -> str | None:
        """The guidance parameter of a request, where steps of a kind follow it: the pipeline's first that is on."""
        first = next(iter(self._traced.arguments.scales), None)
        return first if first in self._followed_scales(kind) else None

    def _guidance_of(self, kind: int) -> tuple[float, float]:
        """(offset, factor) of the guidance scale in steps of a kind. A request gives the pipeline's first; others are
        the build's."""
        followed = self._followed_scales(kind)
        if not followed or self._own_scale(kind):
            return 0.0, 1.0
        return self._traced.arguments.scales[followed[0]], 0.0

    def noise(self, seed: int) -> Tensor:
        """As `Model.noise`."""
        return next(self.noises(seed))

    def noises(self, seed: int) -> Iterator[Tensor]:
        """As `Model.noises`: drawn in the shape of the latents that the sampler steps (packed, where they are), behind
        what an image encoder draws."""
        generator = torch.Generator("cpu").manual_seed(seed)
        if self._image is not None:
            self._image.draw(generator)
        while True:
            yield torch.randn((1, *self.latent_shape), generator=generator)[0]

    @cached_property
    def _noise_arguments(self) -> NoiseArguments:
        """How the pipeline's call takes initial latents."""
        return NoiseArguments(self.pipeline, self._traced.arguments, self._traced.runs.base.tape)

    @torch.no_grad()
    def reference(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        negative: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> Tensor:
        """The pipeline's own final latents for one request, fp32 [1, *latent_shape] on the CPU.

        Args:
            prompts: one line of a prompt file.
            seed: of what its image encoder draws.
            others: as in `Model.reference`.
        """
        if len(prompts) != 1:
            raise InputError(f"a traced pipeline runs one request a call, got {len(prompts)}")
        arguments = self._traced.arguments
        first = next(iter(arguments.scales), None)
        scales = {} if guidance_scale is None or first is None else {first: guidance_scale}
        negative = self.profile.sampling.negative_prompt if negative is None else negative
        prompt, draw = prompt_from_line(prompts[0]), None
        others = {
            **self._noise_arguments.given(noise.to(self.device)),
            "num_inference_steps": self.profile.sampling.steps if steps is None else steps,
            **({} if generator is None else {"generator": generator}),
        }
        if self._image is not None:
            others["image"] = Image.fromarray(self._picture(prompt))
            draw = self._image.draw(torch.Generator("cpu").manual_seed(seed))
        with given_draw(draw):
            tape, _ = record(
                self.pipeline,
                arguments,
                prompt=prompt.text,
                negative=negative if isinstance(negative, str) else negative[0],
                scales=scales,
                others=others,
            )
        return joined_states([tape.value(ref).float() for ref in _final_refs(tape)]).cpu()

    def check_own_parts(self) -> None:
        """The conditions that its own encoders make of two requests must be the pipeline's; body and decoder are made.

        Raises:
            UnsupportedError: they are not, or cannot; says which part.
        """
        runs = self._traced.runs
        requests = [(BASE, BASE_NEGATIVE, runs.base), (SHORTER, SHORTER_NEGATIVE, runs.check)]
        if runs.longer:
            requests[1] = (SHORTER, SHORTER_NEGATIVE, self._short)
            requests += [(LONGER, BASE_NEGATIVE, run) for what, run in runs.longer.items() if what == PROMPT]
        allowed = tolerance(self._precision)
        for prompt, negative, run in requests:
            own = self.embed([prompt], negative) | self._encoded_image(run)
            for place in self._places():
                if place.slot.role != "condition":
                    continue
                name, wanted = self._name(place.slot), self._value(run, place)
                rows = own[name][list(self._rows(place))]
                most = allowed if wanted.is_floating_point() else 0.0
                if rows.shape != wanted.shape or relative(rows.to(wanted.dtype).float(), wanted.float()) > most:
                    raise UnsupportedError(
                        f"{self.trace.pipeline} cannot be built yet: {name} is not reproduced from "
                        + ("the image" if IMAGE in place.slot.of else "token ids")
                    )
        longest = [self._whole] if self._whole is not runs.base else []  # of others, inputs are not kept
        self._networks.require_same(self.trace.pipeline, [runs.base, requests[1][2], *longest])
        for kind in range(len(self.trace.kinds)):
            self.body(kind)
        _ = self.ends


class _FirstRows(nn.Module):
    """A text encoder whose outputs are one row each: the prompt's.

    Args:
        rows: of each output, the axis of rows and the prompt's; an axis of None: it is one, without rows.
        filled: outputs that are zero behind the prompt.
    """

    def __init__(
        self, module: TapeSlice, rows: Mapping[str, tuple[int | None, int]], filled: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.module, self._rows, self._filled = module, rows, filled
        self.read = list(dict.fromkeys([*module.read, *["attention_mask"] * bool(filled)]))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Token ids → conditions [1, …]; masks as int64."""
        values, found = self.module(inputs), dict[str, Tensor]()
        for name, (axis, row) in self._rows.items():
            found[name] = (values[name] if axis is None else values[name].select(axis, row))[None]
        for name in self._filled:
            mask = inputs["attention_mask"].reshape(1, -1, *[1] * (found[name].dim() - 2))
            found[name] = torch.where(mask > 0, found[name], torch.zeros_like(found[name]))
        return {name: value.long() if value.dtype == torch.bool else value for name, value in found.items()}


def _changed_rows(one: Tensor, other: Tensor, axis: int) -> list[int]:
    """Which rows along an axis differ."""
    pairs = zip(one.unbind(axis), other.unbind(axis))
    return [i for i, (mine, its) in enumerate(pairs) if not torch.equal(mine, its)]


def _texts(event: Event, prompt: str) -> list[str]:
    """The texts of a tokenizer's call that have the prompt in them."""
    return [leaf for leaf in pytree.tree_leaves(event.inputs) if isinstance(leaf, str) and prompt in leaf]


def _suffix(k: int) -> str:
    """What the k-th ids of a text encoder graph are called by, behind `input_ids`."""
    return f"_{k + 1}" if k else ""


def _final_refs(tape: Tape) -> list[Ref]:
    """What the sampler's last step of each state returned."""
    last = {event.scheduler: refs(event.outs)[0] for event in _sampler_steps(tape)}
    return [last[scheduler] for scheduler in tape.schedulers]


def _sampler_steps(tape: Tape) -> list[Event]:
    return [item for item in tape.items if isinstance(item, Event) and item.kind == "step"]


def _beyond_prompts(trace: Trace) -> dict[str, bool]:
    """Why a pipeline cannot be built whose conditions follow more than prompts."""
    found = {}
    for slot in trace.role("condition"):
        others = [what for what in slot.of if what not in (PROMPT, NEGATIVE)]
        if others and slot.of not in ((IMAGE,), (IMAGE, SEED)):
            found[f"{slot.component}.{slot.argument} follows the {' and the '.join(others)}"] = True
    return found


def request_from_profile(profile: Profile, pipeline: Any) -> TraceRequest:
    """What a profile asks of a trace."""
    names = inspect.signature(type(pipeline).__call__).parameters
    frames = profile.shape.frames if any(name in names for name in ("num_frames", "video_length", "frames")) else None
    return TraceRequest(
        height=profile.shape.height,
        width=profile.shape.width,
        frames=frames,
        guidance_scale=profile.sampling.guidance_scale,
        max_sequence_length=profile.text_length if "max_sequence_length" in names else None,
        arguments={"guidance_scale_2": scale} if (scale := profile.sampling.guidance_scale_2) is not UNSET else {},
    )
