"""Calls of a pipeline that differ in one thing each, recorded."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lemica_trt.core.errors import InputError, LemicaError, MissingDependencyError, UnsupportedError
from lemica_trt.models.load import quiet
from lemica_trt.models.trace.arguments import (
    GUIDER,
    LONGER,
    LONGER_NEGATIVE,
    OTHER,
    OTHER_NEGATIVE,
    SHORTER,
    SHORTER_NEGATIVE,
    Arguments,
)
from lemica_trt.models.trace.decoded import decoding_on_shapes, has_autoencoder
from lemica_trt.models.trace.program import programs
from lemica_trt.models.trace.slots import IMAGE, NEGATIVE, PROMPT, SEED, Run
from lemica_trt.models.trace.tape import Event, HeldNetworks, Recorder, Tape

GUIDANCE_STEP = 1.25
"""How much a guidance scale is raised in the run that shows what follows it; twice in the run of the check."""

WORD, FEW = "a ", 8
"""What long prompts are made of, and how often it stands in a short one."""

MAX_PROMPT = 1 << 15
"""Letters of the longest prompt that is tried."""

REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError, ImportError)
"""What a pipeline raises for arguments that it does not take."""


STEPS_OF_A_KIND = 3
"""Steps of each kind that a trace must have: fewer tell neither a line nor what changes with the step."""

STEPS_TRIED = (4, 6, 8, 10, 12, 16, 24, 32)
"""Numbers of steps that are tried for that."""


def record(
    pipeline: Any,
    arguments: Arguments,
    *,
    last_step: int | None = None,
    held: HeldNetworks | None = None,
    **changes: Any,
) -> tuple[Tape, Any]:
    """One call of a pipeline, recorded.

    Args:
        last_step: the recording ends before this step; None: with the call.
        held: networks that need not compute.
        changes: of the arguments, see `Arguments.at`.

    Returns:
        The recording, and what the call returned; None where it was ended.

    Raises:
        InputError: the pipeline refuses its arguments.
        MissingDependencyError: it needs a library that is not installed.
    """
    kind, recorder = type(pipeline).__name__, Recorder(pipeline.components, last_step=last_step, held=held)
    output, guider = None, changes.get("scales", {}).get(GUIDER, arguments.guider)
    try:
        with torch.no_grad(), quiet(), _guider(pipeline, guider), recorder():
            output = pipeline(**arguments.at(**changes))
    except LemicaError:
        raise
    except NameError as error:  # diffusers imports optional libraries only where they are there
        raise MissingDependencyError(f"{kind} needs a library that is not installed: {error}") from error
    except REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{kind} refuses its arguments: {line}") from error
    return recorder.tape, output


class Runs:
    """All runs of a trace.

    Attributes:
        arguments: as given; of more steps, where a kind of steps has fewer than `STEPS_OF_A_KIND` of those; with an
            image and a last one, where the call fails without.
        base: every argument as requested.
        others: what differs in it → a run that differs from the base run in one thing.
        longer: `prompt` or `negative_prompt` → a run with a longer one whose shapes or operators follow its length.
        check: everything is new in it. Its prompt has another length than the base run's, unless shapes follow it.
    """

    def __init__(self, pipeline: Any, arguments: Arguments) -> None:
        self._pipeline, self.arguments = pipeline, arguments
        self.longer: dict[str, Run] = {}
        parts = pipeline.components.items()
        self._networks = {name for name, part in parts if name.startswith("transformer") and part is not None}
        self.base = self._first()
        called = {str(node.what) for program in self.base.programs for node in program.calls}
        self._idle = self._networks - called
        self._held = HeldNetworks(called | self._networks)
        self._require_size()
        self._trace_every_kind()
        arguments = self.arguments
        self.others: dict[str, Run] = {}
        if arguments.has_prompt:
            self.others[PROMPT] = self._other(PROMPT, "prompt", LONGER, OTHER)
        if arguments.has_negative:
            self.others[NEGATIVE] = self._other(NEGATIVE, "negative", LONGER_NEGATIVE, OTHER_NEGATIVE)
        if arguments.has_image:
            self.others[IMAGE] = self._run(compared=True, image=2)
        self.others[SEED] = self._run(compared=True, seed=12)
        for name, value in arguments.scales.items():
            self.others[name] = self._run(compared=True, scales={name: value * GUIDANCE_STEP})
        texts: dict[str, Any] = {"prompt": OTHER, "negative": OTHER_NEGATIVE}
        if not self.longer:
            texts = {"prompt": SHORTER, "negative": SHORTER_NEGATIVE}
        scales = {name: value * GUIDANCE_STEP**2 for name, value in arguments.scales.items()}
        self.check = self._run(seed=77, image=3, scales=scales, **texts)

    def _run(self, *, compared: bool = False, **changes: Any) -> Run:
        """A run.

        Args:
            compared: only what its slots are is looked at.
        """
        tape, _ = record(self._pipeline, self.arguments, **changes)
        its = {name: changes[name] for name in ("seed", "image") if name in changes}
        scales = {**self.arguments.scales, **changes.get("scales", {})}
        found = programs(tape, self._networks)
        tape.forget(frozenset().union(*(program.made for program in found)), compared=compared)
        if compared:
            found = [program.without_latents() for program in found]
        return Run(tape, found, scales, **its)

    def _first(self) -> Run:
        """The base run; of a call that fails without an image, or without a last one beside it, with that."""
        try:
            return self._run()
        except InputError as error:
            for arguments in self.arguments.with_pictures(self._pipeline):
                self.arguments = arguments
                with contextlib.suppress(InputError):
                    return self._run()
            raise error from None

    def at_steps(self, count: int) -> Run:
        """A run of another number of steps whose networks do not compute: its latents mean nothing."""
        return self._run(held=self._held, others={"num_inference_steps": count})

    def _require_size(self) -> None:
        """Raise InputError where the pipeline decodes another height or width than was asked for."""
        asked = self.arguments.size
        if asked is None or not has_autoencoder(self._pipeline):
            return
        with decoding_on_shapes(self._pipeline) as decoded, contextlib.suppress(InputError):  # in tiles only (Allegro)
            record(self._pipeline, self.arguments, held=self._held, others={"output_type": "pt"})
        for height, width in decoded:
            if (height, width) != asked:
                kind = type(self._pipeline).__name__
                raise InputError(
                    f"{kind} makes {width}x{height} where {asked[1]}x{asked[0]} is asked for",
                    fix=f"--width {width} --height {height}",
                )

    def _trace_every_kind(self) -> None:
        """Where there are several kinds of steps, a base run that has enough of each that can have more."""
        kinds = Counter(program.digest for program in self.base.programs)
        if not self._idle and (len(kinds) == 1 or min(kinds.values()) >= STEPS_OF_A_KIND):
            return

        @functools.cache
        def enough(steps: int) -> set[str]:
            counts = Counter(program.digest for program in self.at_steps(steps).programs)
            return {kind for kind, count in counts.items() if count >= STEPS_OF_A_KIND}

        steps = next(n for n in STEPS_TRIED if enough(n) >= enough(STEPS_TRIED[-1]))
        if steps != len(self.base.programs):
            self.arguments = self.arguments.at_steps(self._pipeline, steps)
            self.base = self._run()

    def longest(self) -> tuple[Run, str]:
        """A run whose prompts have as many tokens as the pipeline takes, none cut off; and that prompt.

        Where the pipeline has no parameter that says how many, its text encoder pads, and any longer prompt will do.

        Raises:
            UnsupportedError: no such prompt was found.
        """
        most = self.arguments.max_sequence_length
        if most is not None:
            short = self._run(prompt=WORD * FEW, negative=WORD * FEW)
            text = (WORD * (FEW + most - self._tokens(short))).strip()
            run = self._run(prompt=text, negative=text)
            if self._tokens(run) == most:
                return run, text
            raise UnsupportedError(f"no prompt was found that has all {most} tokens")
        text, before = LONGER, self._run(prompt=LONGER, negative=LONGER)
        while len(text) < MAX_PROMPT:
            text = f"{text} {text}"
            run = self._run(prompt=text, negative=text)
            if _alike(before, run):
                return run, text
            before = run
        raise UnsupportedError(f"it takes prompts of more than {MAX_PROMPT} letters whole")

    def filled(self) -> tuple[Run, str]:
        """A run whose prompts are cut, where they are padded: no position is empty; and that prompt.

        Raises:
            UnsupportedError: no such prompt was found.
        """
        text = LONGER
        while len(text) < MAX_PROMPT:
            text = f"{text} {text}"
            tape, _ = record(self._pipeline, self.arguments, last_step=0, prompt=text, negative=text)
            events = [item for item in tape.items if isinstance(item, Event) and item.kind == "tokenize"]
            masks = [tape.value(event.outs["attention_mask"]) for event in events if "attention_mask" in event.outs]
            if masks and all(bool(mask.all()) for mask in masks):
                run = self._run(prompt=text, negative=text)
                if run.programs[0].digest == self.base.programs[0].digest:
                    return run, text
        raise UnsupportedError("no prompt was found that fills all positions of its text encoder")

    def _tokens(self, run: Run) -> int:
        """The first dimension that follows the length of a text."""
        longer = next(iter(self.longer.values())).programs[0]
        for mine, its, found in zip(self.base.programs[0].values, longer.values, run.programs[0].values):
            if isinstance(mine, Tensor) and mine.shape != its.shape:
                return int(next(size for a, b, size in zip(mine.shape, its.shape, found.shape) if a != b))
        raise UnsupportedError("it runs other operators on longer prompts")

    def shorter(self) -> Run:
        """A run with short prompts, another seed and another image."""
        return self._run(prompt=SHORTER, negative=SHORTER_NEGATIVE, seed=78, image=4)

    def _other(self, name: str, what: str, longer: str, other: str) -> Run:
        """A run with a longer text, so that masks show; where shapes follow its length, with one of equal length."""
        run = self._run(compared=True, **{what: longer})
        if _alike(self.base, run):
            return run
        self.longer[name] = run
        return self._run(compared=True, **{what: other})

    def following(self, kinds: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """(kind, slot) of the tensors whose shapes follow the length of a text."""
        return [
            (k, slot)
            for k, steps in enumerate(kinds)
            for slot, mine in enumerate(self.base.programs[steps[0]].values)
            if isinstance(mine, Tensor) and any(_follows(mine, run, steps[0], slot) for run in self.longer.values())
        ]


@contextlib.contextmanager
def _guider(pipeline: Any, scale: float | None) -> Iterator[None]:
    """A guidance scale that is an attribute, set for a run."""
    if scale is None:
        yield
        return
    old = pipeline.guider.guidance_scale
    pipeline.guider.guidance_scale = scale
    try:
        yield
    finally:
        pipeline.guider.guidance_scale = old


def _alike(one: Run, other: Run) -> bool:
    """Whether two runs have the same operators on tensors of the same shapes."""
    return all(
        a.digest == b.digest and all(v.shape == w.shape for v, w in zip(a.values, b.values) if isinstance(v, Tensor))
        for a, b in zip(one.programs, other.programs)
    )


def _follows(mine: Tensor, run: Run, step: int, slot: int) -> bool:
    values = run.programs[step].values
    return slot < len(values) and isinstance(values[slot], Tensor) and values[slot].shape != mine.shape
