"""Frames → files that other programs read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lemica_trt.core.errors import InputError, MissingDependencyError, UsageError
from lemica_trt.runtime.video import check_suffix, default_scale, write_video

pytestmark = pytest.mark.cpu


def clip(frames: int, height: int, width: int) -> np.ndarray:
    """A smooth gradient that moves."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([x * 4 + t * 8, y * 4, 128 + 0 * t], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 48, 48), (9, 64, 48), (3, 33, 47), (2, 17, 16)])
def test_mp4(tmp_path: Path, size: tuple[int, int, int]) -> None:
    import av

    frames = clip(*size)
    path = tmp_path / "new" / "clip.mp4"
    write_video(frames, path, fps=8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 8
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == (size[0], size[1] + size[1] % 2, size[2] + size[2] % 2, 3)
    seen = decoded[:, : size[1], : size[2]].astype(float)
    assert np.abs(seen - frames).mean() < 6.0
    head = path.read_bytes()
    assert head.index(b"moov") < head.index(b"mdat"), "faststart"
    assert [other.name for other in path.parent.iterdir()] == ["clip.mp4"]


def test_gif(tmp_path: Path) -> None:
    from PIL import Image

    write_video(clip(5, 32, 40), tmp_path / "clip.GIF", fps=8)
    with Image.open(tmp_path / "clip.GIF") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (5, (40, 32), 0)


def test_png_and_npy_are_exact(tmp_path: Path) -> None:
    from PIL import Image

    frames = clip(3, 20, 30)
    write_video(frames, tmp_path / "clip.png", fps=8)
    with Image.open(tmp_path / "clip.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.concatenate(list(frames), axis=1))
    write_video(frames, tmp_path / "clip.npy", fps=8)
    np.testing.assert_array_equal(np.load(tmp_path / "clip.npy"), frames)


def test_pixels_become_squares(tmp_path: Path) -> None:
    frames = clip(2, 20, 30)
    write_video(frames, tmp_path / "clip.npy", fps=8, scale=3)
    made = np.load(tmp_path / "clip.npy")
    assert made.shape == (2, 60, 90, 3)
    assert all((made[:, y::3, x::3] == frames).all() for y in range(3) for x in range(3))


def test_only_small_clips_are_enlarged_unasked() -> None:
    small, wide = np.zeros((1, 64, 128, 3), np.uint8), np.zeros((1, 64, 129, 3), np.uint8)
    assert [default_scale(small, name) for name in ("a.mp4", "a.PNG", "a.npy")] == [4, 4, 1]
    assert default_scale(wide, "a.mp4") == 1


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = clip(2, 16, 16)
    with pytest.raises(UsageError, match=r"cannot write '\.avi' → use one of: \.mp4, \.gif, \.png, \.npy"):
        write_video(frames, tmp_path / "clip.avi", fps=8)
    with pytest.raises(UsageError, match="without a suffix"):
        check_suffix("clip")
    for bad in (frames[0], frames.astype(np.float32), frames[:0], frames[..., :2]):
        with pytest.raises(InputError, match="frames must be uint8"):
            write_video(bad, tmp_path / "clip.png", fps=8)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a file that can be written"):
        write_video(frames, tmp_path / "file" / "clip.png", fps=8)
    check_suffix("clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    check_suffix("clip.gif")
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[video\]'"):
        check_suffix("clip.mp4")
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[video\]'"):
        write_video(frames, tmp_path / "clip.mp4", fps=8)
    assert [other.name for other in tmp_path.iterdir()] == ["file"]
