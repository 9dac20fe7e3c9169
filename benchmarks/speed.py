"""Wall-clock time of sampling: eager diffusers, the runtime uncached, and the runtime with plans.

    python benchmarks/speed.py                 the bundled model
    python benchmarks/speed.py --large         a random CogVideoX of 8 layers × 512, about 2000 tokens
    python benchmarks/speed.py --folded        plans that reuse outputs, folded: B engine calls, no skipped steps

Denoising loop only, one request of two branches; the text encoder and the VAE run outside of it in every row.
Plans have full steps at equal distances: where they lie does not change the time.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from time import perf_counter

import msgspec
import torch
from diffusers import CogVideoXTransformer3DModel

from lemica_trt.compiler import Request, build
from lemica_trt.core.progress import Quiet
from lemica_trt.evaluate.timing import machine, measure_timing
from lemica_trt.ir.profile import Profile, Shape
from lemica_trt.ir.resources import load_profile, zoo_path
from lemica_trt.models import load_model
from lemica_trt.runtime.pipeline import Pipeline


def large_profile(folder: Path) -> Profile:
    """The bundled pipeline with a random transformer of 8 layers × 512 at 416×416: 3·26·26 + 16 = 2044 tokens."""
    shutil.copytree(zoo_path("cogvideox-tiny"), folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = dict(CogVideoXTransformer3DModel.load_config(folder / "transformer"))
    config.update(num_layers=8, num_attention_heads=8, attention_head_dim=64, sample_height=52, sample_width=52)
    shutil.rmtree(folder / "transformer")
    CogVideoXTransformer3DModel.from_config(config).save_pretrained(folder / "transformer")
    tiny = load_profile("cogvideox-tiny")
    return msgspec.structs.replace(
        tiny, name="random-8x512", source=str(folder), shape=Shape(frames=9, height=416, width=416)
    )


def eager(profile: Profile, repeats: int) -> float:
    """Seconds of the diffusers pipeline's loop: a whole call less one without its steps' DiT is not to be had, so
    embeddings and noise are given and the VAE is left out by asking for latents."""
    model = load_model(profile)
    embeds = model.embed(["a big red circle moves left"])
    noise = model.noise(0)[None]
    arguments = {
        "prompt_embeds": embeds[1:],
        "negative_prompt_embeds": embeds[:1],
        "latents": noise,
        "num_frames": profile.shape.frames,
        "height": profile.shape.height,
        "width": profile.shape.width,
        "num_inference_steps": profile.sampling.steps,
        "guidance_scale": profile.sampling.guidance_scale,
        "output_type": "latent",
    }
    times = []
    for _ in range(repeats):
        start = perf_counter()
        model.pipeline(**arguments)
        times.append(perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="the random model instead of the bundled one")
    parser.add_argument("--folded", action="store_true", help="plans that run full steps only, not reused residuals")
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 15, 20, 25], help="full steps of the plans")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the best counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        profile = large_profile(root / "model") if arguments.large else load_profile("cogvideox-tiny")
        methods = ("stock:first-order",) if arguments.folded else ("uniform",)  # one method: nothing is tried
        request = Request(budgets=tuple(arguments.budgets), methods=methods, verify_samples=0)
        bundle = build(profile, root / "bundle", request, Quiet()).bundle
        seconds = eager(profile, arguments.repeats)
        plans = [bundle.plan(name) for name in bundle.plans]
        timings = measure_timing(Pipeline(bundle), plans, repeats=arguments.repeats)
    print(f"{profile.name}, {profile.sampling.steps} steps, {profile.dtype}, {machine()}\n")
    print("| | full steps | seconds | speed-up | full step | skipped step | beyond its steps |")
    print("|---|---|---|---|---|---|---|")
    print(f"| eager diffusers | {profile.sampling.steps} | {seconds:.2f} | 1.00× | | | |")
    for timing in timings:
        skipped = "" if timing.skipped_step is None else f"{timing.skipped_step * 1e3:.1f} ms"
        print(
            f"| runtime, {timing.plan} | {timing.budget} | {timing.total:.2f} | {seconds / timing.total:.2f}× "
            f"| {timing.full_step * 1e3:.1f} ms | {skipped} | {timing.overhead:+.1%} |"
        )


if __name__ == "__main__":
    main()
