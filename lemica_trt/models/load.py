"""Profile → model: find the files, name the family, load with diffusers; one clear line when something is missing."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import msgspec
import numpy as np
import torch
import transformers

from lemica_trt.core.errors import InputError, MissingDependencyError, UnsupportedError, UsageError
from lemica_trt.core.text import first_line
from lemica_trt.core.threads import usable_threads
from lemica_trt.ir.profile import TRACED, DType, Lora, Profile, Sampling, Shape
from lemica_trt.ir.resources import nearest, zoo_path
from lemica_trt.models.cogvideox import CogVideoX
from lemica_trt.models.family import DTYPES, Family
from lemica_trt.models.index import index_file, read_index
from lemica_trt.models.lora import fuse_loras, identified, lora_file
from lemica_trt.models.model import Model, folder_revision, fused_revision, pipeline_files
from lemica_trt.models.modular import blocks_of, defaults_of, guidance_of, is_modular, load_modular
from lemica_trt.models.open_sora import published
from lemica_trt.models.open_sora.pipeline import OpenSoraPipeline
from lemica_trt.models.parts import (
    BROKEN,
    load_networks,
    reading,
    require_fitting,
    require_vocabulary,
)
from lemica_trt.models.scheduler import made_scheduler
from lemica_trt.models.wan import Wan

FAMILIES: dict[str, Family] = {family.name: family for family in (CogVideoX(), Wan())}
"""All families, by name."""

PIPELINES: dict[str, Any] = {OpenSoraPipeline.__name__: OpenSoraPipeline}
"""Pipeline classes beside those of diffusers, by name."""


def family_from_name(name: str) -> Family:
    """The family that a profile names.

    Raises:
        UnsupportedError: there is no such family.
    """
    if name not in FAMILIES:
        raise UnsupportedError(f"family must be one of {', '.join(sorted(FAMILIES))}, got {name!r}")
    return FAMILIES[name]


def family_from_pipeline(folder: Path) -> Family:
    """The family of a pipeline folder, by the class in its `model_index.json`.

    Raises:
        InputError: no readable `model_index.json`.
        UnsupportedError: no family has this pipeline class.
    """
    try:
        kind = json.loads((folder / "model_index.json").read_bytes())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{folder}: expected a diffusers pipeline folder, got no readable model_index.json") from None
    for family in FAMILIES.values():
        if family.pipeline_class == kind:
            return family
    known = ", ".join(sorted(family.pipeline_class for family in FAMILIES.values()))
    raise UnsupportedError(f"{folder}: the pipeline must be one of {known}, got {kind}")


def usable_device(name: str | None) -> str:
    """The torch device of that name; None: the first GPU, or the CPU where there is none.

    Raises:
        MissingDependencyError: torch has no such device here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise MissingDependencyError(
            f"expected a torch device, got {name!r}: {first_line(error)}", fix="--device cpu"
        ) from None
    return name


def limit_threads() -> None:
    """Let PyTorch use no more CPU threads than this process may; fewer that were set before stay."""
    torch.set_num_threads(min(torch.get_num_threads(), usable_threads()))


def load_model(
    profile: Profile,
    *,
    source: str | None = None,
    dtype: DType | None = None,
    device: str = "cpu",
    weights: bool = True,
) -> Model:
    """Load a model for a profile.

    The DiT and the text encoder are in the profile's dtype, except what their classes keep in fp32; the VAE is in
    what users of the family run it in (`Family.vae_dtype`). What LoRA weights are fused into keeps its precision.

    Args:
        profile: the build profile.
        source: hub id, folder or `package:NAME` instead of the profile's.
        dtype: precision of the DiT instead of the profile's.
        device: torch device.
        weights: as in `load_pipeline`.

    Raises:
        InputError: the source is not there, is incomplete, or is of another family.
        UnsupportedError: unknown family, or a variant that this tool cannot build; or as `lora.fuse_loras`.
        MissingDependencyError: a library that the pipeline needs is not installed.
    """
    profile = msgspec.structs.replace(profile, dtype=dtype or profile.dtype, source=source or profile.source)
    if profile.loras:
        profile = msgspec.structs.replace(profile, loras=identified(profile.loras))
    if profile.family == TRACED:
        from lemica_trt.models.traced import TracedModel

        pipeline = load_pipeline(
            profile.source, dtype=profile.dtype, device=device, sampling=profile.sampling, loras=profile.loras or (),
            weights=weights,
        )  # fmt: skip
        return TracedModel(profile, pipeline, folder_from_source(profile.source))
    family = family_from_name(profile.family)
    with quiet():
        folder = folder_from_source(profile.source)
        found = family_from_pipeline(folder)
        if found is not family:
            raise InputError(f"{profile.source}: expected a {family.pipeline_class}, got a {found.pipeline_class}")
        dtypes = {"default": DTYPES[profile.dtype], "vae": DTYPES[family.vae_dtype or profile.dtype]}
        with reading(profile.source):
            networks = load_networks(folder, dtypes, weights=weights)
            pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder, **networks)
            require_vocabulary(folder, pipeline)
        fuse_loras(pipeline, (profile.loras or ()) if weights else ())
        pipeline.scheduler = scheduler_for(profile.sampling, pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
    model = Model(profile, family, pipeline, folder)
    with quiet():
        require_fitting(model)
    return model


def load_pipeline(
    source: str,
    *,
    dtype: DType = "fp32",
    device: str = "cpu",
    sampling: Sampling | None = None,
    loras: Sequence[Lora] = (),
    weights: bool = True,
) -> Any:
    """Load any diffusers pipeline whose denoiser is a transformer.

    Args:
        source: hub id, folder or `package:NAME`.
        dtype: of all its networks.
        device: torch device.
        sampling: its scheduler and flow shift are put in the place of the pipeline's own.
        loras: fused into it.
        weights: else its networks stand in for themselves, see `stand_ins`; nothing is fused into them.

    Raises:
        InputError: the source is not there, or is incomplete; or there is no such scheduler; or as `lora.fuse_loras`.
        UnsupportedError: its denoiser is a UNet, or its class is not one of diffusers'. Known before a download.
        MissingDependencyError: a library that the pipeline needs is not installed.
    """
    with quiet():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).is_dir():
            pipeline_class(source, _index_on_hub(source))
        folder = folder_from_source(source, weights=weights)
        index = read_index(index_file(folder), where=str(folder))
        kind = pipeline_class(source, index)
        for name, value in index.items():
            if isinstance(value, list) and value[:1] != [None] and not (folder / name).is_dir():
                raise InputError(f"{source}: expected a complete pipeline, got no folder {name!r}")
        _require_vocabularies(source, folder, index)
        with reading(source):
            networks = load_networks(folder, {"default": DTYPES[dtype]}, weights=weights)
            modular = is_modular(kind)
            pipeline = (
                load_modular(kind, index, folder, networks) if modular else kind.from_pretrained(folder, **networks)
            )
        fuse_loras(pipeline, loras if weights else ())
        if sampling is not None:
            pipeline.scheduler = scheduler_for(sampling, pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
    return pipeline


def _require_vocabularies(source: str, folder: Path, index: dict[str, Any]) -> None:
    """Raise InputError where the folder of a tokenizer has none: transformers does not say of which."""
    for name, entry in index.items():
        if name.startswith("tokenizer") and isinstance(entry, list) and entry[:1] != [None]:
            names = {path.name for path in (folder / name).iterdir()}
            if not (names & {"tokenizer.json", "vocab.json", "vocab.txt"} or any(n.endswith(".model") for n in names)):
                raise InputError(f"{source}: expected a vocabulary in {name}/, got none")


def profile_from_pipeline(source: str) -> Profile:
    """The build profile of a pipeline that has none: shape, steps and guidance by the signature of its class.

    Args:
        source: folder or hub id; only its `model_index.json` is read.

    Raises:
        UsageError: its family is one that has profiles.
        InputError, UnsupportedError: as `load_pipeline`.
    """
    with quiet():
        local = Path(source).is_dir() and not published.is_published(source)
        index = read_index(index_file(Path(source)), where=source) if local else _index_on_hub(source)
        kind = pipeline_class(source, index)
    for name, family in FAMILIES.items():
        if family.pipeline_class == kind.__name__ and len(_transformers(index)) == 1:
            raise UsageError(
                f"{source}: expected a profile of the family {name}, got the pipeline alone",
                fix=f"name a profile with its shape and steps, for example --model {EXAMPLES[name]} --weights {source}",
            )
    if is_modular(kind):
        defaults = defaults_of(blocks_of(kind, index))
    else:
        defaults = {name: each.default for name, each in inspect.signature(kind.__call__).parameters.items()}

    def number(*names: str, otherwise: float) -> float:
        found = (defaults[name] for name in names if isinstance(defaults.get(name), int | float))
        return float(next(found, otherwise))

    scales = [name for name in defaults if name.endswith(("guidance_scale", "cfg_scale"))]
    on = [name for name in scales if isinstance(defaults[name], int | float) and defaults[name] > 1]
    return Profile(
        name=Path(source).name,
        family=TRACED,
        source=source,
        dtype="fp32",
        text_length=int(number("max_sequence_length", otherwise=UNKNOWN_TEXT_LENGTH)),
        shape=Shape(
            frames=int(number("num_frames", "video_length", "frames", otherwise=1)),
            height=int(number("height", otherwise=UNKNOWN_SIZE)),
            width=int(number("width", otherwise=UNKNOWN_SIZE)),
        ),
        sampling=Sampling(
            steps=int(number("num_inference_steps", otherwise=50)),
            guidance_scale=_guidance_scale(source, kind, index, number(*on, otherwise=1.0) if scales else None),
        ),
    )


EXAMPLES = {"cogvideox": "cogvideox-5b", "wan": "wan2.1-t2v-1.3b"}
"""Family → a profile of it."""

UNKNOWN_SIZE = 1024
"""Height and width in pixels where the pipeline's class says none."""

UNKNOWN_TEXT_LENGTH = 77
"""Tokens of a prompt where it says none."""


def _index_on_hub(source: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    if published.is_published(source):
        return published.INDEX
    try:
        return read_index(Path(hf_hub_download(source, "model_index.json")), where=source)
    except BROKEN as error:
        raise InputError(
            f"{source}: expected a folder or a diffusers pipeline on the hub, got: {first_line(error)}",
            fix=f"check the name and the network, or give the folder of a downloaded pipeline; {nearest(source)}",
        ) from None


def _guidance_scale(source: str, kind: Any, index: dict[str, Any], given: float | None) -> float:
    """The guidance scale of a pipeline: its guider's where it has one, that of its call, or 1.

    Args:
        given: that of its call; None: it takes none.
    """
    if index.get("guider", [None, None]) == [None, None]:
        return given if given is not None else guidance_of(kind, index) if is_modular(kind) else 1.0
    if not (path := Path(source) / GUIDER_CONFIG).is_file():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(source, GUIDER_CONFIG))
        except BROKEN as error:
            raise InputError(f"{source}: expected {GUIDER_CONFIG}, got: {first_line(error)}") from None
    try:
        return float(json.loads(path.read_bytes())["guidance_scale"])
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"{source}: expected the guidance scale of its guider in {GUIDER_CONFIG}, got none") from None


GUIDER_CONFIG = "guider/guider_config.json"
"""Of a pipeline with a guider."""


def _transformers(index: dict[str, Any]) -> list[str]:
    """The components of a pipeline that are transformers of its loop; families have one."""
    parts = (key for key, value in index.items() if isinstance(value, list) and value[:1] != [None])
    return [part for part in parts if part.startswith("transformer")]


def pipeline_class(source: str, index: dict[str, Any]) -> Any:
    """The class of a pipeline whose denoiser is a transformer."""
    name = index["_class_name"]
    parts = {key for key, value in index.items() if isinstance(value, list) and value[:1] != [None]}
    if not _transformers(index):
        got = "a UNet" if "unet" in parts else f"none in {', '.join(sorted(parts)) or 'no components'}"
        raise UnsupportedError(f"{source}: expected a pipeline with a diffusion transformer, got {got} ({name})")
    kind = PIPELINES.get(name, getattr(diffusers, name, None))
    if is_modular(kind):
        return kind  # which parts it needs follows its blocks
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise UnsupportedError(f"{source}: expected a pipeline class of diffusers {diffusers.__version__}, got {name}")
    needed, _ = diffusers.DiffusionPipeline._get_signature_keys(kind)
    if missing := sorted(set(needed) - set(getattr(kind, "_optional_components", ())) - parts):
        raise InputError(
            f"{source}: expected all parts of {name}, got none for {', '.join(missing)}", fix="name them in its index"
        )
    return kind


def revision_of(profile: Profile) -> str:
    """The revision that a profile's model would have, without loading it; see `Model.revision`.

    Raises:
        InputError: a source is not there.
    """
    with quiet():
        revision = folder_revision(folder_from_source(profile.source))
        return fused_revision(revision, identified(profile.loras or ()))


def stored_weights(profile: Profile) -> int:
    """Bytes of a profile's weights, of all components, as they are stored.

    Raises:
        InputError: the source is not there.
    """
    with quiet():
        folder = folder_from_source(profile.source)
    return sum(
        (folder / name).stat().st_size for name in pipeline_files(folder) if name.endswith((".safetensors", ".bin"))
    )


def is_bare(source: str) -> bool:
    """Whether a source is a folder of a pipeline that has no weights."""
    folder = Path(source)
    return (folder / "model_index.json").is_file() and not [*folder.glob("*/*.safetensors"), *folder.glob("*/*.bin")]


def is_here(profile: Profile) -> bool:
    """Whether a profile's model can be loaded without a download; True of sources that are no hub ids."""
    source = profile.source
    for lora in profile.loras or ():
        try:
            lora_file(lora, download=False)
        except InputError:
            if lora.on_hub is not None:
                return False
    if published.is_published(source):
        return published.is_here(source)
    if source.startswith("package:") or Path(source).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return True
    found = huggingface_hub.try_to_load_from_cache(source, "model_index.json")
    if not isinstance(found, str):
        return False
    index = read_index(Path(found), where=source)
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[:1] != [None]]
    return all((Path(found).parent / name).is_dir() for name in parts)


DESCRIPTION = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model")
"""Files of a pipeline on the hub that are no weights: configurations and tokenizers."""


def folder_from_source(source: str, *, weights: bool = True) -> Path:
    """Local folder of a source; downloads from the hub into its cache where the source is a hub id.

    Args:
        weights: else only what describes the pipeline is downloaded.
    """
    if published.is_published(source):
        return published.pipeline_folder(source)
    scheme, _, name = source.partition(":")
    folder = zoo_path(name) if scheme == "package" else Path(source)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise InputError(
            f"{source}: expected a pipeline folder, got a file", fix="give the folder that has model_index.json"
        )
    if scheme == "package" or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(
            f"{source}: expected a folder, a hub id or package:NAME, got none that exists",
            fix="check the path, or give the id as the hub has it: OWNER/NAME",
        )
    try:
        if not weights:
            return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(DESCRIPTION)))
        return Path(diffusers.DiffusionPipeline.download(source))
    except BROKEN as error:
        raise InputError(
            f"{source}: expected a folder or a model on the hub, got: {first_line(error)}",
            fix="check the name and the network, or give the folder of a downloaded pipeline",
        ) from None


def _scheduler_class(name: str) -> Any:
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        if (missing := getattr(kind, "_backends", None)) is not None:  # diffusers' stand-in for it
            raise MissingDependencyError(
                f"scheduler {name} needs {' and '.join(missing)}, which is not here",
                fix=f"pip install {' '.join(library for library in missing if library != 'torch')}",
            )
        near = difflib.get_close_matches(name, [known for known in dir(diffusers) if known.endswith("Scheduler")], n=3)
        raise UsageError(
            f"scheduler: expected a class of diffusers, got {name!r}",
            fix=f"did you mean {' or '.join(near)}?" if near else "for example --scheduler DPMSolverMultistepScheduler",
        )
    return kind


def scheduler_for(sampling: Sampling, scheduler: Any) -> Any:
    """The scheduler that a profile asks for, with its flow shift and its steps, made from the pipeline's own.

    Raises:
        UsageError: no such class.
        UnsupportedError: as `scheduler_like` and `scheduler_at`, or there is no shift to change.
    """
    if sampling.scheduler is not None:
        scheduler = scheduler_like(_scheduler_class(sampling.scheduler), scheduler)
    if sampling.flow_shift is not None:
        scheduler = _shifted(scheduler, sampling.flow_shift)
    return scheduler_at(scheduler, sampling)


def scheduler_like(kind: Any, scheduler: Any) -> Any:
    """A scheduler of another class for the same model: `from_config`, and the flow settings that it loses.

    diffusers' two kinds of flow schedulers do not read each other's settings: FlowMatch* have `shift`, the others
    `flow_shift`, and those take the model's output for noise unless told that it is velocity.

    Args:
        kind: diffusers scheduler class.
        scheduler: of the model.

    Raises:
        UnsupportedError: one of the two is for flow matching, the other cannot be.
    """
    own = type(scheduler).__name__.startswith("FlowMatch")
    flow = own or scheduler.config.get("use_flow_sigmas", False)
    shift = scheduler.config.get("shift" if own else "flow_shift", 1.0)
    known = inspect.signature(kind).parameters
    config = {key: value for key, value in scheduler.config.items() if key in known or key == "_use_default_values"}
    if kind.__name__.startswith("FlowMatch") and flow:
        return made_scheduler(kind, config, shift=shift)
    if "use_flow_sigmas" in known and flow:
        return made_scheduler(kind, config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if kind.__name__.startswith("FlowMatch") or flow:
        what = f"{type(scheduler).__name__} is {'' if flow else 'not '}for flow matching"
        raise UnsupportedError(f"the model's {what}, unlike {kind.__name__}", fix="choose another --scheduler, or none")
    return made_scheduler(kind, config)


def _shifted(scheduler: Any, shift: float) -> Any:
    """The same scheduler with another shift of its sigmas, in place of one that follows the size (FLUX) too.

    Raises:
        UnsupportedError: it has none.
    """
    name = type(scheduler).__name__
    fixed = {"use_dynamic_shifting": False} if scheduler.config.get("use_dynamic_shifting", False) else {}
    if name.startswith("FlowMatch"):
        return made_scheduler(type(scheduler), scheduler.config, shift=shift, **fixed)
    if scheduler.config.get("use_flow_sigmas", False):
        return made_scheduler(type(scheduler), scheduler.config, flow_shift=shift, **fixed)
    raise UnsupportedError(f"expected a scheduler for flow matching to shift, got {name}", fix="leave --flow-shift out")


def scheduler_at(scheduler: Any, sampling: Sampling) -> Any:
    """The same scheduler, which takes the profile's sigmas or timesteps when it is asked for the profile's N steps.

    That is what a diffusers pipeline does whose call is given them; here it also holds for those whose call takes none.

    Raises:
        UnsupportedError: its `set_timesteps` takes none.
    """
    name = "timesteps" if sampling.sigmas is None else "sigmas"
    given = getattr(sampling, name)
    if given is None:
        return scheduler
    kind = type(scheduler)
    theirs = inspect.signature(kind.set_timesteps)
    if name not in theirs.parameters:
        raise UnsupportedError(
            f"expected a scheduler that takes {name}, {kind.__name__} does not",
            fix=f"leave --{name} out, or choose another --scheduler",
        )
    numbers = np.array(given) if name == "sigmas" else [int(n) if n.is_integer() else n for n in given]

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        asked = theirs.bind(self, *args, **kwargs).arguments
        lists = [asked[other] for other in ("sigmas", "timesteps") if asked.get(other) is not None]
        if (len(lists[0]) if lists else asked.get("num_inference_steps")) == len(numbers):
            asked = {**asked, "num_inference_steps": None, "sigmas": None, "timesteps": None, name: numbers}
        kind.set_timesteps(**{key: value for key, value in asked.items() if value is not None})
        if asked.get(name) is numbers:
            made = [] if self.num_inference_steps is None else self.timesteps.tolist()
            if len(made) != len(numbers) or (name == "timesteps" and made != numbers):
                raise ValueError(f"of {len(numbers)} {name} it makes {len(made)} steps, at {made}")

    same = {"set_timesteps": set_timesteps, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return made_scheduler(type(kind.__name__, (kind,), same), scheduler.config)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor advice of libraries on stderr; the caller reports what matters."""
    with_bars = (diffusers.utils.logging, transformers.utils.logging)
    libraries = (*with_bars, huggingface_hub.utils.logging)  # the hub's client tells of every request that failed
    levels = [library.get_verbosity() for library in libraries]
    bars = [library for library in with_bars if library.is_progress_bar_enabled()]
    for library in libraries:
        library.set_verbosity_error()
    for library in bars:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, level in zip(libraries, levels):
            library.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()
