"""How alike two clips are: PSNR, SSIM; LPIPS and FLIP where they are installed. Frames in, numbers out.

A clip is an array [F, H, W, 3], uint8 or floats on the same scale, 0 … 255. Numpy only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PEAK = 255.0

PSNR_CAP = 100.0
"""What identical clips score, dB; uint8 clips that differ in one value of a million score 108 and are capped too."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5

Frames = npt.NDArray[Any]
Array = npt.NDArray[np.float64]


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio of two clips, 10·log₁₀(255²/MSE), MSE over the whole clip; at most `PSNR_CAP` dB.

    Raises:
        ValueError: not two clips of one shape, or not finite.
    """
    _check(a, b)
    error = np.mean([np.mean((x.astype(np.float64) - y.astype(np.float64)) ** 2) for x, y in zip(a, b)])
    if error == 0:
        return PSNR_CAP
    return min(PSNR_CAP, float(10 * np.log10(PEAK**2 / error)))


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity of two clips (Wang et al. 2004): mean over frames, channels and window positions.

    Gaussian window 11×11 with σ = 1.5, population covariance, K₁ = 0.01, K₂ = 0.03, windows that lie wholly inside
    the frame. Equals skimage's `structural_similarity(gaussian_weights=True, use_sample_covariance=False)`.

    Raises:
        ValueError: as `psnr`, or frames smaller than 11×11.
    """
    _check(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW}×{SSIM_WINDOW}, got {a.shape[1]}×{a.shape[2]}")
    return float(np.mean([_ssim_frame(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b)]))


def lpips(a: Frames, b: Frames) -> float | None:
    """LPIPS with AlexNet (Zhang et al. 2018), mean over frames; None without the `lpips` package and its weights.

    AlexNet's weights are looked for where torch keeps downloads; they are never downloaded from here.

    Raises:
        ValueError: as `psnr`.
    """
    _check(a, b)
    home = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch"))
    if importlib.util.find_spec("lpips") is None or not any(home.glob("hub/checkpoints/alexnet-*.pth")):
        return None
    package, network = _lpips_network()
    distances = [float(network(package.im2tensor(_as_uint8(x)), package.im2tensor(_as_uint8(y)))) for x, y in zip(a, b)]
    return float(np.mean(distances))


@functools.cache
def _lpips_network() -> tuple[Any, Any]:
    package = importlib.import_module("lpips")
    return package, package.LPIPS(net="alex", verbose=False).eval()


def flip(a: Frames, b: Frames, *, pixels_per_degree: float) -> tuple[float, npt.NDArray[np.uint8]] | None:
    """FLIP (Andersson et al. 2020), what somebody sees who flips between two pictures; None without `flip-evaluator`.

    Args:
        a, b: clips; `b` is the reference.
        pixels_per_degree: of the field of view, as the frames are seen.

    Returns:
        Mean over pixels and frames, 0 … 1; maps uint8 [F, H, W, 3] in the authors' colours, black where nothing is
        seen.

    Raises:
        ValueError: as `psnr`.
    """
    _check(a, b)
    if importlib.util.find_spec("flip_evaluator") is None:
        return None
    package = importlib.import_module("flip_evaluator")
    pairs = [(y.astype(np.float32) / PEAK, x.astype(np.float32) / PEAK) for x, y in zip(a, b)]
    found = [package.evaluate(*pair, "LDR", parameters={"ppd": pixels_per_degree}) for pair in pairs]
    maps = np.stack([_as_uint8(PEAK * np.asarray(shown)) for shown, _, _ in found])
    return float(np.mean([mean for _, mean, _ in found])), maps


def _ssim_frame(x: Array, y: Array) -> float:
    """SSIM of two frames, float64 [H, W, C]."""
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(similarity.mean())


def _blur(image: Array) -> Array:
    """Gaussian mean over every window that lies inside: [H, W, C] → [H − 10, W − 10, C]."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    height, width = image.shape[0] - SSIM_WINDOW + 1, image.shape[1] - SSIM_WINDOW + 1
    rows = sum(w * image[k : k + height] for k, w in enumerate(weights))
    blurred: Array = sum(w * rows[:, k : k + width] for k, w in enumerate(weights))
    return blurred


def _as_uint8(frame: Frames) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(frame), 0, PEAK).astype(np.uint8)


def _check(a: Frames, b: Frames) -> None:
    if a.ndim != 4 or a.shape[3] != 3 or a.size == 0:
        raise ValueError(f"expected a clip [frames, height, width, 3], got shape {a.shape}")
    if a.shape != b.shape:
        raise ValueError(f"expected two clips of one shape, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("expected clips of finite values, got NaN or infinity")


STUDENT_95 = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13),
    *(2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04),
)
"""Student's t: two-sided 95 % quantiles of 1 … 30 degrees of freedom."""

NORMAL_95 = 1.96


def margin_95(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean of some independent values; None for a single one."""
    freedom = len(values) - 1
    if freedom == 0:
        return None
    quantile = STUDENT_95[freedom - 1] if freedom <= len(STUDENT_95) else NORMAL_95
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
