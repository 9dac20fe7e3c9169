"""Open-Sora 1.2 as it is published → a folder of `OpenSoraPipeline`: links to weights, and configs in diffusers' form.

The transformer and the autoencoder are repositories of their own; T5 and the config of the autoencoder's first stage
are others' (its weights are in the autoencoder's own file: it was trained on). The folder lies in the user's cache,
named by its contents; weights are not copied.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from lemica_trt.core.errors import InputError, UnsupportedError
from lemica_trt.core.files import user_cache
from lemica_trt.core.text import first_line
from lemica_trt.models.open_sora import transformer, vae
from lemica_trt.models.open_sora.pipeline import SCHEDULER, OpenSoraPipeline
from lemica_trt.models.open_sora.transformer import STDiT3
from lemica_trt.models.open_sora.vae import OpenSoraVAE


class Repository(NamedTuple):
    """Of the hub.

    Attributes:
        source: hub id; a folder of all has one named by its second half.
        files: patterns of those that are needed.
    """

    source: str
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.source.partition("/")[2]


WEIGHTS = "model.safetensors"
"""Of the transformer and of the autoencoder."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")

TRANSFORMER = Repository("hpcai-tech/OpenSora-STDiT-v3", ("config.json", WEIGHTS))
AUTOENCODER = Repository("hpcai-tech/OpenSora-VAE-v1.2", ("config.json", WEIGHTS))
TEXT = Repository("DeepFloyd/t5-v1_1-xxl", (*TOKENIZER, "config.json", "*.safetensors", "*.bin", "*.index.json"))
IMAGES = Repository("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", ("vae/config.json",))

REPOSITORIES = (TRANSFORMER, AUTOENCODER, TEXT, IMAGES)

TEMPORAL = {"filters": "filters", "num_res_blocks": "res_blocks", "num_groups": "norm_num_groups"}
"""Settings of the second stage, as upstream calls them, and as `OpenSoraVAE` does."""

INDEX: dict[str, Any] = {
    "_class_name": OpenSoraPipeline.__name__,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": [transformer.__name__, STDiT3.__name__],
    "vae": [vae.__name__, OpenSoraVAE.__name__],
}
"""`model_index.json`."""

FAILURES = (OSError, ValueError, RuntimeError)
"""What the hub's client raises where there is no network, no such repository, or no space."""


def is_published(source: str) -> bool:
    """Whether a source is the transformer's hub id, or a folder that has the repositories."""
    if source.casefold() == TRANSFORMER.source.casefold():
        return not Path(source).is_dir()
    return (Path(source) / TRANSFORMER.name).is_dir() and not (Path(source) / "model_index.json").exists()


def pipeline_folder(source: str, *, download: bool = True) -> Path:
    """The pipeline folder of a source that `is_published`.

    Args:
        download: what is not on this machine; else that is a refusal.

    Raises:
        InputError: a repository or a file is missing, or is of another model.
        UnsupportedError: the transformer takes text that is embedded already.
    """
    found = {each: _folder(each, source, download=download) for each in REPOSITORIES}
    tokenizer = _config(found[TEXT] / "tokenizer_config.json").get("tokenizer_class", INDEX["tokenizer"][1])
    contents: dict[str, bytes | Path] = {
        "model_index.json": _json({**INDEX, "tokenizer": ["transformers", tokenizer]}),
        "scheduler/scheduler_config.json": _json({"_class_name": INDEX["scheduler"][1], **SCHEDULER}),
        "transformer/config.json": _json(_transformer_config(found[TRANSFORMER])),
        "transformer/diffusion_pytorch_model.safetensors": _file(found[TRANSFORMER], WEIGHTS),
        "vae/config.json": _json(_vae_config(found[AUTOENCODER], found[IMAGES])),
        "vae/diffusion_pytorch_model.safetensors": _file(found[AUTOENCODER], WEIGHTS),
    }
    _file(found[TEXT], "config.json")
    for path in sorted(found[TEXT].iterdir()):
        if any(path.match(pattern) for pattern in TEXT.files):
            part = "tokenizer" if path.name in TOKENIZER else "text_encoder"
            contents[f"{part}/{path.name}"] = path.absolute()
    for part, endings in {
        "tokenizer": ("spiece.model", "tokenizer.json"),
        "text_encoder": (".safetensors", ".bin"),
    }.items():
        if not any(name.startswith(part) and name.endswith(endings) for name in contents):
            raise InputError(f"{found[TEXT]}: expected a file {' or '.join(endings)}, got none")
    _require_shards(found[TEXT])
    return _made(contents)


def is_here(source: str) -> bool:
    """Whether a source that `is_published` can be loaded without a download; True of a folder."""
    try:
        pipeline_folder(source, download=False)
    except InputError:
        return Path(source).is_dir()
    return True


def _folder(repository: Repository, source: str, *, download: bool) -> Path:
    if source.casefold() != TRANSFORMER.source.casefold():
        folder = Path(source) / repository.name
        if folder.is_dir():
            return folder
        raise InputError(
            f"{source}: expected folders {', '.join(each.name for each in REPOSITORIES)}, got no {repository.name}",
            fix=f"hf download {repository.source} --local-dir {folder}",
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository.source, allow_patterns=list(repository.files), local_files_only=not download
            )
        )
    except FAILURES as error:
        raise InputError(
            f"{repository.source}: expected a repository on the hub, got: {first_line(error)}",
            fix=f"check the network, or give a folder with {', '.join(each.name for each in REPOSITORIES)}",
        ) from None


def _require_shards(folder: Path) -> None:
    """Raise InputError unless every file of the weights that transformers reads is there: safetensors before others."""
    indices = [folder / f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")]
    index = next((path for path in indices if path.is_file()), None)
    whole = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    if index is None or whole[0].is_file() or (index == indices[1] and whole[1].is_file()):
        return
    named = _config(index).get("weight_map")
    names = {str(name) for name in named.values()} if isinstance(named, dict) else set()
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise InputError(f"{folder}: expected all files that {index.name} names, got no {missing[0]}")


def _transformer_config(folder: Path) -> dict[str, Any]:
    config = _config(folder / "config.json")
    if config.get("model_type") != STDiT3.__name__:
        raise InputError(f"{folder.name}: expected the config.json of an STDiT3, got one of {config.get('model_type')}")
    if config.get("skip_y_embedder"):
        raise UnsupportedError(f"{folder.name}: expected a transformer that embeds text, skip_y_embedder is set")
    known = inspect.signature(STDiT3).parameters
    return {"_class_name": STDiT3.__name__, **{key: value for key, value in config.items() if key in known}}


def _vae_config(folder: Path, images: Path) -> dict[str, Any]:
    config = _config(folder / "config.json")
    first, second = config.get("vae_2d"), config.get("vae_temporal")
    if not isinstance(first, dict) or not isinstance(second, dict):
        raise InputError(f"{folder.name}: expected a config.json with vae_2d and vae_temporal, got {', '.join(config)}")
    taken = {"micro_frame_size": "micro_frame_size", "shift": "latent_shift", "scale": "latent_scale"}
    return {
        "_class_name": OpenSoraVAE.__name__,
        "spatial": {key: its for key, its in _config(images / "vae" / "config.json").items() if key[0] != "_"},
        **{ours: config[theirs] for theirs, ours in taken.items() if theirs in config},
        **{ours: second[theirs] for theirs, ours in TEMPORAL.items() if theirs in second},
        **{key: first[key] for key in ("micro_batch_size",) if key in first},
    }


def _config(path: Path) -> dict[str, Any]:
    where = "/".join(path.parts[-2:])
    try:
        found = json.loads(_file(path.parent, path.name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a readable config, got: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected a config, got {type(found).__name__}")
    return found


def _file(folder: Path, name: str) -> Path:
    path = (folder / name).absolute()
    if not path.is_file():
        raise InputError(f"{folder}: expected {name}, got no such file", fix="download the repository again")
    return path


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()


def _made(contents: Mapping[str, bytes | Path]) -> Path:
    """A folder of files, and links to files; of the same contents it is the same folder."""
    named = [(name, its.hex() if isinstance(its, bytes) else str(its)) for name, its in sorted(contents.items())]
    root = (user_cache() or Path(tempfile.mkdtemp())) / "open-sora"  # never one that others could have made
    target = root / hashlib.sha256(repr(named).encode()).hexdigest()[:16]
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".", dir=root))
    try:
        for name, its in contents.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if isinstance(its, bytes):
                path.write_bytes(its)
            else:
                path.symlink_to(its)
        folder.rename(target)
    except OSError as error:
        if not target.is_dir():  # else another process has made the same
            raise InputError(f"{root}: expected a folder to write links in, got: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target
