"""Build TensorRT for RTX engines of tiny random pipelines, traced: which classes' graphs TensorRT takes.

    python benchmarks/rtx_builds.py --output benchmarks/results/rtx-builds.json

No GPU is needed, and none of the engines is run. Pipelines are those of `lemica_trt.testing.pipelines`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from record import RtxBuild, RtxBuilds, this_run, write_result
from tables import described

from lemica_trt.bundle.reading import Bundle
from lemica_trt.compiler import work_commands
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.core.errors import LemicaError
from lemica_trt.core.progress import Quiet, reporter
from lemica_trt.ir.profile import TRACED, Profile, Sampling, Shape
from lemica_trt.testing.pipelines import CASES, tiny_pipeline

NAMES = ("flux", "hunyuanvideo", "latte", "qwen-image")

STEPS, SCHEDULE = 5, (0, 2, 4)


def built(name: str, folder: Path) -> RtxBuild:
    """The row of a case."""
    pipeline, request = tiny_pipeline(name), CASES[name].request
    kind = type(pipeline).__name__
    pipeline.save_pretrained(folder / name)
    profile = Profile(
        name=name,
        family=TRACED,
        source=str(folder / name),
        dtype="fp32",
        text_length=request.max_sequence_length or 64,
        shape=Shape(frames=request.frames or 1, height=request.height or 32, width=request.width or 32),
        sampling=Sampling(steps=STEPS, guidance_scale=3.0),
    )
    asked = BuildRequest(
        schedule=SCHEDULE, backends=("tensorrt-rtx",), verify_samples=0, options={"builder_optimization_level": 0}
    )
    try:
        bundle: Bundle = work_commands.build(profile, folder / "bundle" / name, asked, Quiet()).bundle
    except LemicaError as error:
        return RtxBuild(name=name, pipeline=kind, refusal=error.what)
    (entry,) = bundle.manifest.engines
    return RtxBuild(name=name, pipeline=kind, engines=tuple(sorted(entry.files)), version=entry.key.version)


def main() -> None:
    """Build, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES), help="of `lemica_trt.testing.pipelines.CASES`")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    report, rows = reporter(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(given.names):
            rows.append(built(name, Path(folder)))
            report.advance(number + 1, len(given.names))
    report.close()
    result = RtxBuilds(run=this_run("tensorrt-rtx", "torch", "diffusers", "onnx"), rows=tuple(rows))
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
