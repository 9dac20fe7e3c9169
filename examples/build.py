"""Build a bundle from Python: the bundled model at few steps, with plans that need no calibration.

python examples/build.py out/small
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

import lemica_trt
from lemica_trt.compiler import BuildRequest
from lemica_trt.core.progress import reporter
from lemica_trt.ir.resources import load_profile


def main(output: str) -> None:
    """Build, and say what is in the bundle."""
    profile = load_profile("cogvideox-tiny")
    profile = msgspec.structs.replace(profile, sampling=msgspec.structs.replace(profile.sampling, steps=8))
    request = BuildRequest(budgets=(4,), methods=("uniform",), verify_samples=0)
    bundle = lemica_trt.build(profile, Path(output), request, reporter()).bundle
    for name in bundle.plans:
        print(name, bundle.plan(name).full_steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
