"""A prompt to a server, a clip back, progress on the way: an example to copy.

    clip = generate("localhost:8001", "a big red circle moves left", parameters={"seed": 7, "plan": "b15"})

Needs tritonclient (`pip install 'lemica-trt[client]'`) and nothing of this package but errors and names.
"""

from __future__ import annotations

import importlib
import queue
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import EngineError, InputError, MissingDependencyError, UsageError, install_command

MODEL = "pipeline_stream"

POLL_SECONDS = 0.25
"""How often who waits for a server may say that it waits no longer."""

CONNECT_SECONDS = 10.0
"""How long a server may take to say that it is live, and what it serves."""


class Unavailable(EngineError):
    """A server that has not run a request, or has gone while it did: another try may help."""


def generate(
    url: str,
    prompt: str,
    *,
    parameters: Mapping[str, str | int | float] | None = None,
    mp4: bool = False,
    timeout: float | None = None,
    image: bytes | None = None,
    last_image: bytes | None = None,
    on_step: Callable[[int, int], None] | None = None,
    check: Callable[[], None] | None = None,
) -> npt.NDArray[np.uint8] | bytes:
    """Generate one clip.

    Args:
        url: host:port of the server's gRPC endpoint, or `grpc://host:port`; `grpcs://` with TLS.
        prompt: any text.
        parameters: `plan`, `steps`, `seed`, `guidance_scale`, `negative_prompt`; what is left out is the bundle's.
        mp4: the clip as the bytes of an MP4 file.
        image, last_image: the content of a PNG, JPEG or WebP file, where the bundle needs one.
        timeout: seconds until the server gives up; None: the server's own limit.
        on_step: called with (steps done, steps) after each full step. What it raises cancels the request on the server
            and passes through, as Ctrl-C does.
        check: called every quarter of a second while the server is silent. What it raises does the same.

    Returns:
        Frames, uint8 [F, H, W, 3], or the bytes of the MP4 file.

    Raises:
        MissingDependencyError: tritonclient is not installed, or no server is at `url`.
        UsageError: `url` is something else.
        InputError: the server says that the request is not what it must be; the message says what is allowed.
        EngineError: the server failed, is full, or the time-out passed; `Unavailable` where another try may help.
    """
    grpc, failure = _tritonclient()
    client = _connect(url, grpc, failure)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    try:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        images = {"image": image, "last_image": last_image}
        given = {"prompt": prompt.encode(), **{name: data for name, data in images.items() if data is not None}}
        client.async_stream_infer(
            MODEL,
            inputs=[
                grpc.InferInput(name, [1, 1], "BYTES").set_data_from_numpy(np.array([[data]], np.object_))
                for name, data in given.items()
            ],
            parameters={**(parameters or {}), "output": "mp4" if mp4 else "frames"},
            timeout=None if timeout is None else max(1, round(timeout * 1e6)),
        )
        return _receive(answers, "video" if mp4 else "frames", on_step, check)
    except failure as error:
        raise _error(error, url) from None
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def served_digest(url: str) -> str:
    """The digest of the bundle that a server serves, as its configuration says.

    Raises:
        MissingDependencyError: as `generate`.
        EngineError: it serves no bundle.
    """
    grpc, failure = _tritonclient()
    client = _connect(url, grpc, failure)
    try:
        config = client.get_model_config(MODEL, as_json=True, client_timeout=CONNECT_SECONDS)["config"]
        found = config["parameters"]["manifest"]["string_value"]
    except failure as error:
        raise _error(error, url) from None
    except KeyError:
        raise EngineError(f"the server at {url}: expected a {MODEL} that lemica-trt wrote, got another") from None
    finally:
        client.close()
    return str(found)


def is_full(error: Exception) -> bool:
    """Whether a server's queue was full; its stream says it in words only."""
    return "maximum queue size" in str(error)


def _tritonclient() -> tuple[Any, type[Exception]]:
    """tritonclient's gRPC module and its exception."""
    try:
        return (
            importlib.import_module("tritonclient.grpc"),
            importlib.import_module("tritonclient.utils").InferenceServerException,
        )
    except ImportError as error:
        raise MissingDependencyError(
            f"the client needs tritonclient, got: {error}", fix=install_command("client")
        ) from None


def _address(url: str) -> tuple[str, bool]:
    """HOST:PORT, and whether to encrypt, of a URL with or without a scheme.

    Raises:
        UsageError: it is something else.
    """
    found = re.fullmatch(r"(?:(grpc|grpcs|http|https)://)?([^/\s@]+:\d+)/?", url)
    if found is None:
        raise UsageError(f"expected HOST:PORT of a server's gRPC endpoint, got {url!r}", fix="--url localhost:8001")
    return found[2], found[1] in ("grpcs", "https")


def _connect(url: str, grpc: Any, failure: type[Exception]) -> Any:
    """A client of a server that is live."""
    address, tls = _address(url)
    client = grpc.InferenceServerClient(address, ssl=tls)
    try:
        if not client.is_server_live(client_timeout=CONNECT_SECONDS):
            raise failure("not live")
    except failure as error:
        client.close()
        message = error.message() if hasattr(error, "message") else error
        raise MissingDependencyError(
            f"expected a Triton server at {url}, got: {message}", fix="start it, or give --url HOST:GRPC_PORT"
        ) from None
    return client


def _receive(
    answers: queue.Queue[tuple[Any, Any]],
    output: str,
    on_step: Callable[[int, int], None] | None,
    check: Callable[[], None] | None = None,
) -> npt.NDArray[np.uint8] | bytes:
    """The first answer that has the output; those before it are progress."""
    while True:
        if check is not None:
            check()
        try:
            result, failed = answers.get(timeout=None if check is None else POLL_SECONDS)
        except queue.Empty:
            continue
        if failed is not None:
            raise failed
        done, steps = (int(result.as_numpy(key)[0, 0]) for key in ("step", "num_steps"))
        if on_step is not None:
            on_step(done, steps)
        found = result.as_numpy(output)
        if found is not None:
            clip: npt.NDArray[np.uint8] | bytes = found[0, 0] if output == "video" else found[0]
            return clip


_REFUSED = re.compile(
    r"unknown parameter|plan \S+ holds for |this bundle was built without |\w+(, the number of full steps,)? must be |"
    r"(last_)?image: expected |.* missing required input"
)


def _error(error: Any, url: str) -> Exception:
    """tritonclient's exception as one of ours."""
    status, message = str(error.status() or ""), " ".join(str(error.message()).split())
    # A stream's errors carry no status: what is wrong with a request is known by how the models say it.
    if "INVALID_ARGUMENT" in status or _REFUSED.match(message):
        return InputError(message)
    unavailable = "UNAVAILABLE" in status or "timeout expired" in message
    return (Unavailable if unavailable else EngineError)(f"the server at {url}: {message}")
