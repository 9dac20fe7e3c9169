"""The README.md of a repository: what it needs, how to start it, what a request may ask for."""

from __future__ import annotations

import textwrap

from msgspec import UNSET

from lemica_trt import __version__
from lemica_trt.bundle.manifest import Manifest
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.pictures import KINDS, MAX_BYTES
from lemica_trt.triton.interface import FILE_FORMATS, MODEL_SUMMARIES, OLDEST_SERVER_NAME, file_output


def readme_text(bundle: Bundle, models: tuple[str, ...], cpu: bool) -> str:
    """The page for a bundle that is served as these models; `cpu`: with configs for machines without a GPU."""
    manifest = bundle.manifest
    engines = ", ".join(f"{entry.key.title} ({entry.key.target})" for entry in manifest.engines)
    about = "\n".join(f"| `{name}` | {MODEL_SUMMARIES[name]} |" for name in models)
    cpu_only = "Without a GPU: `./start.sh --model-config-name=cpu`." if cpu else "The engines need a GPU."
    whole = "pipeline" in models
    memory = sum(manifest.files[file].size for entry in manifest.engines for file in set(entry.files.values())) / 1e6
    return f"""# {manifest.profile.name} on Triton Inference Server

Written by lemica-trt {__version__}. Needs:

- tritonserver {OLDEST_SERVER_NAME} or newer, with its python backend;
- in that backend's interpreter (the first `python3` on PATH, or EXECUTION_ENV_PATH) `lemica-trt=={__version__}` without
  PyTorch, the engines' library – {engines}; TensorRT at exactly this version –, PyAV for MP4, and `numpy<2` if the
  server is older than its numpy 2 support. A model that finds something else does not load, and says what.
  `requirements.txt` has all of it but TensorRT, with hashes; `sbom.cdx.json` lists the same.

```bash
python3 -m pip install --require-hashes -r requirements.txt
python3 -m pip install --no-deps lemica-trt=={__version__}
lemica-trt triton --check .
./start.sh
```

`start.sh` listens on this machine only (`ADDRESS=0.0.0.0` opens it; there is no encryption: put a proxy in front), and
closes the APIs to load models, to trace and to log (`--http-restricted-api`, `--grpc-restricted-protocol`): whoever may
load models may upload a `model.py`, and so run any code as the server's user. `ADMIN_TOKEN=…` sets the token that opens
them. {cpu_only}

{_memory(memory, whole)}

| model | |
|---|---|
{about}

{_parameters(manifest, whole)}

{_PROBE if whole else _NO_PIPELINE}

| plan | full steps |
|---|---|
{_plan_table(bundle)}

{_examples(manifest) if whole else ""}{_operation(models)}"""


_PROBE = """\
`./probe.py` makes a real request, the first step of one: for readiness probes, since a server whose models' processes
have died still says that it is ready. With `--clip` it wants the frames, too."""

_NO_PIPELINE = """\
The bundle has no VAE decoder, or no encoder of what the denoisers take: they are for callers with their own, and there
are no pipelines. A server whose models' processes have died still says that it is ready: ask for something real."""


def _memory(megabytes: float, whole: bool) -> str:
    """How much the engines are, and what need not be loaded."""
    spare = (
        "the pipelines use the latter only, so load\n"
        '`denoiser` where you call it: name the others in `MODELS="denoiser_stream pipeline …"`.'
    )
    load = spare if whole else "load the one that you\ncall: `MODELS=denoiser`."
    return f"Engine files: {megabytes:.0f} MB, held by `denoiser` and `denoiser_stream` each; {load}"


def _examples(manifest: Manifest) -> str:
    """Requests, to copy."""
    kind = FILE_FORMATS[file_output(manifest.profile.shape)]
    asked, flag, before = f'"prompt": "a prompt", "seed": 7, "output": "{kind}-base64"', "", ""
    request = f"curl -d '{{{asked}}}' localhost:8000"
    if manifest.graphs.image is not UNSET:  # larger than an argument of a command may be
        files = {name: "first.png" if name == "image" else "last.png" for name in manifest.graphs.sources}
        flag = "".join(f" --{name.replace('_', '-')} {file}" for name, file in files.items())
        fields = "".join(f', "{name}": "%s"' for name in files)
        contents = " ".join(f'"$(base64 -w0 {file})"' for file in files.values())
        before = f"""printf '{{{asked}{fields}}}' {contents} | """
        request = "curl -d @- localhost:8000"
    return f"""```bash
lemica-trt client --url localhost:8001 "a prompt"{flag} --output out.{kind}
{before}{request}/v2/models/pipeline/generate
```

"""


def _operation(models: tuple[str, ...]) -> str:
    """New plans, and models that have died."""
    planned = [name for name in models if name.startswith(("denoiser", "pipeline"))]
    return _OPERATION.format(planned=" ".join(planned), any=models[0])


_OPERATION = """New plans, without a restart:

```bash
lemica-trt plan denoiser/bundle --budget 12
lemica-trt triton denoiser/bundle --output .
for model in {planned}; do
  curl -X POST -H "admin-token: $ADMIN_TOKEN" localhost:8000/v2/repository/models/$model/load
done
```

Each model loads only the bundle whose digest its config names. Requests under way finish on the old plans; a bundle
that is damaged is refused, and the old one keeps serving.

A model whose process has died answers every request with an error. Start it anew; `load` alone would do nothing:

```bash
for action in unload load; do
  curl -X POST -H "admin-token: $ADMIN_TOKEN" localhost:8000/v2/repository/models/{any}/$action
done
```
"""


def _parameters(manifest: Manifest, whole: bool) -> str:
    """What a request may ask for, of pipelines, too, where they are served."""
    guided, output = manifest.graphs.layout.guided, file_output(manifest.profile.shape)
    kind = FILE_FORMATS[output]
    names = [
        "`plan`",
        "`steps` (full steps, of the plans below)",
        "`quality`",
        "`seed`",
        *(["`guidance_scale`"] * guided),
    ]
    pipelines = (
        f", and to the pipelines {'`negative_prompt` and ' * guided}`output`: `frames`, or `{kind}` and "
        f"`{kind}-base64`, which are the answer's `{output}`"
    )
    image = "".join(
        f" The input `{name}` is the content of a {KINDS} file, as it is or in base64, at most {MAX_BYTES >> 20} MiB."
        for name in manifest.graphs.sources
    )
    wrapped = textwrap.wrap(
        f"Parameters of a request: {', '.join(names)}{pipelines * whole}. `timeout` (microseconds) ends it between two "
        f"steps.{image * whole}",
        width=120,
    )
    return "\n".join(wrapped)


def _plan_table(bundle: Bundle) -> str:
    rows = []
    for plan in map(bundle.plan, bundle.plans):
        default = " (default)" if plan.name == bundle.manifest.default_plan else ""
        rows.append(f"| `{plan.name}`{default} | {plan.budget} of {plan.num_steps} |")
    return "\n".join(rows)
