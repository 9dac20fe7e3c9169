"""The text encoders of a traced pipeline as graphs: prompt → ids → conditions, by its own tokenizers and networks.

Conditions are followed back to the calls of tokenizers whose ids they follow. How a text becomes ids – cleaning,
template, padding, the end of what is cut – is found by trying, on the pipeline's own prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import torch
from msgspec import UNSET
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.core.text import CLEANINGS
from lemica_trt.ir.graphs import EncoderSpec, TensorSpec
from lemica_trt.models.conditions import Conditions, Place
from lemica_trt.models.model import End
from lemica_trt.models.padding import fed_ids, multiples
from lemica_trt.models.trace.arguments import BASE, LONGER, LONGER_NEGATIVE, SHORTER, SHORTER_NEGATIVE
from lemica_trt.models.trace.arguments import NEGATIVE as BASE_NEGATIVE
from lemica_trt.models.trace.ends import TapeSlice
from lemica_trt.models.trace.runs import record
from lemica_trt.models.trace.slots import NEGATIVE, PROMPT, Run
from lemica_trt.models.trace.tape import Event, Ref, Tape

ODD = "The RED Cat &amp; a  blue <b>bird</b>, 2 ｔｒｅｅｓ schÃ¶n\n"
"""A prompt that shows how a pipeline cleans its prompts."""

CUT = " ".join([LONGER] * 80)
"""A prompt of more tokens than text encoders take: whether its last id is the end token, where it is cut."""


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


class TextEncoders:
    """See the module docstring.

    Raises:
        UnsupportedError: a condition does not follow token ids by operators alone, or ids cannot be made again.
    """

    def __init__(self, pipeline: Any, conditions: Conditions) -> None:
        self._pipeline, self._named = pipeline, conditions
        self._traced, self._trace = conditions.traced, conditions.trace
        self._whole, self._text = conditions.longest
        self.encoders = self._made()

    def _made(self) -> list[_Encoder]:
        """A graph for each group of conditions that follow the ids of the same tokenizers.

        Where Python reads how long a prompt is, they are followed in a run whose prompt fills all positions.
        """
        names = [
            name for name in self._named.values if not (self._named.is_negative(name) or self._named.is_image(name))
        ]
        source = _Source(self._whole, self._text)
        followed = self._followed(names, source)
        if not all(followed.values()) and self._trace.text == "fixed":
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

    def _negative_encoders(self, found: Sequence[_Encoder]) -> list[_Encoder]:
        """Text encoder graphs of their own for negative prompts, where those become other ids than prompts do."""
        source = _Source(self._traced.runs.base, BASE_NEGATIVE, negative=True)
        if self._trace.text == "free" or not self._named.guided:
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

    def _texts_at(self, source: _Source) -> dict[str, Place]:
        """Where each condition is that follows the prompt, or the negative prompt; of several kinds of steps, the last
        of the first that has it."""
        found: dict[str, Place] = {}
        for place in self._named.places():
            name, slot = self._named.name(place.slot), place.slot
            own = slot.role == "condition" and source.follows in slot.of
            if own and (name not in found or found[name].kind == place.kind):
                found[name] = place
        return found

    def _births(self, source: _Source) -> dict[str, Ref]:
        """The tensors that conditions are, by name."""
        births = {
            name: self._named.program(source.run, place.kind).births[place.number]
            for name, place in self._texts_at(source).items()
        }
        return {name: born for name, born in births.items() if born is not None}

    def _end(self, source: _Source) -> int:
        """The item of the recording behind which no condition is made."""
        return max(self._named.program(source.run, place.kind).span[1] for place in self._texts_at(source).values())

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
        held = tuple(name for name in inputs if name.startswith(names[1])) if self._trace.text == "free" else ()
        span = (min(events) + 1, self._end(source))
        return TapeSlice(
            source.run.tape, span, inputs, outputs, self._pipeline.components, held, counted=source.counted
        )

    def _encoder(self, events: dict[int, Event], outputs: Sequence[str], source: _Source) -> _Encoder:
        components = [event.name for event in events.values()]
        if len(set(components)) < len(components) or (len(components) > 1 and self._trace.text == "free"):
            raise UnsupportedError(
                f"{', '.join(outputs)}: expected a condition that follows each tokenizer once, got "
                f"{', '.join(components)}; it cannot be built yet"
            )
        births = self._births(source)
        module = self._slice(events, {name: births[name] for name in outputs}, source)
        places = self._texts_at(source)
        rows = {
            name: (
                self._named.axis(places[name].slot.name),
                self._named.prompt_row(places[name], source.follows),
            )
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
        return tuple(name for name in outputs if self._named.values[name].shape[1:2] == (length,))

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
        found = self._pipeline.components[component]
        return getattr(found, "tokenizer", found)

    def _checked_ids(self, component: str, spec: EncoderSpec) -> EncoderSpec:
        """The spec with the cleaning, and the end of cut prompts, that give the pipeline's own ids, for prompts of
        several lengths and kinds."""
        runs = self._traced.runs
        tapes = {BASE: runs.base.tape, LONGER: runs.others[PROMPT].tape, SHORTER: runs.check.tape, ODD: self._odd}
        if not runs.longer:
            tapes[CUT] = self._cut
        if spec.negative:
            odd, _ = record(self._pipeline, self._traced.arguments, last_step=0, negative=ODD)
            tapes = {BASE_NEGATIVE: runs.base.tape, LONGER_NEGATIVE: runs.others[NEGATIVE].tape, ODD: odd}
            tapes |= {SHORTER_NEGATIVE: runs.check.tape, CUT: self._cut}
        if PROMPT in runs.longer:
            tapes = {
                **tapes,
                LONGER: runs.longer[PROMPT].tape,
                SHORTER: self._named.short.tape,
                self._text: self._whole.tape,
            }
        tries = itertools.product(CLEANINGS, (spec.end_id, None), multiples(tapes, component), (UNSET, True))
        for clean, end, multiple, left in tries:
            tried = msgspec.structs.replace(spec, clean=clean, end_id=end, multiple=multiple or UNSET, left=left)
            if all(self._has_ids(tape, component, *self.ids(component, tried, text)) for text, tape in tapes.items()):
                return tried
        raise UnsupportedError(f"{component}: the runtime would give other token ids; it cannot be built yet")

    @cached_property
    def _odd(self) -> Tape:
        """A prompt with capitals, white space, markup and damaged Unicode, up to the loop."""
        return record(self._pipeline, self._traced.arguments, last_step=0, prompt=ODD)[0]

    @cached_property
    def _cut(self) -> Tape:
        """A prompt and a negative prompt that are cut, up to the loop."""
        return record(self._pipeline, self._traced.arguments, last_step=0, prompt=CUT, negative=CUT)[0]

    @staticmethod
    def _has_ids(tape: Tape, component: str, ids: Tensor, mask: Tensor) -> bool:
        """Whether a tokenizer gave these ids in a recording, with padding or without."""
        events = [e for e in tape.items if isinstance(e, Event) and e.kind == "tokenize" and e.name == component]
        found = [tape.value(fed_ids(tape, event)) for event in events if "input_ids" in event.outs]
        own = ids[mask > 0][None]
        return any(torch.equal(its.cpu(), ids) or torch.equal(its.cpu(), own) for its in found)

    def ids(self, component: str, spec: EncoderSpec, text: str) -> tuple[Tensor, Tensor]:
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

    def length(self, name: str, text: str) -> int:
        """Tokens that a condition has for a prompt."""
        encoder = next(encoder for encoder in self.encoders if name in encoder.outputs)
        ((component, spec),) = encoder.specs.items()
        _, mask = self.ids(component, spec, text)
        return self._named.values[name].shape[1] - int((mask == 0).sum())

    def embed(self, text: str, device: torch.device, *, negative: bool = False) -> dict[str, Tensor]:
        """Conditions of a prompt or a negative prompt, by name, [1, …]."""
        found: dict[str, Tensor] = {}
        own = [encoder for encoder in self.encoders if encoder.is_negative]
        for encoder in own if negative and own else [encoder for encoder in self.encoders if encoder not in own]:
            found |= encoder.module(self.tokens(text, encoder.graph, device))
        return found

    def specs(self) -> tuple[EncoderSpec, ...]:
        """How the runtime makes conditions of a prompt, a text encoder each."""
        return tuple(spec for encoder in self.encoders for spec in encoder.specs.values())

    def tokenizer_files(self) -> dict[str, bytes]:
        """Path in a bundle → `tokenizer.json`, without padding and truncation."""
        files = {}
        for component, spec in (pair for encoder in self.encoders for pair in encoder.specs.items()):
            backend = self._tokenizer(component).backend_tokenizer
            copied = type(backend).from_str(backend.to_str())
            copied.no_padding()
            copied.no_truncation()
            files[spec.tokenizer] = copied.to_str(pretty=False).encode()
        return files

    def tokens(self, text: str, role: str, device: torch.device) -> dict[str, Tensor]:
        """Inputs of a text encoder graph, for one prompt."""
        encoder = next(each for each in self.encoders if each.graph == role)
        found: dict[str, Tensor] = {}
        for component, spec in encoder.specs.items():
            found |= dict(zip(spec.inputs, (its.to(device) for its in self.ids(component, spec, text))))
        return found

    def ends(self) -> dict[str, End]:
        """The graphs, by role."""
        found = {}
        for encoder in self.encoders:
            specs = [
                TensorSpec(name=name, dtype="int64", shape=(1, spec.length))
                for spec in encoder.specs.values()
                for name in spec.inputs
            ]
            found[encoder.graph] = End(encoder.module, tuple(specs), encoder.outputs)
        return found


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


def _texts(event: Event, prompt: str) -> list[str]:
    """The texts of a tokenizer's call that have the prompt in them."""
    return [leaf for leaf in pytree.tree_leaves(event.inputs) if isinstance(leaf, str) and prompt in leaf]


def _suffix(k: int) -> str:
    """What the k-th ids of a text encoder graph are called by, behind `input_ids`."""
    return f"_{k + 1}" if k else ""
