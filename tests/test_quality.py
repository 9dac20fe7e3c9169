"""Quality metrics against their definitions and against skimage."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from lemica_trt.core import metrics as quality
from lemica_trt.core.metrics import lpips, psnr, ssim

pytestmark = pytest.mark.null

RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (3, 24, 31, 3), np.uint8)
NOISY = np.clip(CLIP + RNG.normal(0, 12, CLIP.shape), 0, 255).astype(np.uint8)


def test_psnr_is_the_definition_over_the_whole_clip() -> None:
    off_by_one_in_half = CLIP.astype(np.int64)
    off_by_one_in_half[..., 0::2, :, :] += 1
    assert psnr(off_by_one_in_half, CLIP) == pytest.approx(10 * math.log10(255**2 / 0.5))
    # one frame is off by 2, two are equal: the mean square is taken over the clip, not the mean of decibels
    one_bad = CLIP.astype(np.float32)
    one_bad[1] += 2
    assert psnr(one_bad, CLIP) == pytest.approx(10 * math.log10(255**2 / (4 / 3)), rel=1e-6)


def test_uint8_does_not_wrap_around() -> None:
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert psnr(black, white) == 0.0
    assert psnr(black, white) == psnr(white, black)


def test_identical_clips_score_the_documented_ends() -> None:
    assert psnr(CLIP, CLIP) == quality.PSNR_CAP == 100.0
    assert psnr(CLIP.astype(np.float64) + 1e-9, CLIP) == 100.0
    assert ssim(CLIP, CLIP) == pytest.approx(1.0, abs=1e-12)


def test_ssim_is_skimage_s() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    expected = [
        metrics.structural_similarity(
            a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(NOISY, CLIP)
    ]
    assert ssim(NOISY, CLIP) == pytest.approx(np.mean(expected), abs=1e-6)


def test_ssim_sees_structure_where_psnr_sees_size() -> None:
    brighter = np.clip(CLIP.astype(float) * 0.9 + 12, 0, 255)
    shuffled = CLIP.reshape(3, -1, 3)[:, RNG.permutation(24 * 31)].reshape(CLIP.shape)
    assert ssim(brighter, CLIP) > 0.95 > 0.2 > ssim(shuffled, CLIP)
    assert ssim(NOISY, CLIP) == pytest.approx(ssim(CLIP, NOISY), abs=1e-12)


def test_smallest_frame_of_ssim() -> None:
    assert ssim(CLIP[:, :11, :11], CLIP[:, :11, :11]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 11×11, got 10×31"):
        ssim(CLIP[:, :10], CLIP[:, :10])


@pytest.mark.parametrize("metric", [psnr, ssim, lpips])
def test_what_is_not_two_clips_is_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match=r"one shape, got \(3, 24, 31, 3\) and \(2, 24, 31, 3\)"):
        metric(CLIP, CLIP[:2])
    with pytest.raises(ValueError, match=r"clip \[frames, height, width, 3\], got shape \(24, 31, 3\)"):
        metric(CLIP[0], CLIP[0])
    with pytest.raises(ValueError, match="got NaN or infinity"):
        metric(np.full((1, 12, 12, 3), np.nan), np.zeros((1, 12, 12, 3)))


class FakeLPIPS(types.ModuleType):
    """Mean absolute difference in the place of a network."""

    def __init__(self) -> None:
        super().__init__("lpips")
        self.__spec__ = types.SimpleNamespace(name="lpips")  # type: ignore[assignment]

    def im2tensor(self, image: np.ndarray) -> np.ndarray:
        assert image.dtype == np.uint8
        return image / 127.5 - 1

    def LPIPS(self, net: str, verbose: bool) -> object:
        assert net == "alex" and not verbose
        return types.SimpleNamespace(eval=lambda: lambda x, y: np.abs(x - y).mean())


def test_lpips_is_absent_without_its_package_or_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", FakeLPIPS())
    quality._lpips_network.cache_clear()
    assert lpips(CLIP, NOISY) is None  # never downloads
    weights = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    difference = np.abs(CLIP.astype(float) - NOISY).mean() / 127.5
    assert lpips(CLIP.astype(float), NOISY) == pytest.approx(difference)
    quality._lpips_network.cache_clear()


def test_metrics_are_free_of_torch() -> None:
    source = Path(quality.__file__).read_text()
    assert "import torch" not in source and "scipy" not in source
