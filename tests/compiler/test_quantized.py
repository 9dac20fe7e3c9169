"""A finished bundle's engines in int8, and plans that are fitted to end where those in fp32 end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from command import lemica, result_of
from rich.console import Console, RenderableType

from lemica_trt.bundle.contents import read_from
from lemica_trt.bundle.manifest import FRONT_FILE, SAMPLER_FILE, SELECTION_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import work_folder
from lemica_trt.bundle.writing import change_plans
from lemica_trt.calibrate.fit import Fitter
from lemica_trt.cli.flags import plan_target
from lemica_trt.compiler import bundle_engines, bundle_verify
from lemica_trt.compiler.inspection import page_facts, summarize
from lemica_trt.compiler.plan_quality import measure_quality
from lemica_trt.compiler.quantized import unquantized
from lemica_trt.compiler.refit import BundleContext
from lemica_trt.compiler.requests import BuildRequest, Inputs, prompts_of
from lemica_trt.core.errors import MissingDependencyError, UnsupportedError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.text import printable
from lemica_trt.evaluate.engine_model import EngineModel
from lemica_trt.hub.card import bundle_card
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.report.page import page_html
from lemica_trt.report.summary import agreement_text, engine_lines
from lemica_trt.runtime.pipeline import Pipeline

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of diffusers

PROMPT = "a big red circle moves left"


@pytest.fixture(scope="module")
def int8(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with engines in int8; copy it with its work folder before changing it."""
    output = tmp_path_factory.mktemp("int8") / "bundle"
    done = lemica("engine", built[0], "--quantize", "int8", "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    (engine,) = result_of(done.stdout)["buckets"]["9x64x64"]["engines"]
    assert engine["key"]["options"]["quantize"] == "int8"
    return output


def plain_text(shown: RenderableType) -> str:
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def latents(bundle: Bundle) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    with Pipeline(bundle) as pipe:
        noise = np.random.default_rng(0).standard_normal((1, *bundle.manifest.graphs.layout.latent_shape), np.float32)
        return pipe.latents(pipe.conditions_of(PROMPT), noise, plan="uncached")


def test_the_whole_dit_is_smaller_and_the_rest_is_as_it_was(
    built: tuple[Path, subprocess.CompletedProcess[str]], int8: Path
) -> None:
    before, after = Bundle.open(built[0]), Bundle.open(int8)
    after.check()
    old, new = before.engine(), after.engine()
    (role,) = new.quantized
    assert before.manifest.graphs.graph(role).dit == "whole"
    sizes = [bundle.file(entry.files[role]).stat().st_size for bundle, entry in ((before, old), (after, new))]
    assert sizes[1] < sizes[0]
    assert {name: file for name, file in new.files.items() if name != role} == {
        name: file for name, file in old.files.items() if name != role
    }
    assert [before.plan(name) for name in before.plans] == [after.plan(name) for name in after.plans]
    layers = new.builds[role].layers or ()
    kept = [layer.name for layer in layers if layer.precision == "fp32"]
    assert 0 < len(kept) < len(layers) / 2 and kept == [layer.name for layer in layers][: len(kept)]
    lines = list(engine_lines(new))
    assert f"{role}: {len(layers) - len(kept)} of {len(layers)} linear layers in int8, the output " in lines[-1]
    assert "kept in fp32 (dB of the output if it alone were int8)" in lines[-1]
    assert all(name in lines[-1] and name in page_html(page_facts(after)) for name in kept)
    shown = lemica("inspect", int8)
    assert "quantised" in shown.stdout and printable(kept[0]) in shown.stdout


def test_without_quantisation_it_is_the_bundle_that_it_was(
    built: tuple[Path, subprocess.CompletedProcess[str]], int8: Path
) -> None:
    before, after = Bundle.open(built[0]), Bundle.open(int8)
    plain = unquantized(after)
    assert plain.engine() == before.engine() and plain.engine().quantized == ()
    assert unquantized(before) is before
    exact, same, rounded = latents(before), latents(plain), latents(after)
    assert np.array_equal(same, exact) and np.abs(rounded - exact).max() > 1e-4
    decibels = 10 * np.log10(np.square(exact).sum() / np.square(rounded - exact).sum())
    assert decibels > 15, "a run of eight steps, each with an output of 20 dB"


def test_its_plans_end_where_the_runs_in_fp32_end(int8: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(int8, tmp_path / "bundle"))
    work = work_folder(output)
    shutil.copytree(work_folder(int8), work)
    kept = {path.name for path in work.joinpath("journals/trajectories").iterdir()}
    assert len(kept) == 5, "uncached runs that quantisation made"
    before = Bundle.open(output)
    made = plan_target(output, {"calibrate_on": "engine", "budget": "4", "method": "fitted"}, Quiet(), samples="2")
    after = Bundle.open(output)
    after.check()
    assert after.manifest.engines == before.manifest.engines and {plan.name for plan in made.plans} == set(after.plans)
    (fits,) = work.joinpath("journals").glob("fits-*")
    _, header = json.loads(fits.read_text().splitlines()[0])
    plain, quantised = (bundle.engine().key.digest for bundle in (unquantized(after), after))
    assert header["target"]["engines"] == plain and header["versions"]["engines"] == quantised
    assert {path.name for path in work.joinpath("journals/trajectories").iterdir()} == kept, "the targets were there"
    (plan,) = [plan for plan in made.plans if plan.budget == 4]
    nearer = [errors(after, each) for each in (plan, fitted_to_own_runs(after, plan, tmp_path))]
    found, own = (float(np.log(of_fp32).mean() - np.log(of_int8).mean()) for of_fp32, of_int8 in nearer)
    assert found < own - 0.01, "nearer to where the runs in fp32 end, measured by where those in int8 do"


def test_fits_to_engines_in_fp32_have_no_other_target(int8: Path) -> None:
    """Of engines of both precisions the first that run here are fitted to."""
    bundle = Bundle.open(int8)
    buckets = {
        name: msgspec.structs.replace(bucket, engines=(unquantized(bundle).engine(), bundle.engine()))
        for name, bucket in bundle.manifest.buckets.items()
    }
    both = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, buckets=buckets), bundle.digest)
    request = BuildRequest(budgets=(4,))
    inputs = Inputs(profile=both.manifest.profile, request=request, prompts=("a",), held_out=())
    for found, expected in ((both, False), (bundle, True)):
        with BundleContext(found, inputs, Quiet()) as context:
            assert (context.target is not None) == expected


def errors(bundle: Bundle, plan: StepPlan) -> tuple[list[float], list[float]]:
    """‖Δ‖² of runs of a plan from the uncached runs in fp32 and in int8, on the samples that plans are fitted on."""
    settings, prompts = bundle.manifest.profile.calibration, prompts_of(bundle.manifest.profile, None)
    with Pipeline(bundle) as pipe, Pipeline(unquantized(bundle)) as exact:
        rounded, plain, uncached = EngineModel(pipe), EngineModel(exact), bundle.plan("uncached")
        samples = [(prompts[s % len(prompts)], settings.seed + s) for s in range(settings.fit_samples)]
        ends = [rounded.run(plan, *sample) for sample in samples]
        found = [
            [float(np.square(end - model.run(uncached, *s)).sum()) for end, s in zip(ends, samples)]
            for model in (plain, rounded)
        ]
    return found[0], found[1]


def fitted_to_own_runs(bundle: Bundle, plan: StepPlan, folder: Path) -> StepPlan:
    """The same steps, fitted to the uncached runs of the quantised engines."""
    settings, table = bundle.manifest.profile.calibration, read_from(bundle, SamplerTable, SAMPLER_FILE)
    with Pipeline(bundle) as pipe:
        found = Fitter(
            EngineModel(pipe), table, table, prompts_of(bundle.manifest.profile, None), samples=settings.fit_samples,
            seed=settings.seed, journal=folder / "own.jsonl",
        )  # fmt: skip
        return found(Schedule(num_steps=plan.num_steps, full_steps=plan.full_steps))


def test_a_verification_says_what_it_is_and_compares_with_pytorch(int8: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(int8, tmp_path / "bundle"))
    report = bundle_verify.verify(Bundle.open(output), None, 1, None, None, Quiet())
    assert report.precision == "int8" and not report.failures()
    assert "onnxruntime" in report.backend and "int8" in report.backend
    (scored,) = [row for row in report.quality if row.plan == "uncached"]
    assert 20 < scored.psnr < 60, "with all steps in int8, against all steps in PyTorch"
    assert "the uncached run in PyTorch, in fp32 as are" in plain_text(agreement_text(report))
    bundle = Bundle.open(output)
    plans = [bundle.plan(name) for name in bundle.plans]
    card = bundle_card(bundle.manifest, bundle.digest, plans, report, (), "hf:someone/something")
    assert "int8 for cpu" in card and "Plans ran in int8; the reference and the other methods in fp32." in card
    assert "the uncached run in PyTorch, in fp32 as are other methods" in page_html(page_facts(bundle))
    measured = measure_quality(bundle, [bundle.plan()], 1, Quiet())
    for found, name in zip(measured, (bundle.plan().name, "uncached")):
        (row,) = [row for row in report.quality if (row.plan, row.method) == (name, "plan")]
        assert found.psnr == pytest.approx(row.each_psnr, abs=0.1), "the same reference, without PyTorch"
    assert set(Bundle.open(output).engine().quantized).isdisjoint(check.role for check in report.graphs)
    (uncached,) = [run for run in report.agreement if run.plan == "uncached"]
    assert uncached.difference > 1e-4 and uncached.psnr > report.lowest_psnr == 20.0
    exact = msgspec.structs.replace(report, precision=msgspec.UNSET)
    assert any("differs from diffusers" in failure for failure in exact.failures())
    noisy = msgspec.structs.replace(report, agreement=(msgspec.structs.replace(uncached, psnr=19.0),))
    assert any("have 19.0 dB against diffusers, 20.0 needed" in failure for failure in noisy.failures())
    assert summarize(Bundle.open(output)).engines[0].quantized


def test_where_the_precision_changes_plans_are_said_to_be_of_the_other_one(
    built: tuple[Path, subprocess.CompletedProcess[str]], int8: Path, tmp_path: Path
) -> None:
    copies = [Bundle.open(shutil.copytree(path, tmp_path / name)) for path, name in ((built[0], "a"), (int8, "b"))]
    measured: dict[str, bytes | None] = {FRONT_FILE: b"{}", SELECTION_FILE: b"{}"}
    before, after = (change_plans(bundle, (), files=measured) for bundle in copies)
    assert "--quantize int8 --output" in after.rebuild_command(after.engine().key)
    assert "--quantize" not in before.rebuild_command(before.engine().key)
    notes = Notes()
    back = bundle_engines.rebuild_engines(after, tmp_path / "fp32", {}, notes)
    assert back.engine() == before.engine() and back.engine().precision == "fp32"
    assert measured.keys().isdisjoint(back.manifest.files), "qualities on other engines"
    assert any("the plans were made for int8 engines, these are fp32" in note for note in notes.found)
    notes = Notes()
    same = bundle_engines.rebuild_engines(before, tmp_path / "same", {}, notes)
    assert measured.keys() <= same.manifest.files.keys()
    assert not any("plans were made for" in note for note in notes.found)


class Notes(Quiet):
    """What was said."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self, text: str) -> None:
        self.found.append(text)


def test_what_cannot_be_quantised_is_refused_before_engines_are_built(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_engines(*_: object) -> None:
        raise AssertionError("engines are built")

    monkeypatch.setattr(bundle_engines, "build_engines", build_engines)
    bundle, changes = Bundle.open(built[0]), {"options": {"quantize": "int8"}}
    silent = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, encoders=()), bundle.digest)
    with pytest.raises(UnsupportedError, match="the bundle has no text encoder"):
        bundle_engines.rebuild_engines(silent, tmp_path / "out", changes, Quiet())
    with monkeypatch.context() as patched:
        patched.setattr("lemica_trt.backends.onnxruntime.quantize.MAX_BYTES", 1000)
        with pytest.raises(UnsupportedError, match="expected a graph of less than"):
            bundle_engines.rebuild_engines(bundle, tmp_path / "out", changes, Quiet())
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnx", None)
        with pytest.raises(MissingDependencyError, match="--quantize needs the package onnx"):
            bundle_engines.rebuild_engines(bundle, tmp_path / "out", changes, Quiet())
    with monkeypatch.context() as patched:
        patched.setattr("lemica_trt.evaluate.step_timer.runnable_backend", lambda _: (None, {"onnxruntime": "no"}))
        with pytest.raises(MissingDependencyError, match="expected engines that run on this machine"):
            bundle_engines.rebuild_engines(bundle, tmp_path / "out", changes, Quiet())
    with pytest.raises(UsageError, match="--quantize: expected one backend"):
        both = {**changes, "backends": ("onnxruntime", "openvino")}
        bundle_engines.rebuild_engines(bundle, tmp_path / "out", both, Quiet())
    assert not list(tmp_path.iterdir())


def test_what_is_no_finished_bundle_is_refused_before_any_work(tmp_path: Path) -> None:
    done = lemica("build", "--model", "cogvideox-tiny", "--quantize", "int8", "--output", tmp_path / "bundle")
    assert done.returncode == UsageError.exit_code
    assert "--quantize is of a finished bundle" in done.stderr and "lemica-trt engine BUNDLE --quantize" in done.stderr
    done = lemica("engine", tmp_path, "--quantize", "nvfp4", "--output", tmp_path / "bundle")
    assert done.returncode == 2 and "'nvfp4' is not one of 'none', 'int8', 'fp8'" in done.stderr
    assert not list(tmp_path.iterdir())
    BuildRequest(options={"quantize": "none"}).check("fp32")
    BuildRequest(options={"quantize": "int8"}).check("fp32", finished=True)
    with pytest.raises(UsageError, match="openvino has no option --quantize"):
        BuildRequest(backends=("openvino",), options={"quantize": "int8"}).check("fp32", finished=True)
