"""Bundle → model repository.

    DIR/
      README.md             what it needs, how to start it, what a request may ask for
      start.sh              starts the server: on loopback, with the APIs that can run code closed
      denoiser/             config.pbtxt, configs/cpu.pbtxt, 1/model.py
        bundle/             the bundle, once; every model refers to it by the parameter `bundle`
      denoiser_stream/  text_encoder/  vae_decoder/  pipeline/  pipeline_stream/

Files of the bundle are hard links where the file system can. Writing again over a repository that is being served is
safe: every file is replaced whole; what runs goes on with what it has loaded until `load_model`.
"""

from __future__ import annotations

import os
from pathlib import Path

from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import copy_bundle
from lemica_trt.core.errors import UsageError
from lemica_trt.core.values import write_bytes
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.triton.config import BUNDLE, Settings, config_text
from lemica_trt.triton.interface import MODELS, interfaces
from lemica_trt.triton.readme import readme_text

__all__ = ["BUNDLE", "Settings", "model_file", "require_repository", "start_script", "write_repository"]

START_SCRIPT = "start.sh"


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
        UsageError: `target` is something else.
        IntegrityError: the bundle is not whole.
    """
    settings = settings or Settings()
    require_repository(target)
    folder = Path(target)
    found = interfaces(bundle.manifest)
    copy_bundle(bundle, folder / BUNDLE)
    gpu, cpu = bundle.engine(), _cpu_engine(bundle)
    for name, interface in found.items():
        write_bytes(model_file(name), folder / name / "1" / "model.py")
        write_bytes(config_text(name, interface, bundle, gpu, settings).encode(), folder / name / "config.pbtxt")
        path = folder / name / "configs" / "cpu.pbtxt"
        if cpu is not None:
            write_bytes(config_text(name, interface, bundle, cpu, settings).encode(), path)
        else:
            path.unlink(missing_ok=True)
    write_bytes(start_script(), folder / START_SCRIPT)
    (folder / START_SCRIPT).chmod(0o755)
    write_bytes(readme_text(bundle, tuple(found), cpu is not None).encode(), folder / "README.md")
    return tuple(found)


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


def start_script() -> bytes:
    """start.sh, as it ships with this package."""
    return (Path(__file__).parent / START_SCRIPT).read_bytes()


def _cpu_engine(bundle: Bundle) -> EngineEntry | None:
    """The engines that run without a GPU, where their backend's name finds them."""
    for entry in bundle.manifest.engines:
        if entry.key.target == "cpu" and bundle.engine(entry.key.backend) == entry:
            return entry
    return None
