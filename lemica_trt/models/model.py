"""A loaded model: everything that calibration, lowering, export and verification ask of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec import UNSET, UnsetType
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lemica_trt.core.errors import InputError
from lemica_trt.core.files import sha256_of
from lemica_trt.core.metrics import Frames
from lemica_trt.core.text import CLEANINGS
from lemica_trt.ir.graphs import DEFAULT_EXPERT, EncoderSpec, ImageSpec, StepLayout, TensorSpec
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Lora, Profile
from lemica_trt.ir.prompts import prompt_from_line, require_taken
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.step_model import Beginning, Latents, Steps
from lemica_trt.models.family import DTYPES, Family, TextEncoder, VideoDecoder
from lemica_trt.models.index import index_file
from lemica_trt.models.scheduler import made_scheduler, refusing, sampler_table
from lemica_trt.models.split import SplitTransformer, split_transformer

NOTES = frozenset({".gif", ".jpeg", ".jpg", ".md", ".mp4", ".png", ".webp"})
"""Endings of the files of a pipeline folder that do not decide what it computes; all others may."""


TOKENIZER_FILE = "tokenizer/tokenizer.json"
"""Path of the tokenizer in a bundle."""


class End(NamedTuple):
    """A graph before or behind the steps: its module, inputs of one request, and names of its outputs, in order."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]


class Model:
    """A diffusers pipeline at one shape, dtype and sampling; made by `load_model`.

    Attributes:
        profile: what it was loaded for; `dtype` is what the DiT has.
        family: its architecture.
        pipeline: the diffusers pipeline, on one device, in evaluation mode, without progress bars.
        folder: where its files lie.
        latent_shape: shape of the latents of one sample, without batch.
    """

    def __init__(self, profile: Profile, family: Family, pipeline: Any, folder: Path) -> None:
        family.check(pipeline, profile)
        self.profile = profile
        self.family = family
        self.pipeline = pipeline
        self.folder = folder
        self.latent_shape = family.latent_shape(pipeline, profile.shape)
        family.prepare(pipeline, profile, self.latent_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the DiT and of the prompt embeddings."""
        return DTYPES[self.profile.dtype]

    @property
    def device(self) -> torch.device:
        """Where the pipeline is."""
        device: torch.device = self.pipeline.device
        return device

    @property
    def guided(self) -> bool:
        """Whether each request runs two branches: R = 2b, unconditional ones first."""
        return self.profile.sampling.guided

    @property
    def image(self) -> ImageSpec | UnsetType:
        """How the picture of a request becomes conditions; unset: requests have none."""
        return UNSET

    @property
    def branches(self) -> bool:
        """Whether the steps give the guidance term beside the output, so that a fit can weigh the branches apart."""
        return self.guided

    @cached_property
    def split(self) -> SplitTransformer:
        """The transformer with and without its trunk."""
        return split_transformer(self.pipeline.transformer, self.family.block_lists, self.family.epilogue)

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that every call of the transformer is given."""
        return self.family.constants(self.pipeline, self.profile.shape, self.latent_shape)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder graph as a module."""
        return TextEncoder(self.pipeline.text_encoder, mask=self.family.text_mask, dtype=self.dtype)

    @cached_property
    def vae_decoder(self) -> nn.Module:
        """The VAE decoder graph as a module."""
        return VideoDecoder(self.family, self.pipeline.vae, self.profile.shape)

    @cached_property
    def ends(self) -> dict[str, End]:
        """The graphs before and behind the steps, by role."""
        names = ("input_ids", "attention_mask") if self.family.text_mask else ("input_ids",)
        ids = tuple(TensorSpec(name=name, dtype="int64", shape=(1, self.profile.text_length)) for name in names)
        latents = TensorSpec(name="latents", dtype="fp32", shape=(1, *self.latent_shape))
        return {
            "text_encoder": End(self.text_encoder, ids, ("prompt_embeds",)),
            "vae_decoder": End(self.vae_decoder, (latents,), ("frames",)),
        }

    @property
    def revision(self) -> str:
        """See `folder_revision`, and `fused_revision` where LoRA weights are fused."""
        return fused_revision(folder_revision(self.folder), self.profile.loras or ())

    @property
    def libraries(self) -> dict[str, str]:
        """Library → version: what the numbers of a calibration depend on."""
        return {"diffusers": version("diffusers"), "torch": str(torch.__version__)}

    def transformer_inputs(self, hidden_states: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> dict[str, Any]:
        """Keyword arguments of `split.full` and `split.skip`; see `Family.transformer_inputs`."""
        return self.family.transformer_inputs(hidden_states, timestep, prompt_embeds, self.constants)

    def scheduler(self, steps: int | None = None) -> Any:
        """A fresh diffusers scheduler, its timesteps set as the pipeline sets them.

        Args:
            steps: number of steps; None: the profile's N.

        Raises:
            UnsupportedError: it cannot make that many with its settings.
        """
        scheduler = made_scheduler(type(self.pipeline.scheduler), self.pipeline.scheduler.config)
        steps = self.profile.sampling.steps if steps is None else steps
        with refusing(f"{type(scheduler).__name__} cannot make {steps} steps"):
            self.family.set_timesteps(scheduler, steps)
        return scheduler

    def table(self, steps: int | None = None) -> SamplerTable:
        """The sampler at a number of steps, and what kind each of them is.

        Args:
            steps: as in `scheduler`.

        Raises:
            UnsupportedError: as `scheduler` and `models.scheduler.sampler_table`.
        """
        return sampler_table(self.scheduler(steps), dynamic_guidance=self.profile.sampling.dynamic_guidance)

    @property
    def experts(self) -> tuple[str, ...]:
        """For each kind of steps the component that it runs."""
        return (DEFAULT_EXPERT,)

    def noise(self, seed: int) -> Tensor:
        """The initial noise of a seed: fp32 latent_shape on the CPU, as diffusers draws it for one fp32 sample."""
        return next(self.noises(seed))

    def noises(self, seed: int) -> Iterator[Tensor]:
        """All noise of a seed, without end: first the initial noise, then z for each row that draws any, in order.

        One CPU generator, so that they are the numbers that a diffusers pipeline with this generator draws.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        while True:
            yield torch.randn((1, *self.latent_shape), generator=generator)[0]

    @cached_property
    def conditions(self) -> tuple[TensorSpec, ...]:
        """What the DiT is given beside the latents; shapes only, nothing is computed."""
        rows = "2*batch" if self.guided else "batch"
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            names = ("input_ids", "attention_mask") if self.family.text_mask else ("input_ids",)
            ids = {n: torch.zeros((1, self.profile.text_length), dtype=torch.int64, device=self.device) for n in names}
            embeds = self.text_encoder(ids)["prompt_embeds"]
        return (TensorSpec(name="prompt_embeds", dtype=self.profile.dtype, shape=(rows, *embeds.shape[1:])),)

    def text_spec(self, tokenizer: str) -> EncoderSpec:
        """How the runtime tokenises.

        Args:
            tokenizer: path of `tokenizer.json` (see `tokenizer_json`) in the bundle.
        """
        tokens = self.pipeline.tokenizer
        return EncoderSpec(
            tokenizer=tokenizer,
            length=self.profile.text_length,
            pad_id=tokens.pad_token_id,
            end_id=tokens.eos_token_id,
            clean=self.family.clean,
            mask=self.family.text_mask,
        )

    def tokenizer_json(self) -> bytes:
        """The tokenizer as a `tokenizer.json` of the `tokenizers` library, without padding and truncation."""
        backend = type(self.pipeline.tokenizer.backend_tokenizer).from_str(
            self.pipeline.tokenizer.backend_tokenizer.to_str()
        )
        backend.no_padding()
        backend.no_truncation()
        text: str = backend.to_str(pretty=False)
        return text.encode()

    def encoder_specs(self) -> tuple[EncoderSpec, ...]:
        """How the runtime makes conditions of a prompt, a text encoder each."""
        return (self.text_spec(TOKENIZER_FILE),)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Path in a bundle → `tokenizer.json`."""
        return {TOKENIZER_FILE: self.tokenizer_json()}

    def tokens(self, prompts: Sequence[str], role: str = "text_encoder") -> dict[str, Tensor]:
        """Inputs of the text encoder.

        Returns:
            `input_ids` int64 [len(prompts), text_length], and `attention_mask` alike where the family has a mask.
        """
        tokens = self.pipeline.tokenizer(
            [CLEANINGS[self.family.clean](prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.profile.text_length,
            truncation=True,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask") if self.family.text_mask else ("input_ids",)
        return {name: tokens[name].to(self.device) for name in names}

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], negative: str | Sequence[str] | None = None) -> Tensor:
        """Prompt embeddings for the DiT.

        Args:
            prompts: b of them.
            negative: negative prompt, one for all or b of them; None: the profile's.

        Returns:
            DiT dtype [R, text_length, width]; under guidance R = 2b, the negative prompts' first; else R = b.
        """
        rows = [*self._negatives(negative, len(prompts)), *prompts] if self.guided else list(prompts)
        embeds: Tensor = self.text_encoder(self.tokens(rows))["prompt_embeds"]
        return embeds

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents fp32 [b, *latent_shape] → frames uint8 [b, frames, height, width, 3]."""
        frames: Tensor = self.vae_decoder({"latents": latents.to(self.device)})["frames"]
        return frames

    # ------------------------------------------------------------ `ir.step_model.StepModel`

    def begin(self, prompt: str, seed: int) -> Beginning:
        """What a request begins with; conditions as `embed` gives them."""
        return Beginning(self.conditions_at(prompt, seed), (noise.numpy() for noise in self.noises(seed)))

    def conditions_at(self, prompt: str, seed: int) -> Any:
        """The conditions of one request, as `embed` gives them.

        Args:
            prompt: a line of a prompt file (`ir.prompts.Prompt.line`).
            seed: of what an image encoder draws.

        Raises:
            InputError: it brings a picture that the model does not take.
        """
        found = prompt_from_line(prompt)
        require_taken(found, (), what=type(self.pipeline).__name__)
        return self.embed([found.text])

    def steps(self, layout: StepLayout) -> Steps:
        """Takes rows of plans that fit a layout."""
        from lemica_trt.models.host_steps import HostSteps  # which is made of a model

        return HostSteps(self, layout)

    def run(self, plan: StepPlan, prompt: str, seed: int, *, start: Latents | None = None) -> Latents:
        """Run one request by a plan; noise as diffusers draws it from the seed.

        Args:
            start: fp32 latent_shape, used in place of the initial noise that the seed gives.

        Returns:
            x_N, fp32 latent_shape; not checked for NaN.
        """
        from lemica_trt.models.denoise import denoise

        noises = (noise[None] for noise in self.noises(seed))
        first = next(noises)
        first = first if start is None else torch.from_numpy(start)[None]
        with torch.inference_mode():
            latents = denoise(self, plan, self.conditions_at(prompt, seed), first, fresh_noise=lambda _: next(noises))
        found: Latents = latents[0].cpu().numpy()
        return found

    def frames(self, latents: Latents) -> Frames:
        """Latents fp32 latent_shape → frames uint8 [F, H, W, 3]."""
        with torch.inference_mode():
            found: Frames = self.decode(torch.from_numpy(latents)[None])[0].cpu().numpy()
        return found

    # ------------------------------------------------------------ the pipeline itself

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
    ) -> Tensor:
        """Run the uncached diffusers pipeline itself, as any user would.

        Args:
            prompts: b of them.
            noise: fp32 [b, *latent_shape], standard normal: not scaled by the scheduler's initial sigma.
            negative: as in `embed`.
            guidance_scale: None: the profile's.
            generator: what a stochastic scheduler draws from.
            seed: of what an image encoder draws; families have none.

        Returns:
            Final latents, fp32 [b, *latent_shape], on the CPU.
        """
        shape, sampling = self.profile.shape, self.profile.sampling
        scale = sampling.guidance_scale if guidance_scale is None else guidance_scale
        if (scale > 1.0) != self.guided:
            raise InputError(f"guidance_scale must {'' if self.guided else 'not '}exceed 1 for this build, got {scale}")
        latents = self.pipeline(
            prompt=list(prompts),
            negative_prompt=self._negatives(negative, len(prompts)) if self.guided else None,
            num_frames=shape.frames,
            height=shape.height,
            width=shape.width,
            num_inference_steps=sampling.steps,
            guidance_scale=scale,
            max_sequence_length=self.profile.text_length,
            generator=generator,
            output_type="latent",
            return_dict=False,
            **self.family.call_arguments(self.profile, noise.to(self.device)),
        )[0]
        return latents.float().cpu()  # type: ignore[no-any-return]

    def _negatives(self, negative: str | Sequence[str] | None, count: int) -> list[str]:
        negative = self.profile.sampling.negative_prompt if negative is None else negative
        return [negative] * count if isinstance(negative, str) else list(negative)


def folder_revision(folder: Path) -> str:
    """SHA-256 (hex) over name and content of `model_index.json` and each component's files, whatever their format."""
    files = [(name, (folder / name).stat()) for name in pipeline_files(folder)]
    return _hashed(folder, tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files))


def fused_revision(revision: str, loras: Sequence[Lora]) -> str:
    """The revision (hex) of a model of this revision with LoRA weights fused; the same where there are none.

    Args:
        loras: as `lora.identified`.
    """
    if not loras:
        return revision
    lines = [revision, *(f"{lora.sha256} {lora.scale!r}{f' {lora.expert}' if lora.expert else ''}" for lora in loras)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def _hashed(folder: Path, files: tuple[tuple[str, int, int, int], ...]) -> str:
    """Weights are hashed once in a process, unless a file changes."""
    digest = hashlib.sha256()
    for name, *_ in files:
        digest.update(f"{sha256_of(folder / name)}  {name}\n".encode())
    return digest.hexdigest()


def pipeline_files(folder: Path) -> list[str]:
    """Relative names of the files that decide what a pipeline folder computes, sorted."""
    parts = [part for part in folder.iterdir() if part.is_dir() and not part.name.startswith(".")]
    found = [path for part in parts for path in part.iterdir() if path.is_file() and path.suffix.lower() not in NOTES]
    return sorted(path.relative_to(folder).as_posix() for path in [index_file(folder), *found])
