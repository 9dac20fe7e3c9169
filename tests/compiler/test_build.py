"""Builds of the bundled model from Python: prompts are an artifact, damage is repaired, engines are built elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from command import result_of

import lemica_trt
from lemica_trt.bundle.reading import Bundle
from lemica_trt.calibrate.prompts import prompts_digest, read_prompts
from lemica_trt.cli.flags import profile_from_flags, request_fields
from lemica_trt.cli.main import main
from lemica_trt.compiler import bundle_engines, bundle_plans, work_commands
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import read_value
from lemica_trt.ir.budget import Latency, Speedup
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.planning.planner import planners

pytestmark = pytest.mark.cpu

SMALL = {"denoising_steps": 8, "samples": 1, "validation_samples": 1, "max_skip": 3}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, and its work folder beside it. Copy both before changing them."""
    output = tmp_path_factory.mktemp("made") / "bundle"
    result = lemica_trt.build(
        model="cogvideox-tiny", budget=3, method="uniform", verify_samples=0, output=output, **SMALL
    )
    assert result.bundle.path == output and result.bundle.plans == ("b3", "uncached")
    assert result.report is None and result.unverified == {"onnxruntime": "not asked for"}
    return output


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made.with_name("bundle.work"), tmp_path / "bundle.work")
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def build_again(output: Path, **flags: object) -> None:
    lemica_trt.build(
        model="cogvideox-tiny",
        output=output,
        **{"budget": 3, "method": "uniform", "verify_samples": 0, **SMALL, **flags},
    )


def test_what_was_calibrated_on_other_prompts_is_fitted_on_them(tmp_path: Path) -> None:
    """`calibrate --prompts mine.txt`, then `plan WORK`: fits and trials are of the same prompts."""
    mine, work = tmp_path / "mine.txt", tmp_path / "work"
    mine.write_text("a small blue square\na large green ring\n")
    profile = profile_from_flags("cogvideox-tiny", None, SMALL)
    work_commands.calibrate(profile, work, BuildRequest(prompts=str(mine)), Quiet())
    mine.unlink()
    work_commands.plan(work, {"budgets": (3,), "methods": ("fitted", "lemica")}, Quiet())
    digest = prompts_digest(["a small blue square", "a large green ring"])
    headers = {
        kind: json.loads(next((work / "journals").glob(f"{kind}-*.jsonl")).read_text().splitlines()[0])[1]
        for kind in ("journal", "fits", "frames")  # trials of few steps are scored by frames
    }
    assert headers["journal"]["prompts_digest"] == headers["fits"]["prompts_digest"] == digest
    assert headers["frames"]["prompts_digest"] == prompts_digest(["a large green ring", "a small blue square"])
    assert read_prompts(work / "inputs" / "prompts.txt") == ["a small blue square", "a large green ring"]
    # Other prompts for `plan` are other prompts for the calibration that it stands on.
    mine.write_text("a small blue square\n")
    work_commands.plan(work, {"budgets": (3,), "methods": ("fitted",), "prompts": str(mine)}, Quiet())
    graph = read_value(ErrorGraph, work / "calibration" / "error_graph.json")
    assert graph.prompts_digest == prompts_digest(["a small blue square"])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param("onnx/full.onnx", b"", marks=pytest.mark.long),
        ("calibration/sampler.json", b"x" * 100),
        ("plans/b3.json", None),
        ("model.json", b"{"),
    ],
)
def test_a_damaged_work_folder_makes_the_same_bundle(copy: Path, file: str, damage: bytes | None) -> None:
    right, path = contents(copy), copy.with_name("bundle.work") / file
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    shutil.rmtree(copy)
    build_again(copy)
    assert contents(copy) == right


def test_a_damaged_bundle_is_written_again(copy: Path) -> None:
    right = contents(copy)
    (copy / "onnx" / "full.onnx").write_bytes(b"")
    build_again(copy)
    assert contents(copy) == right


def test_other_plans_take_no_other_graphs(copy: Path) -> None:
    """The layout comes from the methods, not from the plans: graphs stay, and later plans run on them."""
    graphs = {name: data for name, data in contents(copy).items() if name.startswith("onnx/")}
    build_again(copy, budget=4)
    assert {name: data for name, data in contents(copy).items() if name.startswith("onnx/")} == graphs
    request = BuildRequest(budgets=(2, 5), methods=("stock:first-order",))
    bundle_plans.plan_bundle(Bundle.open(copy), request, Quiet())
    assert Bundle.open(copy).plans == ("b2", "b4", "b5", "uncached")
    Bundle.open(copy).check()


def test_engines_of_a_bundle_are_built_again_elsewhere(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy.with_name("bundle.work"))
    here = bundle_engines.rebuild_engines(Bundle.open(copy), tmp_path / "here", {"options": {"threads": 1}}, Quiet())
    before, after = Bundle.open(copy).manifest, here.manifest
    assert after.engines[0].key.options["threads"] == 1 and before.engines[0].key.options["threads"] == 0
    assert (after.graphs, after.plans, after.revision, after.versions) == (
        before.graphs, before.plans, before.revision, before.versions,
    )  # fmt: skip
    keys = [manifest.engines[0].key.digest[:16] for manifest in (before, after)]
    files = {name.replace(*keys): entry for name, entry in before.files.items()}
    assert after.files == files, "only the folder of the engines has another name"
    assert keys[0] != keys[1]
    with pytest.raises(UsageError, match="expected another folder than the bundle"):
        bundle_engines.rebuild_engines(Bundle.open(copy), copy, {}, Quiet())


def test_a_calibration_of_another_model_is_refused_before_it_is_used(copy: Path, tmp_path: Path) -> None:
    profile = profile_from_flags("cogvideox-tiny", None, {**SMALL, "guidance_scale": 3.0})
    work_commands.calibrate(profile, tmp_path / "other", BuildRequest(), Quiet())
    graph = tmp_path / "other" / "calibration" / "error_graph.json"
    with pytest.raises(InputError, match="--error-graph: expected a measurement of guidance scale"):
        build_again(copy, method="lemica", error_graph=graph)


def test_flags_become_a_profile_and_a_request() -> None:
    profile = profile_from_flags("cogvideox-tiny", None, {"frames": 17, "denoising_steps": 7, "calibration": "exact"})
    assert (profile.shape.frames, profile.sampling.steps, profile.calibration.method) == (17, 7, "exact")
    fields = request_fields({"method": "lemica,linear", "speedup": "2,3x", "backend": ("onnxruntime",), "threads": 2})
    assert BuildRequest(**fields) == BuildRequest(
        methods=("lemica", "linear"), budgets=(Speedup(factor=2), Speedup(factor=3)), options={"threads": 2}
    )
    assert request_fields({"latency": "800ms"}) == {"budgets": (Latency(seconds=0.8),)}
    assert request_fields({"budget": 15}) == request_fields({"budget": "15"}) == {"budgets": (15,)}
    for flags, word in (({"budget": "many"}, "integers"), ({"budget": 1, "min_psnr": 30}, "together with --min-psnr")):
        with pytest.raises(UsageError, match=word):
            request_fields(flags)
    with pytest.raises(UsageError, match="onnxruntime has no option --gpus"):
        lemica_trt.build(model="cogvideox-tiny", gpus=2)
    with pytest.raises(UsageError, match="steps must be at least 2, got 1"):
        lemica_trt.build(model="cogvideox-tiny", num_inference_steps=1)


def test_methods_are_listed_with_what_they_need() -> None:
    done = CliRunner().invoke(main, ["methods", "--json"])
    found = {method["name"]: method for method in result_of(done.stdout)}
    assert set(found) == set(planners()) and found["fitted"]["auto"] and not found["lemica"]["auto"]
    assert CliRunner().invoke(main, ["methods"]).stdout.count("\n") > len(found)
