"""lemica-trt: a deployment compiler for diffusion transformers.

Source: a diffusion pipeline (a DiT, its sampler, a few prompts). Target: a bundle – engines, and a static step plan
that says when to call them.

    load(path)     a bundle, ready to run: prompts in, frames out; no PyTorch
    build(…)       a model → a bundle
    Bundle         a bundle on disk, to look into

A plan in a diffusers pipeline, without a bundle; these need PyTorch:

    fit(pipe, budget, prompts)      a loaded pipeline → a step plan
    apply(pipe, plan)               the pipeline runs by the plan, until it is removed
    PlanScheduler                   the same as a diffusers scheduler

The packages, each below those that import it (`docs/architecture.md`; `tests/test_architecture.py` holds it):

    core        knows nothing of diffusion: errors, values, pictures, progress, metrics, files
    ir          nouns: frozen values; every on-disk format has its version here
    planning    verbs on numbers: planners, searches, folding, budgets
    calibrate   model, prompts → error graph, Grams, sensitivities, fitted solvers; on any model that takes steps
    models      diffusers pipelines: loading, LoRA, tracing, step modules, scheduler lowering        torch, diffusers
    export      model, layout → ONNX graphs                                                         torch, onnx
    backends    one folder a vendor: engines built and run                                          vendor SDKs
    bundle      the folder that is deployed: manifest, digests, atomic writing
    runtime     runs a step plan on engines, numpy in and out
    evaluate    runs plans and scores what they make: trials, timing; verification                  torch
    pipelines   plans in a diffusers pipeline: applied to one, fitted to one                        torch, diffusers
    report      tables, pictures and the page that a person looks at
    compiler    the stages of a build, and the loop that runs them
    triton      bundle → model repository of Triton Inference Server; what runs in it; a client     tritonclient
    hub         bundles and plans on the Hugging Face hub, or in folders                         huggingface_hub
    endpoint    a bundle for OpenAI's clients: videos, images, in process or before Triton           starlette, uvicorn
    cli         parse, call `compiler`, print, exit code
    testing     a null GPU, oracles and builders of small values for tests
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Bundle", "PlanScheduler", "__version__", "apply", "build", "fit", "load"]

if TYPE_CHECKING:
    from lemica_trt.bundle.reading import Bundle
    from lemica_trt.cli.flags import build
    from lemica_trt.pipelines.applied import apply
    from lemica_trt.pipelines.fitting import fit
    from lemica_trt.pipelines.scheduler import PlanScheduler
    from lemica_trt.runtime.pipeline import load

_FACE = {
    "Bundle": "lemica_trt.bundle.reading",
    "PlanScheduler": "lemica_trt.pipelines.scheduler",
    "apply": "lemica_trt.pipelines.applied",
    "build": "lemica_trt.cli.flags",
    "fit": "lemica_trt.pipelines.fitting",
    "load": "lemica_trt.runtime.pipeline",
}
"""Name → module that has it; imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
