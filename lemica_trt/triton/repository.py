"""Bundle → model repository.

    DIR/
      README.md             what it needs, how to start it, what a request may ask for
      denoiser/             config.pbtxt, configs/cpu.pbtxt, 1/model.py
        bundle/             the bundle, once; every model refers to it by the parameter `bundle`
      denoiser_stream/  text_encoder/  vae_decoder/  pipeline/  pipeline_stream/

Files of the bundle are hard links where the file system can. Writing again over a repository that is being served is
safe: every file is replaced whole; what runs goes on with what it has loaded until `load_model`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lemica_trt import __version__
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import copy_bundle
from lemica_trt.core.errors import UsageError
from lemica_trt.core.values import write_bytes
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.triton.interface import CACHED, MODELS, STREAMS, Interface, Port, interfaces

BUNDLE = "denoiser/bundle"
"""Where the bundle lies in a repository: a folder of a model that is not a version is none of Triton's business."""

SERVER = "2.51 (container 24.10)"
"""The oldest release; tested with it."""


@dataclass(frozen=True)
class Settings:
    """What a repository is written for.

    Attributes:
        instances: processes of each denoiser, on each GPU; each holds the engines.
        queue: requests that may wait at each model; a further one is answered UNAVAILABLE.
        timeout: seconds that a request may wait in a queue, unless it says so itself.
        threads: CPU threads of each engine; 0: as the bundle was built.
        batching: `exact` or `off`, see `lemica_trt.triton.serving.Batches`.
    """

    instances: int = 1
    queue: int = 64
    timeout: int = 600
    threads: int = 0
    batching: str = "exact"

    def __post_init__(self) -> None:
        for name, least in (("instances", 1), ("queue", 1), ("timeout", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.batching not in ("exact", "off"):
            raise UsageError(f"batching must be exact or off, got {self.batching!r}")


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
    write_bytes(_readme(bundle, tuple(found), cpu is not None).encode(), folder / "README.md")
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


def _cpu_engine(bundle: Bundle) -> EngineEntry | None:
    """The engines that run without a GPU, where their backend's name finds them."""
    for entry in bundle.manifest.engines:
        if entry.key.target == "cpu" and bundle.engine(entry.key.backend) == entry:
            return entry
    return None


# ---------------------------------------------------------------- config.pbtxt


def config_text(model: str, interface: Interface, bundle: Bundle, engine: EngineEntry, settings: Settings) -> str:
    """The config.pbtxt of a model on one set of engines."""
    manifest = bundle.manifest
    joins = model.startswith("pipeline")
    on_gpu = engine.key.target != "cpu" and not joins
    batch = manifest.graphs.max_batch if model.startswith("denoiser") else 8 if model in CACHED else 1
    count = settings.instances if model.startswith("denoiser") else 1
    if joins:  # a process for each request under way, so that enough meet in the denoiser to fill its batches
        count = min(8, manifest.graphs.max_batch * settings.instances + 2)
    blocks = [
        f"# {_ABOUT[model]}\n"
        f"# Written by lemica-trt {__version__} for {manifest.profile.name}, tritonserver {SERVER} or newer,\n"
        f"# engines of {engine.key.backend} {engine.key.version} for {engine.key.target}.\n"
        f'# "lemica-trt triton --check" checks it.',
        f'name: "{model}"\nbackend: "python"\nmax_batch_size: {batch}',
        _ports("input", interface.inputs),
        _ports("output", interface.outputs),
    ]
    if model in STREAMS:
        blocks.append("# Several answers to one request: progress, then the result.\n"
                      "model_transaction_policy { decoupled: true }")  # fmt: skip
    blocks.append(
        f"# Each instance is a process{' with its own engines' if not joins else ''}.\n"
        f"instance_group [ {{ count: {count} kind: KIND_{'GPU' if on_gpu else 'CPU'} }} ]"
    )
    blocks.append(
        "# More than max_queue_size waiting, or waiting longer than the time-out: UNAVAILABLE. A request's own\n"
        "# `timeout` (microseconds) takes the default's place, and also stops the denoising loop between two steps.\n"
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
    blocks.append("# The newest version serves.\nversion_policy { latest { num_versions: 1 } }")
    if model in CACHED:
        blocks.append("# Embeddings of prompts that have been seen, if the server runs with --cache-config.\n"
                      "response_cache { enable: true }")  # fmt: skip
    if not joins:
        samples = "\n".join(
            f'    inputs {{ key: "{port.name}" value {{ data_type: TYPE_{port.dtype} dims: {_dims(port)} '
            "zero_data: true } }"
            for port in interface.inputs
        )
        blocks.append(f'# One request before the model is ready.\nmodel_warmup [ {{\n    name: "zeros" batch_size: 1\n'
                      f"{samples}\n}} ]")  # fmt: skip
    blocks += [_parameter(*parameter) for parameter in _parameters(model, bundle, engine, settings)]
    return "\n\n".join(blocks) + "\n"


_ABOUT = {
    "text_encoder": "Prompt → embeddings.",
    "denoiser": "Prompt embeddings → latents: the whole denoising loop, in process.",
    "denoiser_stream": "Like denoiser, with an answer after each full step.",
    "vae_decoder": "Latents → frames.",
    "pipeline": "Prompt → frames, or an MP4 file.",
    "pipeline_stream": "Like pipeline, with an answer after each full step.",
}


def _parameters(model: str, bundle: Bundle, engine: EngineEntry, settings: Settings) -> Iterable[tuple[str, str, str]]:
    """Name, value, explanation."""
    yield "bundle", f"../{BUNDLE}", "The bundle, relative to this folder."
    yield "graphs", engine.key.graphs_digest, "Digest of the graphs that this was written for; others do not load."
    yield "lemica_trt", __version__, "Version of lemica-trt that the python backend's interpreter must have."
    if model in STREAMS:
        yield "stream", "yes", "Progress is sent."
    if model.startswith("pipeline"):
        return
    yield "backend", engine.key.backend, "Engines of the bundle that are used."
    yield "threads", str(settings.threads), "CPU threads of an engine; 0: as the bundle was built. CPU engines only."
    if model.startswith("denoiser"):
        yield (
            "batching",
            settings.batching,
            "exact: requests share a batch if that was measured at load to change no bit of them; off: never.",
        )


def _parameter(name: str, value: str, about: str) -> str:
    return f'# {about}\nparameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'


def _ports(kind: str, ports: Iterable[Port]) -> str:
    lines = (f'  {{ name: "{port.name}" data_type: TYPE_{port.dtype} dims: {_dims(port)} }}' for port in ports)
    return f"{kind} [\n" + ",\n".join(lines) + "\n]"


def _dims(port: Port) -> str:
    return f"[ {', '.join(str(size) for size in port.dims)} ]"


# ---------------------------------------------------------------- README


def _readme(bundle: Bundle, models: tuple[str, ...], cpu: bool) -> str:
    manifest = bundle.manifest
    plans = {name: bundle.plan(name) for name in bundle.plans}
    table = "\n".join(
        f"| `{name}`{' (default)' if name == manifest.default_plan else ''} | {plan.budget} of {plan.num_steps} |"
        for name, plan in plans.items()
    )
    engines = ", ".join(f"{entry.key.backend} {entry.key.version} ({entry.key.target})" for entry in manifest.engines)
    about = "\n".join(f"| `{name}` | {_ABOUT[name]} |" for name in models)
    cpu_only = "Without a GPU: add `--model-config-name=cpu`." if cpu else "The engines need a GPU."
    memory = sum(manifest.files[file].size for entry in manifest.engines for file in set(entry.files.values())) / 1e6
    return f"""# {manifest.profile.name} on Triton Inference Server

Written by lemica-trt {__version__}. Needs:

- tritonserver {SERVER} or newer, with its python backend;
- in that backend's interpreter (the first `python3` on PATH, or EXECUTION_ENV_PATH) `lemica-trt=={__version__}` without
  PyTorch, the engines' library – {engines}; TensorRT at exactly this version –, PyAV for MP4, and `numpy<2` if the
  server is older than its numpy 2 support. A model that finds something else does not load, and says what.

```bash
lemica-trt triton --check .
tritonserver --model-repository=. --model-control-mode=explicit --load-model='*' --cache-config=local,size=67108864
```

{cpu_only} Engine files: {memory:.0f} MB, held by `denoiser` and `denoiser_stream` each; the pipelines use the latter
only, so load `denoiser` where you call it: name the others with `--load-model` each.

| model | |
|---|---|
{about}

Parameters of a request: `plan`, `steps` (full steps, of the plans below), `seed`, `guidance_scale`, and to the
pipelines `negative_prompt` and `output` (`frames`, `mp4`, `mp4-base64`). `timeout` (microseconds) ends it between two
steps.

| plan | full steps |
|---|---|
{table}

```bash
lemica-trt client --url localhost:8001 "a prompt" --output clip.mp4
curl -d '{{"prompt": "a prompt", "seed": 7, "output": "mp4-base64"}}' localhost:8000/v2/models/pipeline/generate
```

New plans: `lemica-trt plan denoiser/bundle --budget 12`, then load `denoiser` and `denoiser_stream` again
(`POST /v2/repository/models/denoiser_stream/load`). Requests under way finish on the old plans; a plan that is
broken is refused and the old ones keep serving.
"""
