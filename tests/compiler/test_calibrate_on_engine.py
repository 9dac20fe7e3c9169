"""Calibration, fits and trials on the engines that are deployed: the plans are those of PyTorch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from command import lemica

from lemica_trt.bundle.contents import read_from
from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE, PROMPTS_FILE, SELECTION_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import work_folder
from lemica_trt.cli.flags import plan_target
from lemica_trt.compiler import work_commands
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.core.errors import MissingDependencyError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import read_value
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.ir.profile import Profile
from lemica_trt.ir.prompts import PromptFacts
from lemica_trt.ir.resources import load_profile
from lemica_trt.ir.trials import TrialTables
from lemica_trt.models import Model
from lemica_trt.runtime.pipeline import load

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of diffusers

WEIGHTS = 1e-3  # of the largest of a row
PROMPT = "a big red circle moves left"


def small(name: str) -> Profile:
    profile = load_profile(name)
    return msgspec.structs.replace(
        profile,
        sampling=msgspec.structs.replace(profile.sampling, steps=13),
        calibration=msgspec.structs.replace(
            profile.calibration, samples=3, rollouts=1, max_skip=4, validation_samples=1
        ),
    )


def weights_of(row: PlanRow) -> np.ndarray[Any, Any]:
    return np.array([*row.latents, *row.outputs, *row.guidance_terms])


def assert_alike(found: StepPlan, expected: StepPlan) -> None:
    assert (found.method, found.full_steps) == (expected.method, expected.full_steps)
    for mine, theirs in zip(found.rows, expected.rows, strict=True):
        weights = weights_of(theirs)
        np.testing.assert_allclose(weights_of(mine), weights, rtol=0, atol=WEIGHTS * np.abs(weights).max())


@pytest.mark.parametrize("name", ["cogvideox-tiny", pytest.param("wan-tiny", marks=pytest.mark.long)])
def test_a_build_on_engines_makes_the_plans_of_pytorch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = BuildRequest(budgets=(5,), methods=("fitted", "lemica"), verify_samples=0, calibrate_on="engine")
    with monkeypatch.context() as patched:
        for method in ("steps", "run"):
            patched.setattr(Model, method, lambda *_, **__: pytest.fail("PyTorch ran the model"))
        built = work_commands.build(small(name), tmp_path / "bundle", request, Quiet()).bundle
    graph = read_from(built, ErrorGraph, ERROR_GRAPH_FILE)
    assert set(graph.versions) == {"onnxruntime", "engines"}
    work = work_folder(tmp_path / "bundle")
    (plan,) = work_commands.plan(work, {"calibrate_on": "torch"}, Quiet()).plans
    assert_alike(built.plan(), plan)
    in_torch = read_value(ErrorGraph, work / ERROR_GRAPH_FILE)
    assert set(in_torch.versions) == {"torch", "diffusers"}
    for mine, theirs in zip(graph.edges, in_torch.edges, strict=True):
        assert mine.errors == pytest.approx(theirs.errors, rel=1e-3)
    tried, scored = (
        {trial.label: trial.mean for trial in tables.tables[0].trials}
        for tables in (read_from(built, TrialTables, SELECTION_FILE), read_value(TrialTables, work / SELECTION_FILE))
    )
    assert tried == pytest.approx(scored, abs=0.1)


def test_a_bundle_is_fitted_again_to_prompts_of_the_user(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output, prompts = Path(shutil.copytree(built[0], tmp_path / "bundle")), tmp_path / "mine.txt"
    prompts.write_text("two boats on a lake\na ball rolls over a hill\n")
    before = Bundle.open(built[0])
    flags = {"calibrate_on": "engine", "prompts": prompts, "method": "fitted"}
    made = plan_target(output, flags, Quiet(), samples="2")
    after = Bundle.open(output)
    after.check()
    assert {plan.name for plan in made.plans} == set(after.plans) == set(before.plans)
    assert after.manifest.default_plan == before.manifest.default_plan
    assert after.manifest.engines == before.manifest.engines
    for name in set(after.plans) - {"uncached"}:
        assert after.plan(name).rows != before.plan(name).rows and after.plan(name).budget == before.plan(name).budget
    graph = read_from(after, ErrorGraph, ERROR_GRAPH_FILE)
    assert graph.samples == after.manifest.profile.calibration.samples == 2
    facts = read_from(after, PromptFacts, PROMPTS_FILE)
    assert facts.prompts == 2 and facts.distance("two boats on a lake", 6) is None
    with load(output) as pipe:
        assert pipe(PROMPT).frames.shape == (9, 64, 64, 3)

    (journal,) = (work_folder(output) / "journals").glob("journal-*")
    measured = journal.read_bytes()
    plan_target(output, {"calibrate_on": "engine", "prompts": prompts, "budget": "4"}, Quiet(), samples="+1")
    again, starts = journal.read_bytes(), graph.num_steps - 1
    assert again.startswith(measured) and again.count(b"\n") == measured.count(b"\n") + starts, "one sample more"
    assert read_from(Bundle.open(output), ErrorGraph, ERROR_GRAPH_FILE).samples == 3


def test_a_plan_that_is_clearly_better_stays(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(built[0], tmp_path / "bundle"))
    before = Bundle.open(built[0])
    flags = {"calibrate_on": "engine", "budget": "4", "method": "fitted"}
    settings = msgspec.structs.replace(before.manifest.profile.calibration, validation_samples=1)
    profile = msgspec.structs.replace(before.manifest.profile, calibration=settings)
    monkeypatch.setattr("lemica_trt.compiler.refit.profile_with_samples", lambda *_: profile)
    monkeypatch.setattr(
        "lemica_trt.evaluate.evaluator.PlanEvaluator.psnrs",  # what chooses at eight steps
        lambda _, plans, samples: [[float(plan == before.plan("b4")) * 50] * len(samples) for plan in plans],
    )
    plan_target(output, flags, Quiet(), samples="2")
    after = Bundle.open(output)
    assert after.plan("b4") == before.plan("b4")
    assert [len(table.trials) for table in read_from(after, TrialTables, SELECTION_FILE).tables] == [2]


def test_what_cannot_be_is_refused_before_anything_runs(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(built[0], tmp_path / "bundle"))
    for flags, message in (
        (("--calibrate-on", "engine", "--device", "cpu"), "expected flags of planning and --prompts only, got device"),
        (("--calibrate-on", "engine", "--schedule", "0,3"), "--schedule cannot be used together with --calibrate-on"),
        (("--prompts", "mine.txt"), "calibrate on its engines (--calibrate-on engine)"),
        (("--calibrate-on", "engine", "--samples", "+x"), "expected how many in all, or +K more than 1"),
    ):
        done = lemica("plan", bundle, *flags)
        assert done.returncode == UsageError.exit_code and message in done.stderr, (flags, done.stderr)
    with pytest.raises(UsageError, match="--ray runs the model in PyTorch"):
        BuildRequest(calibrate_on="engine", ray="local").check("fp32")
    monkeypatch.setattr(
        "lemica_trt.evaluate.step_timer.Pipeline", lambda *_, **__: (_ for _ in ()).throw(MissingDependencyError("no"))
    )
    with pytest.raises(MissingDependencyError, match="expected engines that run on this machine"):
        plan_target(bundle, {"calibrate_on": "engine"}, Quiet())
    assert Bundle.open(bundle).digest == Bundle.open(built[0]).digest
    assert not (work_folder(bundle) / "journals").exists()
