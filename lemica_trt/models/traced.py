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

import dataclasses
import inspect
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from msgspec import UNSET
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.core.text import CLEANINGS
from lemica_trt.ir.graphs import NEGATIVE as NEGATIVE_NAME
from lemica_trt.ir.graphs import EncoderSpec, TensorDType, TensorSpec, text_axis
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.sampler import SamplerTable, Setting
from lemica_trt.ir.trace import Trace, TraceRequest, TraceSlot
from lemica_trt.models.model import End, Model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.models.trace.arguments import BASE, LONGER, SHORTER, SHORTER_NEGATIVE
from lemica_trt.models.trace.arguments import NEGATIVE as BASE_NEGATIVE
from lemica_trt.models.trace.body import Body, Line, Network, Prefix, Rows, fitted_line, on_line
from lemica_trt.models.trace.ends import FramesDecoder, TapeSlice, unmasked
from lemica_trt.models.trace.program import Program, effects
from lemica_trt.models.trace.replay import precision, relative, tolerance
from lemica_trt.models.trace.runs import record
from lemica_trt.models.trace.slots import NEGATIVE, PROMPT, Run
from lemica_trt.models.trace.tape import Event, Ref, Tape, plain, refs
from lemica_trt.models.trace.tracing import trace_runs

ODD = "The RED Cat &amp; a  blue <b>bird</b>, 2 ｔｒｅｅｓ schÃ¶n\n"
"""A prompt that shows how a pipeline cleans its prompts."""

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
    """A text encoder graph: tokenizer's component, how text becomes ids, and the graph."""

    component: str
    spec: EncoderSpec
    module: _FirstRows
    outputs: tuple[str, ...]


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
        self._require_buildable()
        self._require_text_axes()
        free = self.trace.text == "free"
        self._whole, self._text = self._traced.runs.longest() if free else (self._traced.runs.base, BASE)
        if any(a.digest != b.digest for a, b in zip(self._whole.programs, self._traced.runs.base.programs)):
            raise UnsupportedError(f"{self.trace.pipeline} cannot be built yet: long prompts take other operators")
        self.latent_shape = tuple(self.trace.states[0].shape[1:])
        self._conditions = self._named_conditions()
        self._encoders = self._make_encoders()
        self.check_own_parts()

    # ------------------------------------------------------------ what it is

    @property
    def guided(self) -> bool:
        """Whether a negative prompt is a condition: then the guidance scale is an input too."""
        return any(NEGATIVE in slot.of for slot in self.trace.role("condition"))

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
        """As the loop reads them, without duplicates; R = 2 under guidance, the negative prompt's row first."""
        rows, specs = "2*batch" if self.guided else "batch", []
        for name, value in self._conditions.items():
            shape: tuple[int | str, ...] = (rows, *value.shape[1:])
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
        followed = [
            {place.slot.of[-1] for place in self._places(k) if place.slot.role == "guidance"}
            for k, _ in enumerate(trace.kinds)
        ]
        reasons = {
            "it steps several latents at once": len(trace.states) != 1,
            "it calls several networks in a step": any(len(set(its.calls)) != 1 for its in trace.kinds),
            "its network is a part of a component": any("." in name or name not in trunks for name in called),
            "some of its steps call their network more often than others": len({len(k.calls) for k in trace.kinds})
            != 1,
            "it takes no prompt": trace.text == "none",
            "its blocks add to no stream, or to several": any(len(trunk.streams) != 1 for trunk in trunks.values()),
            **_beyond_prompts(trace),
            f"its network reads values in Python ({', '.join(trace.python)})": bool(trace.python),
            "it follows several guidance scales": any(len(names) > 1 for names in followed),
            "its latents are not of one request": trace.states[0].shape[0] != 1,
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
        """What a slot is in the first step of its kind."""
        return run.programs[self.trace.kinds[place.kind].steps[0]].values[place.number]

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
                row = value[self._prompt_row(place) if PROMPT in slot.of else 0][None]
                if name in found and found[name].shape != row.shape:
                    raise UnsupportedError(f"{slot.name} has another shape in another call: it cannot be built yet")
                if PROMPT in slot.of or name not in found:
                    found[name] = row
        return found

    def _name(self, slot: TraceSlot) -> str:
        """A condition's name in graphs: that of the network's argument, unless it is the only one, or graphs use that
        for something else."""
        name = slot.argument.replace(".", "_")
        if len({its.argument for its in self.trace.role("condition")}) == 1:
            name = "prompt_embeds"
        own = slot.name in self.trace.text_slots and PROMPT not in slot.of
        return (NEGATIVE_NAME if own else "") + (f"dit_{name}" if name in TAKEN else name)

    def _require_text_axes(self) -> None:
        """Conditions whose shape follows the prompt must be [rows, tokens, …].

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

    def _prompt_row(self, place: _Place) -> int:
        """The row of a condition that follows the prompt."""
        runs = self._traced.runs
        base, other = self._value(runs.base, place), self._value(runs.others[PROMPT], place)
        rows = [i for i in range(base.shape[0]) if not torch.equal(base[i], other[i])]
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
            elif slot.role == "guidance" and self.guided:
                spread = [max(numbers) - min(numbers) for numbers in (slot.factor, slot.column) if numbers]
                if not spread or max(spread) > 1e-5 * abs(slot.factor[0]):
                    raise UnsupportedError(f"{slot.name} has another guidance scale each step: it cannot be built yet")
                slots[k] = Line("guidance", slot.factor[0], slot.column[0])
            elif slot.role == "guidance" and "step" in slot.of:
                raise UnsupportedError(f"{slot.name} has another guidance scale each step: it cannot be built yet")
            elif slot.role == "condition":
                slots[k] = Rows(self._name(slot), self._rows(place))
        trunk = next(trunk for trunk in self.trace.trunks if trunk.component == self.experts[kind])
        network = Network(self.pipeline.components[trunk.component], trunk)
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
        """Rows of a condition that a slot has: 0 is the negative prompt's, where there is guidance."""
        slot = place.slot
        if not self.guided or (slot.name in self.trace.text_slots and len(slot.of) == 1):
            return (0,)
        if slot.of == (PROMPT, NEGATIVE):
            return (0, 1) if self._prompt_row(place) == 1 else (1, 0)
        return (1,) if PROMPT in slot.of else (0,)

    # ------------------------------------------------------------ text

    def _make_encoders(self) -> list[_Encoder]:
        """A graph for each tokenizer whose ids conditions follow."""
        tape, end = self._whole.tape, 0
        left = {name: None for name in self._conditions if not self._is_negative(name)}
        births: dict[str, tuple[Ref | None, int]] = {}
        for kind, its in enumerate(self.trace.kinds):
            program, known = self._whole.programs[its.steps[0]], set(births)
            for place in self._places(kind):
                name = self._name(place.slot)
                if place.slot.role == "condition" and PROMPT in place.slot.of and name not in known:
                    births[name] = (program.births[place.number], self._prompt_row(place))
                    end = program.span[1]
        encoders = []
        for at, event in enumerate(tape.items[:end]):
            if not (isinstance(event, Event) and event.kind == "tokenize" and _texts(event, self._text)):
                continue
            encoder = self._encoder(at, event, {name: births[name] for name in left}, end)
            if encoder is not None:
                encoders.append(encoder)
                left = {name: None for name in left if name not in encoder.outputs}
        if left:
            raise UnsupportedError(
                f"{', '.join(left)}: expected a condition that follows one tokenizer's ids; it cannot be built yet"
            )
        return encoders

    def _encoder(self, at: int, event: Event, births: dict[str, tuple[Ref | None, int]], end: int) -> _Encoder | None:
        tape, components = self._whole.tape, self.pipeline.components
        held = ("attention_mask",) if self.trace.text == "free" else ()
        inputs = {name: event.outs[name] for name in ("input_ids", "attention_mask") if name in event.outs}
        blanked = {
            name: found
            for name, (ref, row) in births.items()
            if ref is not None and (found := unmasked(tape, (at + 1, end), inputs, ref, row))
        }
        if blanked:
            end = 1 + max(found.at for found in blanked.values())
            births = {name: (found.ref, 0) for name, found in blanked.items()}
        outputs = {}
        for name, (ref, _) in births.items():
            try:
                TapeSlice(tape, (at + 1, end), inputs, {name: ref}, components, held)  # type: ignore[dict-item]
                outputs[name] = ref
            except UnsupportedError:
                continue
        if not outputs:
            return None
        module = TapeSlice(tape, (at + 1, end), inputs, outputs, components, held)  # type: ignore[arg-type]
        rows = {name: births[name][1] for name in outputs}
        tokens, ids = components[event.name], tape.value(event.outs["input_ids"])
        role = event.name.replace("tokenizer", "text_encoder")
        text = _texts(event, self._text)[0]
        spec = EncoderSpec(
            tokenizer=f"{event.name}/tokenizer.json",
            length=ids.shape[1],
            pad_id=tokens.pad_token_id,
            end_id=tokens.eos_token_id,
            graph=role,
            mask=bool(blanked) or "attention_mask" in module.read,
            template=text.replace(self._text, "{prompt}"),
        )
        spec = self._checked_ids(event.name, spec)
        own = _FirstRows(module, rows, blanked=bool(blanked))
        return _Encoder(event.name, spec, own, tuple(outputs))

    def _checked_ids(self, component: str, spec: EncoderSpec) -> EncoderSpec:
        """The spec with the cleaning, and the end of cut prompts, that give the pipeline's own ids, for prompts of
        several lengths and kinds."""
        runs = self._traced.runs
        tapes = {BASE: runs.base.tape, LONGER: runs.others[PROMPT].tape, SHORTER: runs.check.tape, ODD: self._odd}
        if PROMPT in runs.longer:
            tapes = {**tapes, LONGER: runs.longer[PROMPT].tape, SHORTER: self._short.tape, self._text: self._whole.tape}
        ends = (spec.end_id, None) if runs.longer else (spec.end_id,)
        for clean, end in itertools.product(CLEANINGS, ends):
            tried = msgspec.structs.replace(spec, clean=clean, end_id=end)
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

    @staticmethod
    def _has_ids(tape: Tape, component: str, ids: Tensor, mask: Tensor) -> bool:
        """Whether a tokenizer gave these ids in a recording, with padding or without."""
        events = [e for e in tape.items if isinstance(e, Event) and e.kind == "tokenize" and e.name == component]
        found = [tape.value(event.outs["input_ids"]) for event in events if "input_ids" in event.outs]
        own = ids[:, : int(mask.sum())]
        return any(torch.equal(its.cpu(), ids) or torch.equal(its.cpu(), own) for its in found)

    def _ids(self, component: str, spec: EncoderSpec, text: str) -> tuple[Tensor, Tensor]:
        """As `runtime.text.PromptTokenizer.ids`; int64 [1, length] each."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.pipeline.components[component].backend_tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.enable_truncation(spec.length)
        found = tokenizer.encode(spec.template.replace("{prompt}", CLEANINGS[spec.clean](text))).ids
        if spec.end_id is not None and len(found) == spec.length:
            found[-1] = spec.end_id
        count = spec.length - len(found)
        mask = torch.tensor([[1] * len(found) + [0] * count])
        return torch.tensor([[*found, *[spec.pad_id] * count]]), mask

    def tokens(self, prompts: Sequence[str], role: str = "text_encoder") -> dict[str, Tensor]:
        """Inputs of a text encoder graph, for one prompt."""
        encoder = next(each for each in self._encoders if each.spec.graph == role)
        ids, mask = self._ids(encoder.component, encoder.spec, prompts[0])
        names = {"input_ids": ids, "attention_mask": mask}
        return {name: names[name].to(self.device) for name in encoder.module.read}

    @torch.no_grad()
    def embed(  # type: ignore[override]  # `denoise.Conditions`
        self, prompts: Sequence[str], negative: str | Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Conditions by name, [R, …] or [b, …]; under guidance the negative prompts' rows first."""
        negatives = self._negatives(negative, len(prompts)) if self.guided else []
        rows = {text: self._embed(text) for text in dict.fromkeys((*negatives, *prompts))}
        found = {}
        for spec in self.conditions:
            name, followed = spec.name, list(prompts)
            if self._is_negative(name):
                name, followed = name.removeprefix(NEGATIVE_NAME), negatives
            texts = followed if spec.text_axes and spec.shape[0] == "batch" else [*negatives, *prompts]
            parts = [rows[text][name] for text in texts]
            if spec.text_axes:
                length, *others = {self._length(name, text) for text in followed}
                if others or length < 1:
                    raise InputError(f"prompts of a batch must have one length, at least 1 token, got {length}")
                parts = [part[:, :length] for part in parts]
            found[spec.name] = torch.cat(parts)
        return found

    def _length(self, name: str, text: str) -> int:
        """Tokens that a condition has for a prompt."""
        encoder = next(encoder for encoder in self._encoders if name in encoder.outputs)
        _, mask = self._ids(encoder.component, encoder.spec, text)
        return self._conditions[name].shape[1] - int((mask == 0).sum())

    def _embed(self, text: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for encoder in self._encoders:
            found |= encoder.module(self.tokens([text], encoder.spec.graph))
        return found

    def encoder_specs(self) -> tuple[EncoderSpec, ...]:
        """How the runtime makes conditions of a prompt, a text encoder each."""
        return tuple(encoder.spec for encoder in self._encoders)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Path in a bundle → `tokenizer.json`, without padding and truncation."""
        files = {}
        for encoder in self._encoders:
            backend = self.pipeline.components[encoder.component].backend_tokenizer
            copied = type(backend).from_str(backend.to_str())
            copied.no_padding()
            copied.no_truncation()
            files[encoder.spec.tokenizer] = copied.to_str(pretty=False).encode()
        return files

    # ------------------------------------------------------------ ends

    @cached_property
    def ends(self) -> dict[str, End]:
        """The graphs before and behind the steps, by role."""
        found = {}
        for encoder in self._encoders:
            length = encoder.spec.length
            specs = [TensorSpec(name=name, dtype="int64", shape=(1, length)) for name in encoder.module.read]
            found[encoder.spec.graph] = End(encoder.module, tuple(specs), encoder.outputs)
        latents = TensorSpec(name="latents", dtype="fp32", shape=(1, *self.latent_shape))
        found["vae_decoder"] = End(self.vae_decoder, (latents,), ("frames",))
        return found

    @cached_property
    def vae_decoder(self) -> nn.Module:
        """The VAE decoder graph as a module, as the pipeline decodes for `output_type="pt"`."""
        tape, output = record(self.pipeline, self._traced.arguments, others={"output_type": "pt"})
        last = max(k for k, item in enumerate(tape.items) if isinstance(item, Event) and item.kind == "step")
        final, step = next(iter(plain(output).values())), tape.items[last]
        if not isinstance(final, Tensor) or final.dim() not in (4, 5):
            raise UnsupportedError(f"{self.trace.pipeline} cannot be built yet: its output is no tensor of pixels")
        slice_ = TapeSlice(
            tape, (last + 1, len(tape.items)), {"latents": refs(step.outs)[0]}, {"pixels": tape.ref(final)},
            self.pipeline.components,
        )  # fmt: skip
        decoder = FramesDecoder(slice_, tape.value(refs(step.outs)[0]).dtype)
        with torch.no_grad():
            pixels = slice_({"latents": tape.value(refs(step.outs)[0])})["pixels"]
        if relative(pixels, final) > tolerance(self._precision):
            raise UnsupportedError(f"{self.trace.pipeline} cannot be built yet: its decoding is not reproduced")
        return decoder

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

    def _guidance_of(self, kind: int) -> tuple[float, float]:
        """(offset, factor) of the guidance scale in steps of a kind. A request gives the pipeline's first; others are
        the build's."""
        scales = self._traced.arguments.scales
        followed = [place.slot.of[-1] for place in self._places(kind) if place.slot.role == "guidance"]
        own = next(iter(followed), None)
        return (0.0, 1.0) if own in (None, next(iter(scales), None)) else (scales[str(own)], 0.0)

    def noise(self, seed: int) -> Tensor:
        """As `Model.noise`."""
        return next(self.noises(seed))

    def noises(self, seed: int) -> Iterator[Tensor]:
        """As `Model.noises`: drawn in the shape of the latents that the sampler steps (packed, where they are)."""
        generator = torch.Generator("cpu").manual_seed(seed)
        while True:
            yield torch.randn((1, *self.latent_shape), generator=generator)[0]

    @torch.no_grad()
    def reference(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        negative: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """The pipeline's own final latents for one request, fp32 [1, *latent_shape] on the CPU."""
        if len(prompts) != 1:
            raise InputError(f"a traced pipeline runs one request a call, got {len(prompts)}")
        arguments = self._traced.arguments
        first = next(iter(arguments.scales), None)
        scales = {} if guidance_scale is None or first is None else {first: guidance_scale}
        negative = self.profile.sampling.negative_prompt if negative is None else negative
        tape, _ = record(
            self.pipeline,
            arguments,
            prompt=prompts[0],
            negative=negative if isinstance(negative, str) else negative[0],
            scales=scales,
            others={
                "latents": noise.to(self.device, _first(self._traced.runs.base.tape).dtype),
                "num_inference_steps": self.profile.sampling.steps if steps is None else steps,
                **({} if generator is None else {"generator": generator}),
            },
        )
        return _final(tape).float().cpu()

    def check_own_parts(self) -> None:
        """The conditions that its own encoders make of two requests must be the pipeline's; body and decoder are made.

        Raises:
            UnsupportedError: they are not, or cannot; says which part.
        """
        runs = self._traced.runs
        requests = [(BASE, BASE_NEGATIVE, runs.base)]
        if runs.longer:
            requests.append((SHORTER, SHORTER_NEGATIVE, self._short))
            requests += [(LONGER, BASE_NEGATIVE, run) for what, run in runs.longer.items() if what == PROMPT]
        else:
            requests.append((SHORTER, SHORTER_NEGATIVE, runs.check))
        allowed = tolerance(self._precision)
        for prompt, negative, run in requests:
            own = self.embed([prompt], negative)
            for place in self._places():
                if place.slot.role != "condition":
                    continue
                name, wanted = self._name(place.slot), self._value(run, place)
                rows = own[name][list(self._rows(place))]
                most = allowed if wanted.is_floating_point() else 0.0
                if rows.shape != wanted.shape or relative(rows.to(wanted.dtype).float(), wanted.float()) > most:
                    raise UnsupportedError(
                        f"{self.trace.pipeline} cannot be built yet: {name} is not reproduced from token ids"
                    )
        for kind in range(len(self.trace.kinds)):
            self.body(kind)
        _ = self.vae_decoder


class _FirstRows(nn.Module):
    """A text encoder whose outputs are one row each: the prompt's.

    Args:
        blanked: whether outputs are zero where the attention mask is.
    """

    def __init__(self, module: TapeSlice, rows: dict[str, int], *, blanked: bool) -> None:
        super().__init__()
        self.module, self._rows, self._blanked = module, rows, blanked
        self.read = [*module.read, *["attention_mask"] * (blanked and "attention_mask" not in module.read)]

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Token ids → conditions [1, …]; masks as int64."""
        found = {name: value[self._rows[name]][None] for name, value in self.module(inputs).items()}
        if self._blanked:
            mask = inputs["attention_mask"][..., None]
            found = {name: value * mask.to(value.dtype) for name, value in found.items()}
        return {name: value.long() if value.dtype == torch.bool else value for name, value in found.items()}


def _texts(event: Event, prompt: str) -> list[str]:
    """The texts of a tokenizer's call that have the prompt in them."""
    return [leaf for leaf in pytree.tree_leaves(event.inputs) if isinstance(leaf, str) and prompt in leaf]


def _first(tape: Tape) -> Tensor:
    """What the sampler's first step was given."""
    latents: Tensor = tape.value(_sampler_steps(tape)[0].inputs["sample"])
    return latents


def _final(tape: Tape) -> Tensor:
    """What the sampler's last step returned."""
    latents: Tensor = tape.value(refs(_sampler_steps(tape)[-1].outs)[0])
    return latents


def _sampler_steps(tape: Tape) -> list[Event]:
    return [item for item in tape.items if isinstance(item, Event) and item.kind == "step"]


def _beyond_prompts(trace: Trace) -> dict[str, bool]:
    """Why a pipeline cannot be built whose conditions follow more than prompts."""
    found = {}
    for slot in trace.role("condition"):
        if others := [what for what in slot.of if what not in (PROMPT, NEGATIVE)]:
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
