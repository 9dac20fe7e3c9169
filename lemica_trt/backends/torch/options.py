"""How modules are run."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from lemica_trt.backends.options import Options


class TorchOptions(Options, frozen=True):
    """Options of the backend `torch`."""

    compile: Annotated[
        bool, Meta(description="torch.compile each module; its first run takes minutes on a large model")
    ] = False
