"""Held-out quality of a bundle's plans as a Markdown table, with paired 95 % intervals; reads `reports/verify.json`.

    lemica-trt build --model cogvideox-tiny --error-graph calibration/cogvideox-tiny/error_graph.json \\
        --budget 15,10,20,25 --verify-samples 32 --output out/quality
    python benchmarks/quality.py out/quality
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lemica_trt.values import read_value
from lemica_trt.verify import Quality, VerifyReport

RESAMPLES = 10_000


def gain(better: Sequence[float], worse: Sequence[float]) -> str:
    """Mean difference and its 95 % bootstrap interval, clip by clip."""
    differences = np.subtract(better, worse)
    random = np.random.default_rng(0)
    means = random.choice(differences, (RESAMPLES, len(differences))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{differences.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def row(plan: Quality, others: dict[str, Quality]) -> str:
    """One budget."""
    cells = [f"{plan.budget}", f"**{plan.psnr:.1f}** / {plan.psnr_p5:.1f} / {plan.ssim:.4f}"]
    for way in ("uniform", "fewer-steps"):
        other = others[way]
        cells += [f"{other.psnr:.1f} / {other.psnr_p5:.1f} / {other.ssim:.4f}", gain(plan.each_psnr, other.each_psnr)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    report = read_value(VerifyReport, Path(sys.argv[1]) / "reports" / "verify.json")
    print(f"{report.samples} held-out clips, {report.backend}, {report.dtype}")
    print("PSNR mean / 5th percentile (dB) / SSIM; differences with 95 % intervals\n")
    print("| full steps | plan | equal distances | plan − it, dB | fewer sampling steps | plan − it, dB |")
    print("|---|---|---|---|---|---|")
    for plan in sorted((q for q in report.quality if q.way == "plan"), key=lambda q: q.budget):
        print(row(plan, {q.way: q for q in report.quality if q.plan == plan.plan}))


if __name__ == "__main__":
    main()
