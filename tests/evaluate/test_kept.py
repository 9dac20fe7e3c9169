"""Which clips are kept, what their pictures show, and that a damaged or foreign folder of them harms nobody."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lemica_trt.bundle.manifest import KEPT_CLIPS, KEPT_FOLDER
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.reports import store_kept, stored_kept, stored_report
from lemica_trt.core.errors import InputError
from lemica_trt.core.metrics import flip, psnr
from lemica_trt.core.values import read_value, write_value
from lemica_trt.evaluate import kept as module
from lemica_trt.evaluate.kept import Keeper, enlarged_difference, kept_numbers, picture, reduced
from lemica_trt.evaluate.samples import Samples
from lemica_trt.ir.kept import UNCACHED, Kept, KeptClips
from lemica_trt.ir.report import PLAN
from lemica_trt.planning.step_plan import plan_from_schedule
from lemica_trt.report.pictures import frames_from_picture
from lemica_trt.testing.values import recurrence, schedule_of

pytestmark = pytest.mark.cpu

RNG = np.random.default_rng(0)
PLAN_B3 = plan_from_schedule(schedule_of(6, 0, 2, 4), recurrence(6), name="b3", guidance_scale=6.0, method="lemica")
ALL = plan_from_schedule(schedule_of(6, *range(6)), recurrence(6), name="uncached", guidance_scale=6.0, method="lemica")


def keeper(noises: list[int], shape: tuple[int, ...] = (5, 16, 24, 3)) -> Keeper:
    made = Keeper()
    for number, noise in enumerate(noises):
        base = RNG.integers(60, 190, shape, np.uint8)
        other = (base + RNG.integers(-noise, noise + 1, shape)).astype(np.uint8)
        made.add(number, UNCACHED, ALL, base, None)
        made.add(number, PLAN, PLAN_B3, other, psnr(other, base))
    return made


def kept_of(noises: list[int], shape: tuple[int, ...] = (5, 16, 24, 3)) -> Kept:
    samples = Samples(prompts=("one", "two"), seed=7, count=len(noises))
    found = keeper(noises, shape).kept("0" * 64, PLAN_B3, samples, PLAN)
    assert found is not None
    return found


def test_the_worst_the_median_and_the_best_are_kept() -> None:
    value = kept_of([2, 40, 8, 4, 20]).clips
    assert [clip.sample for clip in value.clips] == [1, 2, 0]
    assert [(clip.prompt, clip.seed) for clip in value.clips] == [("two", 8), ("one", 9), ("one", 7)]
    assert [(held.prompt, held.seed) for held in value.samples] == [
        ("one", 7), ("two", 8), ("one", 9), ("two", 10), ("one", 11),
    ]  # fmt: skip
    assert [run.full_steps for run in value.clips[0].runs] == [(0, 1, 2, 3, 4, 5), (0, 2, 4)]
    assert [clip.sample for clip in kept_of([5]).clips.clips] == [0]
    assert [clip.sample for clip in kept_of([5, 9]).clips.clips] == [1, 0]


def test_small_clips_are_kept_as_they_are_and_differences_are_of_them() -> None:
    kept = kept_of([6, 3])
    assert kept.clips.is_whole and kept.clips.lossless and kept.clips.frames == (0, 1, 2, 3, 4)
    for clip in kept.clips.clips:
        uncached, plan = clip.runs
        assert uncached.psnr is uncached.difference is uncached.flip is uncached.flip_map is None
        assert plan.difference is not None
        a, b, apart = (frames_from_picture(kept, path) for path in (uncached.frames, plan.frames, plan.difference))
        assert plan.psnr == psnr(b, a)
        assert (apart == np.minimum(8 * np.abs(a.astype(int) - b), 255)).all()


def test_differences_do_not_wrap_around() -> None:
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert (enlarged_difference(black, white) == 255).all() and (enlarged_difference(white, black) == 255).all()
    assert (enlarged_difference(white, white - 3) == 24).all()


def test_large_clips_are_reduced_to_a_bounded_size() -> None:
    kept = kept_of([6], (49, 240, 360, 3))
    value = kept.clips
    assert value.frames[0] == 0 and value.frames[-1] == 48 and len(value.frames) == module.KEPT_FRAMES
    assert len(value.frames) * value.height * value.width <= module.KEPT_PIXELS < 1.05 * 13 * value.height * value.width
    assert value.width / value.height == pytest.approx(1.5, abs=0.02)
    assert not value.lossless and not value.is_whole and value.source == (49, 240, 360)
    assert all(frames_from_picture(kept, path).shape[0] == 13 for path in value.files)
    assert reduced(np.full((1, 2000, 10, 3), 7, np.uint8)).shape == (1, 2000, 10, 3)
    assert kept_numbers(1) == (0,) and kept_numbers(4) == (0, 1, 2, 3)


def test_without_a_plan_nothing_is_kept() -> None:
    made = Keeper()
    samples = Samples(prompts=("one",), seed=0, count=1)
    assert made.kept("0" * 64, ALL, samples, PLAN) is None
    made.add(0, UNCACHED, ALL, np.zeros((1, 8, 8, 3), np.uint8), None)
    assert made.kept("0" * 64, ALL, samples, PLAN) is None


def test_flip_is_measured_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    assert all(run.flip is None for clip in kept_of([6, 3]).clips.clips for run in clip.runs)
    monkeypatch.undo()
    pytest.importorskip("flip_evaluator", reason="flip-evaluator is not installed")
    kept = kept_of([6, 60])
    means = [clip.runs[1].flip for clip in kept.clips.clips]
    assert means[0] is not None and means[1] is not None and 1 > means[0] > means[1] > 0
    path = kept.clips.clips[0].runs[1].flip_map
    assert path is not None and frames_from_picture(kept, path).any()


def test_flip_is_nothing_for_equal_clips_and_grows_with_what_is_seen() -> None:
    pytest.importorskip("flip_evaluator", reason="flip-evaluator is not installed")
    clip = RNG.integers(60, 190, (2, 24, 24, 3), np.uint8)
    same = flip(clip, clip, pixels_per_degree=67)
    assert same is not None and same[0] == 0.0 and same[1].max() < 5 and same[1].shape == clip.shape
    (near, _), (far, _) = (flip(clip, clip[:, ::-1], pixels_per_degree=p) or (0.0, None) for p in (10.0, 200.0))
    assert near > far > 0  # fine noise is not seen from afar


def test_a_bundle_keeps_the_clips_of_its_last_verification(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    shutil.copytree(built[0], tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    kept, report = stored_kept(bundle), stored_report(bundle)
    assert kept is not None and report is not None
    assert kept.clips.manifest_digest == bundle.digest and kept.clips.plan == "b4"
    assert [[run.method for run in clip.runs] for clip in kept.clips.clips] == 2 * [[UNCACHED, PLAN, "fewer-steps"]]
    own = next(row for row in report.quality if (row.plan, row.method) == ("b4", PLAN))
    assert [clip.runs[1].psnr for clip in kept.clips.clips] == sorted(own.each_psnr)
    assert kept.clips.lossless and sum(map(len, kept.pictures.values())) < 1_000_000
    bundle.check()  # they are no part of its identity
    store_kept(None, bundle)
    assert stored_kept(bundle) is None and not (bundle.path / KEPT_FOLDER).exists()
    bundle.check()


def test_what_is_damaged_is_not_shown(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    shutil.copytree(built[0], tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    kept = stored_kept(bundle)
    assert kept is not None
    path = kept.clips.files[0]
    small = picture(np.zeros((9, 8, 8, 3), np.uint8), lossless=True)
    with pytest.raises(InputError, match="expected 64×576 pixels, got 8×72"):
        frames_from_picture(Kept(kept.clips, {path: small}), path)
    as_png = io.BytesIO()
    Image.new("RGB", (64, 576)).save(as_png, "PNG")
    for data in (b"", b"RIFF", as_png.getvalue(), kept.pictures[path][:500]):
        with pytest.raises(InputError, match="expected a WebP picture"):
            frames_from_picture(Kept(kept.clips, {path: data}), path)
    (bundle.path / "reports" / path).unlink()
    assert stored_kept(bundle) is None


@pytest.mark.parametrize(
    "path", ["../manifest.json", "clips/../../x.webp", "/etc/passwd", "clips/0-x.svg", "clips/0-X.webp"]
)
def test_paths_stay_in_their_folder(
    path: str, built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    value = read_value(KeptClips, built[0] / KEPT_CLIPS)
    data = (built[0] / KEPT_CLIPS).read_text().replace(value.files[0], path)
    (tmp_path / "clips.json").write_text(data)
    with pytest.raises(InputError, match=r"expected a picture clips/NUMBER-NAME\.webp"):
        read_value(KeptClips, tmp_path / "clips.json")


def test_written_as_it_was(tmp_path: Path) -> None:
    value = kept_of([6, 3]).clips
    write_value(value, tmp_path / "clips.json")
    assert read_value(KeptClips, tmp_path / "clips.json") == value
