"""The config.pbtxt of each model, with what every setting is for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lemica_trt import __version__
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.signing import TRUSTED_KEYS
from lemica_trt.core.errors import UsageError
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.triton.interface import (
    MODEL_SUMMARIES,
    OLDEST_SERVER_NAME,
    STREAMS,
    Interface,
    Port,
)

BUNDLE = "denoiser/bundle"
"""Where the bundle lies in a repository: Triton ignores folders of a model that are not versions."""


@dataclass(frozen=True)
class Settings:
    """What a repository is written for.

    Attributes:
        instances: processes of each denoiser, on each GPU; each holds the engines.
        queue: requests that may wait at each model; a further one is answered UNAVAILABLE.
        timeout: seconds that a request may wait in a queue, unless it says so itself.
        threads: CPU threads of each engine; 0: as the bundle was built.
        batching: `exact` or `off`, see `lemica_trt.triton.server.batching`.
        require_signature: models load only if the server is given keys, one of which signed the bundle.
    """

    instances: int = 1
    queue: int = 64
    timeout: int = 600
    threads: int = 0
    batching: str = "exact"
    require_signature: bool = False

    def __post_init__(self) -> None:
        for name, least in (("instances", 1), ("queue", 1), ("timeout", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.batching not in ("exact", "off"):
            raise UsageError(f"batching must be exact or off, got {self.batching!r}")


def config_text(model: str, interface: Interface, bundle: Bundle, engine: EngineEntry, settings: Settings) -> str:
    """The config.pbtxt of a model on one set of engines."""
    batch = bundle.manifest.graphs.max_batch if model.startswith("denoiser") else 8 if model == "text_encoder" else 1
    blocks = [
        f"# {MODEL_SUMMARIES[model]}\n"
        f"# Written by lemica-trt {__version__} for {bundle.manifest.profile.name}, tritonserver {OLDEST_SERVER_NAME}\n"
        f"# or newer, engines of {engine.key.title} for {engine.key.target}.\n"
        f'# "lemica-trt triton --check" checks it.',
        f'name: "{model}"\nbackend: "python"\nmax_batch_size: {batch}',
        _ports("input", interface.inputs),
        _ports("output", interface.outputs),
        *_scheduling(model, bundle, engine, settings),
    ]
    if model in ("text_encoder", "vae_decoder"):
        blocks.append(_warm_up(interface))
    blocks += [_parameter(*parameter) for parameter in _parameters(model, bundle, engine, settings)]
    return "\n\n".join(blocks) + "\n"


def _scheduling(model: str, bundle: Bundle, engine: EngineEntry, settings: Settings) -> Iterable[str]:
    """How requests reach the model's processes."""
    if model in STREAMS:
        yield (
            "# Several answers to one request: progress, then the result.\nmodel_transaction_policy { decoupled: true }"
        )
    joins = model.startswith("pipeline")
    on_gpu = engine.key.target != "cpu" and not joins
    count = settings.instances if model.startswith("denoiser") else 1
    if joins:  # a process for each request under way, so that enough meet in the denoiser to fill its batches
        count = min(8, bundle.manifest.graphs.max_batch * settings.instances + 2)
    yield (
        f"# Each instance is a process{' with its own engines' if not joins else ''}.\n"
        f"instance_group [ {{ count: {count} kind: KIND_{'GPU' if on_gpu else 'CPU'} }} ]"
    )
    yield (
        "# More than max_queue_size waiting, or waiting longer than the time-out: UNAVAILABLE. A request's own\n"
        "# `timeout` (microseconds) replaces the default, and also stops the denoising loop between two steps.\n"
        "dynamic_batching {\n"
        f"  max_queue_delay_microseconds: {2000 if model.startswith('denoiser') else 0}\n"
        "  default_queue_policy {\n"
        "    timeout_action: REJECT\n"
        f"    default_timeout_microseconds: {settings.timeout * 1_000_000}\n"
        "    allow_timeout_override: true\n"
        f"    max_queue_size: {settings.queue}\n"
        "  }\n"
        "}"
    )
    yield "# The newest version serves.\nversion_policy { latest { num_versions: 1 } }"


def _warm_up(interface: Interface) -> str:
    """A request of zeros. The denoisers get none, since conditions of zeros need not give finite latents; they run rows
    of every plan when they are loaded."""
    samples = "\n".join(
        f'    inputs {{ key: "{port.name}" value {{ {_kind(port)} zero_data: true }} }}' for port in interface.inputs
    )
    return (
        f'# One request before the model is ready.\nmodel_warmup [ {{\n    name: "zeros" batch_size: 1\n{samples}\n}} ]'
    )


def parameter_names(model: str) -> tuple[str, ...]:
    """The parameters that a model's config must have."""
    names = ["bundle", "manifest", "lemica_trt", "require_signature"]
    names += ["stream"] if model in STREAMS else []
    names += [] if model.startswith("pipeline") else ["backend", "threads"]
    names += ["batching"] if model.startswith("denoiser") else []
    return tuple(names)


def _parameters(model: str, bundle: Bundle, engine: EngineEntry, settings: Settings) -> Iterable[tuple[str, str, str]]:
    """Name, value, explanation."""
    known = {
        "bundle": (f"../{BUNDLE}", "The bundle, relative to this folder."),
        "manifest": (bundle.digest, "SHA-256 of the bundle's manifest; no other bundle is loaded."),
        "lemica_trt": (__version__, "Version of lemica-trt that the python backend's interpreter must have."),
        "require_signature": (
            "yes" if settings.require_signature else "no",
            f"yes: the bundle must be signed by a key that the server's variable {TRUSTED_KEYS} names.",
        ),
        "stream": ("yes", "Progress is sent."),
        "backend": (engine.key.backend, "Engines of the bundle that are used."),
        "threads": (str(settings.threads), "CPU threads of an engine; 0: as the bundle was built. CPU engines only."),
        "batching": (
            settings.batching,
            "exact: requests share a batch if that was measured at load to change no bit of them; off: never.",
        ),
    }
    for name in parameter_names(model):
        yield (name, *known[name])


def _parameter(name: str, value: str, about: str) -> str:
    return f'# {about}\nparameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'


def _ports(kind: str, ports: Iterable[Port]) -> str:
    lines = (f'  {{ name: "{port.name}" {_kind(port)} }}' for port in ports)
    return f"{kind} [\n" + ",\n".join(lines) + "\n]"


def _kind(port: Port) -> str:
    return f"data_type: TYPE_{port.dtype} dims: [ {', '.join(str(size) for size in port.dims)} ]"
