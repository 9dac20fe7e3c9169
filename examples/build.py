"""Build a bundle from Python: the bundled model at few steps, with a plan that needs no calibration.

python examples/build.py out/small

The arguments are the flags of `lemica-trt build`.
"""

from __future__ import annotations

import sys

import lemica_trt
from lemica_trt.core.progress import reporter


def main(output: str) -> None:
    """Build, and say what is in the bundle."""
    result = lemica_trt.build(
        model="cogvideox-tiny",
        denoising_steps=8,
        method="uniform",
        budget=4,
        verify_samples=0,
        output=output,
        reporter=reporter(),
    )
    for name in result.bundle.plans:
        print(name, result.bundle.plan(name).full_steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
