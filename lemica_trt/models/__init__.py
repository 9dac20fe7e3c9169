"""A diffusion transformer as this tool sees it: trunk, head, text encoder, VAE decoder, and the reference itself.

    family, cogvideox, wan   what one architecture is, declaratively: one small file each
    trace                    any diffusers pipeline: its loop, conditions, guidance and trunk, found by running it
    split                    any diffusers transformer → whole run with trunk residual, and run without trunk
    parts                    pipeline folder → networks; whether they are whole, and fit each other
    stand_ins                networks without their weights, for traces and estimates
    lora                     LoRA weights: found, checked tensor by tensor, fused with diffusers' own loader
    load                     profile → `Model`
    preflight                what a pipeline's configuration tells before weights are downloaded
    traced                   a model made from a trace, of any pipeline
    conditions               which inputs of its graphs are conditions: names, rows, text axes
    text_encoders            its text encoders as graphs, and how text becomes their ids
    image_encoder            what a traced pipeline makes of its picture before the loop, as a module
    families                 exceptions: networks that no graph can follow, said in another way
    copies                   networks as graphs are made of them, held against the pipeline's own
    padding                  ids that a pipeline pads itself
    modular                  diffusers' modular pipelines with the interface of the others
    index                    what a pipeline folder says of itself
    open_sora                Open-Sora 1.2, a pipeline that diffusers does not have
    model                    what every stage asks of a model
    scheduler                diffusers scheduler → `SamplerTable`
    graph_specs              what each graph is called with and gives
    steps                    the step graphs as torch modules: the very modules that are exported
    host_steps               the same as calibration calls them: several runs at once, arrays on the host
    denoise                  a `StepPlan` run with them: the oracle of the deployed runtime

Knows nothing of plans' origin, error graphs, ONNX or engines.
"""

from lemica_trt.models.denoise import denoise
from lemica_trt.models.family import DTYPES, Family
from lemica_trt.models.load import (
    FAMILIES,
    family_from_name,
    family_from_pipeline,
    load_model,
    scheduler_like,
    usable_device,
)
from lemica_trt.models.model import Model

__all__ = [
    "DTYPES",
    "FAMILIES",
    "Family",
    "Model",
    "denoise",
    "family_from_name",
    "family_from_pipeline",
    "load_model",
    "scheduler_like",
    "usable_device",
]
