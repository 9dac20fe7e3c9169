"""lemica-trt: a deployment compiler for diffusion transformers.

Source: a diffusion pipeline (a DiT, its sampler, a few prompts). Target: a bundle – engines, and a static step
plan that says when to call them. The rooms, in the order in which data passes through them:

    errors      the exception tree and the exit codes
    values      base of all values: frozen, strict JSON
    spec        Profile, StepLayout, GraphSet: what is built, by name, shape and dtype
    models/     one small file a family: where the DiT's trunk begins and ends           torch, diffusers
    sampler     SamplerTable: a sampler as a table of coefficients
    lower       diffusers scheduler → SamplerTable                                       torch, diffusers
    graph       ErrorGraph: what caching each segment costs
    calibrate/  model, prompts → ErrorGraph, by replaying segments                       torch
    schedule    ErrorGraph, B → Schedule, by lexicographic minimax path search
    plan        Schedule, SamplerTable → StepPlan
    export/     model, StepLayout → GraphSet, ONNX files                                 torch, onnx
    builders/   ONNX → engine, one file a vendor                                         vendor SDKs
    bundle      the folder that is deployed: manifest, digests, atomic writing
    runtime/    runs a StepPlan on engines, numpy in and out                             one vendor SDK a file
    verify      does the bundle do what it must? how good is the plan?                   torch where it compares
    report/     tables, contact sheets and plots that a person looks at
    pipeline    the ordered list of stages; the only place that joins them
    cli         parse, call `pipeline`, print, exit code

Imports point upwards in this list, stages never import each other, and nothing that runs a bundle imports torch
(`tests/test_boundaries.py` and ruff's banned-api rules hold that).
"""

__version__ = "0.1.0"
