"""lemica-trt: a deployment compiler for diffusion transformers.

Source: a diffusion pipeline (a DiT, its sampler, a few prompts). Target: a bundle – engines, and a static step
plan that says when to call them. The rooms, each below those that it imports:

    errors      the exception tree and the exit codes
    values      base of all values: frozen, strict JSON
    spec        Profile, StepLayout, GraphSet: what is built, by name, shape and dtype
    text        what is done to a prompt before it is tokenised
    resources   what ships with the package: profiles, prompts, published schedules, the bundled models
    progress    what a running stage tells: a bar, lines, or nothing
    sampler     SamplerTable: a sampler as a table of coefficients
    provenance  what a measurement was made on
    graph       ErrorGraph: what caching each segment costs
    grams       TrajectoryGrams: inner products of residuals and outputs along uncached runs
    schedule    ErrorGraph, B → Schedule, by lexicographic minimax path search
    signed      AdjointProducts, B → Schedule for extrapolated outputs, by signed errors
    predicted   ErrorGraph, TrajectoryGrams, B → Schedule for predicted outputs, by what prediction leaves
    predict     Predictor, Schedule, TrajectoryGrams → Prediction: what a skipped step computes
    plan        Schedule, SamplerTable, Prediction → StepPlan
    sensitivity  Sensitivity: what of a calibration holds for other steps, shifts and guidance
    fold        StepPlan → StepPlan without the rows that run no graph
    candidates  the ways to spend a budget, and the choice between them by trial
    models/     one small file a family: where the DiT's trunk begins and ends           torch, diffusers
    lower       diffusers scheduler → SamplerTable                                       torch, diffusers
    calibrate/  model, prompts → ErrorGraph, by replaying segments or by estimates       torch
    export/     model, StepLayout → GraphSet, ONNX files                                 torch, onnx
    builders/   ONNX → engine, one file a vendor                                         vendor SDKs
    bundle      the folder that is deployed: manifest, digests, atomic writing
    runtime/    runs a StepPlan on engines, numpy in and out                             one vendor SDK a file
    quality     how alike two clips are: PSNR, SSIM, LPIPS
    budget      speed-up, latency or PSNR → full steps B; the Pareto front of them
    timing      what steps and plans take on the engines of this machine
    verify      does the bundle do what it must? how good is the plan?                   torch where it compares
    diagnosis   what is on this machine
    report/     tables, contact sheets and plots that a person looks at
    estimate    what calibrating a model would cost                                      torch
    triton/     Bundle → model repository of Triton Inference Server; what runs in it; a client     tritonclient
    pipeline    the ordered list of stages; the only place that joins them
    cli         parse, call `pipeline`, print, exit code

Imports point upwards in this list, stages never import each other, and nothing that runs a bundle imports torch
(`tests/test_boundaries.py` and ruff's banned-api rules hold that).
"""

__version__ = "0.1.0"
