"""Prompt → frames: a bundle, loaded.

    pipe = Bundle.open("engines/cogvideox-tiny").pipeline()
    clip = pipe("a big red circle moves left", seed=7)
    write_video(clip.frames, "clip.mp4", fps=pipe.fps)

Requests are encoded and decoded one by one and denoised together; each draws its noise from its own seed.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, SupportsIndex, overload

import numpy as np

from lemica_trt.errors import EngineError, InputError, UsageError
from lemica_trt.plan import StepPlan
from lemica_trt.runtime.backend import Array, Backend, Engine, decode, encode, open_backend
from lemica_trt.runtime.denoise import Denoiser, OnRow, RowDone
from lemica_trt.runtime.random import Generator
from lemica_trt.runtime.text import PromptTokenizer
from lemica_trt.spec import GraphSpec, Role, TensorSpec

if TYPE_CHECKING:
    from lemica_trt.bundle import Bundle


@dataclass(frozen=True)
class Request:
    """One prompt and its settings; None: the bundle's default.

    Attributes:
        prompt: any text; cut to the bundle's text length.
        seed: 0 … 2^63 − 1.
        guidance_scale: g; the plan's by default. Guided bundles only.
        negative_prompt: the profile's by default. Guided bundles only.
    """

    prompt: str
    seed: SupportsIndex = 0
    guidance_scale: float | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Result:
    """What came of one request.

    Attributes:
        frames: uint8 [F, H, W, 3].
        latents: float32, the layout's `latent_shape`.
        seconds: wall-clock time by part: `text` and `denoise` of the whole batch that it ran in, `decode`.
    """

    frames: Array
    latents: Array
    seconds: dict[str, float]


class Pipeline:
    """The engines of a bundle, loaded once; see `Bundle.pipeline`, which makes it.

    Calls of several threads are correct, but wait for each other; batch requests, or use one pipeline a thread.

    Raises:
        as `Bundle.pipeline`.
    """

    def __init__(
        self, bundle: Bundle, *, plan: str | None = None, backend: str | None = None, threads: int | None = None
    ) -> None:
        manifest = bundle.manifest
        entry = bundle.engine(backend)
        self.bundle = bundle
        self.default_plan = bundle.plan(plan).name
        self._plans: dict[str, StepPlan] = {}
        self._tokenizer = PromptTokenizer(manifest.text, bundle.read_bytes(manifest.text.tokenizer))
        self._backend = open_backend(entry.key, threads=threads)
        engines: dict[Role, Engine] = {}
        singles: dict[Role, _Single] = {}
        for graph in manifest.graphs.graphs:
            if graph.role in entry.files:
                file = entry.files[graph.role]
                for data_file in graph.data_files if file == graph.file else ():  # the engine is the ONNX file
                    bundle.file(data_file)
                engines[graph.role] = self._backend.load(graph, bundle.file(file))
                if graph.role in ("text_encoder", "vae_decoder"):
                    singles[graph.role] = _Single(self._backend, engines[graph.role], graph)
        self._singles = singles
        self._denoiser = Denoiser(self._backend, manifest.graphs, engines)

    @property
    def fps(self) -> int:
        """Frames a second that the model makes."""
        return self.bundle.manifest.profile.shape.fps

    @overload
    def __call__(
        self,
        prompt: str,
        *,
        seed: SupportsIndex = 0,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        plan: str | None = None,
        on_step: OnRow | None = None,
    ) -> Result: ...

    @overload
    def __call__(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        seed: SupportsIndex | Sequence[SupportsIndex] = 0,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        plan: str | None = None,
        on_step: OnRow | None = None,
    ) -> list[Result]: ...

    def __call__(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        seed: SupportsIndex | Sequence[SupportsIndex] = 0,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        plan: str | None = None,
        on_step: OnRow | None = None,
    ) -> Result | list[Result]:
        """Generate one clip, or one for each prompt of a list (all with one seed, or a list of seeds).

        Args and raises: see `Request` and `run`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise UsageError(f"expected one seed, or one for each of {len(prompts)} prompts, got {len(seeds)}")
        requests = [Request(text, number, guidance_scale, negative_prompt) for text, number in zip(prompts, seeds)]
        results = self.run(requests, plan=plan, on_step=on_step)
        return results[0] if isinstance(prompt, str) else results

    def run(
        self, requests: Sequence[Request], *, plan: str | None = None, on_step: OnRow | None = None
    ) -> list[Result]:
        """Generate a clip for each request, in batches of at most the bundle's `max_batch`.

        Args:
            requests: each with its own seed, guidance scale and negative prompt.
            plan: None: the pipeline's default.
            on_step: called after each row of a batch, `index` and `rows` counted over all batches; what it raises
                (`Cancelled`, say) ends the call.

        Raises:
            UsageError: no such plan; a bad seed or guidance scale; guidance asked of an unguided bundle.
            InputError: a prompt is not text.
            EngineError: an engine failed, or the result is not finite.
        """
        chosen = self._plan(plan)
        complete = [self._complete(request, chosen) for request in requests]
        size = self.bundle.manifest.graphs.max_batch
        results = []
        for start in range(0, len(complete), size):
            part = complete[start : start + size]
            progress = None if on_step is None else _offset(on_step, start // size, -(-len(complete) // size))
            results += self._run_batch(part, chosen, progress)
        return results

    def encode(self, prompt: str) -> Array:
        """The text encoder's output for one prompt, float32 or float16 [text_length, width].

        Raises:
            UsageError: the bundle has no text encoder.
            InputError: the prompt is not text.
        """
        ids, mask = self._tokenizer.ids(prompt)
        return self._single("text_encoder").run({"input_ids": ids, "attention_mask": mask})

    def latents(
        self,
        prompt_embeds: Array,
        noise: Array,
        *,
        guidance_scale: float | Array | None = None,
        plan: str | StepPlan | None = None,
        seeds: Sequence[SupportsIndex] | None = None,
        on_step: OnRow | None = None,
    ) -> Array:
        """Denoise given noise under given embeddings; what `run` does between `encode` and `decode`.

        Args:
            prompt_embeds: [R, text_length, width]; R = 2b under guidance, unconditional branches first.
            noise: float32 [b, *latent_shape].
            guidance_scale: one, or one for each request [b]; None: the plan's. Guided bundles only.
            plan: a name, any plan that fits the graphs, or None: the default.
            seeds: [b], where a stochastic plan's fresh noise comes from, after `noise` was drawn from them.

        Returns:
            float32 [b, *latent_shape].

        Raises:
            as `Denoiser.run`; EngineError: the result is not finite.
        """
        chosen = plan if isinstance(plan, StepPlan) else self._plan(plan)
        generators = [Generator(seed) for seed in seeds or ()]
        for generator in generators:
            self._noise(generator)
        return self._denoise(chosen, prompt_embeds, noise, guidance_scale, generators, on_step)

    def decode(self, latents: Array) -> Array:
        """The VAE decoder's frames for one request: float32 `latent_shape` → uint8 [F, H, W, 3].

        Raises:
            UsageError: the bundle has no VAE decoder.
        """
        return self._single("vae_decoder").run({"latents": latents})

    def _run_batch(self, requests: Sequence[Request], plan: StepPlan, on_step: OnRow | None) -> list[Result]:
        """Requests without None, at most max_batch."""
        start = perf_counter()
        embeds = [self.encode(request.prompt) for request in requests]
        scales = None
        if self.bundle.manifest.graphs.layout.guided:
            negative = {text: self.encode(text) for text in {str(request.negative_prompt) for request in requests}}
            embeds = [negative[str(request.negative_prompt)] for request in requests] + embeds
            scales = np.array([request.guidance_scale for request in requests], np.float64)
        encoded = perf_counter()
        generators = [Generator(request.seed) for request in requests]
        noise = np.stack([self._noise(generator) for generator in generators])
        latents = self._denoise(plan, np.stack(embeds), noise, scales, generators, on_step)
        denoised = perf_counter()
        results = []
        for sample in latents:
            start_decode = perf_counter()
            frames = self.decode(sample)
            seconds = {
                "text": encoded - start,
                "denoise": denoised - encoded,
                "decode": perf_counter() - start_decode,
            }
            results.append(Result(frames, sample, seconds))
        return results

    def _denoise(
        self,
        plan: StepPlan,
        prompt_embeds: Array,
        noise: Array,
        guidance_scale: float | Array | None,
        generators: Sequence[Generator],
        on_step: OnRow | None,
    ) -> Array:
        guidance = None
        if self.bundle.manifest.graphs.layout.guided:
            scale = plan.guidance_scale if guidance_scale is None else guidance_scale
            guidance = np.broadcast_to(np.asarray(scale, np.float64), (len(noise),))
        elif guidance_scale is not None:
            raise UsageError(_UNGUIDED)

        def draw() -> Array:
            return np.stack([self._noise(generator) for generator in generators])

        latents = self._denoiser.run(
            plan, prompt_embeds, noise, guidance, draw=draw if generators else None, on_row=on_step
        )
        if not np.isfinite(latents).all():
            raise EngineError(
                f"plan {plan.name}: the latents are not finite", fix="rebuild with --dtype bf16 or fp32; fp16 overflows"
            )
        return latents

    def _noise(self, generator: Generator) -> Array:
        """As diffusers draws for one request, float32 `latent_shape`."""
        return generator.randn(self.bundle.manifest.graphs.layout.latent_shape)

    def _plan(self, name: str | None) -> StepPlan:
        name = self.default_plan if name is None else name
        if name not in self._plans:
            self._plans[name] = self.bundle.plan(name)
        return self._plans[name]

    def _complete(self, request: Request, plan: StepPlan) -> Request:
        """Check a request and put in the defaults."""
        Generator(request.seed)
        self._tokenizer.ids(request.prompt)
        if not self.bundle.manifest.graphs.layout.guided:
            if request.guidance_scale is not None or request.negative_prompt is not None:
                raise UsageError(_UNGUIDED)
            return request
        scale = plan.guidance_scale if request.guidance_scale is None else request.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise UsageError(f"guidance_scale must be a finite number, got {scale!r}")
        negative = request.negative_prompt
        if negative is None:
            negative = self.bundle.manifest.profile.sampling.negative_prompt
        self._tokenizer.ids(negative)
        return dataclasses.replace(request, guidance_scale=float(scale), negative_prompt=negative)

    def _single(self, role: Role) -> _Single:
        if role not in self._singles:
            raise UsageError(f"the bundle has no {role} engine", fix="rebuild it with one")
        return self._singles[role]


_UNGUIDED = "the bundle was built without guidance: it takes no guidance_scale and no negative_prompt"


class _Single:
    """A graph with one output that runs for one request at a time, its batch dimension 1."""

    def __init__(self, backend: Backend, engine: Engine, graph: GraphSpec) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._inputs = {tensor.name: backend.empty(_at_batch_one(tensor), tensor.dtype) for tensor in graph.inputs}
        (output,) = graph.outputs
        self._output = backend.empty(_at_batch_one(output), output.dtype)
        self._call = engine.bind({**self._inputs, output.name: self._output})

    def run(self, arrays: Mapping[str, Array]) -> Array:
        """Arrays without batch in, by name (superfluous ones are left out); the output without batch."""
        with self._lock:
            for name, buffer in self._inputs.items():
                array = arrays[name][None]
                if array.shape != buffer.shape:
                    raise InputError(f"{name} must have shape {list(buffer.shape[1:])}, got {list(array.shape[1:])}")
                self._backend.upload(encode(array, buffer.dtype), buffer)
            self._call.run()
            return np.asarray(decode(self._backend.download(self._output), self._output.dtype)[0])


def _at_batch_one(tensor: TensorSpec) -> tuple[int, ...]:
    return tuple(1 if isinstance(size, str) else size for size in tensor.shape)


def _offset(on_step: OnRow, chunk: int, chunks: int) -> OnRow:
    """Count rows over all batches of a call."""

    def count(row: RowDone) -> None:
        on_step(dataclasses.replace(row, index=row.index + chunk * row.rows, rows=row.rows * chunks))

    return count
