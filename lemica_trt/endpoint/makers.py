"""Who makes the clips: the engines of this process, or a Triton server that has them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import EngineError, LemicaError, MissingDependencyError, UnsupportedError
from lemica_trt.core.pictures import drawn_picture
from lemica_trt.endpoint.errors import Refused
from lemica_trt.runtime.denoise import Cancelled, RowDone
from lemica_trt.runtime.generation import GenerationRequest
from lemica_trt.runtime.pipeline import Pipeline
from lemica_trt.runtime.video import encoded
from lemica_trt.triton import client
from lemica_trt.triton.interface import IMAGES

OnProgress = Callable[[int, int], None]
"""Called with (steps done, steps); what it raises ends the request."""

Check = Callable[[], None]
"""Called again and again while another process is silent; what it raises ends the request."""

LOGGER = logging.getLogger("lemica_trt.endpoint")

RETRY_SECONDS = 5
"""When to come again after a Triton server could not be reached."""

CHECK_SECONDS = 120.0
"""How long a Triton server may take for the first step of a check."""


def wait_on() -> None:
    """A `Check` that never ends a request."""


@dataclass(frozen=True)
class Made:
    """A clip.

    Attributes:
        data: the file's content.
        seconds: wall-clock time of the denoising loop; None: not known here.
        full, skipped: rows that ran the DiT, and that did not; 0: not known here.
    """

    data: bytes
    seconds: float | None = None
    full: int = 0
    skipped: int = 0


class Maker(Protocol):
    """Makes clips. May be called by several threads."""

    def make(
        self, request: GenerationRequest, plan: str, suffix: str, on_progress: OnProgress, check: Check = wait_on
    ) -> Made:
        """One clip as a file: `.mp4` or `.png`.

        Raises:
            LemicaError: it cannot be made.
            Cancelled: `on_progress` or `check` raised it.
        """

    def check(self, check: Check = wait_on) -> None:
        """Run the text encoder and the first step of the default plan; not to its end if `check` raises Cancelled.

        Raises:
            LemicaError: they do not run.
        """


class Engines:
    """The engines of this process.

    Args:
        pipeline: loaded.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def make(
        self, request: GenerationRequest, plan: str, suffix: str, on_progress: OnProgress, check: Check = wait_on
    ) -> Made:
        """See `Maker`; nothing is waited for but the steps."""
        rows = {True: 0, False: 0}

        def step(row: RowDone) -> None:
            rows[row.full] += 1
            on_progress(row.index + 1, row.rows)

        (clip,) = self._pipeline.run([request], plan=plan, on_step=step)
        data = encoded(clip.frames, suffix, fps=self._pipeline.fps)
        return Made(data, clip.seconds["denoise"], rows[True], rows[False])

    def check(self, check: Check = wait_on) -> None:
        """See `Maker`."""

        def stop(row: RowDone) -> None:
            raise Cancelled

        with suppress(Cancelled):
            self._pipeline.run([self._pipeline.request("", 0)], on_step=stop)


class TritonServer:
    """A Triton server with a repository of the same bundle.

    Args:
        url: its gRPC endpoint.
        bundle: what it must serve.
        plan: the default plan.
    """

    def __init__(self, url: str, bundle: Bundle, plan: str) -> None:
        self._url, self._bundle, self._plan = url, bundle, plan

    def make(
        self, request: GenerationRequest, plan: str, suffix: str, on_progress: OnProgress, check: Check = wait_on
    ) -> Made:
        """See `Maker`; an MP4 is made by the server."""
        given = {"guidance_scale": request.guidance_scale, "negative_prompt": request.negative_prompt}
        parameters: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        parameters |= {"plan": plan, "seed": int(request.seed)}
        try:
            made = client.generate(
                self._url,
                request.prompt,
                parameters=parameters,
                image=request.image,
                last_image=request.last_image,
                mp4=suffix == ".mp4",
                on_step=on_progress,
                check=check,
            )
        except (EngineError, MissingDependencyError) as error:
            raise self._told(error) from None
        return Made(
            made if isinstance(made, bytes) else encoded(made, suffix, fps=self._bundle.manifest.profile.shape.fps)
        )

    def _told(self, error: LemicaError) -> LemicaError:
        """What clients are told, who need not know where the server is; the log says it."""
        if client.is_full(error):
            return Refused(429, "queue_full", "the queue of the Triton server is full", retry_after=1)
        if isinstance(error, (client.Unavailable, MissingDependencyError)):
            LOGGER.error("%s", error)
            what = "the Triton server cannot be reached, or had no time: try again"
            return Refused(503, "unavailable", what, retry_after=RETRY_SECONDS)
        return EngineError(str(error).replace(f"the server at {self._url}", "the Triton server"))

    def check(self, check: Check = wait_on) -> None:
        """See `Maker`; also that the server serves this bundle.

        Raises:
            EngineError: there is no first step within `CHECK_SECONDS`.
            UnsupportedError: it serves another one.
        """
        digest = client.served_digest(self._url)
        if digest != self._bundle.digest:
            raise UnsupportedError(
                f"{self._url}: expected a server of bundle {self._bundle.digest[:12]}, it serves {digest[:12]}",
                fix="give the bundle that the repository was written from: REPOSITORY/denoiser/bundle",
            )

        def stop(done: int, steps: int) -> None:
            raise Cancelled

        end = time.monotonic() + CHECK_SECONDS

        def wait() -> None:
            check()
            if time.monotonic() > end:
                raise EngineError(
                    f"expected a first step of the server at {self._url} within {CHECK_SECONDS:g} seconds",
                    fix="look at the log of tritonserver",
                )

        needed = self._bundle.manifest.graphs.sources
        image, last_image = (
            encoded(drawn_picture("", 64, 64, name=name)[None], ".png", fps=1) if name in needed else None
            for name in IMAGES
        )
        with suppress(Cancelled):
            client.generate(
                self._url,
                "",
                parameters={"plan": self._plan},
                image=image,
                last_image=last_image,
                on_step=stop,
                check=wait,
            )
