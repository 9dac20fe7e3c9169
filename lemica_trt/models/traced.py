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

import inspect
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import UNSET, UnsetType
from PIL import Image
from torch import Tensor, nn

from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.core.pictures import Pixels
from lemica_trt.ir.graphs import IMAGE_ENCODER, EncoderSpec, ImageSpec, Source, TensorDType, TensorSpec, text_axis
from lemica_trt.ir.graphs import NEGATIVE as NEGATIVE_NAME
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.prompts import Prompt, prompt_from_line, require_taken
from lemica_trt.ir.sampler import SamplerTable, Setting
from lemica_trt.ir.trace import Trace, TraceRequest
from lemica_trt.models.conditions import Conditions, Place
from lemica_trt.models.copies import Copies
from lemica_trt.models.image_encoder import ImageEncoder, given_draw, image_encoder, pictures_of
from lemica_trt.models.model import End, Model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.models.text_encoders import TextEncoders
from lemica_trt.models.trace.arguments import BASE, LONGER, SHORTER, SHORTER_NEGATIVE
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

NAMES: dict[torch.dtype, TensorDType] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "int64",
}
"""dtype of a condition → of the graphs' tensors."""


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
        self._named = Conditions(self._traced)
        self._networks = Copies(pipeline.components, self.experts)
        self._require_buildable()
        self._named.require_text_axes()
        self.latent_shape = tuple(joined_states(self._traced.runs.base.programs[0].x).shape[1:])
        self._texts = TextEncoders(pipeline, self._named)
        self._image = self._make_image_encoder()
        self.check_own_parts()

    # ------------------------------------------------------------ what it is

    @property
    def guided(self) -> bool:
        """Whether a negative prompt is a condition: then the guidance scale is an input too."""
        return self._named.guided

    @property
    def image(self) -> ImageSpec | UnsetType:
        """How the pictures of a request become conditions."""
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
            for place in self._named.places(number):
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
        for name, value in self._named.values.items():
            shape: tuple[int | str, ...] = ("batch" if self._named.is_image(name) else rows, *value.shape[1:])
            if self._named.is_free(name):
                negative = self._named.is_negative(name)
                first = "batch" if negative or NEGATIVE_NAME + name in self._named.values else rows
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

    def body(self, kind: int) -> Body:
        """The program of a step of a kind, as a module."""
        program = self._traced.runs.base.programs[self.trace.kinds[kind].steps[-1]]
        slots: dict[int, Line | Rows | Prefix] = {}
        for place in self._named.places(kind):
            k, slot = place.number, place.slot
            if slot.name in self.trace.text_slots and slot.role != "condition":
                slots[k] = self._named.prefix(place)
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
                slots[k] = Rows(self._named.name(slot), self._named.rows(place), self._named.axis(slot.name))
        trunk = next(trunk for trunk in self.trace.trunks if trunk.component == self.experts[kind])
        network = Network(self._networks[trunk.component], trunk)
        return Body(program, slots, network, branches=self.branches)

    def _line(self, place: Place) -> Line:
        """A column, as a line in the timestep."""
        slot, steps = place.slot, self.trace.kinds[place.kind].steps
        if not slot.column:
            raise UnsupportedError(f"{slot.name} has another value in each element: it cannot be built yet")
        timesteps = [self.trace.states[0].table.timesteps[step] for step in steps]
        halves = self._halves(self._named.value(self._traced.runs.base, place))
        return fitted_line("timestep", timesteps, slot.column, slot.name, dtypes=halves)

    def _halves(self, value: Any) -> list[torch.dtype]:
        """The half precisions that a value of the loop may have been rounded to, its own first."""
        found = [self._precision] if self._precision.itemsize < 4 else []
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
            found.insert(0, value.dtype)
        return list(dict.fromkeys(found))

    def _make_image_encoder(self) -> ImageEncoder | None:
        """The graph of all conditions that follow the image; None: there are none."""
        base, found, whole = self._traced.runs.base, {}, set[str]()
        for place in reversed(self._named.places()):
            if IMAGE in place.slot.of:
                name = self._named.name(place.slot)
                found[name] = self._named.program(base, place.kind).births[place.number]
                whole |= {name} if self._named.axis(place.slot.name) is None else set()
        return image_encoder(self._traced, self.pipeline, found, whole) if found else None  # type: ignore[arg-type]

    def tokens(self, prompts: Sequence[str], role: str = "text_encoder") -> dict[str, Tensor]:
        """Inputs of a text encoder graph, for one prompt."""
        return self._texts.tokens(prompts[0], role, self.device)

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
            prompts: lines of a prompt file (`ir.prompts.Prompt.line`); pictures that one has not are drawn.
            seeds: of what an image encoder draws, [b].

        Raises:
            InputError: a line brings a picture that the model does not take, or it cannot be read.
        """
        images = self._image_conditions([*map(prompt_from_line, prompts)], seeds)
        prompts = [prompt_from_line(prompt).text for prompt in prompts]
        negatives = self._negatives(negative, len(prompts)) if self.guided else []
        rows = {(text, False): self._texts.embed(text, self.device) for text in dict.fromkeys(prompts)}
        rows |= {(text, True): self._texts.embed(text, self.device, negative=True) for text in dict.fromkeys(negatives)}
        first, second = (
            [(text, is_negative) for text in texts] for texts, is_negative in ((negatives, True), (prompts, False))
        )
        found = {}
        for spec in self.conditions:
            if spec.name in images:
                found[spec.name] = images[spec.name]
                continue
            name, followed = spec.name, second
            if self._named.is_negative(name):
                name, followed = name.removeprefix(NEGATIVE_NAME), first
            texts = followed if spec.text_axes and spec.shape[0] == "batch" else [*first, *second]
            parts = [rows[text][name] for text in texts]
            if spec.text_axes:
                length, *others = {self._texts.length(name, text) for text, _ in followed}
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
        for prompt in prompts:
            require_taken(prompt, self._sources, what=type(self.pipeline).__name__)
        if self._image is None:
            return {}
        rows = []
        for prompt, seed in zip(prompts, [*seeds, *[0] * len(prompts)]):
            draw = self._image.draw(torch.Generator("cpu").manual_seed(seed))
            rows.append(self._image.conditions(self._pictures(prompt), draw, self.device))
        return {name: torch.cat([row[name] for row in rows]) for name in self._image.outputs}

    def _encoded_image(self, run: Run) -> dict[str, Tensor]:
        """What the image encoder makes of the pictures and the seed of a recorded run."""
        if self._image is None:
            return {}
        draw = self._image.draw(torch.Generator("cpu").manual_seed(run.seed))
        pictures = self._traced.arguments.pictures(run.image)
        return self._image.conditions(
            {name: np.array(picture) for name, picture in pictures.items()}, draw, self.device
        )

    @property
    def _sources(self) -> tuple[Source, ...]:
        """The pictures that a request must have."""
        return () if self._image is None else self._image.spec.sources

    def _pictures(self, prompt: Prompt) -> dict[Source, Pixels]:
        return pictures_of(prompt, self._sources, self.profile.shape.height, self.profile.shape.width)

    def encoder_specs(self) -> tuple[EncoderSpec, ...]:
        """How the runtime makes conditions of a prompt, a text encoder each."""
        return self._texts.specs()

    def tokenizer_files(self) -> dict[str, bytes]:
        """As `TextEncoders.tokenizer_files`."""
        return self._texts.tokenizer_files()

    # ------------------------------------------------------------ ends

    @cached_property
    def ends(self) -> dict[str, End]:
        """The graphs before and behind the steps, by role. Without weights there is no decoder: its pixels would be
        gigabytes."""
        found = self._texts.ends()
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
        for place in self._named.places(kind):
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
        return list(
            dict.fromkeys(place.slot.of[-1] for place in self._named.places(kind) if place.slot.role == "guidance")
        )

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
            others |= {name: Image.fromarray(picture) for name, picture in self._pictures(prompt).items()}
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
            requests[1] = (SHORTER, SHORTER_NEGATIVE, self._named.short)
            requests += [(LONGER, BASE_NEGATIVE, run) for what, run in runs.longer.items() if what == PROMPT]
        allowed = tolerance(self._precision)
        for prompt, negative, run in requests:
            own = self.embed([prompt], negative) | self._encoded_image(run)
            for place in self._named.places():
                if place.slot.role != "condition":
                    continue
                name, wanted = self._named.name(place.slot), self._named.value(run, place)
                rows = own[name][list(self._named.rows(place))]
                most = allowed if wanted.is_floating_point() else 0.0
                if rows.shape != wanted.shape or relative(rows.to(wanted.dtype).float(), wanted.float()) > most:
                    raise UnsupportedError(
                        f"{self.trace.pipeline} cannot be built yet: {name} is not reproduced from "
                        + ("the image" if IMAGE in place.slot.of else "token ids")
                    )
        whole, _ = self._named.longest
        longest = [whole] if whole is not runs.base else []  # of others, inputs are not kept
        self._networks.require_same(self.trace.pipeline, [runs.base, requests[1][2], *longest])
        for kind in range(len(self.trace.kinds)):
            self.body(kind)
        _ = self.ends


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
