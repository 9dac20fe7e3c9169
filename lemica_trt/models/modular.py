"""diffusers' modular pipelines with the interface of the others: a call with named arguments, and components.

What a modular pipeline takes is what its blocks take. Its guidance scale is that of its guider. Some pipelines exist in
this form only (FLUX.3).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.modular_pipelines import modular_pipeline

from lemica_trt.core.errors import UnsupportedError

OUTPUTS = ("videos", "images", "video", "image", "frames")
"""Names of what blocks give in the end, the first that there is."""


class _Called:
    """A modular pipeline; what is not here is its own."""

    def __init__(self, modular: Any) -> None:
        self.__dict__["modular"] = modular

    def __getattr__(self, name: str) -> Any:
        return getattr(self.modular, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a component."""
        self.modular.update_components(**{name: value})

    def set_progress_bar_config(self, **config: Any) -> None:
        """As a pipeline's; of all blocks."""
        left = [self.modular._blocks]
        while left:
            block = left.pop()
            left += getattr(block, "sub_blocks", {}).values()
            if hasattr(block, "progress_bar"):
                block._progress_bar_config = config

    def __call__(self, **inputs: Any) -> Any:
        """Run all blocks; the output by its name. Latents are decoded whatever is asked for."""
        names = self.modular.blocks.output_names
        name = next((name for name in OUTPUTS if name in names), names[-1])
        if inputs.get("output_type") == "latent":
            inputs["output_type"] = "pt"
        log = logging.getLogger("diffusers.modular_pipelines")  # blocks log the traceback of all that ends them early
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            return {name: self.modular(output=name, **inputs)}
        finally:
            log.setLevel(level)


def called(modular: Any) -> Any:
    """A modular pipeline as others are, of a class of its own whose call has the inputs of its blocks as arguments."""

    def call(self: _Called, **inputs: Any) -> Any:
        return _Called.__call__(self, **inputs)

    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
                for name, default in defaults_of(modular.blocks).items()
            ),
        ]
    )
    return type(type(modular).__name__, (_Called,), {"__call__": call})(modular)


def defaults_of(blocks: Any) -> dict[str, Any]:
    """Input of blocks → default."""
    return {its.name: its.default for its in blocks.inputs if its.name is not None}


def is_modular(kind: Any) -> bool:
    """Whether a class is that of a modular pipeline."""
    return isinstance(kind, type) and issubclass(kind, diffusers.ModularPipeline)


def blocks_of(kind: Any, index: Mapping[str, Any]) -> Any:
    """The blocks of a modular pipeline, as its folder names them.

    Raises:
        UnsupportedError: they are not diffusers' own.
    """
    name = index.get("_blocks_class_name") or kind.default_blocks_name
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, modular_pipeline.ModularPipelineBlocks)):
        raise UnsupportedError(f"expected blocks of diffusers {diffusers.__version__}, got {name}")
    return found()


def load_modular(kind: Any, index: Mapping[str, Any], folder: Path, networks: Mapping[str, Any]) -> Any:
    """A modular pipeline of a folder, as `called` gives it.

    Args:
        kind: its class.
        networks: the parts that are loaded; the others are read from the folder.

    Raises:
        UnsupportedError: as `blocks_of`.
    """
    found = kind(blocks_of(kind, index), pretrained_model_name_or_path=str(folder))
    found.update_components(**networks)
    others = [name for name in found.pretrained_component_names if name not in networks and (folder / name).is_dir()]
    found.load_components(names=others, pretrained_model_name_or_path=str(folder))
    return called(found)


def guidance_of(kind: Any, index: Mapping[str, Any]) -> float:
    """The guidance scale of the guider that a modular pipeline has unless it is given another; 1 without one."""
    guider = getattr(blocks_of(kind, index).init_pipeline(), "guider", None)
    return float(getattr(guider, "guidance_scale", 1.0)) if getattr(guider, "_enabled", False) else 1.0
