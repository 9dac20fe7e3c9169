"""What can be wrong with a build that its configuration tells, before weights are downloaded: sampler, shape, disk."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
from accelerate import init_empty_weights

from lemica_trt.core.errors import MissingDependencyError
from lemica_trt.core.progress import size
from lemica_trt.ir.profile import TRACED, Profile
from lemica_trt.models.index import index_file, read_index
from lemica_trt.models.load import (
    DESCRIPTION,
    family_from_name,
    folder_from_source,
    is_here,
    load_pipeline,
    pipeline_class,
    quiet,
    scheduler_for,
)
from lemica_trt.models.lora import require_fitting_lora
from lemica_trt.models.open_sora import published
from lemica_trt.models.parts import BROKEN, class_of, reading
from lemica_trt.models.scheduler import refusing, sampler_table
from lemica_trt.models.stand_ins import WeightsNeededError
from lemica_trt.models.trace import trace_pipeline
from lemica_trt.models.traced import request_from_profile

WEIGHTS = (".safetensors", ".bin", ".model")
"""Endings of those that are large."""


def require_configuration(profile: Profile) -> int | None:
    """Refuse a sampler, a shape, LoRA weights or a download that could only fail later; of a model that is on this
    machine LoRA weights alone are looked at, the rest is found by loading it in the same time.

    Returns:
        N, the rows of the sampler; None: not known.

    Raises:
        UsageError: no such scheduler.
        UnsupportedError: it is not linear, or not for this model; or the loop of a pipeline cannot be traced.
        InputError: the model does not make this shape.
        InputError, UnsupportedError, MissingDependencyError: as `lora.require_fitting_lora`.
        MissingDependencyError: the disk is too small for the weights.
    """
    here = is_here(profile)
    if here and not profile.loras:
        return None
    if published.is_published(profile.source):
        _require_disk(profile.source, [(each.source, each.files) for each in published.REPOSITORIES])
        return None
    with quiet():
        folder = folder_from_source(profile.source) if here else _configuration(profile.source)
        if folder is None:
            return None  # the download says why
        _require_loras(folder, profile)
        if here:
            return None
        scheduler, rows = _scheduler_in(folder), None
        if scheduler is not None:
            scheduler = scheduler_for(profile.sampling, scheduler)
        if profile.family != TRACED and scheduler is not None:  # those that are traced set it up themselves
            with refusing(f"{type(scheduler).__name__} cannot make {profile.sampling.steps} steps"):
                family_from_name(profile.family).set_timesteps(scheduler, profile.sampling.steps)
            rows = sampler_table(scheduler, dynamic_guidance=profile.sampling.dynamic_guidance).num_steps
        _require_made(folder, profile)
        _require_disk(profile.source, [(profile.source, [f"*/*{ending}" for ending in WEIGHTS])])
    return rows


def require_shape(profile: Profile) -> None:
    """Refuse a shape that a model does not make, by its configuration, where the model is on this machine; of a traced
    pipeline by its loop, as far as that is known without its weights.

    Raises:
        InputError, UnsupportedError: it does not; says the nearest that it makes, where that is known.
    """
    if published.is_published(profile.source) or not is_here(profile):
        return
    with quiet():
        _require_made(folder_from_source(profile.source), profile)


def _require_made(folder: Path, profile: Profile) -> None:
    """Refuse a shape that the configuration of a pipeline does not make, or a loop that cannot be traced."""
    if profile.family == TRACED:
        _require_traceable(folder, profile)
    else:
        family = family_from_name(profile.family)
        family.latent_shape(_without_weights(folder, family.pipeline_class), profile.shape)


def _configuration(source: str) -> Path | None:
    """A folder with the configuration of a pipeline on the hub; None: it cannot be had."""
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(DESCRIPTION)))
    except BROKEN:
        return None


def _require_traceable(folder: Path, profile: Profile) -> None:
    """Refuse a pipeline whose loop cannot be traced, as far as that is known without its weights."""
    with contextlib.suppress(WeightsNeededError):
        pipeline = load_pipeline(str(folder), dtype=profile.dtype, sampling=profile.sampling, weights=False)
        trace_pipeline(pipeline, request_from_profile(profile, pipeline))


def _require_loras(folder: Path, profile: Profile) -> None:
    """Refuse LoRA weights that do not fit the networks that a pipeline's configuration describes."""
    if not profile.loras:
        return
    index = read_index(index_file(folder), where=profile.source)
    kind = pipeline_class(profile.source, index)
    networks: dict[str, Any] = {}
    for name in getattr(kind, "_lora_loadable_modules", ()):
        networks[name] = None
        if isinstance(entry := index.get(name), list) and entry[:1] not in ([], [None]):
            with reading(profile.source), init_empty_weights():
                part = class_of(name, entry)
                if issubclass(part, diffusers.ModelMixin):
                    networks[name] = part.from_config(part.load_config(folder / name))
                else:
                    networks[name] = part(part.config_class.from_pretrained(folder / name))
    for lora in profile.loras:
        require_fitting_lora(kind, networks, lora)


def _scheduler_in(folder: Path) -> Any:
    """The pipeline's scheduler; None: it has none that diffusers knows."""
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
        kind = getattr(diffusers, index["scheduler"][1])
        return kind.from_pretrained(folder, subfolder="scheduler")
    except (AttributeError, KeyError, TypeError, IndexError, OSError, ValueError):
        return None


def _without_weights(folder: Path, pipeline: str) -> Any:
    """A pipeline with transformer and VAE as their configuration says, which take no memory, and no other parts."""
    index = json.loads((folder / "model_index.json").read_bytes())
    kind = getattr(diffusers, pipeline)
    names, _ = kind._get_signature_keys(kind)
    parts: dict[str, Any] = dict.fromkeys(names)
    with init_empty_weights():
        for name in ("transformer", "vae"):
            part = getattr(diffusers, index[name][1])
            parts[name] = part.from_config(part.load_config(folder, subfolder=name))
    return kind(**parts)


def _require_disk(source: str, repositories: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raise MissingDependencyError where the hub says that the weights are larger than the disk that they go to.

    Args:
        repositories: hub id, and patterns of the files that are downloaded.
    """
    needed, hub = 0, huggingface_hub.HfApi()
    try:
        for name, patterns in repositories:
            for file in hub.model_info(name, files_metadata=True).siblings or []:
                if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in patterns):
                    needed += file.size or 0
    except BROKEN:
        return
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise MissingDependencyError(
            f"{source}: the weights take {size(needed)}, {size(free)} are free in {cache}",
            fix="free disk space, or set HF_HOME to a folder on another disk",
        )
