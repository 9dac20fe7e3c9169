"""Prompt → frames: a bundle, loaded.

    with lemica_trt.load("out/cogvideox-tiny") as pipe:
        pipe("a big red circle moves left", seed=7).save("clip.mp4")

Requests are encoded and decoded one by one and denoised together; each draws its noise from its own seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, SupportsIndex, cast, overload

import numpy as np
from msgspec import UNSET

from lemica_trt.backends.base import Array, Buffer, Capture, Change, ChangesWeights, Engine, Settings, open_backend
from lemica_trt.bundle.contents import read_if_listed
from lemica_trt.bundle.manifest import PROMPTS_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.signing import trusted_keys
from lemica_trt.core.errors import EngineError, InputError, UsageError
from lemica_trt.core.files import user_cache
from lemica_trt.core.pictures import drawn_picture, picture_from, planes, read_picture, resized
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.graphs import DRAW, IMAGE_ENCODER, ImageSpec, Role
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Lora
from lemica_trt.ir.prompts import PromptFacts, prompt_from_line
from lemica_trt.ir.resources import lora_from_text
from lemica_trt.runtime.conditions import EncodedText, conditions_from_texts
from lemica_trt.runtime.denoise import Denoiser, OnStep, RowDone
from lemica_trt.runtime.generation import Generation, GenerationRequest
from lemica_trt.runtime.lora import Added, read_loras, unmeasured
from lemica_trt.runtime.random import Generator
from lemica_trt.runtime.single_graph import run_graph
from lemica_trt.runtime.text import PromptTokenizer
from lemica_trt.runtime.validation import require_image

LOGGER = logging.getLogger("lemica_trt")
"""Told of prompts that are cut, or far from those of the calibration."""


_ARGUMENTS = ("guidance_scale", "negative_prompt", "image", "last_image", "plan", "on_step")

_SHAPE = "load the bundle at another of its shapes: lemica_trt.load(path, shape=NAME), one of pipe.bundle.shapes"

DIFFUSERS = {
    "num_inference_steps": "the steps are part of a plan: plan=NAME, one of pipe.bundle.plans",
    "timesteps": "the steps are part of a plan: plan=NAME, one of pipe.bundle.plans",
    "sigmas": "the steps are part of a plan: plan=NAME, one of pipe.bundle.plans",
    "generator": "seed=NUMBER: the noise of torch.Generator('cpu').manual_seed(NUMBER)",
    "num_frames": _SHAPE,
    "height": _SHAPE,
    "width": _SHAPE,
    "num_videos_per_prompt": "give a list of prompts, and a list of seeds",
    "num_images_per_prompt": "give a list of prompts, and a list of seeds",
    "output_type": "leave it out: .frames is uint8 [F, H, W, 3], .latents is what output_type='latent' gives",
    "return_dict": "leave it out: the result has .frames, .latents and .seconds",
    "latents": "pipe.latents(conditions, noise) denoises given noise",
    "prompt_embeds": "pipe.latents(conditions, noise) takes conditions, as pipe.encode(prompt) gives them",
    "callback_on_step_end": "on_step=FUNCTION, which is called with a RowDone",
    "true_cfg_scale": "guidance_scale=NUMBER",
}
"""Arguments of diffusers' pipelines → what to write here."""


class Pipeline:
    """The engines of a bundle, loaded once: a callable from prompts to frames.

    Calls of several threads are correct, but wait for each other; batch requests, or use one pipeline a thread. Engines
    and their memory are freed by `close`, or at the end of a `with` block. A process made by `os.fork` loads its own.

    Args:
        bundle: opened.
        plan: the plan of requests that name none; None: the bundle's default.
        shape: `FRAMESxHEIGHTxWIDTH`, one of the bundle's; None: the one that it was built for, or is looked at as.
        backend: which engines; None: the first set.
        device: which GPU, as CUDA counts those that it sees.
        threads: CPU threads within an operator, 0: one for each CPU; None: as built. For ONNX Runtime.
        capture: what becomes a CUDA graph: the `plan`, each `step` (always so while a request reports progress), or
            `none`. For TensorRT.
        roles: which engines; None: all.
        loras: LoRA weights that are added to the transformer's, in this order: `ir.profile.Lora`, or FILE[:SCALE] as
            on the command line. Plans were measured without them: one line in the log says so.

    Attributes:
        loras: those that were added, with the digests of their files.

    Raises:
        InputError, UnsupportedError: as `lora.read_loras`, before an engine loads.
        UsageError, IntegrityError: as `Bundle.at`, `Bundle.plan`, `Bundle.engine` and `Bundle.file`.
        MissingDependencyError: the backend's package, driver or device is not here.
        UnsupportedError: the engines are for another machine; says the command that builds them for this one.
        EngineError: an engine does not load.
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: str | None = None,
        *,
        shape: str | None = None,
        backend: str | None = None,
        device: int = 0,
        threads: int | None = None,
        capture: Capture = "plan",
        roles: Collection[Role] | None = None,
        loras: Sequence[Lora | str] = (),
    ) -> None:
        bundle = bundle.at(shape)
        manifest = bundle.manifest
        entry = bundle.engine(backend)
        given = [lora if isinstance(lora, Lora) else lora_from_text(lora, "loras") for lora in loras]
        added = read_loras(bundle, entry, given) if given else Added((), {})
        settings = Settings(
            device=device,
            threads=threads,
            capture=capture,
            cache=_compiled_cache(entry),
            rebuild=lambda: bundle.rebuild_command(entry.key),
        )
        self.bundle = bundle
        self._plans = {name: bundle.plan(name) for name in bundle.plans}
        self.default_plan = bundle.plan(plan).name
        self._backend = open_backend(entry.key, settings)
        self._encoders = [PromptTokenizer(spec, bundle.read_bytes(spec.tokenizer)) for spec in manifest.encoders]
        self._calibrated = read_if_listed(bundle, PromptFacts, PROMPTS_FILE)
        self._lock = threading.RLock()  # a callback may encode and decode
        self.loras = added.loras
        self._engines = self._load(entry, roles, added.changes)
        self._denoiser = Denoiser(self._backend, manifest.graphs, self._engines)
        self._process: int | None = os.getpid()
        if self.loras:
            LOGGER.warning("%s", unmeasured(bundle, self.loras))

    def _load(
        self, entry: EngineEntry, roles: Collection[Role] | None, changes: Mapping[Role, Mapping[str, Change]]
    ) -> dict[Role, Engine]:
        """Load engines from files that have the listed digests before and after they are loaded."""
        graphs = [graph for graph in self.bundle.manifest.graphs.graphs if graph.role in entry.files]
        graphs = [graph for graph in graphs if roles is None or graph.role in roles]
        files = {graph.role: entry.files[graph.role] for graph in graphs}
        names = {*files.values()}
        names |= {name for graph in graphs if files[graph.role].endswith(".onnx") for name in graph.data_files}
        self.bundle.check_files(names)
        engines: dict[Role, Engine] = {}
        for graph in graphs:
            path, own = self.bundle.path / files[graph.role], changes.get(graph.role)
            if own:
                engines[graph.role] = cast(ChangesWeights, self._backend).load_changed(graph, path, own)
            else:
                engines[graph.role] = self._backend.load(graph, path)
        self.bundle.check_files(names)
        return engines

    def __repr__(self) -> str:
        state = f"plan {self.default_plan}, engines {', '.join(self._engines)}" if self._process else "closed"
        return f"<Pipeline: {state}; {self.bundle!r}>"

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the engines and their memory; calls raise `UsageError` from then on. May be called twice."""
        with self._lock:
            self._process = None
            self._engines.clear()
            self._denoiser = Denoiser(self._backend, self.bundle.manifest.graphs, {})

    def device_memory(self) -> int | None:
        """Bytes that all processes hold on the device of the engines; None: see `Backend.device_memory`."""
        with self._lock:
            return self._backend.device_memory()

    def _require_open(self) -> None:
        if self._process != os.getpid():
            what = "closed" if self._process is None else "loaded by the process that this one was forked from"
            raise UsageError(f"the pipeline was {what}", fix="load the bundle again, here")

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
        image: Any = None,
        last_image: Any = None,
        plan: str | None = None,
        on_step: OnStep | None = None,
    ) -> Generation: ...

    @overload
    def __call__(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        seed: SupportsIndex | Sequence[SupportsIndex] = 0,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        image: Any = None,
        last_image: Any = None,
        plan: str | None = None,
        on_step: OnStep | None = None,
    ) -> list[Generation]: ...

    def __call__(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        seed: SupportsIndex | Sequence[SupportsIndex] = 0,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        image: Any = None,
        last_image: Any = None,
        plan: str | None = None,
        on_step: OnStep | None = None,
        **others: object,
    ) -> Generation | list[Generation]:
        """Generate one clip, or one for each prompt of a list (all with one seed and images, or lists of them).

        Args and raises: see `GenerationRequest` and `run`; arguments of diffusers that are called otherwise here are
        answered with what to write (UsageError).
        """
        if others:
            name = next(iter(others))
            hint = DIFFUSERS.get(name, f"arguments are prompt, seed, {', '.join(_ARGUMENTS)}")
            raise UsageError(f"expected no argument {name!r}", fix=hint)
        if not isinstance(prompt, (str, list, tuple)):
            raise InputError(f"a prompt must be a string, or a list of strings, got {type(prompt).__name__}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise UsageError(f"expected one seed, or one for each of {len(prompts)} prompts, got {len(seeds)}")
        images, lasts = (
            list(its) if isinstance(its, (list, tuple)) else [its] * len(prompts) for its in (image, last_image)
        )
        for its in (images, lasts):
            if len(its) != len(prompts):
                raise UsageError(f"expected one image, or one for each of {len(prompts)} prompts, got {len(its)}")
        requests = [
            GenerationRequest(text, number, guidance_scale, negative_prompt, first, last)
            for text, number, first, last in zip(prompts, seeds, images, lasts)
        ]
        results = self.run(requests, plan=plan, on_step=on_step)
        return results[0] if isinstance(prompt, str) else results

    def run(
        self, requests: Sequence[GenerationRequest], *, plan: str | None = None, on_step: OnStep | None = None
    ) -> list[Generation]:
        """Generate a clip for each request, in batches of at most the bundle's `max_batch`.

        Args:
            requests: each with its own seed, guidance scale and negative prompt.
            plan: None: the pipeline's default.
            on_step: called after each row of a batch, `index` and `rows` counted over all batches; what it raises
                (`Cancelled`, say) ends the call. It may encode and decode, but not denoise, on this pipeline.

        Raises:
            UsageError: no such plan; a bad seed or guidance scale; guidance asked of an unguided bundle.
            InputError: a prompt is not text; the plan does not hold for the guidance scale.
            EngineError: an engine failed, or the result is not finite.
        """
        self._require_open()
        chosen = self._plan(plan)
        complete = [self._complete(request, chosen) for request in requests]
        size = self.bundle.manifest.graphs.max_batch
        results = []
        for start in range(0, len(complete), size):
            part = complete[start : start + size]
            progress = None if on_step is None else _offset(on_step, start // size, -(-len(complete) // size))
            results += self._run_batch(part, chosen, progress)
        return results

    def warnings(self, prompt: str, *, negative: bool = False) -> list[str]:
        """What a user should know of a prompt, a line each: that it is cut to the length of a text encoder, or that it
        is far from the prompts that the plans were calibrated on, so that they may do less well.

        Args:
            negative: whether it is a negative prompt, which is like no other.

        Raises:
            InputError: the prompt is not text.
        """
        name, found = "the negative prompt" if negative else "the prompt", []
        for tokenizer in self._encoders_of(negative=negative):
            cut, length = tokenizer.cut(prompt), tokenizer.spec.length
            if cut:
                found.append(f"{name} has {cut + length} tokens, the text encoder takes {length}: the end is cut off")
        if self._calibrated is not None and self._encoders and not negative:
            longest = max(self._encoders, key=lambda tokenizer: tokenizer.spec.length)
            distance = self._calibrated.distance(prompt, longest.count(prompt))
            if distance is not None:
                found.append(
                    f"{name} is far from those that this bundle was calibrated on, {distance}: its plans may do less "
                    "well → calibrate with prompts like yours: lemica-trt build … --prompts FILE"
                )
        return found

    def encode(self, prompt: str) -> dict[str, Array]:
        """The conditions that the text encoders make of one prompt: name → array without batch.

        Raises:
            UsageError: the bundle has no text encoder.
            InputError: the prompt is not text.
        """
        return dict(self.encode_text(prompt).arrays)

    def encode_text(self, text: str, *, negative: bool = False) -> EncodedText:
        """The same of a prompt or negative prompt, and at how many positions it is.

        Raises:
            as `encode`.
        """
        free = {spec.name for spec in self.bundle.manifest.graphs.layout.conditions if spec.text_axes}
        inputs: dict[Role, dict[str, Array]] = {}
        padded: dict[Role, int] = {}
        for tokenizer in self._encoders_of(negative=negative):
            ids, mask = tokenizer.ids(text)
            given = dict(zip(tokenizer.spec.inputs, (ids[None], mask[None])))
            inputs.setdefault(tokenizer.spec.graph, {}).update(given)
            padded[tokenizer.spec.graph] = int((mask == 0).sum())
        arrays: dict[str, Array] = {}
        tokens: dict[str, int] = {}
        for graph, its in inputs.items():
            found = self.run_graph(graph, its)
            arrays.update({name: array[0] for name, array in found.items()})
            tokens.update({name: len(arrays[name]) - padded[graph] for name in found if name in free})
        return EncodedText(arrays, tokens)

    def _encoders_of(self, *, negative: bool) -> list[PromptTokenizer]:
        """Those of prompts, or of negative prompts; the same unless some are of negative ones alone."""
        own = [tokenizer for tokenizer in self._encoders if tokenizer.spec.negative]
        return own if negative and own else [tokenizer for tokenizer in self._encoders if tokenizer not in own]

    def encode_image(self, image: Any, seed: SupportsIndex = 0, *, last_image: Any = None) -> dict[str, Array]:
        """The conditions that the image encoder makes of the pictures of a request: name → array without batch.

        Args:
            image, last_image: as in `GenerationRequest`.
            seed: of the noise that the encoder takes, if it does.

        Raises:
            InputError: the bundle takes no image, or needs a last one; or one is none, or cannot be read.
        """
        graphs = self.bundle.manifest.graphs
        require_image(graphs, image, last_image)
        spec, given = cast(ImageSpec, graphs.image), {"image": image, "last_image": last_image}
        pictures = {name: picture_from(given[name], name=name) for name in spec.sources}
        inputs = {
            its.name: planes(
                resized(pictures[its.source], its.height, its.width, fit=its.fit, by=its.by), its.scale, its.offset
            )
            for its in spec.pictures
        }
        if spec.draw is not UNSET:
            inputs[DRAW] = Generator(seed).randn(spec.draw)
        return {name: array[0] for name, array in self.run_graph(IMAGE_ENCODER, inputs).items()}

    def generator(self, seed: SupportsIndex) -> Generator:
        """Where the initial noise of a request comes from, then z of each draw: behind what the image encoder draws."""
        generator, spec = Generator(seed), self.bundle.manifest.graphs.image
        if spec is not UNSET and spec.draw is not UNSET:
            generator.randn(spec.draw)
        return generator

    def request(self, line: str, seed: SupportsIndex) -> GenerationRequest:
        """The request of a line of a prompt file (`ir.prompts.Prompt.line`), with the pictures that it names; those
        that it does not name and the bundle needs are drawn of its text.

        Raises:
            InputError: a picture cannot be read.
        """
        prompt, shape = prompt_from_line(line), self.bundle.manifest.profile.shape
        pictures = {name: read_picture(path, digest=digest) for name, (path, digest) in prompt.pictures.items()}
        for name in self.bundle.manifest.graphs.sources:
            if name not in pictures:
                pictures[name] = drawn_picture(prompt.text, shape.height, shape.width, name=name)
        return GenerationRequest(prompt.text, seed, image=pictures.get("image"), last_image=pictures.get("last_image"))

    def conditions(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] = (),
        *,
        images: Sequence[Any] = (),
        last_images: Sequence[Any] = (),
        seeds: Sequence[SupportsIndex] = (),
    ) -> dict[str, Array]:
        """What the DiT is given for some requests, see `runtime.conditions.conditions_from_texts`.

        Args:
            prompts: b of them.
            negatives: as many under guidance, else none.
            images, seeds: as many where the bundle needs an image, as `encode_image` takes them.
            last_images: as many where it needs a last one.

        Raises:
            UsageError: the bundle has no text encoder.
            InputError: a prompt is not text, or has no tokens; texts of one batch have other lengths; an image
                is missing, or there is one and the bundle takes none.
        """
        graphs = self.bundle.manifest.graphs
        lasts = [*last_images] or [None] * len(images or prompts)
        for image, last in itertools.zip_longest(images or [None] * len(prompts), lasts):
            require_image(graphs, image, last)
        needed = graphs.image is not UNSET
        if needed and not len(images) == len(seeds) == len(prompts):
            raise InputError(
                f"expected an image and a seed for each of {len(prompts)} prompts, got {len(images)} images and "
                f"{len(seeds)} seeds"
            )
        pictures = (
            [self.encode_image(image, seed, last_image=last) for image, last, seed in zip(images, lasts, seeds)]
            if needed
            else []
        )
        encoded = {text: self.encode_text(text) for text in dict.fromkeys(prompts)}
        against = {text: self.encode_text(text, negative=True) for text in dict.fromkeys(negatives)}
        return conditions_from_texts(
            graphs.layout, [encoded[one] for one in prompts], [against[one] for one in negatives], pictures
        )

    def latents(
        self,
        conditions: Mapping[str, Array],
        noise: Array,
        *,
        guidance_scale: float | Array | None = None,
        plan: str | StepPlan | None = None,
        seeds: Sequence[SupportsIndex] | None = None,
        on_step: OnStep | None = None,
        finite: bool = True,
    ) -> Array:
        """Denoise given noise under given conditions; what `run` does between `encode` and `decode`.

        Args:
            conditions: by name, each of the layout's shape with first dimension R = 2b under guidance, unconditional
                branches first.
            noise: float32 [b, *latent_shape].
            guidance_scale: one, or one for each request [b]; None: the plan's. Guided bundles only.
            plan: a name, any plan that fits the graphs, or None: the default.
            seeds: [b], where a stochastic plan's fresh noise comes from, after `noise` was drawn from them.
            finite: whether numbers that are not are refused.

        Returns:
            float32 [b, *latent_shape].

        Raises:
            as `Denoiser.run`; InputError: the plan does not hold for this guidance; EngineError: not finite.
        """
        self._require_open()
        chosen = plan if isinstance(plan, StepPlan) else self._plan(plan)
        generators = [self.generator(seed) for seed in seeds or ()]
        for generator in generators:
            self._noise(generator)
        return self._denoise(chosen, conditions, noise, guidance_scale, generators, on_step, finite=finite)

    def decode(self, latents: Array) -> Array:
        """The VAE decoder's frames for one request: float32 `latent_shape` → uint8 [F, H, W, 3].

        Raises:
            UsageError: the bundle has no VAE decoder.
        """
        return cast(Array, self.run_graph("vae_decoder", {"latents": latents[None]})["frames"][0])

    def conditions_of(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        *,
        image: Any = None,
        last_image: Any = None,
        seed: SupportsIndex = 0,
    ) -> dict[str, Array]:
        """The conditions of one request, as `latents` takes them.

        Args:
            negative_prompt: None: the profile's. Guided bundles only.
            image, last_image, seed: as `encode_image` takes them, where the bundle needs an image.

        Raises:
            as `conditions`.
        """
        default = self.bundle.manifest.profile.sampling.negative_prompt
        guided = self.bundle.manifest.graphs.layout.guided
        negatives = [default if negative_prompt is None else negative_prompt] if guided else []
        return self.conditions([prompt], negatives, images=[image], last_images=[last_image], seeds=[seed])

    def conditions_at(self, line: str, seed: SupportsIndex) -> dict[str, Array]:
        """The conditions of a line of a prompt file, see `request`.

        Raises:
            as `request` and `conditions`.
        """
        request = self.request(line, seed)
        return self.conditions_of(request.prompt, image=request.image, last_image=request.last_image, seed=seed)

    def run_graph(
        self, role: Role, inputs: Mapping[str, Array | Buffer], *, keep: Collection[str] = ()
    ) -> dict[str, Any]:
        """Run one graph once, with inputs of any batch up to `max_batch`; see `runtime.single_graph.run_graph`.

        Raises:
            UsageError: the bundle has no such engine.
            InputError: inputs are missing, superfluous or of another shape.
            EngineError: it failed.
        """
        self._require_open()
        if role not in self._engines:
            raise UsageError(f"the bundle has no {role} engine", fix="rebuild it with one")
        graph = self.bundle.manifest.graphs.graph(role)
        with self._lock:
            return run_graph(self._backend, graph, self._engines[role], inputs, keep=keep)

    def _run_batch(
        self, requests: Sequence[GenerationRequest], plan: StepPlan, on_step: OnStep | None
    ) -> list[Generation]:
        """Requests without None, at most max_batch."""
        start = perf_counter()
        scales, negatives = None, list[str]()
        if self.bundle.manifest.graphs.layout.guided:
            negatives = [str(request.negative_prompt) for request in requests]
            scales = np.array([request.guidance_scale for request in requests], np.float64)
        conditions = self.conditions(
            [request.prompt for request in requests],
            negatives,
            images=[request.image for request in requests],
            last_images=[request.last_image for request in requests],
            seeds=[request.seed for request in requests],
        )
        encoded = perf_counter()
        generators = [self.generator(request.seed) for request in requests]
        noise = np.stack([self._noise(generator) for generator in generators])
        latents = self._denoise(plan, conditions, noise, scales, generators, on_step)
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
            results.append(Generation(frames, sample, seconds, self.fps))
        return results

    def _denoise(
        self,
        plan: StepPlan,
        conditions: Mapping[str, Array],
        noise: Array,
        guidance_scale: float | Array | None,
        generators: Sequence[Generator],
        on_step: OnStep | None,
        *,
        finite: bool = True,
    ) -> Array:
        guidance = None
        if self.bundle.manifest.graphs.layout.guided:
            scale = plan.guidance_scale if guidance_scale is None else guidance_scale
            guidance = np.broadcast_to(np.asarray(scale, np.float64), (len(noise),))
            for each in guidance.tolist():
                plan.require_guidance(each)
        elif guidance_scale is not None:
            raise UsageError(_UNGUIDED, fix="leave them out, or build with --guidance-scale")

        def draw() -> Array:
            return np.stack([self._noise(generator) for generator in generators])

        with self._lock:
            latents = self._denoiser.run(
                plan, conditions, noise, guidance, draw=draw if generators else None, on_step=on_step
            )
        if finite and not np.isfinite(latents).all():
            raise EngineError(
                f"plan {plan.name}: the latents are not finite", fix="rebuild with --dtype bf16 or fp32; fp16 overflows"
            )
        return latents

    def _noise(self, generator: Generator) -> Array:
        """As diffusers draws for one request, float32 `latent_shape`."""
        return generator.randn(self.bundle.manifest.graphs.layout.latent_shape)

    def _warn(self, prompt: str, *, negative: bool = False) -> None:
        """Log what there is to warn of; raise InputError unless every tokenizer takes the prompt."""
        for line in self.warnings(prompt, negative=negative):
            LOGGER.warning(line)

    def _plan(self, name: str | None) -> StepPlan:
        name = self.default_plan if name is None else name
        if not isinstance(name, str):
            raise UsageError(f"plan must be the name of a plan, got {name!r}")
        return self._plans[name] if name in self._plans else self.bundle.plan(name)

    def _complete(self, request: GenerationRequest, plan: StepPlan) -> GenerationRequest:
        """Check a request and put in the defaults."""
        Generator(request.seed)
        require_image(self.bundle.manifest.graphs, request.image, request.last_image)
        if request.image is not None:
            request = dataclasses.replace(request, image=picture_from(request.image))
        if request.last_image is not None:
            last = picture_from(request.last_image, name="last_image")
            request = dataclasses.replace(request, last_image=last)
        self._warn(request.prompt)
        if not self.bundle.manifest.graphs.layout.guided:
            if request.guidance_scale is not None or request.negative_prompt is not None:
                raise UsageError(_UNGUIDED, fix="leave them out, or build with --guidance-scale")
            return request
        scale = plan.guidance_scale if request.guidance_scale is None else request.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise UsageError(f"guidance_scale must be a finite number, got {scale!r}")
        plan.require_guidance(scale)
        negative = request.negative_prompt
        if negative is None:
            negative = self.bundle.manifest.profile.sampling.negative_prompt
        self._warn(negative, negative=True)
        return dataclasses.replace(request, guidance_scale=float(scale), negative_prompt=negative)


def _compiled_cache(entry: EngineEntry) -> Path | None:
    """Where a vendor keeps what it compiles here: the user's cache, never the bundle; None without a home."""
    folder = user_cache()
    return None if folder is None else folder / entry.key.digest[:16]


_UNGUIDED = "the bundle was built without guidance: it takes no guidance_scale and no negative_prompt"


def _offset(on_step: OnStep, chunk: int, chunks: int) -> OnStep:
    """Count rows over all batches of a call."""

    def count(row: RowDone) -> None:
        on_step(dataclasses.replace(row, index=row.index + chunk * row.rows, rows=row.rows * chunks))

    return count


def load(
    path: str | os.PathLike[str],
    plan: str | None = None,
    *,
    verify_with: Iterable[str | os.PathLike[str]] | None = None,
    **options: Any,
) -> Pipeline:
    """Open a bundle and load its engines: `lemica_trt.load("out/tiny")("a big red circle moves left")`.

    Args:
        path: the bundle's folder.
        plan: the plan of requests that name none; None: the bundle's default.
        verify_with: PEM files of public keys, one of which must have signed the bundle; None: those that the
            environment names (`LEMICA_TRUSTED_KEYS`), if it does.
        options: as `Pipeline` takes them.

    Raises:
        IntegrityError: no bundle, a damaged one, or one that none of the keys signed.
        LemicaError: as `Pipeline`.
    """
    trusted = None if verify_with is None else trusted_keys(verify_with)
    return Pipeline(Bundle.open(path, trusted=trusted), plan=plan, **options)
