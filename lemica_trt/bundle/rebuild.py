"""What to type where engines are for another machine."""

from __future__ import annotations

import shlex

from lemica_trt.bundle.reading import Bundle
from lemica_trt.ir.engine import EngineKey


def rebuild_command(bundle: Bundle, key: EngineKey) -> str:
    """The command that builds engines from a bundle's own graphs, on the machine where it is typed.

    Plans and graphs stay as they are, the old bundle too; neither the model nor PyTorch is needed. Options of the
    builder that are not its defaults are for who built the bundle to repeat.
    """
    command = ["lemica-trt", "engine", str(bundle.path), "--backend", key.backend, "--output", f"{bundle.path}-here"]
    return shlex.join(command)
