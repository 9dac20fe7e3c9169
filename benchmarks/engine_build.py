"""What it takes to export a CogVideoX of real size and to build its TensorRT engines: time, peak memory, file sizes.

    python benchmarks/engine_build.py                          CogVideoX-2B in fp16, for TensorRT for RTX: no GPU needed
    python benchmarks/engine_build.py --size 5b                CogVideoX-5B in bf16; 24 GiB of memory and 35 GB of disk
    python benchmarks/engine_build.py --layers 2 --frames 9    the same with fewer layers and frames, to try it out
    python benchmarks/engine_build.py --opset 23               `Attention` in place of opset 20's matrix products

Random weights: neither time nor memory depends on what they are. The DiT's graphs only (full, skip, combine); text
encoder and VAE are stand-ins of a few weights. Export and builds are processes of their own, whose peaks are reported.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import shutil
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import msgspec

from lemica_trt import builders
from lemica_trt.builders.tensorrt_worker import peak_memory
from lemica_trt.progress import duration, reporter, size
from lemica_trt.resources import load_profile, zoo_path
from lemica_trt.spec import GraphSet, Profile, StepLayout

PROFILES = {"2b": "cogvideox", "5b": "cogvideox-5b"}

CONFIGS: dict[str, dict[str, int | bool]] = {
    "2b": {"num_attention_heads": 30, "num_layers": 30},
    "5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
}
"""What differs from the defaults of diffusers' CogVideoXTransformer3DModel in zai-org/CogVideoX-2b and -5b."""


class Exported(NamedTuple):
    """Graphs, the DiT's parameters, seconds and peak bytes of the process that exported them."""

    graphs: GraphSet
    parameters: int
    seconds: float
    memory: int


def export(profile: Profile, config: dict[str, int | bool], folder: Path) -> Exported:
    """Make the model and export the step graphs of a sampler that looks one step back."""
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

    start = perf_counter()
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
    layout = StepLayout(latent_shape=model.latent_shape, latent_history=1, output_history=1, guided=model.guided)
    graphs = export_graphs(model, layout, folder, roles=("combine", "full", "skip"))
    parameters = sum(weights.numel() for weights in pipeline.transformer.parameters())
    return Exported(graphs, parameters, perf_counter() - start, peak_memory())


def main() -> None:
    """Export, build, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(PROFILES), default="2b", help="of the model")
    parser.add_argument("--backend", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt-rtx")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), help="instead of the profile's own")
    parser.add_argument("--opset", type=int, help="ONNX opset")
    parser.add_argument("--layers", type=int, help="transformer blocks instead of the model's")
    parser.add_argument("--frames", type=int, help="video frames instead of 49")
    parser.add_argument("--output", type=Path, help="keep graphs and engines there, and find them there again")
    given = parser.parse_args()
    profile = load_profile(PROFILES[given.size])
    frames = given.frames or profile.shape.frames
    profile = msgspec.structs.replace(
        profile,
        dtype=given.dtype or profile.dtype,
        opset=given.opset or profile.opset,
        shape=msgspec.structs.replace(profile.shape, frames=frames),
    )
    config = {**CONFIGS[given.size], **({"num_layers": given.layers} if given.layers else {})}
    builders.check(given.backend, profile.dtype)
    folder = given.output or Path(tempfile.mkdtemp(prefix="engine_build_"))
    try:
        # A fresh interpreter, so that its memory is given back before the builds, and its peak is the export's.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            exported = pool.submit(export, profile, config, folder).result()
        entry = builders.build(given.backend, exported.graphs, folder, folder, {}, reporter())
        shape = profile.shape
        print(
            f"CogVideoX-{given.size.upper()}, {config['num_layers']} layers, "
            f"{exported.parameters / 1e9:.2f} G parameters, {profile.dtype}, "
            f"{frames} frames {shape.height}×{shape.width}, opset {profile.opset}; "
            f"{given.backend} {entry.key.version} for {entry.key.target}; Python {sys.version.split()[0]}\n"
        )
        print("| | time | peak memory | file | layers | fused attention |\n|---|---|---|---|---|---|")
        onnx = sum(path.stat().st_size for path in (folder / "onnx").iterdir())
        print(f"| export | {duration(exported.seconds)} | {size(exported.memory)} | {size(onnx)} | | |")
        for role, build in entry.builds.items():
            engine = (folder / entry.files[role]).stat().st_size
            counts = build.precisions if build.engine_precisions is None else build.engine_precisions
            layers = ", ".join(f"{count} {dtype}" for dtype, count in sorted(counts.items()))
            fused = "not looked into" if build.fused_attention is None else build.fused_attention
            row = (f"{role} engine", duration(build.seconds), size(build.host_memory), size(engine), layers, fused)
            print(f"| {' | '.join(map(str, row))} |")
    finally:
        if given.output is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
