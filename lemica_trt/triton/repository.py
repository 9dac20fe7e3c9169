"""Bundle → model repository.

    DIR/
      README.md             what it needs, how to start it, what a request may ask for
      requirements.txt      what the server's interpreter needs, pinned with hashes; sbom.cdx.json lists the same
      start.sh              starts the server: on loopback, with the APIs that can run code closed
      probe.py              asks it for something real, where pipelines are served
      denoiser/             config.pbtxt, configs/cpu.pbtxt, 1/model.py
        bundle/             the bundle, once; every model refers to it by the parameter `bundle`
      denoiser_stream/  text_encoder/  vae_decoder/  pipeline/  pipeline_stream/

Files of the bundle are hard links where the file system can. Writing again over a repository that is being served is
safe: every file is replaced whole; what runs goes on with what it has loaded until `load_model`. Where the disk is
full, a repository stays as it was, and a new one is not there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import copy_bundle
from lemica_trt.core.atomic_folder import held
from lemica_trt.core.errors import UsageError
from lemica_trt.core.values import written
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.triton.config import BUNDLE, Settings, config_text
from lemica_trt.triton.interface import MODELS, interfaces
from lemica_trt.triton.readme import readme_text

__all__ = ["BUNDLE", "Settings", "model_file", "require_repository", "shipped", "write_repository"]

START_SCRIPT = "start.sh"
PROBE = "probe.py"
"""Asks a pipeline."""

SERVER_PINS = ("requirements.txt", "sbom.cdx.json")
"""What tools/lock_server.sh makes: versions with hashes of what the server's interpreter needs."""


def write_repository(
    bundle: Bundle, target: str | os.PathLike[str], settings: Settings | None = None
) -> tuple[str, ...]:
    """Write a model repository, or write it again.

    Args:
        bundle: what is served; checked whole.
        target: a new or empty folder, or a repository that this function wrote.
        settings: None: the defaults.

    Returns:
        The names of the models.

    Raises:
        UsageError: `target` is something else, or another process writes it.
        IntegrityError: the bundle is not whole.
    """
    settings = settings or Settings()
    require_repository(target)
    folder = Path(target)
    is_new = not folder.exists()
    found, cpu = interfaces(bundle.manifest), _cpu_engine(bundle)
    contents = _contents(bundle, tuple(found), settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder):
            with written({folder / name: data for name, data in contents.items()}):  # fails before anything is replaced
                copy_bundle(bundle, folder / BUNDLE)
            for name in contents.keys() & {START_SCRIPT, PROBE}:
                (folder / name).chmod(0o755)
            for name in found if cpu is None else ():
                (folder / name / "configs" / "cpu.pbtxt").unlink(missing_ok=True)
    except BaseException:  # Ctrl-C, too: no half repository stays
        if is_new and not (folder / BUNDLE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return tuple(found)


def _contents(bundle: Bundle, models: tuple[str, ...], settings: Settings) -> dict[str, bytes]:
    """All files of a repository but the bundle, by path."""
    found, gpu, cpu = interfaces(bundle.manifest), bundle.engine(), _cpu_engine(bundle)
    contents = {}
    for name in models:
        contents[f"{name}/1/model.py"] = model_file(name)
        contents[f"{name}/config.pbtxt"] = config_text(name, found[name], bundle, gpu, settings).encode()
        if cpu is not None:
            contents[f"{name}/configs/cpu.pbtxt"] = config_text(name, found[name], bundle, cpu, settings).encode()
    scripts = (START_SCRIPT, PROBE) if "pipeline" in models else (START_SCRIPT,)
    contents.update({name: shipped(name) for name in (*scripts, *SERVER_PINS)})
    contents["README.md"] = readme_text(bundle, models, cpu is not None).encode()
    return contents


def require_repository(target: str | os.PathLike[str]) -> None:
    """Raise UsageError unless `write_repository` would write there."""
    folder = Path(target)
    if folder.exists() and not (folder / BUNDLE).is_dir() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{target}: expected a model repository of lemica-trt, an empty folder or nothing, got something else",
            fix="give another output folder",
        )


def model_file(model: str) -> bytes:
    """The model.py of a model, as it ships with this package."""
    return (Path(__file__).parent / "model" / MODELS[model]).read_bytes()


def shipped(name: str) -> bytes:
    """A file of the repository as it ships with this package."""
    return (Path(__file__).parent / name).read_bytes()


def _cpu_engine(bundle: Bundle) -> EngineEntry | None:
    """The engines that run without a GPU, where their backend's name finds them."""
    for entry in bundle.manifest.engines:
        if entry.key.target == "cpu" and bundle.engine(entry.key.backend) == entry:
            return entry
    return None
