"""Several shapes in one bundle: which plans hold where, what is refused before work, and whole chains."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from command import in_process, result_of

from lemica_trt.bundle.manifest import Bucket, bucket_folder, plan_path, shape_report
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import change_buckets, change_plans
from lemica_trt.core.atomic_folder import held
from lemica_trt.core.errors import InputError, IntegrityError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import json_bytes
from lemica_trt.ir.measured import PlanAtShape
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import Shape, sizes_from_name

FURTHER = "1x8x16"


def written(tmp_path: Path) -> Bundle:
    """A toy bundle of one shape, 1x8x8, with plans `default`, `slow` and `uncached`."""
    from test_bundle import plan_of, write

    return write(
        tmp_path / "bundle", plans=[plan_of(), plan_of("slow", guidance_scale=2.0), plan_of("uncached", False)]
    )


def bucket_of(bundle: Bundle, *plans: PlanAtShape, **changes: Any) -> tuple[Bucket, dict[str, Path | bytes]]:
    """A bucket for `FURTHER` with the graphs of the bundle's own, and its files."""
    folder, own = bucket_folder(FURTHER), bundle.manifest.buckets[bundle.shapes[0]]
    graphs = tuple(msgspec.structs.replace(graph, file=f"{folder}/{graph.file}") for graph in own.graphs.graphs)
    (entry,) = own.engines
    engines = (msgspec.structs.replace(entry, files={r: f"{folder}/{path}" for r, path in entry.files.items()}),)
    bucket = Bucket(
        shape=Shape(**sizes_from_name(FURTHER)),
        graphs=msgspec.structs.replace(own.graphs, graphs=graphs),
        engines=engines,
        **{"plans": plans, **changes},
    )
    files: dict[str, Path | bytes] = {graph.file: b"other " + graph.file.encode() for graph in graphs}
    files[graphs[0].file] = bundle.path / own.graphs.graphs[0].file
    return bucket, files


def at_shape(plan: StepPlan, psnr: float, fewer: float) -> PlanAtShape:
    return PlanAtShape(rows_digest=plan.rows_digest, psnr=(psnr, psnr), fewer_steps=(fewer, fewer))


@pytest.mark.null
def test_names_of_shapes() -> None:
    assert Shape(**sizes_from_name(" 049X480x720 ")).name == "49x480x720"
    for text in ("", "49x480", "49x480x720x3", "0x8x8", "-1x8x8", "1.5x8x8", "49*480*720", "9" * 40 + "x1x1"):
        with pytest.raises(UsageError, match="expected FRAMESxHEIGHTxWIDTH") as raised:
            sizes_from_name(text)
        assert raised.value.fix


@pytest.mark.null
def test_a_plan_holds_where_it_is_no_worse_than_fewer_steps() -> None:
    digest = "0" * 64
    assert PlanAtShape(rows_digest=digest, psnr=(30.0, 40.0), fewer_steps=(35.0, 35.0)).holds
    assert not PlanAtShape(rows_digest=digest, psnr=(30.0, 39.9), fewer_steps=(35.0, 35.0)).holds
    assert PlanAtShape(rows_digest=digest, psnr=(1.0,)).holds  # there is nothing to be worse than
    for psnr, fewer in (((), ()), ((1.0,), (1.0, 2.0)), ((float("nan"),), (1.0,))):
        with pytest.raises(ValueError, match="psnr"):
            PlanAtShape(rows_digest=digest, psnr=psnr, fewer_steps=fewer)


@pytest.mark.null
def test_plans_hold_at_a_shape_or_say_why_not(tmp_path: Path) -> None:
    bundle = written(tmp_path)
    assert bundle.shapes == ("1x8x8",) and bundle.at("1x8x8") is bundle.at(None) is bundle
    one, slow = bundle.plan(), msgspec.structs.replace(bundle.plan(), name="slow")
    bundle = change_buckets(bundle, *bucket_of(bundle, at_shape(one, 30.0, 35.0)))
    bundle.check()
    assert bundle.shapes == ("1x8x8", FURTHER) and bundle.plans == ("default", "slow", "uncached")
    there = bundle.at(FURTHER)
    assert there.plans == ("uncached",) and there.plan().name == "uncached"  # `slow` has the rows of `default`
    assert there.manifest.profile.shape.width == 16 and there.digest == bundle.digest and slow.rows == one.rows
    assert there.manifest.graphs.graphs[0].file.startswith(f"shapes/{FURTHER}/onnx/")
    assert there.at("1x8x8").plans == bundle.plans and there.shapes == bundle.shapes
    with pytest.raises(UsageError, match=rf"plan default does not hold at {FURTHER}: 30.0 dB on 2 clips, fewer steps"):
        there.plan("default")
    with pytest.raises(UsageError, match="the bundle has no plan 'b99'"):
        there.plan("b99")
    with pytest.raises(UsageError, match="no shape 2x8x8") as raised:
        bundle.at("2x8x8")
    assert raised.value.fix and "use 1x8x8 or 1x8x16, or add it" in raised.value.fix
    again = change_buckets(bundle, *bucket_of(bundle, at_shape(one, 36.0, 35.0)))  # measured once more
    assert {"default", "slow"} <= set(again.at(FURTHER).plans) and again.at(FURTHER).plan() == one


def _raised(bundle: Bundle, plan: str) -> UsageError:
    with pytest.raises(UsageError) as raised:
        bundle.plan(plan)
    return raised.value


@pytest.mark.null
def test_a_new_plan_is_refused_until_it_is_measured(tmp_path: Path) -> None:
    bundle = written(tmp_path)
    bundle = change_buckets(bundle, *bucket_of(bundle, at_shape(bundle.plan(), 36.0, 35.0)))
    rows = bundle.plan("uncached").rows
    last = msgspec.structs.replace(rows[-1], outputs=(-0.25,))
    bundle = change_plans(bundle, [msgspec.structs.replace(bundle.plan(), name="new", rows=(*rows[:-1], last))])
    assert "new" in bundle.plans and "new" not in bundle.at(FURTHER).plans
    error = _raised(bundle.at(FURTHER), "new")
    assert error.what == f"plan new was not measured at {FURTHER}" and f"--shape {FURTHER}" in str(error.fix)
    renamed = change_plans(bundle, rename={"slow": "nice"})  # what was measured is known by the rows
    assert "nice" in renamed.at(FURTHER).plans


@pytest.mark.null
def test_where_the_sampler_is_another_the_shape_has_its_own_uncached_plan(tmp_path: Path) -> None:
    bundle = written(tmp_path)
    path = f"{bucket_folder(FURTHER)}/{plan_path('uncached')}"
    bucket, files = bucket_of(bundle, uncached=path)
    own = bundle.plan("uncached")
    own = msgspec.structs.replace(own, rows=(msgspec.structs.replace(own.rows[0], timestep=0.75), *own.rows[1:]))
    bundle = change_buckets(bundle, bucket, {**files, path: json_bytes(own)})
    bundle.check()
    assert bundle.at(FURTHER).plan() == own != bundle.plan("uncached")
    assert "its noise levels follow the size" in _raised(bundle.at(FURTHER), "default").what
    (bundle.path / path).write_bytes(json_bytes(own) + b" ")
    with pytest.raises(IntegrityError):
        bundle.check()


@pytest.mark.null
def test_buckets_are_added_linked_and_removed(tmp_path: Path) -> None:
    bundle = before = written(tmp_path)
    bucket, files = bucket_of(bundle, at_shape(bundle.plan(), 36.0, 35.0))
    bundle = change_buckets(bundle, bucket, files)
    same = bucket.graphs.graphs[0].file
    known = [bundle.path / graph.file for graph in before.manifest.graphs.graphs]  # all of one content
    assert any((bundle.path / same).samefile(path) for path in known)  # takes no disk
    assert (bundle.path / "reports" / "report.html").is_file()
    with pytest.raises(UsageError, match="1x8x8 is the shape that the bundle was built for"):
        change_buckets(bundle, remove=["1x8x8"])
    with pytest.raises(UsageError, match="no further shape 3x8x8"):
        change_buckets(bundle, remove=["3x8x8"])
    with held(bundle.path), pytest.raises(UsageError, match="another lemica-trt"):
        change_buckets(bundle, remove=[FURTHER])
    with pytest.raises(InputError, match="cannot change its shapes"):
        change_buckets(bundle, msgspec.structs.replace(bucket, uncached="plans/none.json", plans=()), files)
    left = change_buckets(bundle, remove=[FURTHER])
    assert left.digest == before.digest and left.shapes == ("1x8x8",)
    left.check()


@pytest.mark.null
def test_sizes_choose_the_shape(tmp_path: Path) -> None:
    bundle = written(tmp_path)
    bundle = change_buckets(bundle, *bucket_of(bundle))
    assert bundle.shape_named() == bundle.shape_named(frames=1) == bundle.shape_named(height=8) == "1x8x8"
    assert bundle.shape_named(width=16) == bundle.shape_named(1, 8, 16) == FURTHER
    with pytest.raises(UsageError, match="no shape of frames 2, width 16") as raised:
        bundle.shape_named(frames=2, width=16)
    assert raised.value.fix == f"use one of: 1x8x8, {FURTHER} (frames x height x width)"


@pytest.mark.cpu
def test_a_rebuild_says_which_shapes_go(tmp_path: Path) -> None:
    from lemica_trt.compiler.work_commands import note_gone

    notes = list[str]()

    class Notes(Quiet):
        def note(self, text: str) -> None:
            notes.append(text)

    bundle = written(tmp_path)
    change_buckets(bundle, *bucket_of(bundle))
    note_gone(bundle.path, {FURTHER}, Notes())
    note_gone(tmp_path / "nothing", (), Notes())
    assert not notes
    note_gone(bundle.path, (), Notes())
    lack = f"the new bundle will lack {FURTHER} → lemica-trt shape {bundle.path} --shape {FURTHER}"
    assert notes == [lack]


@pytest.mark.cpu
def test_flags_of_shapes() -> None:
    from lemica_trt.cli.flags import sizes_of_shapes

    assert sizes_of_shapes({"budget": 3}) == ({"budget": 3}, ())
    sizes = {"frames": 9, "height": 64, "width": 96}
    assert sizes_of_shapes({"shape": "9x64x96"}) == (sizes, ())
    assert sizes_of_shapes({"shape": ("9x64x96", "1x8x8"), "frames": None}) == (sizes, ("1x8x8",))
    with pytest.raises(UsageError, match="--shape cannot be used together with --width"):
        sizes_of_shapes({"shape": "9x64x96", "width": 64})


@pytest.mark.cpu
def test_mistakes_are_one_line_before_work(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    bundle = shutil.copytree(built[0], tmp_path / "bundle")
    digest = Bundle.open(bundle).digest
    add = ("shape", bundle, "--shape")
    for arguments, said in (
        ((*add, "9x64"), "expected FRAMESxHEIGHTxWIDTH"),
        ((*add, "9x64x64"), "9x64x64 is the bundle's own shape"),
        ((*add, "9x64x96", "--shape", "09x64x96"), "9x64x96 is given twice"),
        ((*add, "9x64x96", "--shape", "5x64x64"), "frames must be a multiple of 8 plus 1 for this model, got 5 → use"),
        ((*add, "9x70x64"), "height must be a multiple of 16 for this model, got 70 → use 64"),
        ((*add, "9x64x96", "--remove", "9x64x96"), "9x64x96 is to be added, too"),
        (("shape", bundle, "--remove", "9x64x96"), "it has one shape only"),
        ((*add, "9x64x128", "--remove", "9x64x96"), "it has one shape only"),
        (("run", bundle, "x", "-o", tmp_path / "x.npy", "--width", 96), "no shape of width 96 → use one of: 9x64x64"),
        (("run", bundle, "x", "-o", tmp_path / "x.npy", "--shape", "9x64x96"), "the bundle has no shape 9x64x96"),
        (("bench", bundle, "--shape", "9x64x96"), "the bundle has no shape 9x64x96"),
        (("verify", bundle, "--shape", "9x64x96"), "the bundle has no shape 9x64x96"),
        (("build", "--model", "cogvideox-tiny", "--shape", "9x64x64", "--frames", 9), "together with --frames"),
        (("build", "--model", "cogvideox-tiny", "--shape", "9x64x64", "--shape", "9x64x64"), "own shape"),
        (
            ("build", "--model", "cogvideox-tiny", "--shape", "9x64x64", "--shape", "9x64x96", "--verify-samples", 0),
            "plans must be measured",
        ),
    ):
        done = in_process(*arguments)
        assert done.returncode != 0 and said in done.stderr and done.stderr.count("\n") == 1, (arguments, done.stderr)
    with held(bundle):
        done = in_process(*add, "9x64x96")
    assert "another lemica-trt" in done.stderr and done.stderr.count("\n") == 1
    assert Bundle.open(bundle).digest == digest and sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.cpu
@pytest.mark.long
def test_two_shapes_of_one_bundle_both_make_what_diffusers_makes(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    import torch

    from lemica_trt.models import load_model
    from lemica_trt.runtime.pipeline import Pipeline

    bundle = shutil.copytree(built[0], tmp_path / "bundle")
    done = in_process("shape", bundle, "--shape", "9x64x96", "--verify-samples", 2, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = result_of(done.stdout)
    opened = Bundle.open(bundle)
    assert opened.shapes == ("9x64x64", "9x64x96") == ("9x64x64", found["name"])
    assert set(found["held"]) | set(found["refused"]) == set(opened.plans) and "uncached" in found["held"]
    report = json.loads((bundle / shape_report("9x64x96")).read_bytes())
    methods = {(row["plan"], row["method"]): np.mean(row["each_psnr"]) for row in report["quality"]}
    for plan in opened.plans:
        if plan != "uncached":
            holds = methods[plan, "plan"] >= methods[plan, "fewer-steps"]
            assert (plan in found["held"]) == holds == (plan in opened.at("9x64x96").plans)
    for shape in opened.shapes:
        profile = opened.at(shape).manifest.profile
        model = load_model(profile)
        with Pipeline(opened, "uncached", shape=shape) as pipe:
            clip = pipe("a big red circle moves left", seed=3)
            noise = pipe.generator(3).randn((1, *model.latent_shape))
            latents = model.reference(["a big red circle moves left"], torch.from_numpy(noise), seed=3)[0].numpy()
        assert clip.frames.shape == (9, profile.shape.height, profile.shape.width, 3)
        assert np.abs(clip.latents - latents).max() < 1e-2
        wanted = model.frames(latents)
        assert np.abs(clip.frames.astype(int) - wanted).max() <= 2
    done = in_process("run", bundle, "a red circle", "--width", 96, "--plan", "uncached", "-o", tmp_path / "a.npy")
    assert done.returncode == 0 and np.load(tmp_path / "a.npy").shape == (9, 64, 96, 3)
    assert "9x64x96 (frames x height x width)" in in_process("inspect", bundle).stdout
    again = in_process("shape", bundle, "--shape", "9x64x96", "--verify-samples", 1)
    assert again.returncode == 0 and again.stderr.count("unchanged") == 4
    assert in_process("verify", bundle, "--shape", "9x64x96", "--verify-samples", 1).returncode == 0
    here = tmp_path / "here"
    assert in_process("engine", bundle, "--output", here).returncode == 0
    assert Bundle.open(here).shapes == opened.shapes
