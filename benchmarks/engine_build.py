"""What it takes to export a CogVideoX of real size and to build its TensorRT engines: time, peak memory, file sizes.

    python benchmarks/engine_build.py --output benchmarks/results/engines-2b.json
    python benchmarks/engine_build.py --size 5b --output benchmarks/results/engines-5b.json

    --size 2b               CogVideoX-2B in fp16, for TensorRT for RTX: no GPU needed
    --size 5b               CogVideoX-5B in bf16; 24 GiB of memory and 25 GB of disk
    --layers 2 --frames 9   fewer layers and frames, to try it out
    --opset 20 23           both opsets side by side: 23 has `Attention` as one operator, 20 its matrix products and
                            softmax

Random weights: neither time nor memory depends on what they are. The DiT's graphs only (full, skip, combine); text
encoder and VAE are stand-ins of a few weights. Export and builds are processes of their own. Their peaks are of memory
that only they can have: weights mapped from a file are not counted, the kernel takes such pages back when it must.
Writes JSON (`record.EngineBuild`) and prints its table.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import msgspec
from record import BuildRow, EngineBuild, this_run, write_result
from tables import described

from lemica_trt.backends.build import build, check
from lemica_trt.backends.tensorrt.worker import HostMemory
from lemica_trt.core.progress import reporter
from lemica_trt.core.values import Value, read_value, write_value
from lemica_trt.ir.graphs import GraphSet, step_layout
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.resources import load_profile, zoo_path

PROFILES = {"2b": "cogvideox", "5b": "cogvideox-5b"}

CONFIGS: dict[str, dict[str, int | bool]] = {
    "2b": {"num_attention_heads": 30, "num_layers": 30},
    "5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
}
"""What differs from the defaults of diffusers' CogVideoXTransformer3DModel in zai-org/CogVideoX-2b and -5b."""


class Exported(Value, frozen=True):
    """What was exported from what, the DiT's parameters, seconds, and peak bytes of the process that did it."""

    profile: Profile
    config: dict[str, int | bool]
    graphs: GraphSet
    parameters: int
    seconds: float
    memory: int


def export(profile: Profile, config: dict[str, int | bool], folder: Path) -> Exported:
    """Make the model and export the step graphs of a sampler that looks one step back."""
    start = perf_counter()
    with HostMemory() as memory:
        graphs, parameters = _export(profile, config, folder)
    return Exported(
        profile=profile,
        config=config,
        graphs=graphs,
        parameters=parameters,
        seconds=perf_counter() - start,
        memory=memory.peak,
    )


def _export(profile: Profile, config: dict[str, int | bool], folder: Path) -> tuple[GraphSet, int]:
    import torch
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    from lemica_trt.export import export_graphs
    from lemica_trt.models import Model
    from lemica_trt.models.family import DTYPES
    from lemica_trt.models.load import family_from_name

    torch.set_default_dtype(DTYPES[profile.dtype])
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("cogvideox-tiny") / "tokenizer")
    encoder = T5Config(vocab_size=len(tokenizer), d_model=4096, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(encoder),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
        ),
        transformer=CogVideoXTransformer3DModel(**config).eval(),  # type: ignore[arg-type]
        scheduler=CogVideoXDDIMScheduler(),
    )
    torch.set_default_dtype(torch.float32)
    model = Model(profile, family_from_name(profile.family), pipeline, folder)
    layout = step_layout(
        latent_shape=model.latent_shape,
        latent_history=1,
        output_history=1,
        conditions=model.conditions,
        guided=model.guided,
    )
    graphs = export_graphs(model, layout, folder, roles=("combine", "full", "skip"))
    return graphs, sum(weights.numel() for weights in pipeline.transformer.parameters())


def exported(profile: Profile, config: dict[str, int | bool], folder: Path) -> Exported:
    """What an earlier run exported to the folder from the same, or a new export."""
    record = folder / "export.json"
    if record.is_file():
        found = read_value(Exported, record)
        if (found.profile, found.config) == (profile, config):
            return found
    # A fresh interpreter, so that its memory is given back before the builds, and its peak is the export's.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(export, profile, config, folder).result()
    write_value(found, record)
    return found


def rows(backend: str, made: Exported, folder: Path) -> Iterator[BuildRow]:
    """Build the engines: the export's row, and one a graph."""
    entry = build(backend, made.graphs, folder, folder, {}, reporter())
    opset = made.profile.opset
    onnx = sum(path.stat().st_size for path in (folder / "onnx").iterdir())
    yield BuildRow(opset=opset, what="export", seconds=made.seconds, memory=made.memory, size=onnx)
    for role, built in entry.builds.items():
        yield BuildRow(
            opset=opset,
            what=f"{role} engine",
            seconds=built.seconds,
            memory=built.host_memory,
            size=(folder / entry.files[role]).stat().st_size,
            layers=built.precisions if built.engine_precisions is None else built.engine_precisions,
            fused=built.fused_attention,
            attentions=built.attentions,
        )


def main() -> None:
    """Export, build, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(PROFILES), default="2b", help="of the model")
    parser.add_argument("--backend", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt-rtx")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), help="instead of the profile's own")
    parser.add_argument("--opset", type=int, nargs="+", help="ONNX opset, or several to compare")
    parser.add_argument("--layers", type=int, help="transformer blocks instead of the model's")
    parser.add_argument("--frames", type=int, help="video frames instead of 49")
    parser.add_argument("--work", type=Path, help="keep graphs and engines there, and find them there again")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    profile = load_profile(PROFILES[given.size])
    shape = msgspec.structs.replace(profile.shape, frames=given.frames or profile.shape.frames)
    profile = msgspec.structs.replace(profile, dtype=given.dtype or profile.dtype, shape=shape)
    config = {**CONFIGS[given.size], **({"num_layers": given.layers} if given.layers else {})}
    check(given.backend, profile.dtype)
    folder = given.work or Path(tempfile.mkdtemp(prefix="engine_build_"))
    found: list[BuildRow] = []
    try:
        for opset in given.opset or [profile.opset]:
            here = folder / f"opset{opset}"
            made = exported(msgspec.structs.replace(profile, opset=opset), config, here)
            found += rows(given.backend, made, here)
    finally:
        if given.work is None:
            shutil.rmtree(folder)
    result = EngineBuild(
        run=this_run("torch", "diffusers", "onnx", given.backend),
        model=profile.name,
        parameters=made.parameters,
        layers=int(config["num_layers"]),
        dtype=profile.dtype,
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
        backend=given.backend,
        rows=tuple(found),
    )
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
