"""A finished bundle's engines in int8, and plans that are fitted to end where those in fp32 end."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
from command import lemica, result_of

from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import work_folder
from lemica_trt.cli.flags import plan_target
from lemica_trt.compiler import bundle_commands
from lemica_trt.compiler.inspection import page_facts, summarize
from lemica_trt.compiler.quantized import unquantized
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.core.errors import UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.text import printable
from lemica_trt.report.page import page_html
from lemica_trt.report.summary import engine_lines
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
    assert f"{role}: {len(layers) - len(kept)} of {len(layers)} linear layers in int8; kept in fp32" in lines[-1]
    assert all(name in lines[-1] and name in page_html(page_facts(after)) for name in kept)
    shown = lemica("inspect", int8)
    assert "quantised" in shown.stdout and printable(kept[0]) in shown.stdout


def test_without_quantisation_it_is_the_bundle_that_it_was(
    built: tuple[Path, subprocess.CompletedProcess[str]], int8: Path
) -> None:
    before, after = Bundle.open(built[0]), Bundle.open(int8)
    plain = unquantized(after)
    assert plain.engine().key == before.engine().key and plain.engine().quantized == ()
    assert unquantized(before) is before
    exact, same, rounded = latents(before), latents(plain), latents(after)
    assert np.abs(same - exact).max() < 1e-4 < np.abs(rounded - exact).max()
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


def test_a_verification_says_what_it_is_and_compares_with_pytorch(int8: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(int8, tmp_path / "bundle"))
    report = bundle_commands.verify(Bundle.open(output), None, 1, None, None, Quiet())
    assert report.precision == "int8" and not report.failures()
    assert set(Bundle.open(output).engine().quantized).isdisjoint(check.role for check in report.graphs)
    (uncached,) = [run for run in report.agreement if run.plan == "uncached"]
    assert uncached.difference > 1e-4 and uncached.psnr > report.lowest_psnr == 20.0
    exact = msgspec.structs.replace(report, precision=msgspec.UNSET)
    assert any("differs from diffusers" in failure for failure in exact.failures())
    noisy = msgspec.structs.replace(report, agreement=(msgspec.structs.replace(uncached, psnr=19.0),))
    assert any("have 19.0 dB against diffusers, 20.0 needed" in failure for failure in noisy.failures())
    assert summarize(Bundle.open(output)).engines[0].quantized


def test_what_is_no_finished_bundle_is_refused_before_any_work(tmp_path: Path) -> None:
    done = lemica("build", "--model", "cogvideox-tiny", "--quantize", "int8", "--output", tmp_path / "bundle")
    assert done.returncode == UsageError.exit_code
    assert "--quantize is of a finished bundle" in done.stderr and "lemica-trt engine BUNDLE --quantize" in done.stderr
    done = lemica("engine", tmp_path, "--quantize", "fp8", "--output", tmp_path / "bundle")
    assert done.returncode == 2 and "'fp8' is not one of 'none', 'int8'" in done.stderr
    assert not list(tmp_path.iterdir())
    BuildRequest(options={"quantize": "none"}).check("fp32")
    BuildRequest(options={"quantize": "int8"}).check("fp32", finished=True)
    with pytest.raises(UsageError, match="openvino has no option --quantize"):
        BuildRequest(backends=("openvino",), options={"quantize": "int8"}).check("fp32", finished=True)
